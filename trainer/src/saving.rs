//! Checkpoints that are written while training goes on: training waits for a copy in memory, and a
//! thread of its own writes that.

use crate::error::{Result, TrainError};
use checkpoint::{CheckpointError, SaveReport, Snapshot};
use collectives::Communicator;
use parallel::Groups;
use std::sync::Arc;
use std::thread::JoinHandle;

/// One that is under way.
pub struct Saving {
    /// Its step.
    pub step: u64,
    thread: JoinHandle<std::result::Result<SaveReport, CheckpointError>>,
}

impl Saving {
    /// Begins to write it, together with all ranks, which meet in `storage`; `tell` runs on rank 0
    /// once it is committed.
    ///
    /// # Errors
    /// Where there is no thread for it.
    pub fn start(
        snapshot: Snapshot,
        step: u64,
        storage: Arc<dyn Communicator>,
        groups: Groups,
        tell: impl FnOnce() + Send + 'static,
    ) -> Result<Self> {
        let write = move || {
            let mut barrier = || {
                let alive = groups.alive();
                let met = alive.and_then(|()| storage.barrier()).and_then(|work| work.wait());
                met.map_err(|error| error.to_string())
            };
            let saved = snapshot.write(&mut barrier)?;
            let (bytes, seconds) = (saved.bytes, saved.seconds);
            tracing::debug!(bytes, seconds, "checkpoint of step {step} committed");
            if groups.rank == 0 {
                tell();
            }
            Ok(saved)
        };
        let thread = std::thread::Builder::new().name("save".into()).spawn(write);
        let thread = thread.map_err(|error| TrainError::Panic(format!("no thread: {error}")))?;
        Ok(Self { step, thread })
    }

    /// Whether it is over, well or not.
    pub fn is_over(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits until it is over; returns the seconds that this rank took to write it.
    ///
    /// # Errors
    /// Why it was not committed.
    pub fn finish(self) -> Result<f64> {
        let result = self.thread.join();
        let saved =
            result.map_err(|_| TrainError::Panic("the thread that saves panicked".into()))??;
        if let Some(error) = saved.retention_error {
            tracing::warn!("an old checkpoint could not be removed: {error}");
        }
        Ok(saved.seconds)
    }
}
