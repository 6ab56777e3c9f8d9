//! What can go wrong with a checkpoint, in words that name the path, the value and a hint.

use std::path::{Path, PathBuf};

/// An error of the checkpoint format. A cause stands in the message and is no `source()` too, which
/// would print it twice.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// The operating system refused something other than a write.
    #[error("cannot {action} {path}: {error}")]
    Io {
        /// What was tried ("open", "rename", …).
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        error: std::io::Error,
    },
    /// A write or a flush to disk failed.
    #[error("cannot write {path} (at byte {bytes} of {total}): {error}{}", space_hint(.error))]
    Write {
        /// The file.
        path: PathBuf,
        /// Bytes of it written before.
        bytes: u64,
        /// Bytes it was to have.
        total: u64,
        /// Why not.
        error: std::io::Error,
    },
    /// Too little room before anything was written.
    #[error(
        "no space for a checkpoint in {path}: it needs {needed} bytes and {free} are free; free \
         some space, or lower checkpoint.keep_last"
    )]
    NoSpace {
        /// The folder of checkpoints.
        path: PathBuf,
        /// Bytes the checkpoint needs.
        needed: u64,
        /// Bytes free for this user.
        free: u64,
    },
    /// A checkpoint is incomplete, altered or not consistent.
    #[error("{path} is damaged: {reason}")]
    Damaged {
        /// The checkpoint's folder or file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Input that is refused because no correct writer makes it.
    #[error("{path} is refused: {reason}")]
    Refused {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A tensor or checkpoint that does not exist.
    #[error("{what} is not in {path}{hint}")]
    NotFound {
        /// What was looked for.
        what: String,
        /// Where.
        path: PathBuf,
        /// What there is instead, starting with ": " or "; ", or empty.
        hint: String,
    },
    /// A writer of an older generation than one that is already known.
    #[error(
        "generation {ours} may not write in {path}: generation {newest} has taken over; this \
         process is a left-over and must end"
    )]
    StaleGeneration {
        /// The folder of checkpoints.
        path: PathBuf,
        /// The generation of this writer.
        ours: u64,
        /// The newest generation seen.
        newest: u64,
    },
    /// A request that makes no sense (a box outside a tensor, a buffer of the wrong size).
    #[error("{0}")]
    Request(String),
    /// Ranks that save together did not meet: one is gone, or a link between them.
    #[error("checkpoint of step {step} was not committed: ranks that save did not meet: {reason}")]
    DidNotMeet {
        /// The step.
        step: u64,
        /// Why not.
        reason: String,
    },
    /// Another rank of the same save failed; the checkpoint was not committed.
    #[error("checkpoint of step {step} was not committed: {reason}")]
    NotCommitted {
        /// The step.
        step: u64,
        /// Which rank, and why where it is known.
        reason: String,
    },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, FormatError>;

fn space_hint(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            "; free some space, or lower checkpoint.keep_last"
        }
        _ => "",
    }
}

impl FormatError {
    /// An [`FormatError::Io`].
    pub fn io(action: &'static str, path: &Path, error: std::io::Error) -> FormatError {
        FormatError::Io { action, path: path.to_path_buf(), error }
    }

    /// A [`FormatError::Damaged`].
    pub fn damaged(path: &Path, reason: impl Into<String>) -> FormatError {
        FormatError::Damaged { path: path.to_path_buf(), reason: reason.into() }
    }

    /// A [`FormatError::Refused`].
    pub fn refused(path: &Path, reason: impl Into<String>) -> FormatError {
        FormatError::Refused { path: path.to_path_buf(), reason: reason.into() }
    }

    /// Whether the disk was full (or a quota used up).
    pub fn is_out_of_space(&self) -> bool {
        match self {
            FormatError::NoSpace { .. } => true,
            FormatError::Write { error, .. } | FormatError::Io { error, .. } => matches!(
                error.kind(),
                std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded
            ),
            _ => false,
        }
    }
}
