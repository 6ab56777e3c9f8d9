//! A save that all ranks make together: the steps of [`crate::Save`] with a barrier between them.
//!
//! Whatever fails on whichever rank, every rank passes the same barriers and then returns; nothing
//! is committed, the temporary folder is removed, and older checkpoints stay. Only a barrier that
//! fails (a peer is gone) ends it earlier.

use crate::error::{FormatError, Result};
use crate::manifest::TrainState;
use crate::retention;
use crate::save::{Piece, Save};
use std::time::Instant;

/// A wait for all ranks; its error says which peer is gone.
pub type Barrier<'a> = dyn FnMut() -> std::result::Result<(), String> + 'a;

/// What one rank brings to a save.
#[derive(Debug)]
pub struct JointSave<'a> {
    /// Which checkpoint.
    pub save: Save,
    /// This rank.
    pub rank: usize,
    /// Number of ranks that take part.
    pub world_size: usize,
    /// Bytes of the tensors of all ranks, for the check of free space.
    pub total_bytes: u64,
    /// What this rank writes.
    pub pieces: Vec<Piece<'a>>,
    /// The state; rank 0's is written.
    pub state: &'a TrainState,
    /// Newest checkpoints kept; at least 1.
    pub keep_last: usize,
    /// Checkpoints of every so many steps are kept for good; 0: none.
    pub keep_every_steps: u64,
}

/// A save that was committed.
#[derive(Clone, Debug, PartialEq)]
pub struct SaveReport {
    /// Bytes of the whole checkpoint.
    pub bytes: u64,
    /// Seconds this rank spent.
    pub seconds: f64,
    /// On rank 0: steps whose checkpoints were removed as old.
    pub removed: Vec<u64>,
    /// On rank 0: why old checkpoints could not be removed (the save itself is good).
    pub retention_error: Option<String>,
}

impl JointSave<'_> {
    /// Writes, commits and removes old checkpoints.
    ///
    /// # Errors
    /// On the rank that failed its own error, with path and bytes; on the others
    /// [`FormatError::NotCommitted`]; [`FormatError::DidNotMeet`] where `barrier` failed.
    pub fn run(&self, barrier: &mut Barrier<'_>) -> Result<SaveReport> {
        let began = Instant::now();
        let outcome = self.write_and_commit(barrier);
        if outcome.is_err() && self.rank == 0 {
            self.save.abandon();
        }
        let (bytes, removed, retention_error) = outcome?;
        let seconds = began.elapsed().as_secs_f64();
        Ok(SaveReport { bytes, seconds, removed, retention_error })
    }

    fn write_and_commit(
        &self,
        barrier: &mut Barrier<'_>,
    ) -> Result<(u64, Vec<u64>, Option<String>)> {
        let step = self.save.step;
        let mut wait = || barrier().map_err(|reason| FormatError::DidNotMeet { step, reason });
        let begun = if self.rank == 0 { self.save.begin(self.total_bytes) } else { Ok(()) };
        wait()?;
        let written = begun.and_then(|()| {
            if self.save.temporary().is_dir() {
                return self.save.write_rank(self.rank, &self.pieces);
            }
            Err(self.save.not_committed("rank 0 could not begin; its log says why".to_string()))
        });
        wait()?;
        let mut retired = (Vec::new(), None);
        let committed = written.and_then(|_| {
            if self.rank > 0 {
                return Ok(());
            }
            self.save.commit(self.world_size, self.state)?;
            match retention::apply(
                self.save.checkpoints_dir(),
                self.keep_last,
                self.keep_every_steps,
            ) {
                Ok(removed) => retired.0 = removed,
                Err(error) => retired.1 = Some(error.to_string()),
            }
            Ok(())
        });
        if committed.is_err() && self.rank == 0 {
            // Before the barrier, so that no rank returns while the folder is still there.
            self.save.abandon();
        }
        wait()?;
        committed?;
        Ok((self.save.committed()?, retired.0, retired.1))
    }
}
