//! Membership, step by step and under random events.

use super::*;
use proptest::prelude::*;

/// Members under test, and their clock.
struct Nodes {
    members: Members,
    now: Instant,
}

impl Nodes {
    fn new(num_nodes: usize) -> Self {
        Self::of(Sizes::fixed(num_nodes, 1))
    }

    fn of(sizes: Sizes) -> Self {
        Self { members: Members::new(Limits::new(sizes), BTreeSet::new()), now: Instant::now() }
    }

    fn join(&mut self, name: &str, agent: &str) -> Joined {
        let (name, agent) = (name.to_owned(), agent.to_owned());
        self.members.join(NodeInfo { name, agent, ..NodeInfo::default() }, self.now)
    }

    fn join_at(&mut self, name: &str, index: Option<u64>) {
        let (name, agent) = (name.to_owned(), name.to_owned());
        let info = NodeInfo { name, agent, index, ..NodeInfo::default() };
        self.members.join(info, self.now);
    }

    fn after(&mut self, seconds: f64, heard: &[NodeId]) -> Vec<Change> {
        self.now += Duration::from_secs_f64(seconds);
        let recovered: Vec<Change> =
            heard.iter().filter_map(|node| self.members.heard(*node, self.now)).collect();
        [recovered, self.members.tick(self.now)].concat()
    }

    fn seek(&mut self) -> Seek {
        self.seek_for(usize::MAX, None)
    }

    fn seek_for(&mut self, ranks: usize, fewer_after: Option<f64>) -> Seek {
        let fewer_after = fewer_after.map(Duration::from_secs_f64);
        self.members.seek(ranks, fewer_after, self.now);
        self.found()
    }

    fn found(&mut self) -> Seek {
        self.members.found(self.now)
    }
}

#[test]
fn places_follow_the_infrastructures_order() {
    let mut nodes = Nodes::new(2);
    for (name, index) in [("c", Some(1)), ("a", None), ("b", Some(0))] {
        nodes.join_at(name, index);
    }
    assert_eq!(nodes.seek(), Seek::Found(vec![2, 0]));
    assert_eq!(nodes.seek(), Seek::Found(vec![2, 0]), "and stay as they are");
}

#[test]
fn a_spare_that_is_early_waits_a_moment_for_those_before_it() {
    for is_late in [true, false] {
        let mut nodes = Nodes::new(2);
        nodes.join_at("spare", Some(2));
        nodes.join_at("b", Some(1));
        // No fewer ranks than there is room for: the wait is not for these.
        assert_eq!(nodes.seek_for(2, None), Seek::Waiting);
        nodes.after(4.9, &[0, 1]);
        let expected = match is_late {
            true => vec![1, 0],
            false => {
                nodes.join_at("a", Some(0));
                vec![2, 1]
            }
        };
        nodes.after(if is_late { 0.1 } else { 0.0 }, &[0, 1]);
        assert_eq!(nodes.found(), Seek::Found(expected));
    }
}

#[test]
fn a_silent_node_is_suspected_then_dead_and_a_spare_takes_its_place() {
    let mut nodes = Nodes::new(2);
    for name in ["a", "b", "spare"] {
        nodes.join(name, name);
    }
    assert_eq!(nodes.seek(), Seek::Found(vec![0, 1]));
    assert_eq!(nodes.after(2.9, &[0, 2]), []);
    assert_eq!(nodes.after(0.1, &[0, 2]), [Change::Suspected(1)]);
    assert_eq!(nodes.seek(), Seek::Waiting, "it may be heard of again");
    let died = nodes.after(2.0, &[0, 2]);
    assert_eq!(died, [Change::Died(1, "no sign of life for 5.0 s".into())]);
    assert_eq!(nodes.seek(), Seek::Waiting, "the same node is preferred for a second");
    nodes.after(1.0, &[0, 2]);
    assert_eq!(nodes.found(), Seek::Found(vec![0, 2]));
}

#[test]
fn a_node_of_the_same_name_has_its_place_back() {
    let mut nodes = Nodes::new(2);
    nodes.join("a", "1");
    nodes.join("b", "1");
    assert_eq!(nodes.seek(), Seek::Found(vec![0, 1]));
    nodes.join("spare", "1");
    assert_eq!(nodes.join("a", "2"), Joined::New(3));
    assert_eq!(nodes.join("a", "1"), Joined::Replaced, "two of a name do not take turns");
    let died = nodes.after(0.0, &[]);
    assert_eq!(died, [Change::Died(0, "another agent of its name took its place".into())]);
    assert_eq!(nodes.seek(), Seek::Found(vec![3, 1]));
}

#[test]
fn a_machine_of_a_name_that_is_taken_is_refused_until_the_other_is_silent() {
    let mut nodes = Nodes::new(1);
    let info = |boot: &str| NodeInfo {
        name: "a".into(),
        agent: boot.into(),
        boot_id: boot.into(),
        ..NodeInfo::default()
    };
    assert_eq!(nodes.members.join(info("1"), nodes.now), Joined::New(0));
    assert_eq!(nodes.after(2.9, &[]), []);
    assert_eq!(nodes.members.join(info("2"), nodes.now), Joined::Taken);
    assert_eq!(nodes.after(0.1, &[]), [Change::Suspected(0)]);
    assert_eq!(nodes.members.join(info("2"), nodes.now), Joined::New(1));
}

#[test]
fn a_connection_that_comes_back_is_the_same_member() {
    let mut nodes = Nodes::new(1);
    assert_eq!(nodes.join("a", "1"), Joined::New(0));
    assert_eq!(nodes.after(4.0, &[]), [Change::Suspected(0)]);
    assert_eq!(nodes.join("a", "1"), Joined::Again(0));
    assert_eq!(nodes.after(0.5, &[0]), [Change::Recovered(0)]);
    nodes.after(6.0, &[]);
    assert_eq!(nodes.join("a", "1"), Joined::New(1), "the dead do not come back");
}

#[test]
fn nobody_is_silent_while_the_coordinator_does_not_listen() {
    let mut nodes = Nodes::new(1);
    nodes.join("a", "1");
    nodes.after(1.0, &[]);
    nodes.now += Duration::from_secs(60);
    nodes.members.was_away(Duration::from_secs(60), nodes.now);
    assert_eq!(nodes.after(1.5, &[]), []);
    assert_eq!(nodes.after(0.5, &[]), [Change::Suspected(0)]);
}

#[test]
fn a_spare_that_is_not_connected_gets_no_place() {
    let mut nodes = Nodes::new(1);
    nodes.join("a", "1");
    nodes.join("b", "1");
    nodes.members.disconnected(0);
    assert_eq!(nodes.seek(), Seek::Found(vec![1]));
}

#[test]
fn a_node_that_fails_twice_is_quarantined_where_another_can_take_its_place() {
    let mut nodes = Nodes::new(2);
    for name in ["a", "b"] {
        nodes.join(name, name);
    }
    assert_eq!(nodes.seek(), Seek::Found(vec![0, 1]));
    assert!(!nodes.members.failed(1, false));
    assert!(!nodes.members.failed(1, false), "nobody else is there");
    nodes.join("spare", "1");
    assert!(nodes.members.failed(1, false));
    assert!(nodes.members.is_quarantined("b") && !nodes.members.is_quarantined("a"));
    nodes.after(1.0, &[0, 1, 2]);
    assert_eq!(nodes.seek(), Seek::Waiting, "its name is preferred for a second");
    nodes.after(1.0, &[0, 2]);
    assert_eq!(nodes.found(), Seek::Found(vec![0, 2]));
}

#[test]
fn a_node_that_certainly_fails_again_is_quarantined_at_once() {
    let mut nodes = Nodes::new(2);
    for name in ["a", "b", "spare"] {
        nodes.join(name, name);
    }
    assert_eq!(nodes.seek(), Seek::Found(vec![0, 1]));
    assert!(!nodes.members.failed(0, false));
    assert!(nodes.members.failed(1, true));
    assert!(nodes.members.is_quarantined("b") && !nodes.members.is_quarantined("a"));
}

#[test]
fn a_node_that_was_found_unwell_twice_is_quarantined() {
    let mut nodes = Nodes::new(1);
    assert!(!nodes.members.is_unwell("a"));
    assert!(!nodes.members.is_unwell("b"));
    assert!(nodes.members.is_unwell("a"));
    assert!(nodes.members.is_quarantined("a"));
}

#[test]
fn a_quarantined_node_is_better_than_none() {
    let mut nodes = Nodes::new(2);
    for name in ["a", "b", "spare"] {
        nodes.join(name, name);
    }
    assert_eq!(nodes.seek(), Seek::Found(vec![0, 1]));
    assert!(nodes.members.failed(1, true));
    assert!(!nodes.members.pardon("b", nodes.now), "nobody is sought");
    nodes.after(40.0, &[0]);
    assert_eq!(nodes.seek(), Seek::Waiting);
    nodes.after(29.9, &[0]);
    assert!(!nodes.members.pardon("b", nodes.now), "others may come");
    nodes.after(0.1, &[0]);
    assert!(nodes.members.pardon("b", nodes.now) && !nodes.members.is_quarantined("b"));
    nodes.join("b", "2");
    assert_eq!(nodes.found(), Seek::Found(vec![0, 3]));
    // It is let go for the first failure where another waits.
    nodes.join("c", "c");
    assert!(nodes.members.failed(3, false));
    nodes.seek();
    assert!(!nodes.members.pardon("b", nodes.now));
    nodes.after(30.0, &[0, 4]);
    assert!(!nodes.members.pardon("b", nodes.now), "there are enough");
}

#[test]
fn too_few_nodes_are_waited_for_ten_minutes() {
    let mut nodes = Nodes::new(2);
    nodes.join("a", "1");
    assert_eq!(nodes.seek(), Seek::Waiting);
    nodes.after(599.0, &[0]);
    assert_eq!(nodes.found(), Seek::Waiting);
    nodes.after(1.0, &[0]);
    assert_eq!(nodes.found(), Seek::TooFew(1));
}

/// Four nodes, each a replica; batches divide over 1, 2 and 4 of them.
fn elastic() -> Nodes {
    let mut nodes = Nodes::of(Sizes::new((&[1, 2], 4), 8, 8));
    for name in ["a", "b", "c", "d"] {
        nodes.join(name, "1");
    }
    assert_eq!(nodes.seek_for(32, None), Seek::Found(vec![0, 1, 2, 3]));
    nodes
}

#[test]
fn a_run_goes_on_with_fewer_nodes_after_the_wait() {
    let mut nodes = elastic();
    nodes.after(5.0, &[0, 2, 3]);
    assert_eq!(nodes.members.room(), Some(Size { replicas: 2, ranks: 16, nodes: 2 }));
    assert_eq!(nodes.seek_for(32, Some(10.0)), Seek::Waiting);
    nodes.after(9.9, &[0, 2, 3]);
    assert_eq!(nodes.found(), Seek::Waiting);
    nodes.after(0.1, &[0, 2, 3]);
    assert_eq!(nodes.found(), Seek::Found(vec![0, 2]), "of three nodes, for two replicas");
    assert_eq!(nodes.members.size(2), Size { replicas: 2, ranks: 16, nodes: 2 });
    // Another failure of the same ranks finds them at once.
    assert_eq!(nodes.seek_for(16, Some(10.0)), Seek::Found(vec![0, 2]));
    nodes.join("b", "2");
    assert_eq!(nodes.members.room(), Some(nodes.members.size(4)));
    assert_eq!(nodes.seek_for(16, Some(10.0)), Seek::Found(vec![0, 2, 4, 3]));
}

#[test]
fn a_spare_within_the_wait_keeps_the_run_whole() {
    let mut nodes = elastic();
    nodes.after(5.0, &[0, 2, 3]);
    assert_eq!(nodes.seek_for(32, Some(10.0)), Seek::Waiting);
    nodes.join("spare", "1");
    nodes.after(1.0, &[0, 2, 3, 4]);
    assert_eq!(nodes.found(), Seek::Found(vec![0, 4, 2, 3]));
}

#[test]
fn fewer_than_the_least_are_waited_for() {
    let mut nodes = Nodes::of(Sizes::new((&[2], 4), 8, 8));
    for name in ["a", "b", "c", "d"] {
        nodes.join(name, "1");
    }
    assert_eq!(nodes.seek_for(32, None), Seek::Found(vec![0, 1, 2, 3]));
    nodes.after(5.0, &[3]);
    assert_eq!(nodes.seek_for(32, Some(0.0)), Seek::Waiting);
    nodes.after(599.0, &[3]);
    assert_eq!(nodes.found(), Seek::Waiting);
    nodes.after(1.0, &[3]);
    assert_eq!(nodes.found(), Seek::TooFew(1));
}

#[test]
fn a_run_that_never_was_whole_begins_with_fewer_nodes_when_no_more_come() {
    let mut nodes = Nodes::of(Sizes::new((&[1], 2), 8, 8));
    nodes.join("a", "1");
    assert_eq!(nodes.seek_for(16, None), Seek::Waiting);
    nodes.after(599.0, &[0]);
    assert_eq!(nodes.found(), Seek::Waiting);
    nodes.after(1.0, &[0]);
    assert_eq!(nodes.found(), Seek::Found(vec![0]));
}

#[test]
fn a_suspected_node_is_waited_for_before_the_run_shrinks() {
    let mut nodes = elastic();
    nodes.after(5.0, &[0, 2, 3]);
    nodes.members.disconnected(2);
    assert_eq!(nodes.seek_for(32, Some(0.0)), Seek::Waiting);
    nodes.after(1.0, &[0, 2, 3]);
    assert_eq!(nodes.found(), Seek::Found(vec![0, 2]));
}

proptest! {
    /// Whoever joins, falls silent or comes back: a generation's nodes are alive, all
    /// different, and a node that is alive keeps its place.
    #[test]
    fn no_order_of_events_breaks_the_rules(
        events in prop::collection::vec((0_usize..5, 0_u32..3, 0_u64..3000), 1..80),
    ) {
        let mut nodes = Nodes::new(3);
        let mut before: Vec<NodeId> = Vec::new();
        for (who, what, millis) in events {
            let heard: Vec<NodeId> = (0..nodes.members.members.len())
                .filter(|node| nodes.members.is_alive(*node) && node % 5 != who)
                .collect();
            nodes.after(millis as f64 / 1e3, &heard);
            if what > 0 {
                nodes.join(&format!("n{who}"), &what.to_string());
            }
            nodes.after(0.0, &[]);
            if nodes.members.search.is_none() {
                nodes.seek();
            }
            let Seek::Found(places) = nodes.found() else { continue };
            prop_assert_eq!(places.len(), 3);
            for (place, node) in places.iter().enumerate() {
                prop_assert!(nodes.members.is_alive(*node));
                prop_assert!(!places[..place].contains(node));
                if let Some(held) = before.get(place) {
                    prop_assert!(held == node || !nodes.members.is_alive(*held));
                }
            }
            before = places;
        }
    }
}
