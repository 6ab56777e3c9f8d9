//! Which node keeps the copy of what each node's ranks hold: one outside their groups, where there
//! is one, so that neither a node nor a whole group of ranks takes a state and its copy along.
//!
//! Each node has one copy of another's. Pure.

use crate::mesh::{Axis, Mesh};

/// Most ways that are tried where nodes are no even blocks of the mesh.
const MAX_WAYS: usize = 64;

/// Ranks that work on something together, and may be lost together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// Of one tensor-parallel group.
    Tensor,
    /// Of one context-parallel group.
    Context,
    /// Of one pipeline.
    Pipeline,
    /// Of one data-parallel group, shards and replicas.
    Data,
}

impl Group {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Tensor, Self::Context, Self::Pipeline, Self::Data];

    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tensor => "tensor",
            Self::Context => "context",
            Self::Pipeline => "pipeline",
            Self::Data => "data",
        }
    }

    fn axes(self) -> &'static [Axis] {
        match self {
            Self::Tensor => &[Axis::Tensor],
            Self::Context => &[Axis::Context],
            Self::Pipeline => &[Axis::Pipeline],
            Self::Data => &Axis::DATA,
        }
    }
}

/// The peer of each node of a run, by the nodes' places.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peers {
    of: Vec<usize>,
    shared: Vec<Group>,
}

impl Peers {
    /// Of the nodes that `ranks_per_node` ranks each fill, in their order; `None`: there is one
    /// node alone.
    pub fn new(mesh: &Mesh, ranks_per_node: usize) -> Option<Self> {
        let nodes = Nodes { mesh, ranks_per_node: ranks_per_node.max(1) };
        if nodes.count() < 2 {
            return None;
        }
        let ways = nodes.across_blocks().unwrap_or_else(|| nodes.around());
        let mut best: Option<(usize, Self)> = None;
        for of in ways {
            let shared: Vec<Vec<Group>> =
                of.iter().enumerate().map(|(place, peer)| nodes.shared(place, *peer)).collect();
            let cost: usize = shared.iter().map(Vec::len).sum();
            if best.as_ref().is_none_or(|(least, _)| cost < *least) {
                let mut shared = shared.concat();
                shared.sort_unstable();
                shared.dedup();
                best = Some((cost, Self { of, shared }));
            }
            if cost == 0 {
                break;
            }
        }
        best.map(|(_, peers)| peers)
    }

    /// The place whose node keeps the copy of this place's.
    pub fn of(&self, place: usize) -> Option<usize> {
        self.of.get(place).copied()
    }

    /// Groups of which some node and its peer both have ranks: with such a group, a state may be
    /// lost and its copy.
    pub fn shared(&self) -> &[Group] {
        &self.shared
    }
}

/// Ranks of a mesh in blocks, one a node; the last may be smaller.
struct Nodes<'a> {
    mesh: &'a Mesh,
    ranks_per_node: usize,
}

impl Nodes<'_> {
    fn count(&self) -> usize {
        self.mesh.size().div_ceil(self.ranks_per_node)
    }

    fn ranks(&self, place: usize) -> std::ops::Range<usize> {
        let first = place * self.ranks_per_node;
        first..(first + self.ranks_per_node).min(self.mesh.size())
    }

    /// Groups that have ranks at both places.
    fn shared(&self, place: usize, peer: usize) -> Vec<Group> {
        let is_shared = |group: &Group| {
            self.ranks(place).any(|rank| {
                let own = self.number(rank, *group);
                self.ranks(peer).any(|other| self.number(other, *group) == own)
            })
        };
        Group::ALL.into_iter().filter(is_shared).collect()
    }

    /// Which of the groups of that kind a rank is in: its first rank.
    fn number(&self, rank: usize, group: Group) -> usize {
        let along = |axis: &Axis| self.mesh.coordinate(rank, *axis) * self.mesh.stride(*axis);
        rank - group.axes().iter().map(along).sum::<usize>()
    }

    /// Where each node is a block of the mesh: the ways that go half round some of the axes on
    /// which nodes differ, those of most axes first. `None`: they are no such blocks.
    fn across_blocks(&self) -> Option<Vec<Vec<usize>>> {
        let mut degrees = [1; Axis::ALL.len()];
        let mut inside = self.ranks_per_node;
        for (degree, axis) in degrees.iter_mut().zip(Axis::ALL) {
            let ranks = self.mesh.degree(axis);
            if inside.is_multiple_of(ranks) {
                inside /= ranks;
            } else if ranks.is_multiple_of(inside) {
                (*degree, inside) = (ranks / inside, 1);
            } else {
                return None;
            }
        }
        if degrees.iter().product::<usize>() != self.count() {
            return None;
        }
        let is_moved = |way: u32, axis: usize| (way >> axis) & 1 == 1;
        let mut ways: Vec<u32> = (1..1 << degrees.len()).collect();
        ways.retain(|way| {
            (0..degrees.len()).all(|axis| !is_moved(*way, axis) || degrees[axis] > 1)
        });
        ways.sort_by_key(|way| std::cmp::Reverse(way.count_ones()));
        let moved = |place: usize, way: u32| {
            let (mut rest, mut stride, mut peer) = (place, 1, 0);
            for (axis, degree) in degrees.iter().enumerate() {
                let by = if is_moved(way, axis) { degree / 2 } else { 0 };
                peer += (rest % degree + by) % degree * stride;
                (rest, stride) = (rest / degree, stride * degree);
            }
            peer
        };
        let all = |way| (0..self.count()).map(|place| moved(place, way)).collect();
        Some(ways.into_iter().map(all).collect())
    }

    /// The ways that go on by a number of places, from half of them on.
    fn around(&self) -> Vec<Vec<usize>> {
        let count = self.count();
        let step = |number: usize| 1 + (count / 2 - 1 + number) % (count - 1);
        let steps = (0..(count - 1).min(MAX_WAYS)).map(step);
        steps.map(|step| (0..count).map(|place| (place + step) % count).collect()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::tests::parallelism;
    use proptest::prelude::*;

    fn mesh([tensor, context, stages, ranks, replicate]: [usize; 5]) -> Mesh {
        let parallelism = parallelism([tensor, context, stages, ranks], Some(replicate));
        Mesh::new(&parallelism, tensor * context * stages * ranks * replicate).unwrap()
    }

    #[track_caller]
    fn check(degrees: [usize; 5], ranks_per_node: usize, of: &[usize], shared: &[Group]) {
        let peers = Peers::new(&mesh(degrees), ranks_per_node).unwrap();
        assert_eq!((&peers.of[..], &peers.shared[..]), (of, shared));
    }

    #[test]
    fn a_peer_is_outside_all_groups_where_that_can_be() {
        // Stages and replicas: the other stage of the other replica.
        check([1, 1, 2, 1, 2], 1, &[3, 2, 1, 0], &[]);
        check([8, 1, 2, 1, 2], 8, &[3, 2, 1, 0], &[]);
        // A node holds one of four stages, of two shards.
        check([2, 1, 4, 2, 1], 2, &[6, 7, 4, 5, 2, 3, 0, 1], &[]);
        // A node holds two stages of four.
        check([1, 1, 4, 1, 2], 2, &[3, 2, 1, 0], &[]);
    }

    #[test]
    fn where_it_cannot_be_another_node_is_the_best() {
        check([2, 1, 1, 1, 2], 2, &[1, 0], &[Group::Data]);
        check([2, 1, 1, 4, 1], 2, &[2, 3, 0, 1], &[Group::Data]);
        check([1, 1, 4, 1, 1], 1, &[2, 3, 0, 1], &[Group::Pipeline]);
        check([4, 1, 1, 1, 1], 2, &[1, 0], &[Group::Tensor]);
        // Three replicas of two ranks on nodes of four: the last is half full.
        check([2, 1, 1, 1, 3], 4, &[1, 0], &[Group::Data]);
    }

    #[test]
    fn one_node_has_no_peer() {
        assert_eq!(Peers::new(&mesh([2, 1, 1, 1, 2]), 4), None);
        assert_eq!(Peers::new(&mesh([2, 1, 1, 1, 2]), 8), None);
    }

    proptest! {
        /// Each node keeps one copy, of another; and what is said to be shared is, by the groups
        /// themselves.
        #[test]
        fn each_node_keeps_the_copy_of_one_other(
            t in 1usize..4, c in 1usize..3, p in 1usize..4, s in 1usize..4, r in 1usize..4,
            per_node in 1usize..9,
        ) {
            let mesh = mesh([t, c, p, s, r]);
            let Some(peers) = Peers::new(&mesh, per_node) else {
                prop_assert!(mesh.size() <= per_node);
                return Ok(());
            };
            let count = mesh.size().div_ceil(per_node);
            let mut kept = peers.of.clone();
            kept.sort_unstable();
            prop_assert_eq!(kept, (0..count).collect::<Vec<_>>());
            let place_of = |rank: &usize| rank / per_node;
            let mut shared = Vec::new();
            for group in Group::ALL {
                let is_shared = (0..mesh.size()).any(|rank| {
                    let peer = peers.of(place_of(&rank)).unwrap();
                    mesh.group_over(rank, group.axes()).iter().any(|other| place_of(other) == peer)
                });
                if is_shared {
                    shared.push(group);
                }
            }
            for (place, peer) in peers.of.iter().enumerate() {
                prop_assert_ne!(place, *peer);
            }
            prop_assert_eq!(&peers.shared, &shared);
        }

        /// Nodes that are blocks, and differ in two kinds of groups, share none with their peers.
        #[test]
        fn two_kinds_of_groups_are_enough(
            t in 1usize..4, p in 2usize..5, s in 1usize..4, r in 2usize..5,
        ) {
            let peers = Peers::new(&mesh([t, 1, p, s, r]), t).unwrap();
            prop_assert!(peers.shared().is_empty());
        }
    }
}
