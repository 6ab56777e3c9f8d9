//! Carries launches out on the CPU: compiles a program's text with a host compiler, behind
//! `emulator.h`, and runs its blocks thread by thread. What is wrong with a launch beyond its
//! values (an access outside a buffer, a barrier that is missing, arguments that do not fit) is an
//! error.

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::{env, fs};

use kernels::{Access, Argument, Executor, Kernels, Key, Launch, Result, Variant};
use libloading::os::unix::Library;
use torch_shim::ShimError;
use torch_shim::tch::Device;

/// What stands before each text.
const HEADER: &str = include_str!("emulator.h");
/// Few, so that blocks take several turns.
const BLOCKS: u32 = 3;

/// `emulation::Argument`.
#[repr(C)]
struct RawArgument {
    value: *const c_void,
    bytes: u64,
    is_buffer: u32,
    access: u32,
}

/// `emulation::Launch`.
#[repr(C)]
struct RawLaunch {
    grid: [u32; 3],
    threads: u32,
    num_arguments: u32,
    arguments: *const RawArgument,
}

type Emulate = unsafe extern "C" fn(*const RawLaunch) -> *const c_char;

/// An error in a kernel: what stands in a text, and what is put there.
pub type Planted = (&'static str, &'static str);

/// Runs kernels on the CPU.
#[derive(Default)]
pub struct Emulator {
    libraries: Mutex<HashMap<PathBuf, Library>>,
    planted: Option<Planted>,
}

/// The kernels, emulated; with an error in all texts that hold it, or none.
pub fn kernels(planted: Option<Planted>) -> Kernels {
    torch_shim::tch::set_num_threads(1);
    Kernels::new(Arc::new(Emulator { planted, ..Emulator::default() }))
}

fn source_of(variant: &Variant, planted: Option<Planted>) -> String {
    let defines = variant.defines();
    let defines = defines.iter().map(|(name, value)| format!("#define {name} {value}\n"));
    let entries = variant.program.kernels.iter().map(|name| format!("EMULATE({name})\n"));
    let text = match planted {
        Some((old, new)) => variant.text().replacen(old, new, 1),
        None => variant.text(),
    };
    // It is no header there.
    let header = HEADER.replace("#pragma once\n", "");
    format!("{header}\n{}{text}\n{}", defines.collect::<String>(), entries.collect::<String>())
}

/// The compiled program, from an earlier test where there was one.
fn library_of(variant: &Variant, planted: Option<Planted>) -> PathBuf {
    // Ranks that are threads want the same at the same time.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let text = source_of(variant, planted);
    let key = Key::of(&[&text]).to_string();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulated");
    fs::create_dir_all(&folder).unwrap();
    let library = folder.join(format!("{}-{}.so", variant.program.name, &key[..16]));
    if library.exists() {
        return library;
    }
    let own = folder.join(format!(".{}-{}", std::process::id(), &key[..16]));
    let source = own.with_extension("cpp");
    fs::write(&source, text).unwrap();
    let compiler = env::var("CXX").unwrap_or_else(|_| "g++".to_string());
    let status = Command::new(compiler)
        .args(["-std=c++17", "-O1", "-shared", "-fPIC", "-fno-strict-aliasing"])
        .args(["-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-variable"])
        .args(["-Wno-unused-function", "-Wno-ignored-attributes", "-Werror"])
        .arg("-o")
        .arg(&own)
        .arg(&source)
        .status();
    assert!(status.unwrap().success(), "{variant} does not compile with the host compiler");
    fs::rename(&own, &library).unwrap();
    fs::remove_file(&source).unwrap();
    library
}

/// The bytes of a number.
union Number {
    i32: i32,
    i64: i64,
    f32: f32,
    f64: f64,
}

impl Emulator {
    /// The entry that runs a kernel of a variant.
    fn entry(&self, variant: &Variant, kernel: &str) -> Emulate {
        let path = library_of(variant, self.planted);
        let mut libraries = self.libraries.lock().unwrap();
        // SAFETY: the library is the one that was just compiled; it has no initializers.
        let open = || unsafe { Library::new(&path) }.unwrap();
        let library = libraries.entry(path.clone()).or_insert_with(open);
        let symbol = format!("emulate_{kernel}");
        // SAFETY: the type is that of emulator.h; the library stays loaded with `self`.
        unsafe { *library.get::<Emulate>(symbol.as_str()).unwrap() }
    }
}

impl Executor for Emulator {
    fn device(&self) -> Device {
        Device::Cpu
    }

    fn sharing_blocks(&self, _each: u32) -> u32 {
        BLOCKS
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        // The fibers and the shared memory of a library are one for all threads.
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let entry = self.entry(&launch.variant, launch.kernel);
        let numbers: Vec<Number> = launch.arguments.iter().map(number).collect();
        let pairs = launch.arguments.iter().zip(&numbers);
        let arguments: Vec<RawArgument> = pairs.map(|(a, number)| raw(a, number)).collect();
        let raw_launch = RawLaunch {
            grid: [launch.grid.blocks.0, launch.grid.blocks.1, 1],
            threads: launch.grid.threads,
            num_arguments: arguments.len() as u32,
            arguments: arguments.as_ptr(),
        };
        let _guard = ONE_AT_A_TIME.lock().unwrap();
        // SAFETY: the arguments live through the call, which touches no memory but theirs; the
        // answer is null, or a text that lives until the next launch.
        let problem = unsafe {
            let text = entry(&raw const raw_launch);
            (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
        };
        match problem {
            None => Ok(()),
            Some(text) => {
                let (variant, kernel) = (launch.variant, launch.kernel);
                Err(ShimError::Invalid(format!("{kernel} of {variant}: {text}")).into())
            }
        }
    }
}

fn number(argument: &Argument<'_>) -> Number {
    match *argument {
        Argument::I32(value) => Number { i32: value },
        Argument::F32(value) => Number { f32: value },
        Argument::F64(value) => Number { f64: value },
        Argument::I64(value) => Number { i64: value },
        Argument::Tensor(..) | Argument::Null => Number { i64: 0 },
    }
}

fn raw(argument: &Argument<'_>, number: &Number) -> RawArgument {
    let value = std::ptr::from_ref(number).cast();
    match *argument {
        Argument::I32(_) | Argument::F32(_) => {
            RawArgument { value, bytes: 4, is_buffer: 0, access: 0 }
        }
        Argument::I64(_) | Argument::F64(_) => {
            RawArgument { value, bytes: 8, is_buffer: 0, access: 0 }
        }
        Argument::Null => RawArgument { value, bytes: 0, is_buffer: 1, access: 0 },
        Argument::Tensor(tensor, access) => RawArgument {
            value: tensor.data_ptr(),
            bytes: Argument::extent(tensor) as u64,
            is_buffer: 1,
            access: match access {
                Access::Read => 1,
                Access::Write => 2,
                Access::Update => 3,
            },
        },
    }
}
