//! The fake library: compiled when a test wants one, told what to do and asked what it saw through
//! files beside it (see `fake.c`).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nccl_rs::{Communicator, DType, DeviceBuffer, Nccl, NcclError, Options, Search, Stream};
use tempfile::TempDir;

/// A library of its own in a folder of its own, so that tests do not see each other.
pub struct Fake {
    folder: Arc<TempDir>,
}

impl Fake {
    pub fn new() -> Fake {
        Fake::compiled_with(&[])
    }

    pub fn compiled_with(arguments: &[&str]) -> Fake {
        let folder = Arc::new(TempDir::new().unwrap());
        let fake = Fake { folder };
        let status = Command::new("cc")
            .args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"])
            .args(arguments)
            .arg("-o")
            .arg(fake.path())
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/nccl/fake.c"))
            .status();
        assert!(status.unwrap().success());
        fake
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn path(&self) -> PathBuf {
        self.folder().join("libnccl.so.2")
    }

    /// Replaces all that the library was told before.
    pub fn tell(&self, orders: &[(&str, i64)]) {
        let text: String = orders.iter().map(|(key, number)| format!("{key}={number}\n")).collect();
        let new = self.folder().join("control.new");
        fs::write(&new, text).unwrap();
        fs::rename(new, self.folder().join("control")).unwrap();
    }

    /// What the library saw.
    pub fn calls(&self) -> Vec<String> {
        let text = fs::read_to_string(self.folder().join("calls")).unwrap_or_default();
        text.lines().map(str::to_string).collect()
    }

    /// What it saw of one function; nothing forbidden may be among all of it.
    pub fn calls_of(&self, function: &str) -> Vec<String> {
        let calls = self.calls();
        assert!(!calls.iter().any(|call| call.starts_with("VIOLATION")), "{calls:#?}");
        calls.into_iter().filter(|call| call.split(' ').next() == Some(function)).collect()
    }

    /// Waits until a function has been called.
    pub fn wait_for(&self, function: &str) {
        let start = Instant::now();
        while self.calls_of(function).is_empty() {
            assert!(start.elapsed() < Duration::from_secs(10), "{function} was not called");
            thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn search(&self) -> Search {
        Search { path: Some(self.path()), ..Search::default() }
    }

    pub fn load(&self) -> Nccl {
        Nccl::load(&self.search()).unwrap()
    }

    /// Rank 1 of 4, in a group called `data`.
    pub fn connect(&self) -> Communicator {
        let nccl = self.load();
        let id = nccl.unique_id().unwrap();
        Communicator::connect(&nccl, id, 1, 4, options(10_000)).unwrap()
    }
}

/// A group called `data` with this time-out.
pub fn options(timeout_ms: u64) -> Options {
    let timeout = Duration::from_millis(timeout_ms);
    Options { timeout, abort_timeout: Duration::from_secs(5), ..Options::new("data") }
}

/// That an error says all of this.
#[track_caller]
pub fn says(error: &dyn std::error::Error, parts: &[&str]) {
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{text:?} does not say {part:?}");
    }
}

/// A buffer at an address that the fake library only writes down.
#[expect(unsafe_code, reason = "the fake library follows no address")]
pub fn buffer(address: usize, count: usize, dtype: DType) -> Result<DeviceBuffer, NcclError> {
    let address = std::ptr::without_provenance_mut(address);
    // SAFETY: the fake library follows no address.
    unsafe { DeviceBuffer::new(address, count, dtype) }
}

/// A stream with a handle that the fake library only writes down.
#[expect(unsafe_code, reason = "the fake library follows no handle")]
pub fn stream(handle: usize) -> Stream {
    // SAFETY: the fake library follows no handle.
    unsafe { Stream::from_native(std::ptr::without_provenance_mut(handle)) }
}
