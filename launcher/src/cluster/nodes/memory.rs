//! The coordinator's part in what nodes keep of checkpoints in their memories: who has what, which
//! is whole, and what agents must know of it.

use super::Nodes;
use crate::cluster::complete::{Holdings, holders, newest};
use crate::cluster::members::NodeId;
use crate::supervisor::restore::Kept;
use layout::Peers;
use rank_protocol::agent::ToAgent;
use rank_protocol::bundle::{BundleId, Door, MemoryPlan, Resume};
use std::collections::BTreeMap;

/// The most nodes that keep checkpoints for each other: each must be told where all are, in one
/// message.
const MAX_NODES: usize = 1024;

/// What nodes say of their memories.
#[derive(Default)]
pub(super) struct Memories {
    doors: BTreeMap<NodeId, Door>,
    holdings: Holdings,
}

impl Memories {
    /// A node has joined, with this.
    pub(super) fn joined(&mut self, node: NodeId, door: Option<Door>, bundles: Vec<BundleId>) {
        match door {
            Some(door) => drop(self.doors.insert(node, door)),
            None => drop(self.doors.remove(&node)),
        }
        self.holds(node, bundles);
    }

    /// A node has this, and nothing else.
    pub(super) fn holds(&mut self, node: NodeId, bundles: Vec<BundleId>) {
        self.holdings.insert(node, bundles);
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

    /// What each of the nodes of a generation must know, by place; `None` where one of them cannot
    /// keep anything.
    pub(super) fn memory_plans(
        &self,
        nodes: &[NodeId],
        keeping: &Keeping,
    ) -> Option<Vec<MemoryPlan>> {
        let all = nodes.iter().all(|node| self.memories.doors.contains_key(node));
        if !all || nodes.len() > MAX_NODES {
            let why = if all { "there are too many nodes" } else { "not all agents know of it" };
            tracing::warn!("nothing is kept in memory: {why}");
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
