//! What can go wrong between ranks.

use thiserror::Error;
use torch_shim::{ShimError, tch::TchError};

/// The failure of a collective operation.
#[derive(Clone, Debug, Error)]
pub enum CommError {
    /// A message did not get through: a peer is gone, or did not come in time.
    #[error("group {group}, operation {sequence} ({operation}): lost rank {peer}: {detail}")]
    Peer {
        /// The group's name.
        group: String,
        /// The number of the operation in the group.
        sequence: u64,
        /// What was being done.
        operation: String,
        /// The rank in the group that the message was for, or should have come from.
        peer: usize,
        /// The transport's own words.
        detail: String,
    },
    /// The ranks did not issue the same operation.
    #[error("group {group}, operation {sequence}: the ranks do not agree: {detail}")]
    Mismatch {
        /// The group's name.
        group: String,
        /// The number of the operation in the group.
        sequence: u64,
        /// Which rank issued what.
        detail: String,
    },
    /// The group was aborted, or had failed before.
    #[error("group {group} is dead: {cause}")]
    Dead {
        /// The group's name.
        group: String,
        /// The first cause.
        cause: String,
    },
    /// An argument was refused.
    #[error("{0}")]
    Invalid(String),
    /// libtorch or the store refused.
    #[error("{0}")]
    Backend(String),
}

impl From<ShimError> for CommError {
    fn from(error: ShimError) -> Self {
        CommError::Backend(error.to_string())
    }
}

impl From<TchError> for CommError {
    fn from(error: TchError) -> Self {
        ShimError::from(error).into()
    }
}

/// The result of a collective operation.
pub type Result<T, E = CommError> = std::result::Result<T, E>;
