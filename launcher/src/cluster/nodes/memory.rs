//! The coordinator's part in what nodes keep of checkpoints in their memories: who has what, which
//! is whole, and what agents must know of it.

use super::Nodes;
use crate::cluster::complete::{Holdings, MAX_NODES, holders, newest};
use crate::cluster::members::NodeId;
use crate::supervisor::restore::Kept;
use layout::Peers;
use rank_protocol::agent::ToAgent;
use rank_protocol::bundle::{BundleId, Door, Holding, MemoryPlan, Resume};
use std::collections::BTreeMap;

/// What nodes say of their memories.
#[derive(Default)]
pub(super) struct Memories {
    doors: BTreeMap<NodeId, Door>,
    holdings: Holdings,
    /// Identity of the run.
    pub(super) run: String,
    /// The generation that was started last, and the (generation, step) in memory that it went on
    /// from.
    started: Option<(u64, Option<(u64, u64)>)>,
}

impl Memories {
    /// A node has joined, with this; what it is to forget all of but for what is returned, where
    /// nothing of it is of use.
    pub(super) fn joined(
        &mut self,
        node: NodeId,
        door: Option<Door>,
        holding: Holding,
    ) -> Option<Option<(u64, u64)>> {
        match door {
            Some(door) => drop(self.doors.insert(node, door)),
            None => drop(self.doors.remove(&node)),
        }
        let but = self.of_no_use(&holding);
        self.holds(node, holding);
        but
    }

    /// Nothing is, where all is of another run; or of generations before that which runs, all of
    /// whose nodes were told to forget it when it was started.
    fn of_no_use(&self, holding: &Holding) -> Option<Option<(u64, u64)>> {
        if holding.is_empty() {
            return None;
        }
        if holding.run != self.run {
            return Some(None);
        }
        let (started, but) = self.started?;
        let is_of_no_use =
            |id: &BundleId| id.generation < started && but != Some((id.generation, id.step));
        let is_before = holding.bundles.iter().all(|id| id.generation < started);
        (is_before && holding.bundles.iter().any(is_of_no_use)).then_some(but)
    }

    /// A node has this, and nothing else. What is of another run counts as nothing.
    pub(super) fn holds(&mut self, node: NodeId, holding: Holding) {
        let bundles = if holding.run == self.run { holding.bundles } else { Vec::new() };
        self.holdings.insert(node, bundles);
    }

    /// A generation is started, which goes on from this of memory.
    pub(super) fn started(&mut self, generation: u64, from: Option<Kept>) {
        self.started = Some((generation, from.map(|kept| (kept.generation, kept.step))));
    }

    /// A node is no member any more: nothing of its memory counts.
    pub(super) fn lost(&mut self, node: NodeId) {
        self.doors.remove(&node);
        self.holdings.remove(&node);
    }
}

/// How a generation keeps its state in memory.
pub struct Keeping {
    /// Whose copies each node has.
    pub peers: Option<Peers>,
    /// What the ranks go on from, where that is in the nodes' memories.
    pub resume: Option<Kept>,
}

impl Nodes {
    /// What agents tell counts where it is of this run.
    pub fn set_run(&mut self, run: &str) {
        run.clone_into(&mut self.memories.run);
    }

    /// The newest checkpoint that is whole in the memories of living nodes, of those whose (step,
    /// generation) counts.
    pub fn newest_in_memory(&self, counts: impl Fn(u64, u64) -> bool) -> Option<Kept> {
        let found = newest(&self.memories.holdings, |(generation, step)| counts(step, generation));
        found.map(|(generation, step)| Kept { step, generation })
    }

    /// Whether it still is.
    pub fn has_in_memory(&self, kept: Kept) -> bool {
        holders(&self.memories.holdings, (kept.generation, kept.step)).is_some()
    }

    /// Has all nodes forget what they have in memory, but for this.
    pub fn forget(&mut self, but: Option<Kept>) {
        let but = but.map(|kept| (kept.generation, kept.step));
        for bundles in self.memories.holdings.values_mut() {
            bundles.retain(|id| but == Some((id.generation, id.step)));
        }
        let nodes: Vec<NodeId> = self.memories.doors.keys().copied().collect();
        for node in nodes {
            self.send(node, ToAgent::Forget { but });
        }
    }

    /// Why these nodes keep nothing in memory, where they do not.
    pub fn keeps_nothing(&self, nodes: &[NodeId]) -> Option<String> {
        if nodes.len() > MAX_NODES {
            return Some(format!("there are {} nodes, more than {MAX_NODES}", nodes.len()));
        }
        let stranger = nodes.iter().find(|node| !self.memories.doors.contains_key(node))?;
        Some(format!("the agent of node {} keeps nothing", self.name(*stranger)))
    }

    /// What each of the nodes of a generation must know, by place; `None` where one of them cannot
    /// keep anything.
    pub(super) fn memory_plans(
        &self,
        nodes: &[NodeId],
        keeping: &Keeping,
    ) -> Option<Vec<MemoryPlan>> {
        if self.keeps_nothing(nodes).is_some() {
            return None;
        }
        let resume = keeping.resume.map(|kept| self.whereabouts(kept));
        let plan = |place: usize| {
            let peer = keeping.peers.as_ref().and_then(|peers| peers.of(place));
            let peer = peer.and_then(|peer| self.door_of(*nodes.get(peer)?));
            MemoryPlan { peer, resume: resume.clone() }
        };
        Some((0..nodes.len()).map(plan).collect())
    }

    fn whereabouts(&self, Kept { step, generation }: Kept) -> Resume {
        let nodes = holders(&self.memories.holdings, (generation, step)).unwrap_or_default();
        let doors =
            |nodes: Vec<NodeId>| nodes.into_iter().filter_map(|node| self.door_of(node)).collect();
        Resume { step, generation, holders: nodes.into_iter().map(doors).collect() }
    }

    /// Where other nodes reach that of this one.
    fn door_of(&self, node: NodeId) -> Option<Door> {
        let door = self.memories.doors.get(&node)?;
        Some(Door { host: self.address_of(node), ..door.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(generation: u64, step: u64) -> BundleId {
        BundleId { generation, step, place: 0, places: 1 }
    }

    fn holding(run: &str, bundles: &[BundleId]) -> Holding {
        Holding { run: run.into(), bundles: bundles.to_vec() }
    }

    #[test]
    fn what_another_run_left_counts_for_nothing_and_goes() {
        let mut memories = Memories { run: "run-2".into(), ..Memories::default() };
        assert_eq!(memories.joined(7, None, holding("run-1", &[id(9, 50)])), Some(None));
        assert_eq!(newest(&memories.holdings, |_| true), None);
        memories.holds(7, holding("run-1", &[id(9, 50)]));
        assert_eq!(newest(&memories.holdings, |_| true), None);
        memories.holds(7, holding("run-2", &[id(1, 5)]));
        assert_eq!(newest(&memories.holdings, |_| true), Some((1, 5)));
        // Who has heard of no run has nothing.
        assert_eq!(memories.joined(8, None, Holding::default()), None);
    }

    #[test]
    fn a_late_joiner_forgets_what_is_old() {
        let mut memories = Memories { run: "run-1".into(), ..Memories::default() };
        let old = holding("run-1", &[id(2, 10), id(2, 20)]);
        // Before a generation is started, all of it may be wanted.
        assert_eq!(memories.joined(7, None, old.clone()), None);
        memories.started(3, Some(Kept { step: 20, generation: 2 }));
        assert_eq!(memories.joined(7, None, old), Some(Some((2, 20))));
        assert_eq!(memories.joined(7, None, holding("run-1", &[id(2, 20)])), None);
        // It was a node of that which runs.
        assert_eq!(memories.joined(7, None, holding("run-1", &[id(2, 10), id(3, 30)])), None);
    }
}
