//! What can go wrong between tensors and a checkpoint.

use checkpoint_format::FormatError;
use std::path::PathBuf;
use torch_shim::ShimError;

/// An error of saving or loading.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The files.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The tensors.
    #[error(transparent)]
    Torch(#[from] ShimError),
    /// The checkpoint is of another model.
    #[error(
        "{path} is a checkpoint of another model: tensor {tensor} {found}, {expected} in this \
         model; check the config's `model`, or name the right run"
    )]
    OtherModel {
        /// The checkpoint.
        path: PathBuf,
        /// The first tensor that does not fit.
        tensor: String,
        /// What the checkpoint has ("has shape [3, 4]", "is missing").
        found: String,
        /// What the model has ("its shape is [3, 5]", "it does not exist").
        expected: String,
    },
    /// The checkpoint holds weights but no optimizer state.
    #[error(
        "{path} has no optimizer state ({tensor} is missing), so that training cannot go on from \
         it; start a new run with model.init_from naming it"
    )]
    NoOptimizerState {
        /// The checkpoint.
        path: PathBuf,
        /// The first tensor that is missing.
        tensor: String,
    },
    /// An argument that does not fit the parameters.
    #[error("{0}")]
    Request(String),
}

impl CheckpointError {
    /// Whether the disk was full, so that training may go on and the save be tried again later.
    pub fn is_out_of_space(&self) -> bool {
        matches!(self, CheckpointError::Format(error) if error.is_out_of_space())
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, CheckpointError>;
