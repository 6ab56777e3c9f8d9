//! The executor's part in checkpoints in memory: of this machine, or of the nodes.

use super::Executor;
use crate::cluster::nodes::Keeping;
use crate::memory;
use crate::supervisor::cause::Cause;
use crate::supervisor::restore::{Branch, Kept, Tier, is_current, went_back};
use layout::{Mesh, Peers};
use rank_protocol::bundle::NodePlace;
use rank_protocol::{FailureClass, Phase};
use run_config::Parallelism;

/// Generations in a row that could not fetch a checkpoint; after so many it is given up. Fewer than
/// `restart.max_no_progress` has by default, so that the one on disk has its turn.
const MOST_FETCHES: u32 = 2;

/// What failures say of the checkpoint in the nodes' memories. Pure.
#[derive(Debug, Default)]
pub(super) struct Doubt {
    is_damaged: bool,
    num_not_fetched: u32,
}

impl Doubt {
    /// A generation failed of this. A rank or a node that is lost while ranks load says nothing of
    /// what they load.
    pub(super) fn failed(&mut self, cause: &Cause) {
        let class = Some(cause.class).filter(|_| cause.phase == Phase::Load);
        self.is_damaged = class == Some(FailureClass::Storage);
        self.num_not_fetched = match class {
            Some(FailureClass::Transient) => self.num_not_fetched + 1,
            _ => 0,
        };
    }

    /// Whether nobody goes on from it any more.
    pub(super) fn is_enough(&self) -> bool {
        self.is_damaged || self.num_not_fetched >= MOST_FETCHES
    }
}

impl Executor {
    /// Whether each node keeps what its ranks hold.
    fn is_kept_by_nodes(&self) -> bool {
        self.elsewhere.is_some() && self.plan.config.checkpoint.memory.every_steps > 0
    }

    /// A rank's node, where each has a memory of its own.
    pub(super) fn node_place(&self, place: usize, places: usize) -> Option<NodePlace> {
        self.is_kept_by_nodes().then_some(NodePlace { place, places })
    }

    /// How the generation that is about to start keeps its state in the nodes' memories.
    pub(super) fn keeping(&self) -> Option<Keeping> {
        let elsewhere = self.elsewhere.as_ref().filter(|_| self.is_kept_by_nodes())?;
        let (size, config) = (self.size(), &self.plan.config);
        let parallelism =
            Parallelism { replicate: Some(size.replicas), ..config.parallelism.clone() };
        let per_node = config.cluster.ranks_per_node.unwrap_or(1);
        // A layout that cannot be is told of by the ranks.
        let mesh = Mesh::new(&parallelism, size.ranks).ok();
        let peers = mesh.and_then(|mesh| Peers::new(&mesh, per_node));
        Some(Keeping { peers, resume: elsewhere.kept })
    }

    /// The newest checkpoint that is whole in the nodes' memories, and of no future that was given
    /// up.
    pub(super) fn newest_kept(&self) -> Option<Kept> {
        let elsewhere = self.elsewhere.as_ref().filter(|_| self.is_kept_by_nodes())?;
        let last = self.state.generation();
        elsewhere.nodes.newest_in_memory(|step, generation| {
            // What is said to be of a generation that never was is nobody's.
            generation <= last
                && is_current(step, generation, &self.plan.branches)
                && is_current(step, generation, &self.plan.resumes)
        })
    }

    /// What the ranks of the last generation could not read out of the nodes' memories is not given
    /// to others.
    pub(super) fn forget_what_is_damaged(&mut self) {
        let resumed = self.recorder.status.resumed;
        let is_from_memory = resumed.is_some_and(|resumed| resumed.tier == Tier::Memory);
        if self.doubt.is_enough() && is_from_memory && self.elsewhere.is_some() {
            self.forget_memory();
        }
    }

    /// What is in memory is as near to the trouble as can be, and of a future that is given up.
    pub(super) fn forget_memory(&mut self) {
        self.doubt = Doubt::default();
        let status = &mut self.recorder.status;
        (status.memory_checkpoint, status.memory_copied) = (None, None);
        if let Some(elsewhere) = &mut self.elsewhere {
            elsewhere.nodes.forget(None);
            elsewhere.kept = None;
        }
        // Also what a node brings that does not hear of it.
        let generation = self.state.generation() + 1;
        went_back(&mut self.plan.resumes, Branch { step: 0, generation });
        let Some(memory) = &self.plan.memory else { return };
        if let Err(error) = memory::forget(memory) {
            // Better none than that one.
            tracing::error!("nothing is read from memory any more: {}: {error}", memory.display());
            self.plan.memory = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::cause::Exit;
    use rank_protocol::FailureReport;

    fn cause(phase: Phase, class: Option<FailureClass>) -> Cause {
        let report = class.map(|class| FailureReport {
            class,
            phase,
            step: None,
            collective: None,
            lines: Vec::new(),
            roll_back: None,
        });
        let killed = Exit { code: None, signal: Some(9) };
        Cause::new(0, killed, report, phase, None, Vec::new())
    }

    fn is_enough(causes: &[Cause]) -> bool {
        let mut doubt = Doubt::default();
        causes.iter().for_each(|cause| doubt.failed(cause));
        doubt.is_enough()
    }

    #[test]
    fn a_rank_that_is_killed_while_it_loads_says_nothing_of_the_checkpoint() {
        let killed = cause(Phase::Load, None);
        assert!(!is_enough(&[killed.clone(), killed.clone(), killed]));
        let lost = cause(Phase::Load, Some(FailureClass::Node));
        assert!(!is_enough(&[lost.clone(), lost]));
    }

    #[test]
    fn what_is_damaged_is_given_up_at_once_and_what_nobody_gives_later() {
        let (storage, link) = (FailureClass::Storage, FailureClass::Transient);
        assert!(is_enough(&[cause(Phase::Load, Some(storage))]));
        assert!(!is_enough(&[cause(Phase::Train, Some(storage))]));
        let not_fetched = cause(Phase::Load, Some(link));
        assert!(!is_enough(std::slice::from_ref(&not_fetched)));
        assert!(is_enough(&[not_fetched.clone(), not_fetched.clone()]));
        let between = cause(Phase::Train, Some(link));
        assert!(!is_enough(&[not_fetched.clone(), between, not_fetched]));
    }
}
