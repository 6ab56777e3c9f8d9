//! Which nodes belong to a run, which of them are alive, and which place each has: a pure record
//! with the time as an argument.
//!
//! A node is alive while its agent is heard of; one that has been silent for long is dead, and
//! never comes back: an agent that is heard of again is a new member. Places follow the
//! infrastructure's order when they are first given; later only those of dead nodes are given
//! anew, first of all to a node of the same name. Where a run may go on with fewer nodes, the last
//! places are given up, and who had one of them takes a free one before.

use super::sizes::{Size, Sizes};
use rank_protocol::agent::NodeInfo;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// The limits that membership goes by.
#[derive(Clone, Debug)]
pub struct Limits {
    /// The nodes that a generation needs, and with how many fewer it may do.
    pub sizes: Sizes,
    /// Silence after which a node is suspected.
    pub suspect: Duration,
    /// Silence after which it is dead.
    pub dead: Duration,
    /// Longest wait for enough nodes.
    pub join: Duration,
    /// Time in which a dead node's place is kept for another agent of its name.
    pub preference: Duration,
    /// How long spares wait, before the first generation, for nodes that come before them.
    pub late: Duration,
    /// How long a run that lacks nodes waits for others before it takes a quarantined one.
    pub last_resort: Duration,
}

impl Limits {
    /// The usual limits.
    pub fn new(sizes: Sizes) -> Self {
        Self {
            sizes,
            suspect: Duration::from_secs(3),
            dead: Duration::from_secs(5),
            join: Duration::from_secs(600),
            preference: Duration::from_secs(1),
            late: Duration::from_secs(5),
            last_resort: Duration::from_secs(30),
        }
    }
}

/// Failures of one node after which it gets no place while there are others.
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
    /// Another machine of its name is there, and is heard of.
    Taken,
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

/// A search for the nodes of a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Search {
    since: Instant,
    /// Ranks that find room at once; more are welcome.
    ranks: usize,
    /// From when on fewer will do.
    fewer: Instant,
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
    search: Option<Search>,
    /// No change of a member is due before.
    next_tick: Option<Instant>,
    /// When places are worth another look, if no member changes before.
    next_look: Option<Instant>,
    /// Members that died of another's joining, and have not been told of.
    replaced: Vec<NodeId>,
    /// How often nodes have failed, by name.
    failures: BTreeMap<String, u32>,
    /// Names of nodes that get no place while there are others.
    quarantined: BTreeSet<String>,
}

impl Members {
    /// Nobody yet; nodes of these names get no place.
    pub fn new(limits: Limits, quarantined: BTreeSet<String>) -> Self {
        let places = vec![None; limits.sizes.whole().nodes];
        Self {
            limits,
            members: Vec::new(),
            places,
            search: None,
            next_tick: None,
            next_look: None,
            replaced: Vec::new(),
            failures: BTreeMap::new(),
            quarantined,
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

    /// The node of this name that is not dead.
    pub fn alive_named(&self, name: &str) -> Option<NodeId> {
        (0..self.members.len()).find(|&at| self.is_alive(at) && self.members[at].info.name == name)
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
            // A node that was started anew is silent for longer than that.
            let is_heard_of = member.health == Health::Alive
                && now.saturating_duration_since(member.heard) < self.limits.suspect;
            if is_heard_of && member.info.boot_id != info.boot_id {
                return Joined::Taken;
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

    /// Whether a node gets no place while there are others.
    pub fn is_quarantined(&self, name: &str) -> bool {
        self.quarantined.contains(name)
    }

    /// Lets a quarantined node join after all, where a generation has waited in vain for others: a
    /// node that may fail again is better than no run. Returns whether it may.
    pub fn pardon(&mut self, name: &str, now: Instant) -> bool {
        let has_waited = self.search.is_some_and(|search| {
            now.saturating_duration_since(search.since) >= self.limits.last_resort
        });
        has_waited && self.num_alive() < self.places.len() && self.quarantined.remove(name)
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
        let places = nodes.iter().copied().map(Some).chain(std::iter::repeat(None));
        self.places = places.take(self.limits.sizes.whole().nodes).collect();
    }

    /// The size of a generation on so many nodes.
    pub fn size(&self, nodes: usize) -> Size {
        self.limits.sizes.within(nodes).unwrap_or_else(|| self.limits.sizes.whole())
    }

    /// The largest size for which there are nodes that are well, where there is one.
    pub fn room(&self) -> Option<Size> {
        let well = self.members.iter().filter(|member| member.health == Health::Alive);
        self.limits.sizes.within(well.count())
    }

    /// A generation needs nodes for so many `ranks` from now on, or for more; it does with fewer
    /// after this time, or with `None` once no more nodes are waited for.
    pub fn seek(&mut self, ranks: usize, fewer_after: Option<Duration>, now: Instant) {
        let wait = fewer_after.map_or(self.limits.join, |wait| wait.min(self.limits.join));
        self.search = Some(Search { since: now, ranks, fewer: now + wait });
        self.next_look = None;
    }

    /// When [`Members::found`] is next of use, beside a change of members.
    pub fn next_seek(&self, now: Instant) -> Option<Instant> {
        let Search { since, fewer, .. } = self.search?;
        let end = since + self.limits.join;
        let next = [since + self.limits.preference, since + self.limits.late, fewer]
            .into_iter()
            .filter(|at| *at > now)
            .min();
        Some(next.map_or(end, |next| next.min(end)))
    }

    /// Whether the nodes that are sought are there. The search is over once they are, or never
    /// will be.
    pub fn found(&mut self, now: Instant) -> Seek {
        let Some(search) = self.search else { return Seek::Waiting };
        // Thousands of agents give signs of life while a few are waited for.
        if self.next_look.is_some_and(|look| now < look) {
            return Seek::Waiting;
        }
        self.next_look = self.next_seek(now);
        let sought = now.saturating_duration_since(search.since);
        let places = self.fill(sought).or_else(|| {
            // Where there is room for all, that some wait for others has been decided.
            let size = self.room().filter(|size| size.nodes < self.places.len())?;
            let will_do = size.ranks >= search.ranks || now >= search.fewer;
            will_do.then(|| self.fill_fewer(size)).flatten()
        });
        if let Some(places) = places {
            self.place(&places);
            self.search = None;
            return Seek::Found(places);
        }
        if now >= search.since + self.limits.join {
            self.search = None;
            return Seek::TooFew(self.num_alive());
        }
        Seek::Waiting
    }

    fn is_well(&self, node: NodeId) -> bool {
        self.members[node].health == Health::Alive
    }

    /// Nodes that are well and have no place, in the infrastructure's order.
    fn free(&self) -> Vec<NodeId> {
        let placed: BTreeSet<NodeId> = self.places.iter().flatten().copied().collect();
        let mut free: Vec<NodeId> = (0..self.members.len())
            .filter(|node| self.is_well(*node) && !placed.contains(node))
            .collect();
        free.sort_by_key(|node| {
            let info = &self.members[*node].info;
            (info.index.unwrap_or(u64::MAX), &info.name)
        });
        free
    }

    /// Every place with a node that is alive, where that is possible. A suspected node is waited
    /// for: it will soon be the one or the other.
    fn fill(&self, sought: Duration) -> Option<Vec<NodeId>> {
        // Looked at after each of thousands that join.
        if (0..self.members.len()).filter(|node| self.is_well(*node)).count() < self.places.len() {
            return None;
        }
        let mut free = self.free();
        let mut places = self.places.clone();
        for place in &mut places {
            let Some(before) = *place else { continue };
            if self.is_alive(before) {
                if !self.is_well(before) {
                    return None;
                }
                continue;
            }
            let name = &self.members[before].info.name;
            *place = free
                .iter()
                .position(|node| self.members[*node].info.name == *name)
                .map(|at| free.remove(at));
            if place.is_none() && sought < self.limits.preference {
                return None;
            }
        }
        let mut free = free.into_iter();
        let filled: Vec<NodeId> =
            places.into_iter().map(|place| place.or_else(|| free.next())).collect::<Option<_>>()?;
        let is_first = self.places.iter().all(Option::is_none);
        let is_spare = |node: &NodeId| {
            self.members[*node].info.index.is_some_and(|index| index >= filled.len() as u64)
        };
        // Who was meant to have its place may be a moment late.
        let may_come = is_first && sought < self.limits.late && filled.iter().any(is_spare);
        (!may_come).then_some(filled)
    }

    /// The first places of a `size` for which there is room, each with a node that is well. Who is
    /// in one of them stays; the others are filled with those of later places, and then with
    /// whoever is there.
    fn fill_fewer(&self, size: Size) -> Option<Vec<NodeId>> {
        let is_suspected = |node: &NodeId| self.is_alive(*node) && !self.is_well(*node);
        if self.places.iter().flatten().any(is_suspected) {
            return None;
        }
        let alive = |place: &Option<NodeId>| place.filter(|node| self.is_alive(*node));
        let (first, rest) = self.places.split_at(size.nodes.min(self.places.len()));
        let mut others = rest.iter().filter_map(alive).chain(self.free());
        first.iter().map(|place| alive(place).or_else(|| others.next())).collect()
    }
}

#[cfg(test)]
mod tests;
