//! What can go wrong in a parallel form.

use collectives::CommError;
use layout::plan::PlanError;
use model::ModelError;
use thiserror::Error;
use torch_shim::ShimError;

/// Errors of the parallel forms.
#[derive(Debug, Error)]
pub enum ParallelError {
    /// A collective failed.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// libtorch refused.
    #[error(transparent)]
    Torch(#[from] ShimError),
    /// The model refused.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A parameter does not split over the ranks.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

/// The result of a parallel operation.
pub type Result<T, E = ParallelError> = std::result::Result<T, E>;
