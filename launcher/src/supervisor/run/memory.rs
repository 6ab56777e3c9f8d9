//! The executor's part in checkpoints in memory: of this machine, or of the nodes.

use super::Executor;
use crate::cluster::nodes::Keeping;
use crate::memory;
use crate::supervisor::restore::{Branch, Kept, Tier, is_current, went_back};
use layout::{Mesh, Peers};
use rank_protocol::bundle::NodePlace;
use run_config::Parallelism;

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
        elsewhere.nodes.newest_in_memory(|step, generation| {
            is_current(step, generation, &self.plan.branches)
                && is_current(step, generation, &self.plan.resumes)
        })
    }

    /// What the ranks of the last generation could not read out of the nodes' memories is not given
    /// to others.
    pub(super) fn forget_what_is_damaged(&mut self) {
        let resumed = self.recorder.status.resumed;
        let is_damaged =
            self.has_failed_to_load && resumed.is_some_and(|resumed| resumed.tier == Tier::Memory);
        if is_damaged && self.elsewhere.is_some() {
            self.forget_memory();
        }
    }

    /// What is in memory is as near to the trouble as can be, and of a future that is given up.
    pub(super) fn forget_memory(&mut self) {
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
