//! What we ask of the driver, and how we take its answers: against a library that keeps the books.
//! It says nothing about what a GPU does.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(unsafe_code, reason = "the fake driver follows no address")]

use std::ffi::c_void;
use std::fs;
use std::path::Path;
use std::process::Command;

use kernels::driver::Driver;
use kernels::{Grid, Search};
use tempfile::TempDir;

/// A library of its own in a folder of its own.
struct Fake {
    folder: TempDir,
}

impl Fake {
    fn compiled_with(arguments: &[&str]) -> Fake {
        let folder = TempDir::new().unwrap();
        let status = Command::new("cc")
            .args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"])
            .args(arguments)
            .arg("-o")
            .arg(folder.path().join("libcuda.so.1"))
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/driver/fake.c"))
            .status();
        assert!(status.unwrap().success());
        Fake { folder }
    }

    fn search(&self) -> Search {
        Search { folder: Some(self.folder.path().to_owned()), libtorch_lib: None }
    }

    /// Which function fails from now on, and how.
    fn fail(&self, function: &str, code: i32) {
        fs::write(self.folder.path().join("fail"), format!("{function} {code}")).unwrap();
    }

    fn calls(&self) -> Vec<String> {
        let text = fs::read_to_string(self.folder.path().join("calls")).unwrap_or_default();
        text.lines().map(str::to_string).collect()
    }
}

#[track_caller]
fn says(error: &dyn std::error::Error, parts: &[&str]) {
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{text:?} does not say {part:?}");
    }
    assert_eq!(text.lines().count(), 1);
}

#[test]
fn a_kernel_comes_to_its_stream_with_its_parameters() {
    let fake = Fake::compiled_with(&[]);
    let driver = Driver::load(&fake.search()).unwrap();
    assert_eq!(driver.version().unwrap(), 13000);
    assert_eq!(driver.path(), fake.folder.path().join("libcuda.so.1"));
    let gpu = driver.gpu(1).unwrap();
    assert_eq!((gpu.capability, gpu.multiprocessors), ((9, 0), 132));
    let module = gpu.load(b"machine code\0").unwrap();
    let function = gpu.function(module, "norm").unwrap();
    let (mut address, mut number, mut small) = (0x1234_5678_u64, -7_i64, 42_i32);
    let mut values: [*mut c_void; 3] =
        [(&raw mut address).cast(), (&raw mut number).cast(), (&raw mut small).cast()];
    let grid = Grid { blocks: (5, 6), threads: 96 };
    let stream = std::ptr::without_provenance_mut(0x77);
    // SAFETY: the fake driver reads three values of these sizes, and follows no address.
    unsafe { gpu.launch(function, grid, stream, &mut values) }.unwrap();
    let expected = [
        "cuInit 0",
        "cuDriverGetVersion",
        "cuDeviceGet 1",
        "cuDevicePrimaryCtxRetain 11",
        "cuDeviceGetAttribute 75 11",
        "cuDeviceGetAttribute 76 11",
        "cuDeviceGetAttribute 16 11",
        // The thread has no context yet, and then that of the GPU.
        "cuCtxGetCurrent",
        "cuCtxSetCurrent 0xc0",
        "cuModuleLoadData machine code",
        "cuCtxGetCurrent",
        "cuModuleGetFunction 0xd0 norm",
        "cuCtxGetCurrent",
        "cuLaunchKernel 0xf0 (5 6 1) (96 1 1) 0 0x77 0x12345678 -7 42",
    ];
    assert_eq!(fake.calls(), expected);
}

#[test]
fn failures_come_back_in_the_drivers_words() {
    let fake = Fake::compiled_with(&[]);
    let driver = Driver::load(&fake.search()).unwrap();
    fake.fail("cuDeviceGet", 101);
    let parts = ["cuDeviceGet failed with code 101 (NAME_101): text of 101"];
    says(&driver.gpu(9).err().unwrap(), &parts);
    fake.fail("cuModuleLoadData", 209);
    let gpu = driver.gpu(0).unwrap();
    says(&gpu.load(b"x\0").err().unwrap(), &["cuModuleLoadData failed with code 209 (NAME_209)"]);
    let other = Fake::compiled_with(&[]);
    other.fail("cuInit", 100);
    says(
        &Driver::load(&other.search()).err().unwrap(),
        &["cuInit failed with code 100 (NAME_100)"],
    );
}

#[test]
fn another_library_is_no_driver() {
    let fake = Fake::compiled_with(&["-DcuLaunchKernel=renamed"]);
    let error = Driver::load(&fake.search()).err().unwrap();
    says(&error, &["libcuda.so.1 has no cuLaunchKernel; hint: it is no usable CUDA driver"]);
}
