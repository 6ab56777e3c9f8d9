//! What can go wrong with NCCL, in its own words and ours.

use std::path::PathBuf;

use thiserror::Error;

use crate::library::Version;

/// The failure of a call, a wait or a search.
#[derive(Clone, Debug, Error)]
pub enum NcclError {
    /// No library was found.
    #[error(
        "no {name} could be loaded; tried {}; hint: install the wheel nvidia-nccl-cu13 beside \
         libtorch, or name the library's path",
        tried.join("; ")
    )]
    Absent {
        /// The library's name.
        name: String,
        /// Each place that was tried, with the linker's words.
        tried: Vec<String>,
    },
    /// A library lacks a function.
    #[error(
        "{} (version {}) has no {symbol}; hint: this is no usable NCCL; {} or later is wanted",
        path.display(),
        version.map_or("unknown".to_string(), |version| version.to_string()),
        Version::OLDEST
    )]
    MissingSymbol {
        /// The library.
        path: PathBuf,
        /// Its version, where it tells one.
        version: Option<Version>,
        /// The function.
        symbol: String,
    },
    /// A library is older than what this crate relies on.
    #[error(
        "{} is NCCL {version}, but {} or later is wanted: older ones cannot be aborted from \
         another thread",
        path.display(),
        Version::OLDEST
    )]
    TooOld {
        /// The library.
        path: PathBuf,
        /// Its version.
        version: Version,
    },
    /// NCCL refused a call, or reports that earlier work failed.
    #[error(
        "group {group}: {function} failed with code {code} ({meaning}): {detail}; hint: {}",
        hint(*code)
    )]
    Call {
        /// The communicator's name.
        group: String,
        /// The function, or what was waited for.
        function: String,
        /// The `ncclResult_t`.
        code: i32,
        /// What NCCL says the code means.
        meaning: String,
        /// NCCL's last error, which may be of an earlier call.
        detail: String,
    },
    /// Work was not done in time.
    #[error(
        "group {group}: {waiting_for} was still in progress after {limit_ms} ms; hint: a rank of \
         the group is missing, stalled, or issues something else"
    )]
    Deadline {
        /// The communicator's name.
        group: String,
        /// What was waited for.
        waiting_for: String,
        /// The longest wait.
        limit_ms: u128,
    },
    /// Another call has not come back, so that this one cannot begin.
    #[error(
        "group {group}: {wanted} cannot begin, {inside} has not returned for {limit_ms} ms; hint: \
         a call that hangs inside NCCL is ended by ending the process"
    )]
    Stuck {
        /// The communicator's name.
        group: String,
        /// The call that wants to begin.
        wanted: String,
        /// The call under way.
        inside: String,
        /// The longest wait.
        limit_ms: u128,
    },
    /// The communicator failed before, or was aborted.
    #[error("group {group} is dead: {cause}")]
    Dead {
        /// The communicator's name.
        group: String,
        /// The first cause.
        cause: String,
    },
    /// An argument was refused before NCCL saw it.
    #[error("{0}")]
    Invalid(String),
}

/// What to do about a code.
fn hint(code: i32) -> &'static str {
    match code {
        1 => {
            "a CUDA call failed: look at the GPU's driver and free memory; NCCL_DEBUG=WARN names it"
        }
        2 => {
            "a system call failed: look at NCCL_SOCKET_IFNAME, /dev/shm and the limit on open \
             files; NCCL_DEBUG=WARN names it"
        }
        3 => "an error inside NCCL: NCCL_DEBUG=INFO shows where",
        4 => "an argument is wrong: the call had no effect",
        5 => {
            "the calls do not fit together: two ranks on one GPU, or ranks that differ in what \
             they issue"
        }
        6 => "a peer ended or the network broke: look at the first error of the other ranks",
        8 => "NCCL's own time-out has passed: a rank is missing or stalled",
        _ => "NCCL_DEBUG=WARN says more",
    }
}

/// The result of a call.
pub type Result<T, E = NcclError> = std::result::Result<T, E>;
