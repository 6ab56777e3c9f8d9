//! What can go wrong between a kernel's source and its launch.

use std::path::PathBuf;

use thiserror::Error;
use torch_shim::{ShimError, tch};

/// The failure of a search, a compilation, a call of the driver, or a kernel's arguments.
#[derive(Debug, Error)]
pub enum KernelError {
    /// No library was found.
    #[error("no {name} could be loaded; tried {}; hint: {hint}", tried.join("; "))]
    Absent {
        /// The library's name.
        name: &'static str,
        /// Each place that was tried, with the linker's words.
        tried: Vec<String>,
        /// What brings it.
        hint: &'static str,
    },
    /// A library lacks a function.
    #[error("{} has no {symbol}; hint: it is no usable {name}", path.display())]
    MissingSymbol {
        /// The library.
        path: PathBuf,
        /// What it should be.
        name: &'static str,
        /// The function.
        symbol: &'static str,
    },
    /// The driver or NVRTC refused a call.
    #[error("{function} failed with code {code} ({meaning}){detail}")]
    Call {
        /// The function.
        function: &'static str,
        /// The `CUresult` or `nvrtcResult`.
        code: i32,
        /// What the library says the code means.
        meaning: String,
        /// More about it, beginning with a separator; may be empty.
        detail: String,
    },
    /// A source does not compile.
    #[error("NVRTC {version} does not compile {program} for {architecture}: {log}")]
    Compile {
        /// NVRTC's version.
        version: String,
        /// The program's name, with its choices.
        program: String,
        /// As `sm_90`.
        architecture: String,
        /// The first lines of NVRTC's log, on one line.
        log: String,
    },
    /// NVRTC knows nothing that the device could run.
    #[error(
        "NVRTC {version} compiles for no architecture of a device of compute capability \
         {capability}, it knows {known}; hint: a newer nvidia-cuda-nvrtc beside libtorch"
    )]
    Architecture {
        /// NVRTC's version.
        version: String,
        /// As `9.0`.
        capability: String,
        /// What it knows.
        known: String,
    },
    /// A tensor does not fit a kernel.
    #[error("{kernel}: {what} is {value}, expected {expected}")]
    Argument {
        /// The kernel or operator.
        kernel: &'static str,
        /// The argument.
        what: String,
        /// What it is.
        value: String,
        /// What it should be.
        expected: String,
    },
    /// libtorch refused.
    #[error(transparent)]
    Torch(#[from] ShimError),
}

impl From<tch::TchError> for KernelError {
    fn from(error: tch::TchError) -> Self {
        KernelError::Torch(error.into())
    }
}

/// For the closures of an autograd function.
impl From<KernelError> for ShimError {
    fn from(error: KernelError) -> Self {
        match error {
            KernelError::Torch(error) => error,
            other => ShimError::Closure(other.to_string()),
        }
    }
}

/// The result of a call.
pub type Result<T, E = KernelError> = std::result::Result<T, E>;
