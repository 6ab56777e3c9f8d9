//! Which checkpoints are whole in the nodes' memories: those of which living nodes have the bundle
//! of every place. Pure.

use super::members::NodeId;
use rank_protocol::bundle::BundleId;
use std::collections::BTreeMap;

/// The most nodes that keep checkpoints for each other: each must be told where all are, in one
/// message, and asks each for what its ranks read.
pub const MAX_NODES: usize = 1024;

/// What living nodes have.
pub type Holdings = BTreeMap<NodeId, Vec<BundleId>>;

/// By place, the nodes that have the bundle of a (generation, step); `None` where nobody has that
/// of some place.
pub fn holders(holdings: &Holdings, (generation, step): (u64, u64)) -> Option<Vec<Vec<NodeId>>> {
    let mut places: Vec<Vec<NodeId>> = Vec::new();
    for (node, bundles) in holdings {
        let is_of_it = |id: &&BundleId| (id.generation, id.step) == (generation, step);
        // Nobody is believed to have had more places than there can be.
        let is_possible = |id: &&BundleId| id.place < id.places && id.places <= MAX_NODES;
        for id in bundles.iter().filter(is_of_it).filter(is_possible) {
            if places.is_empty() {
                places = vec![Vec::new(); id.places];
            }
            // Those of one save say the same.
            if let Some(holders) = places.get_mut(id.place) {
                holders.push(*node);
            }
        }
    }
    let is_whole = !places.is_empty() && places.iter().all(|holders| !holders.is_empty());
    is_whole.then_some(places)
}

/// The (generation, step) of the newest that is whole, of those that count: of several of one step
/// that of the newest generation.
pub fn newest(holdings: &Holdings, counts: impl Fn((u64, u64)) -> bool) -> Option<(u64, u64)> {
    let all = holdings.values().flatten().map(|id| (id.step, id.generation));
    let mut all: Vec<(u64, u64)> = all.collect();
    all.sort_unstable();
    all.dedup();
    let mut newest = all.into_iter().rev().map(|(step, generation)| (generation, step));
    newest.find(|which| counts(*which) && holders(holdings, *which).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn id(generation: u64, step: u64, place: usize) -> BundleId {
        BundleId { generation, step, place, places: 3 }
    }

    fn all(_: (u64, u64)) -> bool {
        true
    }

    #[test]
    fn the_newest_of_which_nothing_is_missing_is_taken() {
        // Each node has its own, and the copy of the one before; the third's of step 20 has not
        // arrived yet.
        let whole: Holdings = [
            (7, vec![id(1, 10, 0), id(1, 10, 2), id(1, 20, 0)]),
            (8, vec![id(1, 10, 1), id(1, 10, 0), id(1, 20, 1), id(1, 20, 0)]),
            (9, vec![id(1, 10, 2), id(1, 10, 1), id(1, 20, 2), id(1, 20, 1)]),
        ]
        .into();
        assert_eq!(newest(&whole, all), Some((1, 20)));
        assert_eq!(holders(&whole, (1, 20)), Some(vec![vec![7, 8], vec![8, 9], vec![9]]));
        let without = |node: NodeId| -> Holdings {
            whole.clone().into_iter().filter(|(other, _)| *other != node).collect()
        };
        assert_eq!(newest(&without(7), all), Some((1, 20)));
        assert_eq!(newest(&without(8), all), Some((1, 20)));
        assert_eq!(newest(&without(9), all), Some((1, 10)), "its copy had not arrived");
        assert_eq!(newest(&Holdings::new(), all), None);
    }

    #[test]
    fn bundles_of_two_generations_make_nothing() {
        let mixed: Holdings = [
            (1, vec![id(1, 20, 0), id(2, 20, 1)]),
            (2, vec![id(1, 20, 1), id(2, 20, 0)]),
            (3, vec![id(2, 20, 2), id(2, 10, 2)]),
        ]
        .into();
        assert_eq!(newest(&mixed, all), Some((2, 20)));
        assert_eq!(newest(&mixed, |(generation, _)| generation == 1), None);
        assert_eq!(newest(&mixed, |(_, step)| step < 20), None);
    }

    #[test]
    fn what_cannot_be_is_passed_over() {
        for places in [0, 1, MAX_NODES + 1, usize::MAX] {
            let wrong = BundleId { generation: 1, step: 5, place: 1, places };
            assert_eq!(holders(&[(7, vec![wrong])].into(), (1, 5)), None);
            let all = vec![wrong, id(1, 5, 0), id(1, 5, 1), id(1, 5, 2)];
            assert_eq!(newest(&[(7, all)].into(), |_| true), Some((1, 5)));
        }
    }

    proptest! {
        /// Each node has its own bundle and one other's copy, as [`layout::Peers`] has it: any one
        /// node may be lost.
        #[test]
        fn any_node_may_be_lost(places in 2usize..9, shift in 1usize..8, lost in 0usize..9) {
            let shift = 1 + shift % (places - 1);
            let mut holdings = Holdings::new();
            for place in 0..places {
                let id = |place| BundleId { generation: 1, step: 5, place, places };
                holdings.entry(place).or_default().push(id(place));
                holdings.entry((place + shift) % places).or_default().push(id(place));
            }
            holdings.remove(&(lost % places));
            prop_assert_eq!(newest(&holdings, all), Some((1, 5)));
        }
    }
}
