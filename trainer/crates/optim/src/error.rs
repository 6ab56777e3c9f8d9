//! What can go wrong in the optimizer.

use kernels::KernelError;
use thiserror::Error;
use torch_shim::{ShimError, tch::TchError};

/// Errors of the optimizer.
#[derive(Debug, Error)]
pub enum OptimError {
    /// libtorch, or the shim around it, refused: a bug here or memory that ran out.
    #[error(transparent)]
    Shim(#[from] ShimError),
    /// A kernel of our own, or what compiles and launches it, refused.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The optimizer was made for another parameter set.
    #[error("optimizer state is for {state} elements, the parameter set has {parameters}")]
    OtherSet {
        /// Elements the state was made for, padding included.
        state: usize,
        /// Elements in the set.
        parameters: usize,
    },
}

impl From<TchError> for OptimError {
    fn from(error: TchError) -> Self {
        OptimError::Shim(error.into())
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, OptimError>;
