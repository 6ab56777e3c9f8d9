//! The coordinator's process: policy, nodes and store as in production, and in the place of
//! `supervisor/run.rs` a loop that takes the same things in the same order, and whose books are
//! [`Log`].
#![cfg(test)]

use crate::cluster::members::{NodeId, Seek};
use crate::cluster::nodes::{Address, ClusterPlan, Happening, Nodes, Outcome};
use crate::cluster::sizes::Sizes;
use crate::supervisor::cause::Cause;
use crate::supervisor::rank::{Input, News, RankHandle};
use crate::supervisor::run::Adopt;
use crate::supervisor::state::{Action, Event, Policy, State};
use rank_protocol::store::{Requester, Store, StoreReply};
use rank_protocol::{Assignment, FailureClass, FromRank, RunDir, ToRank, exit_code};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// As in `supervisor/run/elsewhere.rs`.
const ADOPTION: Duration = Duration::from_secs(10);
/// As in `supervisor/run.rs`.
const AWAY: Duration = Duration::from_secs(1);

/// What a run's folder keeps of the coordinators.
#[derive(Clone, Debug, Default)]
pub struct Log {
    /// Generations that were started.
    pub generations: Vec<u64>,
    /// The nodes of the last one by place.
    pub nodes: Vec<String>,
    /// How the run ended.
    pub end: Option<(i32, String)>,
    /// Whether a generation went on under another coordinator.
    pub num_adopted: u64,
}

/// What a coordinator believes of a rank, to be compared with the truth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// It did this step.
    Step(u64),
    /// Its process has ended, as its agent says.
    Exited,
}

/// A coordinator's process.
pub struct Head {
    /// Which of them, from 1.
    pub epoch: u64,
    state: State,
    nodes: Nodes,
    /// Nothing comes here; it is open all the same.
    _received: mpsc::Receiver<Happening>,
    store: Store,
    ranks: Vec<RankHandle>,
    places: Vec<NodeId>,
    ranks_per_node: usize,
    gathering: Option<Option<u64>>,
    /// The nodes of the generation that may go on, and until when they are waited for.
    adopt: Option<(Vec<String>, Instant)>,
    committed: Option<u64>,
    may_begin: bool,
    /// Ranks whose node is known to be lost.
    lost: BTreeSet<usize>,
    /// Whether it wants a search for a checkpoint, whose answer is [`Head::searched`].
    pub wants_search: bool,
    /// What it has been told of ranks since this was last taken.
    pub claims: Vec<(u64, usize, Claim)>,
    /// The next time at which it wakes up.
    pub wake_at: Option<Instant>,
    /// The run is over.
    pub finish: Option<(i32, String)>,
}

/// What a coordinator finds when it starts.
pub struct Found {
    /// The highest generation that left a trace.
    pub last_generation: u64,
    /// Newest checkpoint.
    pub committed: Option<u64>,
    /// The nodes of a generation that may still run.
    pub adopt: Option<Vec<String>>,
}

impl Head {
    /// Starts a coordinator.
    pub fn new(
        epoch: u64,
        (num_nodes, ranks_per_node): (usize, usize),
        found: Found,
        now: Instant,
        log: &mut Log,
    ) -> Self {
        let policy = Policy {
            has_agents: true,
            // However many faults there are, the run must go on after them.
            max_same_failure: u32::MAX,
            hang: Duration::from_secs(5),
            keep_processes: true,
            ..Policy::new(num_nodes * ranks_per_node, u32::MAX)
        };
        let listen = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
        let sizes = Sizes::fixed(num_nodes, ranks_per_node);
        let plan = ClusterPlan { listen, host: None, sizes, ranks_per_node };
        let address = Address { host: "simulated".into(), port: 0, pid: 1 };
        // Happenings come by `happened`.
        let (happenings, received) = mpsc::channel(1);
        let first = (epoch * 1_000_000, now);
        let mut head = Self {
            epoch,
            state: State::new(policy, found.last_generation),
            nodes: Nodes::new(plan, address, happenings, first),
            _received: received,
            store: Store::default(),
            ranks: Vec::new(),
            places: Vec::new(),
            ranks_per_node,
            gathering: None,
            adopt: None,
            committed: found.committed,
            may_begin: found.committed.is_none(),
            lost: BTreeSet::new(),
            wants_search: false,
            claims: Vec::new(),
            wake_at: None,
            finish: None,
        };
        match found.adopt {
            Some(names) => {
                head.nodes.await_ranks(found.last_generation);
                head.adopt = Some((names, now + ADOPTION));
            }
            None => head.handle(Event::Begin { committed: found.committed }, now, log),
        }
        head.look(now, log);
        head
    }

    /// The generation it is at.
    pub fn generation(&self) -> u64 {
        self.state.generation()
    }

    /// When it has to wake up.
    pub fn next_wake(&self, now: Instant) -> Instant {
        let times = [self.state.next_tick(), self.store.next_deadline()];
        let next = times.into_iter().flatten().fold(self.nodes.next_wake(now), Instant::min);
        self.adopt.as_ref().map_or(next, |(_, until)| next.min(*until))
    }

    /// Time has passed; it should have woken up at `at`.
    pub fn wake(&mut self, at: Instant, now: Instant, log: &mut Log) {
        let late = now.saturating_duration_since(at);
        if late >= AWAY {
            self.handle(Event::WasAway { time: late }, now, log);
        }
        let replies = self.store.expire(now);
        self.reply(replies);
        let outcomes = self.nodes.wake(now);
        self.take_outcomes(outcomes, now, log);
        self.handle(Event::Tick, now, log);
        self.look(now, log);
    }

    /// Something came over a connection.
    pub fn happened(&mut self, happening: Happening, now: Instant, log: &mut Log) {
        let outcomes = self.nodes.take(happening, now);
        self.take_outcomes(outcomes, now, log);
        self.look(now, log);
    }

    /// The search for a checkpoint is over.
    pub fn searched(&mut self, step: Option<u64>, now: Instant, log: &mut Log) {
        self.handle(Event::Found { step, is_committed: true }, now, log);
        self.look(now, log);
    }

    fn take_outcomes(&mut self, outcomes: Vec<Outcome>, now: Instant, log: &mut Log) {
        for outcome in outcomes {
            match outcome {
                Outcome::Rank(input) => self.take(input, now, log),
                Outcome::Store(requests) => {
                    for request in requests {
                        let nobody = Requester { rank: usize::MAX, id: 0 };
                        let replies = self.store.handle(nobody, request, now);
                        self.reply(replies);
                    }
                }
                Outcome::Event(..) | Outcome::Unwell(_) | Outcome::Stop(_) => {}
            }
        }
    }

    fn take(&mut self, input: Input, now: Instant, log: &mut Log) {
        let Input { generation, rank, news } = input;
        if generation != self.state.generation() {
            return;
        }
        match news {
            News::Message(message) => self.hear(rank, message, now, log),
            News::Garbled(_) => {}
            News::Exited { exit, last_lines } => {
                if !self.lost.contains(&rank) {
                    self.claims.push((generation, rank, Claim::Exited));
                }
                self.handle(Event::Exited { rank, exit, last_lines }, now, log);
            }
        }
    }

    fn hear(&mut self, rank: usize, message: FromRank, now: Instant, log: &mut Log) {
        match message {
            FromRank::Phase(phase) => self.handle(Event::Phase { rank, phase }, now, log),
            FromRank::Step(report) => {
                self.claims.push((self.state.generation(), rank, Claim::Step(report.step)));
                self.handle(Event::Step { rank, step: report.step }, now, log);
            }
            FromRank::CheckpointCommitted { step } => {
                self.handle(Event::Committed { step }, now, log);
            }
            FromRank::Here(position) => self.handle(Event::Here { rank, position }, now, log),
            FromRank::Failure(report) => {
                if report.class == FailureClass::Node {
                    self.lost.insert(rank);
                }
                self.handle(Event::Reported { rank, report: *report }, now, log);
            }
            FromRank::Released => self.handle(Event::Released { rank }, now, log),
            FromRank::Finished { .. } => self.handle(Event::Finished { rank }, now, log),
            FromRank::Store { id, request } => {
                let replies = self.store.handle(Requester { rank, id }, request, now);
                self.reply(replies);
            }
            _ => {}
        }
    }

    fn reply(&self, replies: Vec<(Requester, StoreReply)>) {
        for (to, reply) in replies {
            if let Some(rank) = self.ranks.get(to.rank) {
                rank.tell(ToRank::Store { id: to.id, reply });
            }
        }
    }

    fn handle(&mut self, event: Event, now: Instant, log: &mut Log) {
        for action in self.state.handle(event, now) {
            match action {
                Action::FindCheckpoint => {
                    // Their processes may wait; nothing more is said to them of this generation,
                    // but that all is over.
                    self.wants_search = true;
                }
                Action::Gather { step, num_ranks, fewer_after } => {
                    self.gathering = Some(step);
                    self.nodes.seek(num_ranks, fewer_after, now);
                }
                Action::Spawn { generation, resume_step, kept } => {
                    self.spawn(generation, resume_step, &kept, log);
                }
                Action::AskToStop => self.tell_all(&ToRank::Stop { now: false }),
                Action::Abort { reason, ranks } => {
                    for rank in self.handles(&ranks) {
                        rank.tell(ToRank::Abort { reason: reason.clone() });
                        rank.terminate();
                    }
                }
                Action::Release { reason, ranks } => {
                    let generation = self.state.generation();
                    for rank in self.handles(&ranks) {
                        rank.tell(ToRank::Release { generation, reason: reason.clone() });
                    }
                }
                Action::Kill { ranks, .. } => self.handles(&ranks).for_each(RankHandle::kill),
                Action::AskWhere => self.tell_all(&ToRank::Where),
                Action::Finish { code, reason } => {
                    log.end = Some((code, reason.clone()));
                    self.finish = Some((code, reason));
                }
                Action::RecordFirstCause(cause) => self.blame_node(&cause, now, log),
                Action::RecordFailure(_)
                | Action::RecordGrowth { .. }
                | Action::RecordRollBack(_)
                | Action::RecordStop { .. }
                | Action::RecordStall(_)
                | Action::RecordLingering { .. } => {}
            }
        }
    }

    fn blame_node(&mut self, cause: &Cause, now: Instant, log: &mut Log) {
        if matches!(cause.class, FailureClass::Process | FailureClass::Node) {
            let outcomes = self.nodes.failed(cause.rank, &cause.summary(), false);
            self.take_outcomes(outcomes, now, log);
        }
    }

    fn handles(&self, ranks: &[usize]) -> impl Iterator<Item = &RankHandle> {
        ranks.iter().filter_map(|rank| self.ranks.get(*rank))
    }

    fn tell_all(&self, message: &ToRank) {
        for rank in &self.ranks {
            rank.tell(message.clone());
        }
    }

    fn spawn(&mut self, generation: u64, resume_step: Option<u64>, kept: &[usize], log: &mut Log) {
        self.store = Store::default();
        self.lost.clear();
        log.generations.push(generation);
        self.ranks.clear();
        let per_node = self.ranks_per_node;
        let world_size = self.places.len() * per_node;
        let assignment = |rank: usize| Assignment {
            run_id: "simulated".into(),
            generation,
            rank,
            world_size,
            local_rank: rank % per_node,
            local_world_size: per_node,
            address: String::new(),
            threads: 1,
            run_dir: "/simulated".into(),
            resume_step,
            replicas: None,
            stop_after: None,
            roll_backs: Vec::new(),
            memory_dir: None,
            node: None,
            resume_dir: None,
            failures: 0,
            observed_s: 0,
            profile: None,
            may_stay: true,
        };
        let assignments = (0..world_size).map(assignment).collect();
        let run = RunDir::new("/simulated");
        self.ranks = self.nodes.start(generation, &run, &self.places, assignments, kept, None);
    }

    /// After each event, as in production.
    fn look(&mut self, now: Instant, log: &mut Log) {
        self.look_for_ranks(now, log);
        self.gather(now, log);
        self.nodes.flush();
        if let Some((code, reason)) = &self.finish {
            self.nodes.tell_over(*code, reason);
        }
    }

    fn gather(&mut self, now: Instant, log: &mut Log) {
        let Some(step) = self.gathering else { return };
        match self.nodes.found(now) {
            Seek::Waiting => {}
            Seek::Found(places) => {
                (self.gathering, self.places) = (None, places);
                log.nodes = self.places.iter().map(|node| self.nodes.name(*node)).collect();
                let num_ranks = self.places.len() * self.ranks_per_node;
                self.handle(Event::Gathered { step, num_ranks }, now, log);
            }
            Seek::TooFew(found) => {
                self.gathering = None;
                let reason = format!("{found} nodes are there, and no more come");
                self.handle(Event::Broken { code: exit_code::FAILED, reason }, now, log);
            }
        }
    }

    fn look_for_ranks(&mut self, now: Instant, log: &mut Log) {
        let Some((names, until)) = self.adopt.clone() else { return };
        let num_ranks = names.len() * self.ranks_per_node;
        let adopt = Adopt { nodes: names, num_ranks };
        if let Some((places, ranks, outcomes)) = self.nodes.adopt(&adopt) {
            (self.adopt, self.places, self.ranks) = (None, places, ranks);
            log.num_adopted += 1;
            self.handle(Event::Adopted { committed: self.committed, num_ranks }, now, log);
            return self.take_outcomes(outcomes, now, log);
        }
        if now < until && !self.nodes.is_in_vain(&adopt) {
            return;
        }
        self.adopt = None;
        self.nodes.abandon();
        if self.committed.is_none() && !self.may_begin {
            let reason = "the ranks are gone, and nothing was saved".to_owned();
            return self.handle(Event::Broken { code: exit_code::FAILED, reason }, now, log);
        }
        self.handle(Event::Begin { committed: self.committed }, now, log);
    }
}
