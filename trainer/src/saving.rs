//! Checkpoints that are written while training goes on: training waits for a copy in memory, and a
//! thread of its own writes that.

use crate::error::{Result, TrainError};
use checkpoint::{CheckpointError, SaveReport, Snapshot};
use checkpoint_format::bundle::NodeRanks;
use collectives::{Communicator, ReduceOp};
use parallel::{Groups, all_reduce_scalars};
use rank_protocol::bundle::{Copied, NodePlace};
use rank_protocol::client::RankClient;
use rank_protocol::message::{Assignment, Event};
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
        Self::spawn(step, write)
    }

    /// Begins to keep it in the nodes' memories, where each node has its own ranks' part, and a
    /// copy of another's. All ranks meet in `group`.
    ///
    /// # Errors
    /// Where there is no thread for it.
    pub fn start_bundle(
        snapshot: Snapshot,
        step: u64,
        place: NodePlace,
        group: Arc<dyn Communicator>,
        groups: Groups,
        client: RankClient,
    ) -> Result<Self> {
        let node = node_ranks(client.assignment(), place);
        let write = move || {
            let mut meet = |is_well: bool| {
                let mut ill = [if is_well { 0.0 } else { 1.0 }];
                groups.alive().map_err(|error| error.to_string())?;
                all_reduce_scalars(group.as_ref(), &mut ill, ReduceOp::Max)
                    .map_err(|error| error.to_string())?;
                Ok(ill[0] == 0.0)
            };
            let mut hand_over = || groups.alive().is_ok() && copy(&client, step, place);
            let run = &client.assignment().run_id;
            let kept = snapshot.write_bundle(run, node, &mut meet, &mut hand_over)?;
            let (bytes, seconds) = (kept.bytes, kept.seconds);
            tracing::debug!(bytes, seconds, "step {step} is kept, copied: {}", kept.is_copied);
            // Without an agent there is nobody to tell, and the control thread ends it all.
            if node.first == client.assignment().rank {
                let _ = client.bundle_kept(step);
            }
            if groups.rank == 0 {
                let is_copied = kept.is_copied && place.places > 1;
                let fields = [("step", step.into()), ("is_copied", is_copied.into())];
                let _ = client.event(event("checkpoint_kept", fields));
            }
            Ok(SaveReport { bytes, seconds, removed: Vec::new(), retention_error: None })
        };
        Self::spawn(step, write)
    }

    fn spawn(
        step: u64,
        write: impl FnOnce() -> std::result::Result<SaveReport, CheckpointError> + Send + 'static,
    ) -> Result<Self> {
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

/// The ranks of this one's node.
fn node_ranks(assignment: &Assignment, NodePlace { place, places }: NodePlace) -> NodeRanks {
    NodeRanks {
        place,
        places,
        first: assignment.rank - assignment.local_rank,
        count: assignment.local_world_size,
        world_size: assignment.world_size,
    }
}

/// Has the agent copy this node's bundle; whether nothing is wrong with that.
fn copy(client: &RankClient, step: u64, place: NodePlace) -> bool {
    match client.copy_bundle(step, place) {
        Ok(Copied::Done | Copied::NoPeer) => true,
        Ok(Copied::Failed { reason }) => {
            tracing::warn!("what is kept of step {step} is not copied: {reason}");
            let fields = [("step", step.into()), ("reason", reason.into())];
            let _ = client.event(event("checkpoint_not_copied", fields));
            false
        }
        Ok(Copied::NotTried) | Err(_) => false,
    }
}

fn event<const N: usize>(kind: &str, fields: [(&str, serde_json::Value); N]) -> Event {
    let fields = fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Event { kind: kind.to_owned(), fields }
}
