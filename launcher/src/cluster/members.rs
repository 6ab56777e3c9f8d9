//! Which nodes belong to a run, which of them are alive, and which place each has: a pure record
//! with the time as an argument.
//!
//! A node is alive while its agent is heard of; one that has been silent for long is dead, and
//! never comes back: an agent that is heard of again is a new member. Places follow the
//! infrastructure's order when they are first given; later only those of dead nodes are given
//! anew, first of all to a node of the same name.

use rank_protocol::agent::NodeInfo;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// The limits that membership goes by.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Nodes that a generation needs.
    pub num_nodes: usize,
    /// Silence after which a node is suspected.
    pub suspect: Duration,
    /// Silence after which it is dead.
    pub dead: Duration,
    /// Longest wait for enough nodes.
    pub join: Duration,
    /// Time in which a dead node's place is kept for another agent of its name.
    pub preference: Duration,
}

impl Limits {
    /// The usual limits.
    pub fn new(num_nodes: usize) -> Self {
        Self {
            num_nodes,
            suspect: Duration::from_secs(3),
            dead: Duration::from_secs(5),
            join: Duration::from_secs(600),
            preference: Duration::from_secs(1),
        }
    }
}

/// Failures of one node after which it gets no place any more.
const MAX_FAILURES: u32 = 2;

/// A member, by the order of joining; never used again.
pub type NodeId = usize;

/// What became of an agent that wants to join.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Joined {
    /// A new member.
    New(NodeId),
    /// A member whose connection had been lost.
    Again(NodeId),
    /// Another agent of its name has taken its place.
    Replaced,
}

/// What became of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It has been silent for some time.
    Suspected(NodeId),
    /// It was suspected, and is heard of again.
    Recovered(NodeId),
    /// It is dead, and why.
    Died(NodeId, String),
}

/// Whether there are enough nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seek {
    /// The nodes, by place.
    Found(Vec<NodeId>),
    /// Not yet.
    Waiting,
    /// Not in time; so many were there.
    TooFew(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Health {
    Alive,
    Suspected,
    Dead,
}

#[derive(Clone, Debug)]
struct Member {
    info: NodeInfo,
    heard: Instant,
    health: Health,
    is_replaced: bool,
}

/// All nodes that ever joined, and the places.
#[derive(Clone, Debug)]
pub struct Members {
    limits: Limits,
    members: Vec<Member>,
    places: Vec<Option<NodeId>>,
    sought: Option<Instant>,
    /// No change of a member is due before.
    next_tick: Option<Instant>,
    /// When places are worth another look, if no member changes before.
    next_look: Option<Instant>,
    /// Members that died of another's joining, and have not been told of.
    replaced: Vec<NodeId>,
    /// How often nodes have failed, by name.
    failures: BTreeMap<String, u32>,
    /// Names of nodes that get no place any more.
    quarantined: BTreeSet<String>,
}

impl Members {
    /// Nobody yet.
    pub fn new(limits: Limits) -> Self {
        let places = vec![None; limits.num_nodes];
        Self {
            limits,
            members: Vec::new(),
            places,
            sought: None,
            next_tick: None,
            next_look: None,
            replaced: Vec::new(),
            failures: BTreeMap::new(),
            quarantined: BTreeSet::new(),
        }
    }

    /// What a member says of itself.
    pub fn info(&self, node: NodeId) -> Option<&NodeInfo> {
        self.members.get(node).map(|member| &member.info)
    }

    /// Nodes that are not dead.
    pub fn num_alive(&self) -> usize {
        self.members.iter().filter(|member| member.health != Health::Dead).count()
    }

    /// Whether a node is not dead.
    pub fn is_alive(&self, node: NodeId) -> bool {
        self.members.get(node).is_some_and(|member| member.health != Health::Dead)
    }

    /// An agent wants to join.
    pub fn join(&mut self, info: NodeInfo, now: Instant) -> Joined {
        if self.members.iter().any(|m| m.is_replaced && m.info.agent == info.agent) {
            return Joined::Replaced;
        }
        let same_name =
            |member: &Member| member.health != Health::Dead && member.info.name == info.name;
        if let Some(node) = self.members.iter().position(same_name) {
            let member = &mut self.members[node];
            if member.info.agent == info.agent {
                member.heard = now;
                member.info = info;
                return Joined::Again(node);
            }
            // Its ranks went with the agent before.
            (member.health, member.is_replaced) = (Health::Dead, true);
            self.replaced.push(node);
            self.tick_by(now);
        }
        self.next_look = None;
        self.tick_by(now + self.limits.suspect);
        let (heard, health, is_replaced) = (now, Health::Alive, false);
        self.members.push(Member { info, heard, health, is_replaced });
        Joined::New(self.members.len() - 1)
    }

    /// Whether a node gets no place any more.
    pub fn is_quarantined(&self, name: &str) -> bool {
        self.quarantined.contains(name)
    }

    /// A node was looked at and is not well. Returns whether it is quarantined.
    pub fn is_unwell(&mut self, name: &str) -> bool {
        let failures = self.failures.entry(name.to_owned()).or_default();
        *failures += 1;
        if *failures >= MAX_FAILURES {
            self.quarantined.insert(name.to_owned());
        }
        self.is_quarantined(name)
    }

    /// A rank of a member failed, of the process or the node. Returns whether the member is
    /// quarantined for it, and so is none any more; not where nobody could take its place. One
    /// failure is enough where `is_certain` that it will not be the last.
    pub fn failed(&mut self, node: NodeId, is_certain: bool) -> bool {
        let Some(member) = self.members.get(node) else { return false };
        let name = member.info.name.clone();
        let failures = self.failures.entry(name.clone()).or_default();
        *failures += if is_certain { MAX_FAILURES } else { 1 };
        let is_free = |other: &NodeId| {
            *other != node
                && self.members[*other].health == Health::Alive
                && !self.places.contains(&Some(*other))
        };
        if *failures < MAX_FAILURES || !(0..self.members.len()).any(|other| is_free(&other)) {
            return false;
        }
        self.quarantined.insert(name);
        self.members[node].health = Health::Dead;
        self.next_look = None;
        true
    }

    /// A member gave a sign of life.
    pub fn heard(&mut self, node: NodeId, now: Instant) -> Option<Change> {
        let member = self.members.get_mut(node)?;
        member.heard = member.heard.max(now);
        if member.health != Health::Suspected {
            return None;
        }
        member.health = Health::Alive;
        self.next_look = None;
        self.tick_by(now + self.limits.suspect);
        Some(Change::Recovered(node))
    }

    /// A member's connection ended: it is waited for, and gets no place until it is heard of.
    pub fn disconnected(&mut self, node: NodeId) {
        if let Some(member) = self.members.get_mut(node)
            && member.health == Health::Alive
        {
            member.health = Health::Suspected;
        }
    }

    /// The coordinator itself was not there for so long: nobody could be heard.
    pub fn was_away(&mut self, time: Duration, now: Instant) {
        for member in &mut self.members {
            member.heard = now.min(member.heard + time).max(member.heard);
        }
    }

    /// When [`Members::tick`] is next of use. Signs of life move that on only when it is called:
    /// thousands of members give them every second.
    pub fn next_tick(&self) -> Option<Instant> {
        self.next_tick
    }

    fn tick_by(&mut self, at: Instant) {
        self.next_tick = Some(self.next_tick.map_or(at, |next| next.min(at)));
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Instant) -> Vec<Change> {
        let mut changes: Vec<Change> = Vec::new();
        for node in std::mem::take(&mut self.replaced) {
            let why = "another agent of its name took its place".to_owned();
            changes.push(Change::Died(node, why));
        }
        for (node, member) in self.members.iter_mut().enumerate() {
            let silence = now.saturating_duration_since(member.heard);
            if member.health == Health::Alive && silence >= self.limits.suspect {
                member.health = Health::Suspected;
                changes.push(Change::Suspected(node));
            }
            if member.health == Health::Suspected && silence >= self.limits.dead {
                member.health = Health::Dead;
                self.next_look = None;
                let why = format!("no sign of life for {:.1} s", silence.as_secs_f64());
                changes.push(Change::Died(node, why));
            }
        }
        let silent = self.members.iter().filter_map(|member| match member.health {
            Health::Alive => Some(member.heard + self.limits.suspect),
            Health::Suspected => Some(member.heard + self.limits.dead),
            Health::Dead => None,
        });
        self.next_tick = silent.min();
        changes
    }

    /// Gives these nodes their places, as an earlier coordinator did.
    pub fn place(&mut self, nodes: &[NodeId]) {
        self.places = nodes.iter().copied().map(Some).collect();
    }

    /// A generation needs its nodes from now on.
    pub fn seek(&mut self, now: Instant) {
        (self.sought, self.next_look) = (Some(now), None);
    }

    /// When [`Members::found`] is next of use, beside a change of members.
    pub fn next_seek(&self, now: Instant) -> Option<Instant> {
        let sought = self.sought?;
        let preferred = sought + self.limits.preference;
        Some(if preferred > now { preferred } else { sought + self.limits.join })
    }

    /// Whether the nodes that are sought are there. The search is over once they are, or never
    /// will be.
    pub fn found(&mut self, now: Instant) -> Seek {
        let Some(sought) = self.sought else { return Seek::Waiting };
        // Thousands of agents give signs of life while a few are waited for.
        if self.next_look.is_some_and(|look| now < look) {
            return Seek::Waiting;
        }
        self.next_look = self.next_seek(now);
        let places = self.fill(now.saturating_duration_since(sought) >= self.limits.preference);
        if let Some(places) = places {
            self.places = places.iter().copied().map(Some).collect();
            self.sought = None;
            return Seek::Found(places);
        }
        if now >= sought + self.limits.join {
            self.sought = None;
            return Seek::TooFew(self.num_alive());
        }
        Seek::Waiting
    }

    /// Every place with a node that is alive, where that is possible. A suspected node is waited
    /// for: it will soon be the one or the other.
    fn fill(&self, is_anyone_welcome: bool) -> Option<Vec<NodeId>> {
        let is_well = |node: NodeId| self.members[node].health == Health::Alive;
        let well: Vec<NodeId> = (0..self.members.len()).filter(|node| is_well(*node)).collect();
        // Looked at after each of thousands that join.
        if well.len() < self.places.len() {
            return None;
        }
        let placed: BTreeSet<NodeId> = self.places.iter().flatten().copied().collect();
        let mut free: Vec<NodeId> =
            well.into_iter().filter(|node| !placed.contains(node)).collect();
        free.sort_by_key(|node| {
            let info = &self.members[*node].info;
            (info.index.unwrap_or(u64::MAX), &info.name)
        });
        let mut places = self.places.clone();
        for place in &mut places {
            let Some(before) = *place else { continue };
            if self.is_alive(before) {
                if !is_well(before) {
                    return None;
                }
                continue;
            }
            let name = &self.members[before].info.name;
            *place = free
                .iter()
                .position(|node| self.members[*node].info.name == *name)
                .map(|at| free.remove(at));
            if place.is_none() && !is_anyone_welcome {
                return None;
            }
        }
        let mut free = free.into_iter();
        places.into_iter().map(|place| place.or_else(|| free.next())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Members under test, and their clock.
    struct Nodes {
        members: Members,
        now: Instant,
    }

    impl Nodes {
        fn new(num_nodes: usize) -> Self {
            Self { members: Members::new(Limits::new(num_nodes)), now: Instant::now() }
        }

        fn join(&mut self, name: &str, agent: &str) -> Joined {
            let (name, agent) = (name.to_owned(), agent.to_owned());
            self.members.join(NodeInfo { name, agent, ..NodeInfo::default() }, self.now)
        }

        fn after(&mut self, seconds: f64, heard: &[NodeId]) -> Vec<Change> {
            self.now += Duration::from_secs_f64(seconds);
            let recovered: Vec<Change> =
                heard.iter().filter_map(|node| self.members.heard(*node, self.now)).collect();
            [recovered, self.members.tick(self.now)].concat()
        }

        fn seek(&mut self) -> Seek {
            self.members.seek(self.now);
            self.found()
        }

        fn found(&mut self) -> Seek {
            self.members.found(self.now)
        }
    }

    #[test]
    fn places_follow_the_infrastructures_order() {
        let mut nodes = Nodes::new(2);
        for (name, index) in [("c", Some(2)), ("a", None), ("b", Some(1))] {
            let info =
                NodeInfo { name: name.into(), agent: name.into(), index, ..NodeInfo::default() };
            nodes.members.join(info, nodes.now);
        }
        assert_eq!(nodes.seek(), Seek::Found(vec![2, 0]));
        assert_eq!(nodes.seek(), Seek::Found(vec![2, 0]), "and stay as they are");
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
    fn too_few_nodes_are_waited_for_ten_minutes() {
        let mut nodes = Nodes::new(2);
        nodes.join("a", "1");
        assert_eq!(nodes.seek(), Seek::Waiting);
        nodes.after(599.0, &[0]);
        assert_eq!(nodes.found(), Seek::Waiting);
        nodes.after(1.0, &[0]);
        assert_eq!(nodes.found(), Seek::TooFew(1));
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
                nodes.members.sought.get_or_insert(nodes.now);
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
}
