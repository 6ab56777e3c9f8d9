//! What can go wrong between ranks.

use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use torch_shim::{ShimError, tch::TchError};

/// The failure of a collective operation.
#[derive(Clone, Debug, Error)]
pub enum CommError {
    /// A message did not get through: a peer is gone, or did not come in time.
    #[error("group {group}, {operation}: lost rank {peer}: {detail}")]
    Peer {
        /// The group's name.
        group: String,
        /// What was being done: `operation 7 (barrier)`, or `receive Float [2] from rank 3`.
        operation: String,
        /// The rank that the message was for, or should have come from: its number in the run.
        peer: usize,
        /// The transport's own words.
        detail: String,
        /// Whether it did nothing in time, for all that is known of it.
        is_late: bool,
    },
    /// The ranks did not issue the same operation.
    #[error("group {group}, {operation}: the ranks do not agree: {detail}")]
    Mismatch {
        /// The group's name.
        group: String,
        /// Which one: `operation 7`, or `message 0 from rank 2 to rank 3`.
        operation: String,
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

impl CommError {
    /// A transport's own error, which knows the peer by its number in the group; [`Site::locate`]
    /// says the rest.
    pub(crate) fn lost(peer: usize, detail: impl Into<String>) -> CommError {
        let (group, operation) = (String::new(), String::new());
        CommError::Peer { group, operation, peer, detail: detail.into(), is_late: false }
    }

    /// The same, of a peer that sent nothing within the time-out, or took nothing.
    pub(crate) fn late(peer: usize, is_sent: bool, timeout: Duration) -> CommError {
        let did = if is_sent { "took" } else { "sent" };
        let detail = format!("it {did} nothing in {} ms", timeout.as_millis());
        let (group, operation) = (String::new(), String::new());
        CommError::Peer { group, operation, peer, detail, is_late: true }
    }

    /// The same, of a peer that did nothing because of others.
    pub(crate) fn because(self, of: &str) -> CommError {
        match self {
            CommError::Peer { group, operation, peer, detail, is_late } => {
                let detail = format!("{detail}{of}");
                CommError::Peer { group, operation, peer, detail, is_late }
            }
            other => other,
        }
    }
}

/// Where an operation took place.
#[derive(Clone, Debug)]
pub(crate) struct Site {
    /// The group's members, by their numbers in the run.
    pub(crate) members: Arc<Members>,
    /// What was being done.
    pub(crate) operation: String,
}

/// Who is in a group.
#[derive(Debug)]
pub(crate) struct Members {
    /// The group's name.
    pub(crate) group: String,
    /// Numbers in the run, by number in the group; empty where they are the same.
    pub(crate) ranks: Vec<usize>,
}

impl Members {
    /// The number in the run of a member.
    pub(crate) fn in_run(&self, member: usize) -> usize {
        self.ranks.get(member).copied().unwrap_or(member)
    }
}

impl Site {
    /// Says in which group and operation a transport lost a peer, and who that is.
    pub(crate) fn locate(&self, error: CommError) -> CommError {
        match error {
            CommError::Peer { peer, detail, is_late, .. } => CommError::Peer {
                group: self.members.group.clone(),
                operation: self.operation.clone(),
                peer: self.members.in_run(peer),
                detail,
                is_late,
            },
            other => other,
        }
    }
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
