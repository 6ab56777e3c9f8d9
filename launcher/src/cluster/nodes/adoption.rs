//! The coordinator's part for a generation that an earlier one left running.

use super::{NodeId, Nodes, Outcome};
use crate::supervisor::rank::RankHandle;
use crate::supervisor::run::Adopt;
use rank_protocol::agent::{Running, ToAgent};

impl Nodes {
    /// The ranks of an earlier coordinator's generation may still run: they are let alone until
    /// [`Nodes::adopt`] or [`Nodes::abandon`].
    pub fn await_ranks(&mut self, generation: u64) {
        self.adopting = Some(generation);
    }

    /// Takes over the generation that was expected, once every one of its nodes is there. Gives the
    /// nodes, the ranks, and what had happened in the meantime.
    pub fn adopt(
        &mut self,
        expected: &Adopt,
    ) -> Option<(Vec<NodeId>, Vec<RankHandle>, Vec<Outcome>)> {
        let generation = self.adopting?;
        let node_of = |name: &String| {
            self.running.keys().copied().find(|node| {
                self.members.is_alive(*node)
                    && self.members.info(*node).is_some_and(|info| info.name == *name)
            })
        };
        let nodes: Vec<NodeId> = expected.nodes.iter().map(node_of).collect::<Option<_>>()?;
        let num_ranks = expected.num_ranks;
        let size = self.plan.sizes.of_ranks(num_ranks)?;
        let per_node = self.plan.ranks_per_node;
        let has_its_ranks = |(place, node): (usize, &NodeId)| {
            let Some(running) = self.running.get(node) else { return false };
            let mut ranks: Vec<usize> = running.ranks.iter().map(|(rank, _)| *rank).collect();
            ranks.extend(&running.exited);
            ranks.sort_unstable();
            ranks.into_iter().eq(place * per_node..num_ranks.min((place + 1) * per_node))
        };
        if nodes.len() != size.nodes || !nodes.iter().enumerate().all(has_its_ranks) {
            return None;
        }
        self.adopting = None;
        self.members.place(&nodes);
        let running = std::mem::take(&mut self.running);
        let outcomes = std::mem::take(&mut self.stored);
        let handles = self.handles(generation, &nodes, 0..num_ranks);
        for (rank, pid) in running.values().flat_map(|running| &running.ranks) {
            if let Some(cell) = self.ranks.pids.get(*rank) {
                cell.set(*pid);
            }
        }
        Some((nodes, handles, outcomes))
    }

    /// Ends the ranks that were expected: not all of them are there.
    pub fn abandon(&mut self) {
        self.adopting = None;
        self.stored.clear();
        for (node, running) in std::mem::take(&mut self.running) {
            self.kill(node, &running);
        }
    }

    pub(super) fn kill(&mut self, node: NodeId, running: &Running) {
        let generation = running.generation;
        for (rank, _) in &running.ranks {
            self.send(node, ToAgent::Kill { generation, rank: *rank });
        }
    }
}
