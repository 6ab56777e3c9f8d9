//! What can go wrong in the model.

use kernels::KernelError;
use thiserror::Error;
use torch_shim::{ShimError, tch::TchError};

/// Errors of building, running or sampling a model.
#[derive(Debug, Error)]
pub enum ModelError {
    /// libtorch, or the shim around it, refused: a bug here or memory that ran out.
    #[error(transparent)]
    Shim(#[from] ShimError),
    /// A kernel of our own, or what compiles and launches it, refused.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A parameter the model needs is not in the set.
    #[error("parameter `{name}` is missing; hint: the set was made for another model or stage")]
    MissingParameter {
        /// Canonical name.
        name: String,
    },
    /// A parameter has another shape than the model states.
    #[error("parameter `{name}` has shape {found:?}, the model states {expected:?}")]
    ShapeMismatch {
        /// Canonical name.
        name: String,
        /// Shape in the set.
        found: Vec<i64>,
        /// Shape the model states.
        expected: Vec<i64>,
    },
    /// An input of the wrong shape or value.
    #[error("{what} is {value}, expected {expected}")]
    Input {
        /// What was passed.
        what: &'static str,
        /// Its value.
        value: String,
        /// What may be passed.
        expected: String,
    },
    /// What a [`crate::LayerBuilder`] of another crate failed with, a collective for example.
    #[error(transparent)]
    Builder(Box<dyn std::error::Error + Send + Sync>),
    /// A piece was asked for that this stage does not hold.
    #[error("this stage does not hold {piece}")]
    NotOnThisStage {
        /// The piece.
        piece: String,
    },
}

impl From<TchError> for ModelError {
    fn from(error: TchError) -> Self {
        ModelError::Shim(error.into())
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, ModelError>;

/// A [`ModelError::Input`].
pub(crate) fn bad_input(
    what: &'static str,
    value: impl std::fmt::Debug,
    expected: impl Into<String>,
) -> ModelError {
    ModelError::Input { what, value: format!("{value:?}"), expected: expected.into() }
}
