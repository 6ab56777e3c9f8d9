//! A cluster that is simulated, and the run on it: the supervisor's own policy, membership and
//! books, driven by a clock that jumps from event to event.
//!
//! A node stands for all its ranks. Its failure, and what follows in it, take the time that the
//! costs say; what the policy then does, and when, is what it does in production.

use super::costs::Costs;
use super::trace::{Kind, Trace, time_to_failure};
use crate::cluster::members::{Change, Limits, Members, NodeId, Seek};
use crate::cluster::sizes::Sizes;
use crate::supervisor::cause::Exit;
use crate::supervisor::ledger::{Ledger, Spent, Sums};
use crate::supervisor::state::{Action, Elastic, Event, Policy, State};
use fastrand::Rng;
use rank_protocol::agent::NodeInfo;
use rank_protocol::{FailureClass, FailureReport, Phase, StepReport, exit_code};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::time::{Duration, Instant};

/// What is simulated.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Nodes of the run.
    pub nodes: usize,
    /// Spares beside them.
    pub spares: usize,
    /// The least with which it goes on where no spare is left.
    pub min_nodes: usize,
    /// Failures of a node in a second.
    pub rate_per_s: f64,
    /// Simulated time.
    pub duration: Duration,
    /// What fails.
    pub trace: Trace,
    /// What things cost.
    pub costs: Costs,
}

/// What came of one seed.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The books at the end.
    pub sums: Sums,
    /// Failures by kind.
    pub failures: BTreeMap<Kind, u64>,
    /// Generations.
    pub generations: u64,
    /// Time that its steps take on all nodes, over the wall time.
    pub whole_speed: f64,
    /// Why the run ended before the time was up, where it did.
    pub gave_up: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Happens {
    /// A node of the run fails.
    Failure,
    /// What failed in this generation is found.
    Found { generation: u64, place: usize, kind: Kind },
    /// A silent node is looked at.
    Silence,
    /// A node that was told to end has ended.
    Gone { generation: u64, place: usize },
    /// The search for a checkpoint is over.
    Searched,
    /// The ranks of a generation read their checkpoint.
    Loads { generation: u64 },
    /// They are ready for the first step.
    Ready { generation: u64 },
    /// A step of a generation is done.
    Step { generation: u64 },
    /// A checkpoint was taken.
    Saved { generation: u64 },
    /// A node is repaired, and joins as a spare.
    Repaired,
    /// The policy wants to look at the time.
    Tick,
}

/// One simulated run.
struct World<'a> {
    scenario: &'a Scenario,
    random: Rng,
    now: Instant,
    queue: BinaryHeap<Reverse<(Instant, u64, Happens)>>,
    num_queued: u64,
    state: State,
    members: Members,
    ledger: Ledger,
    places: Vec<NodeId>,
    /// Nodes that no longer answer.
    silent: Vec<NodeId>,
    names: u64,
    gathering: Option<Option<u64>>,
    generation: u64,
    /// Whether something in the generation has failed and is not found yet: nothing moves.
    is_stuck: bool,
    step: u64,
    saved: u64,
    last_save: Instant,
    failures: BTreeMap<Kind, u64>,
    over: Option<(i32, String)>,
}

/// Simulates one seed.
pub fn simulate(scenario: &Scenario, seed: u64) -> Outcome {
    let start = Instant::now();
    let end = start + scenario.duration;
    let seconds = |name| Duration::try_from_secs_f64(scenario.costs.get(name)).unwrap_or_default();
    let elastic = (scenario.min_nodes < scenario.nodes).then(|| Elastic {
        wait: seconds("elastic_wait_s"),
        pause: seconds("grow_pause_s"),
        last_step: u64::MAX,
        has_begun: false,
    });
    let policy = Policy { has_agents: true, elastic, ..Policy::new(scenario.nodes, 3) };
    // A node stands for a replica, and the batch for one that divides over any number of them.
    let smaller: Vec<usize> = (scenario.min_nodes..scenario.nodes).collect();
    let sizes = Sizes::new((&smaller, scenario.nodes), 1, 1);
    let mut world = World {
        scenario,
        random: Rng::with_seed(seed),
        now: start,
        queue: BinaryHeap::new(),
        num_queued: 0,
        state: State::new(policy, 0),
        members: Members::new(Limits::new(sizes), BTreeSet::new()),
        ledger: Ledger::new(&Sums::default(), start),
        places: Vec::new(),
        silent: Vec::new(),
        names: 0,
        gathering: None,
        generation: 0,
        is_stuck: false,
        step: 0,
        saved: 0,
        last_save: start,
        failures: BTreeMap::new(),
        over: None,
    };
    for _ in 0..scenario.nodes + scenario.spares {
        world.join();
    }
    world.next_failure();
    world.handle(Event::Begin { committed: None });
    while let Some(Reverse((at, _, happens))) = world.queue.pop() {
        if at > end || world.over.is_some() {
            break;
        }
        world.now = world.now.max(at);
        world.happens(happens);
        world.look();
    }
    let now = world.now;
    if world.over.is_some() {
        world.ledger.enter(Spent::Down, now);
    }
    let sums = world.ledger.sums(end);
    Outcome {
        whole_speed: sums.best_step as f64 * world.cost("step_s") / sums.wall_s,
        sums,
        failures: world.failures,
        generations: world.generation,
        gave_up: world.over.map(|(_, reason)| reason),
    }
}

impl World<'_> {
    fn cost(&self, name: &str) -> f64 {
        self.scenario.costs.get(name)
    }

    /// Fewer nodes take longer for the same batch.
    fn step_s(&self) -> f64 {
        let nodes = self.places.len().max(1) as f64;
        self.cost("step_s") * self.scenario.nodes as f64 / nodes
    }

    fn after(&mut self, seconds: f64, happens: Happens) {
        let wait = Duration::try_from_secs_f64(seconds).unwrap_or(self.scenario.duration * 2);
        let Some(at) = self.now.checked_add(wait) else { return };
        self.num_queued += 1;
        self.queue.push(Reverse((at, self.num_queued, happens)));
    }

    fn join(&mut self) {
        self.names += 1;
        let name = format!("node-{:06}", self.names);
        let info = NodeInfo { agent: name.clone(), name, ..NodeInfo::default() };
        self.members.join(info, self.now);
    }

    fn next_failure(&mut self) {
        let rate = self.scenario.rate_per_s * self.scenario.nodes as f64;
        let seconds = time_to_failure(&mut self.random, rate);
        self.after(seconds, Happens::Failure);
    }

    fn happens(&mut self, happens: Happens) {
        match happens {
            Happens::Failure => self.fail(),
            Happens::Found { generation, place, kind } if generation == self.generation => {
                self.found(place, kind);
            }
            Happens::Silence => self.silence(),
            Happens::Gone { generation, place } if generation == self.generation => {
                let exit = Exit { code: Some(exit_code::FAILED), signal: None };
                self.handle(Event::Exited { rank: place, exit, last_lines: Vec::new() });
            }
            Happens::Searched => {
                let step = (self.saved > 0).then_some(self.saved);
                self.handle(Event::Found { step, is_committed: true });
            }
            Happens::Loads { generation } if self.moves(generation) => {
                self.ledger.phase(Phase::Load, self.now);
                let seconds = self.cost("load_s");
                self.after(seconds, Happens::Ready { generation });
            }
            Happens::Ready { generation } if self.moves(generation) => {
                self.ledger.phase(Phase::Train, self.now);
                self.last_save = self.now;
                let seconds = self.step_s() + self.cost("first_step_extra_s");
                self.after(seconds, Happens::Step { generation });
            }
            Happens::Step { generation } if self.moves(generation) => self.stepped(generation),
            Happens::Saved { generation } if self.moves(generation) => {
                self.saved = self.step;
                self.last_save = self.now;
                let num_ranks = self.members.room().map_or(0, |size| size.ranks);
                self.handle(Event::Room { num_ranks });
                self.handle(Event::Committed { step: self.step });
                if self.is_stuck {
                    return; // the generation ends for one of more nodes
                }
                self.ledger.phase(Phase::Train, self.now);
                let seconds = self.step_s();
                self.after(seconds, Happens::Step { generation });
            }
            Happens::Repaired => self.join(),
            Happens::Tick => self.handle(Event::Tick),
            _ => {}
        }
    }

    /// Whether a generation is the one under way, and nothing in it has failed.
    fn moves(&self, generation: u64) -> bool {
        generation == self.generation && !self.is_stuck
    }

    fn stepped(&mut self, generation: u64) {
        self.step += 1;
        let report = StepReport { step: self.step, generation, ..StepReport::default() };
        self.ledger.stepped(&report, false, self.now);
        self.handle(Event::Step { rank: 0, step: self.step });
        let since = self.now.saturating_duration_since(self.last_save).as_secs_f64();
        if since >= self.cost("save_every_s") {
            self.ledger.phase(Phase::Save, self.now);
            let seconds = self.cost("save_stall_s");
            return self.after(seconds, Happens::Saved { generation });
        }
        let seconds = self.step_s();
        self.after(seconds, Happens::Step { generation });
    }

    /// One of the run's nodes fails, whatever it is doing.
    fn fail(&mut self) {
        self.next_failure();
        let kind = self.scenario.trace.draw(&mut self.random);
        *self.failures.entry(kind).or_default() += 1;
        let place = self.random.usize(..self.scenario.nodes);
        let Some(&node) = self.places.get(place).filter(|node| self.members.is_alive(**node))
        else {
            return; // while no generation works, a node that is not needed yet fails unseen
        };
        if kind.takes_the_node() && !self.silent.contains(&node) {
            let hours = self.cost("repair_h");
            self.after(hours * 3600.0, Happens::Repaired);
        }
        self.is_stuck = true;
        let generation = self.generation;
        let seconds = match kind {
            Kind::Process => self.cost("detect_process_s"),
            Kind::Link => self.cost("detect_link_s"),
            Kind::Hang => self.cost("detect_hang_s").max(5.0 * self.step_s()),
            Kind::Node => {
                // It is silent from now on; the policy's own limits say when it is dead.
                self.hear();
                self.silent.push(node);
                for limit in [3.0, 5.0] {
                    self.after(limit, Happens::Silence);
                }
                return;
            }
        };
        self.after(seconds, Happens::Found { generation, place, kind });
    }

    /// Ranks of a place are known to have failed.
    fn found(&mut self, place: usize, kind: Kind) {
        let class = match kind {
            Kind::Process => FailureClass::Process,
            Kind::Link => FailureClass::Transient,
            Kind::Hang => FailureClass::Hang,
            Kind::Node => FailureClass::Node,
        };
        let report = FailureReport {
            class,
            phase: Phase::Train,
            step: Some(self.step + 1),
            collective: None,
            lines: vec![format!("simulated: {} of place {place}", kind.name())],
            roll_back: None,
        };
        self.handle(Event::Reported { rank: place, report });
        self.handle(Event::Exited { rank: place, exit: Exit::default(), last_lines: vec![] });
    }

    /// Everyone but the silent nodes gives a sign of life.
    fn hear(&mut self) {
        for node in 0..usize::try_from(self.names).unwrap_or(0) {
            if self.members.is_alive(node) && !self.silent.contains(&node) {
                self.members.heard(node, self.now);
            }
        }
    }

    /// Silent nodes may be dead.
    fn silence(&mut self) {
        self.hear();
        for change in self.members.tick(self.now) {
            let Change::Died(node, _) = change else { continue };
            self.silent.retain(|silent| *silent != node);
            if let Some(place) = self.places.iter().position(|placed| *placed == node) {
                self.found(place, Kind::Node);
            }
        }
    }

    fn handle(&mut self, event: Event) {
        for action in self.state.handle(event, self.now) {
            self.act(action);
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::FindCheckpoint => {
                let seconds = self.cost("search_s");
                self.after(seconds, Happens::Searched);
            }
            Action::Gather { step, num_ranks, fewer_after } => {
                self.ledger.enter(Spent::Rendezvous, self.now);
                self.gathering = Some(step);
                self.members.seek(num_ranks, fewer_after, self.now);
            }
            Action::Spawn { generation, resume_step, .. } => {
                self.ledger.enter(Spent::Start, self.now);
                self.generation = generation;
                self.is_stuck = false;
                self.step = resume_step.unwrap_or(0);
                let seconds = self.cost("start_s");
                self.after(seconds, Happens::Loads { generation });
            }
            Action::Abort { .. } | Action::Release { .. } | Action::Kill { .. } => {
                let (generation, seconds) = (self.generation, self.cost("teardown_s"));
                // The last first: whether all are gone is asked each time, from the first on.
                for place in (0..self.scenario.nodes).rev() {
                    if self.places.get(place).is_some_and(|node| !self.silent.contains(node)) {
                        self.after(seconds, Happens::Gone { generation, place });
                    }
                }
            }
            Action::RecordFailure(cause) => {
                self.ledger.failed(cause.class == FailureClass::Hang, self.now);
            }
            Action::RecordGrowth { .. } => {
                self.is_stuck = true;
                self.ledger.failed(false, self.now);
            }
            Action::Finish { code, reason } => self.over = Some((code, reason)),
            Action::AskToStop
            | Action::AskWhere
            | Action::RecordFirstCause(_)
            | Action::RecordRollBack(_)
            | Action::RecordStop { .. }
            | Action::RecordStall(_)
            | Action::RecordLingering { .. } => {}
        }
    }

    /// After each event: whether the nodes are there, and when the policy wants to look again.
    fn look(&mut self) {
        if let Some(step) = self.gathering {
            if self.members.next_tick().is_some_and(|tick| tick <= self.now) {
                self.silence();
            }
            match self.members.found(self.now) {
                Seek::Waiting => {}
                Seek::Found(places) => {
                    let num_ranks = self.members.size(places.len()).ranks;
                    (self.gathering, self.places) = (None, places);
                    self.handle(Event::Gathered { step, num_ranks });
                }
                Seek::TooFew(found) => {
                    self.gathering = None;
                    let nodes = self.scenario.nodes;
                    let reason = format!("{found} of {nodes} nodes are there, and no more come");
                    self.handle(Event::Broken { code: exit_code::FAILED, reason });
                }
            }
        }
        let seek = self.gathering.and_then(|_| self.members.next_seek(self.now));
        let next = [self.state.next_tick(), seek].into_iter().flatten().min();
        if let Some(next) = next
            && !self.queue.iter().take(1).any(|Reverse((at, ..))| *at <= next)
        {
            let seconds = next.saturating_duration_since(self.now).as_secs_f64();
            self.after(seconds + 1e-6, Happens::Tick);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scenario(nodes: usize, rate_per_node_day: f64, trace: Trace) -> Scenario {
        let costs = Costs::defaults().unwrap_or_else(|error| panic!("{error}"));
        Scenario {
            nodes,
            spares: 4,
            min_nodes: nodes,
            rate_per_s: rate_per_node_day / 86_400.0,
            duration: Duration::from_secs(86_400),
            trace,
            costs,
        }
    }

    #[test]
    fn without_failures_only_start_and_saves_cost_time() {
        let outcome = simulate(&scenario(4, 0.0, Trace::Poisson), 1);
        let sums = outcome.sums;
        assert_eq!((outcome.generations, outcome.gave_up), (1, None));
        assert!((sums.wall_s - 86_400.0).abs() < 1e-6 * 86_400.0, "{}", sums.wall_s);
        // A stall of 0.2 s at the first step that ends 60 s after the last save: 14 steps of 4.3 s.
        let expected = 60.2 / 60.4;
        let found = sums.ettr.unwrap_or(0.0);
        assert!((found - expected).abs() < 0.001, "{found} for {expected}");
    }

    #[test]
    fn the_same_seed_gives_the_same_books() {
        let scenario = scenario(8, 2.0, Trace::Llama3);
        let [one, two] = [7, 7].map(|seed| simulate(&scenario, seed).sums);
        for (spent, seconds) in &one.seconds {
            assert!((two.seconds[spent] - seconds).abs() < 1e-6, "{spent:?}");
        }
        assert_ne!(simulate(&scenario, 8).sums.seconds, one.seconds);
    }

    /// ETTR is near Kokolis et al.'s formula, where its assumptions hold: failures that are rare,
    /// each of which costs the same time.
    #[test]
    fn the_ratio_is_near_the_formula() {
        let mut scenario = scenario(8, 1.0, Trace::Poisson);
        scenario.duration = Duration::from_secs(40 * 86_400);
        scenario.spares = 40;
        let mean =
            (1..=4).map(|seed| simulate(&scenario, seed).sums.ettr.unwrap_or(0.0)).sum::<f64>()
                / 4.0;
        let cost = |name: &str| scenario.costs.get(name);
        // Found after 5 s; one second for others of the same moment.
        let restart = 5.0
            + 1.0
            + cost("teardown_s")
            + cost("search_s")
            + cost("start_s")
            + cost("load_s")
            + cost("first_step_extra_s");
        let interval = 60.2 + cost("save_stall_s");
        let lost_per_day = 8.0 / 86_400.0 * (restart + interval / 2.0);
        let expected = (1.0 - lost_per_day) / (1.0 + cost("save_stall_s") / interval);
        assert!((mean - expected).abs() < 0.002, "{mean} for {expected}");
    }

    /// Row 18 of the fault table, simulated: 24,000 ranks, 19.5 lost nodes a day.
    #[test]
    fn the_ratio_of_3000_nodes_is_at_least_97_percent() {
        let mut scenario = scenario(3000, 0.0065, Trace::Poisson);
        scenario.duration = Duration::from_secs(4 * 86_400);
        scenario.spares = 40;
        let outcome = simulate(&scenario, 1);
        let lost = outcome.failures.values().sum::<u64>();
        assert!((50..110).contains(&lost), "{lost} of 78 expected");
        assert_eq!(outcome.gave_up, None);
        let ratio = outcome.sums.ettr.unwrap_or(0.0);
        assert!((0.97..0.99).contains(&ratio), "{ratio}");
    }

    #[test]
    fn a_cluster_without_spares_waits_and_gives_up() {
        let mut scenario = scenario(4, 50.0, Trace::Poisson);
        scenario.spares = 0;
        let outcome = simulate(&scenario, 3);
        let why = outcome.gave_up.unwrap_or_default();
        assert!(why.contains("of 4 nodes are there, and no more come"), "{why}");
        assert!(outcome.sums.seconds[&Spent::Down] > 10_000.0);
    }

    #[test]
    fn with_fewer_nodes_the_run_goes_on_and_comes_back() {
        let mut whole = scenario(8, 0.7, Trace::Poisson);
        whole.duration = Duration::from_secs(2 * 86_400);
        whole.spares = 0;
        let elastic = Scenario { min_nodes: 1, ..whole.clone() };
        let [waits, goes_on] = [&whole, &elastic].map(|scenario| simulate(scenario, 5));
        assert!(waits.gave_up.is_some());
        assert_eq!(goes_on.gave_up, None);
        assert!(goes_on.generations > 5);
        assert!(goes_on.whole_speed > 2.0 * waits.whole_speed, "{goes_on:?}");
        assert!(goes_on.whole_speed < goes_on.sums.ettr.unwrap_or(0.0), "steps take longer");
    }
}
