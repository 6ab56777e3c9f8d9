//! The error of everything that crosses into libtorch.

use thiserror::Error;

/// What can go wrong at the border to libtorch.
#[derive(Debug, Error)]
pub enum ShimError {
    /// libtorch, or the C++ shim, refused; the first line of its message.
    #[error("libtorch: {0}")]
    Torch(String),
    /// A Rust closure that libtorch called failed or panicked.
    #[error("{0}")]
    Closure(String),
    /// The store of the ranks could not answer.
    #[error("store: {0}")]
    Store(String),
    /// An argument was refused before libtorch saw it.
    #[error("{0}")]
    Invalid(String),
}

impl From<tch::TchError> for ShimError {
    fn from(error: tch::TchError) -> Self {
        let text = match error {
            tch::TchError::Torch(text) => text,
            other => other.to_string(),
        };
        ShimError::Torch(text.lines().next().unwrap_or("unknown error").to_string())
    }
}

impl From<std::ffi::NulError> for ShimError {
    fn from(error: std::ffi::NulError) -> Self {
        ShimError::Invalid(format!("text with a zero byte cannot go to libtorch: {error}"))
    }
}

/// The result of a call across the border.
pub type Result<T, E = ShimError> = std::result::Result<T, E>;
