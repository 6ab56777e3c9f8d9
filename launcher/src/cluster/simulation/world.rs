//! The clock, what happens next, and the rules that must hold whatever happens.
#![cfg(test)]

use super::faults::{self, Fault, Kind, WINDOW};
use super::head::{Head, Log};
use super::network::{Dial, Side, Way, Wire};
use super::node::AgentProcess;
use super::ranks::{Disk, Generation, RankProcess, meeting};
use crate::supervisor::cause::Exit;
use crate::supervisor::rank::Input;
use fastrand::Rng;
use rank_protocol::agent::{Answer, FromAgent, ToAgent};
use rank_protocol::session::Numbered;
use rank_protocol::{FailureClass, exit_code};
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hasher};
use std::time::{Duration, Instant};

mod injuries;
mod processes;
mod traffic;
mod work;

/// After the last fault a run must come to its end within this time.
const PATIENCE: Duration = Duration::from_secs(3600);
/// After its end, everything must be gone within this time.
const CLEARING: Duration = Duration::from_secs(60);
/// Steps of a run, and between two saves.
const STEPS: u64 = 60;
const SAVE_EVERY: u64 = 5;

/// What came of a seed.
pub struct Outcome {
    /// Of everything that happened, in order and with the time.
    pub hash: u64,
    /// What was met how often.
    pub fired: BTreeMap<Kind, u64>,
    /// Where it was asked for.
    pub trace: Vec<String>,
    /// Generations that were started.
    pub generations: Vec<u64>,
}

/// What happens at a time.
#[derive(Debug)]
enum Happens {
    Fault(Box<Fault>),
    HeadStarts,
    HeadWakes { epoch: u64 },
    HeadGone { epoch: u64 },
    FenceRaised { epoch: u64, next: u64 },
    Searched { epoch: u64 },
    AgentStarts { host: usize },
    AgentWakes { agent: u64 },
    Dialed { dial: u64 },
    Answered { dial: u64, wire: u64 },
    DialExpires { dial: u64 },
    DialFailed { agent: u64, why: String, code: Option<i32> },
    Up { wire: u64, frame: Box<Numbered<FromAgent>> },
    Down { wire: u64, frame: Box<Numbered<ToAgent>> },
    Ended { wire: u64, side: Side },
    Said { agent: u64, input: Box<Input> },
    RankBegins { process: u64, generation: u64, world_size: usize },
    Command { process: u64, command: Box<ToAgent> },
    LinkLost { process: u64, generation: u64 },
    LetsGo { process: u64, generation: u64 },
    RankEnds { process: u64, exit: Exit },
    Step { generation: u64 },
    Commit { process: u64, generation: u64, step: u64 },
}

/// A world.
pub struct World {
    random: Rng,
    start: Instant,
    now: Instant,
    queue: BTreeMap<(Instant, u64), Happens>,
    num_queued: u64,
    num_nodes: usize,
    ranks_per_node: usize,
    ways: Vec<Way>,
    /// The agent on each host.
    hosts: Vec<Option<u64>>,
    agents: BTreeMap<u64, AgentProcess>,
    head: Option<Head>,
    head_paused_until: Instant,
    num_heads: u64,
    log: Log,
    disk: Disk,
    wires: BTreeMap<u64, Wire>,
    dials: BTreeMap<u64, Dial>,
    answers: BTreeMap<u64, Answer>,
    processes: BTreeMap<u64, RankProcess>,
    generations: BTreeMap<u64, Generation>,
    started: BTreeSet<(u64, usize)>,
    num_ids: u64,
    fired: BTreeMap<Kind, u64>,
    hasher: DefaultHasher,
    trace: Option<Vec<String>>,
    violation: Option<String>,
    over_at: Option<Instant>,
}

impl World {
    /// With the faults of the seed.
    pub fn new(seed: u64, is_traced: bool) -> Self {
        let mut world = Self::without_faults(seed, is_traced);
        for (at, fault) in faults::draw(&mut world.random, world.hosts.len()) {
            world.plan(at, fault);
        }
        world
    }

    /// A fault will happen so long after the start.
    pub fn plan(&mut self, at: Duration, fault: Fault) {
        self.after(at.as_secs_f64(), Happens::Fault(Box::new(fault)));
    }

    /// The nodes and ranks of the seed alone.
    pub fn without_faults(seed: u64, is_traced: bool) -> Self {
        let mut random = Rng::with_seed(seed);
        let start = Instant::now();
        let num_nodes = random.usize(1..4);
        let num_hosts = num_nodes + random.usize(1..4);
        let mut world = Self {
            start,
            now: start,
            queue: BTreeMap::new(),
            num_queued: 0,
            num_nodes,
            ranks_per_node: random.usize(1..3),
            ways: vec![Way::new(start); num_hosts],
            hosts: vec![None; num_hosts],
            agents: BTreeMap::new(),
            head: None,
            head_paused_until: start,
            num_heads: 0,
            log: Log::default(),
            disk: Disk::default(),
            wires: BTreeMap::new(),
            dials: BTreeMap::new(),
            answers: BTreeMap::new(),
            processes: BTreeMap::new(),
            generations: BTreeMap::new(),
            started: BTreeSet::new(),
            num_ids: 0,
            fired: BTreeMap::new(),
            hasher: DefaultHasher::new(),
            trace: is_traced.then(Vec::new),
            violation: None,
            over_at: None,
            random,
        };
        world.after(0.0, Happens::HeadStarts);
        for host in 0..num_hosts {
            let seconds = 2.0 * world.random.f64();
            world.after(seconds, Happens::AgentStarts { host });
        }
        world
    }

    /// Lives it; an error says which rule was broken, after the trace where it was asked for.
    pub fn run(mut self) -> Result<Outcome, String> {
        while let Some(((at, _), happens)) = self.queue.pop_first() {
            self.now = at;
            if let Some(until) = self.pause(&happens) {
                self.at(until, happens);
                continue;
            }
            self.note(&happens);
            self.happens(happens);
            self.pump();
            self.check_claims();
            if self.violation.is_some() || self.is_at_the_end() {
                break;
            }
        }
        if let Some(violation) = self.violation {
            let lines = self.trace.unwrap_or_default();
            return Err([lines, vec![violation]].concat().join("\n"));
        }
        let trace = self.trace.unwrap_or_default();
        let (hash, generations) = (self.hasher.finish(), self.log.generations);
        Ok(Outcome { hash, fired: self.fired, trace, generations })
    }

    fn is_at_the_end(&mut self) -> bool {
        let left = self.agents.len() + self.processes.values().filter(|p| p.is_alive).count();
        match self.over_at {
            Some(over) if left == 0 => {
                let (code, reason) = self.log.end.clone().unwrap_or_default();
                if code != exit_code::DONE {
                    self.violate(format!("the run ended with {code}: {reason}"));
                }
                let steps: Vec<u64> = self.disk.commits.iter().map(|(_, step)| *step).collect();
                let all: Vec<u64> = (1..=STEPS / SAVE_EVERY).map(|n| n * SAVE_EVERY).collect();
                if steps != all {
                    self.violate(format!("commits of the steps {steps:?}"));
                }
                let _ = over;
                true
            }
            Some(over) if self.now > over + CLEARING => {
                self.violate(format!("{left} agents and ranks outlive the run"));
                true
            }
            None if self.now > self.start + WINDOW + PATIENCE => {
                self.violate("the run does not go on after the faults".into());
                true
            }
            _ => false,
        }
    }

    fn violate(&mut self, what: String) {
        let seconds = (self.now - self.start).as_secs_f64();
        self.violation.get_or_insert(format!("at {seconds:.3} s: {what}"));
    }

    fn note(&mut self, happens: &Happens) {
        let micros = (self.now - self.start).as_micros();
        let line = format!("{micros} {happens:?}");
        self.hasher.write(line.as_bytes());
        if let Some(trace) = &mut self.trace {
            trace.push(line);
        }
    }

    fn fire(&mut self, kind: Kind) {
        *self.fired.entry(kind).or_default() += 1;
    }

    fn at(&mut self, at: Instant, happens: Happens) {
        self.num_queued += 1;
        self.queue.insert((at, self.num_queued), happens);
    }

    fn after(&mut self, seconds: f64, happens: Happens) {
        self.at(self.now + Duration::from_secs_f64(seconds), happens);
    }

    fn new_id(&mut self) -> u64 {
        self.num_ids += 1;
        self.num_ids
    }

    /// Until when whom it happens to does not run.
    fn pause(&self, happens: &Happens) -> Option<Instant> {
        let of_agent = |agent: &u64| self.agents.get(agent).map(|agent| agent.paused_until);
        let of_rank = |process: &u64| self.processes.get(process).map(|rank| rank.frozen_until);
        let until = match happens {
            Happens::HeadWakes { .. }
            | Happens::FenceRaised { .. }
            | Happens::Searched { .. }
            | Happens::Dialed { .. }
            | Happens::Up { .. }
            | Happens::Ended { side: Side::Head, .. } => Some(self.head_paused_until),
            Happens::AgentWakes { agent }
            | Happens::DialFailed { agent, .. }
            | Happens::Said { agent, .. } => of_agent(agent),
            Happens::Down { wire, .. } | Happens::Ended { wire, side: Side::Agent } => {
                self.wires.get(wire).and_then(|wire| of_agent(&wire.agent))
            }
            Happens::Answered { dial, .. } | Happens::DialExpires { dial } => {
                self.dials.get(dial).and_then(|dial| of_agent(&dial.agent))
            }
            Happens::Command { command, .. } if matches!(**command, ToAgent::Kill { .. }) => None,
            Happens::Command { process, .. }
            | Happens::LinkLost { process, .. }
            | Happens::LetsGo { process, .. }
            | Happens::RankBegins { process, .. }
            | Happens::Commit { process, .. } => of_rank(process),
            _ => None,
        };
        until.filter(|until| *until > self.now)
    }

    fn happens(&mut self, happens: Happens) {
        match happens {
            Happens::Fault(fault) => self.fault(*fault),
            Happens::HeadStarts => self.start_head(),
            Happens::HeadWakes { epoch } => self.with_head(epoch, |head, now, log| {
                // Another time may have taken this one's place.
                if let Some(at) = head.wake_at.take_if(|at| *at <= now) {
                    head.wake(at, now, log);
                }
            }),
            Happens::HeadGone { epoch } => {
                drop(self.head.take_if(|head| head.epoch == epoch));
                self.tell_desks();
            }
            Happens::FenceRaised { epoch, next } => {
                if self.head.as_ref().is_some_and(|head| head.epoch == epoch) {
                    self.disk.fence = self.disk.fence.max(next);
                }
            }
            Happens::Searched { epoch } => {
                let step = self.disk.newest();
                self.with_head(epoch, |head, now, log| head.searched(step, now, log));
            }
            Happens::AgentStarts { host } => self.start_agent(host),
            Happens::AgentWakes { agent } => self.with_agent(agent, |process, now| {
                if process.wake_at.take_if(|at| *at <= now).is_some() {
                    process.agent.at(now).wake();
                }
            }),
            Happens::Dialed { dial } => self.dialed(dial),
            Happens::Answered { dial, wire } => self.answered(dial, wire),
            Happens::DialExpires { dial } => {
                if let Some(dial) = self.dials.remove(&dial) {
                    self.dial_failed(dial.agent, "no answer".into(), None);
                }
            }
            Happens::DialFailed { agent, why, code } => {
                self.dial_failed(agent, why, code);
            }
            Happens::Said { agent, input } => {
                self.with_agent(agent, |process, now| process.agent.at(now).take(*input));
            }
            Happens::Up { wire, frame } => self.arrived_up(wire, frame),
            Happens::Down { wire, frame } => self.arrived_down(wire, frame),
            Happens::Ended { wire, side } => self.ended(wire, side),
            Happens::RankBegins { process, generation, world_size } => {
                if let Some(rank) = self.at_work(process, generation).map(|process| process.rank) {
                    for message in meeting(rank, world_size) {
                        self.say(process, message);
                    }
                }
            }
            Happens::Command { process, command } => self.command(process, *command),
            Happens::LinkLost { process, generation } => {
                if self.at_work(process, generation).is_some() {
                    self.fail(process, FailureClass::Transient);
                }
            }
            Happens::LetsGo { process, generation } => self.lets_go(process, generation),
            Happens::RankEnds { process, exit } => self.end_rank(process, exit),
            Happens::Step { generation } => self.step(generation),
            Happens::Commit { process, generation, step } => {
                if self.at_work(process, generation).is_some() {
                    self.commit(process, step);
                }
            }
        }
    }
}
