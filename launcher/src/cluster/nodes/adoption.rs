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
        let (nodes, num_ranks) = (self.back(expected)?, expected.num_ranks);
        if !self.have_their_ranks(&nodes, num_ranks) {
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
        for rank in running.values().flat_map(|running| &running.exited) {
            if let Some(has_exited) = self.ranks.has_exited.get_mut(*rank) {
                *has_exited = true;
            }
        }
        Some((nodes, handles, outcomes))
    }

    /// Whether all nodes of the generation are back, and not with all of its ranks: then it is no
    /// use to wait on, because an agent says what it runs when it joins.
    pub fn is_in_vain(&self, expected: &Adopt) -> bool {
        let nodes = self.back(expected).filter(|_| self.adopting.is_some());
        nodes.is_some_and(|nodes| !self.have_their_ranks(&nodes, expected.num_ranks))
    }

    /// The nodes of the generation, by place, once all of them are back.
    fn back(&self, expected: &Adopt) -> Option<Vec<NodeId>> {
        expected.nodes.iter().map(|name| self.members.alive_named(name)).collect()
    }

    /// Whether each of these nodes runs the ranks of its place, or knows how they ended.
    fn have_their_ranks(&self, nodes: &[NodeId], num_ranks: usize) -> bool {
        let per_node = self.plan.ranks_per_node;
        let has_its_ranks = |(place, node): (usize, &NodeId)| {
            let Some(running) = self.running.get(node) else { return false };
            let mut ranks: Vec<usize> = running.ranks.iter().map(|(rank, _)| *rank).collect();
            ranks.extend(&running.exited);
            ranks.sort_unstable();
            ranks.into_iter().eq(place * per_node..num_ranks.min((place + 1) * per_node))
        };
        let size = self.plan.sizes.of_ranks(num_ranks);
        size.is_some_and(|size| size.nodes == nodes.len())
            && nodes.iter().enumerate().all(has_its_ranks)
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
