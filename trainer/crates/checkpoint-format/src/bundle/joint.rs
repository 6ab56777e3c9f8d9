//! A save into the memories of several nodes, that all ranks make together.
//!
//! ```text
//! first of each node   begin           fence, old temporaries away, room checked, folder
//! all meet
//! each rank            write_rank      tensor files, its part of the index
//! all meet
//! first of each node   commit_bundle   its node's index, state, manifest, COMMIT, rename
//! all meet                             from here on it is kept
//! first of each node   hand over       its bundle is copied to another node
//! all meet                             from here on the one before is not needed
//! ```
//! No node sees another's files: what each meeting is about is whether all is well with all ranks.

use super::NodeRanks;
use crate::error::{FormatError, Result};
use crate::manifest::TrainState;
use crate::save::{Piece, Save};
use std::time::Instant;

/// A meeting of all ranks: whether all is well with all of them, given whether it is with this one.
/// Its error says which peer is gone.
pub type Meeting<'a> = dyn FnMut(bool) -> std::result::Result<bool, String> + 'a;

/// Has this node's bundle copied to where its copies are kept; whether that succeeded, which no
/// save fails of.
pub type HandOver<'a> = dyn FnMut() -> bool + 'a;

/// What one rank brings to it.
#[derive(Debug)]
pub struct JointBundle<'a> {
    /// Identity of the run.
    pub run: &'a str,
    /// Which checkpoint, in this node's folder.
    pub save: Save,
    /// This rank.
    pub rank: usize,
    /// The ranks of its node.
    pub node: NodeRanks,
    /// Bytes of the tensors of all ranks of all nodes, for the check of free space.
    pub total_bytes: u64,
    /// What this rank writes.
    pub pieces: Vec<Piece<'a>>,
    /// The state.
    pub state: &'a TrainState,
}

/// A save that all nodes keep.
#[derive(Clone, Debug, PartialEq)]
pub struct BundleReport {
    /// On the first rank of a node: bytes of its bundle.
    pub bytes: u64,
    /// Seconds this rank spent.
    pub seconds: f64,
    /// Whether all nodes' bundles are copied, too.
    pub is_copied: bool,
}

impl JointBundle<'_> {
    /// Writes, commits and hands over.
    ///
    /// # Errors
    /// On the rank that failed its own error; on the others [`FormatError::NotCommitted`];
    /// [`FormatError::DidNotMeet`] where `meet` failed. Nothing of it stays then, unless it was
    /// kept already.
    pub fn run(
        &self,
        meet: &mut Meeting<'_>,
        hand_over: &mut HandOver<'_>,
    ) -> Result<BundleReport> {
        let began = Instant::now();
        let is_first = self.rank == self.node.first;
        let kept = self.keep(is_first, meet);
        if kept.is_err() && is_first {
            self.save.abandon_bundle(self.node.place);
        }
        let bytes = kept?;
        let is_well = !is_first || hand_over();
        let is_copied = meet(is_well).map_err(|reason| self.did_not_meet(reason))?;
        Ok(BundleReport { bytes, seconds: began.elapsed().as_secs_f64(), is_copied })
    }

    fn keep(&self, is_first: bool, meet: &mut Meeting<'_>) -> Result<u64> {
        let node = &self.node;
        let share = u128::from(self.total_bytes) * node.count as u128;
        let needed = u64::try_from(share / node.world_size.max(1) as u128).unwrap_or(u64::MAX);
        let begun = if is_first { self.save.begin(needed) } else { Ok(()) };
        self.agree(begun, meet)?;
        let written = self.save.write_rank(self.rank, &self.pieces);
        self.agree(written, meet)?;
        let committed = match is_first {
            true => self.save.commit_bundle(self.run, node, self.state),
            false => Ok(0),
        };
        self.agree(committed, meet)
    }

    /// Passes a meeting, whatever came of this rank's own part.
    fn agree<T>(&self, own: Result<T>, meet: &mut Meeting<'_>) -> Result<T> {
        let all_are_well = meet(own.is_ok());
        let own = own?;
        match all_are_well {
            Ok(true) => Ok(own),
            Ok(false) => {
                let reason = "another rank failed; its log says why".to_owned();
                Err(self.save.not_committed(reason))
            }
            Err(reason) => Err(self.did_not_meet(reason)),
        }
    }

    fn did_not_meet(&self, reason: String) -> FormatError {
        FormatError::DidNotMeet { step: self.save.step, reason }
    }
}
