//! Going on with fewer ranks and back: the policy and the membership together, as the executor and
//! the simulator drive them, by steps and under random losses of nodes.

use launcher::cluster::members::{Change, Joined, Limits, Members, NodeId, Seek};
use launcher::cluster::sizes::{Size, Sizes};
use launcher::supervisor::cause::Exit;
use launcher::supervisor::state::{Action, Elastic, Event, Policy, State};
use proptest::prelude::*;
use rank_protocol::agent::NodeInfo;
use rank_protocol::{FailureClass, FailureReport, Phase};
use run_config::RunConfig;
use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

const WAIT: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_secs(100);
const LAST_STEP: u64 = 1_000_000;

fn config(
    nodes: usize,
    per_node: usize,
    parallelism: &str,
    batch: usize,
    least: usize,
) -> RunConfig {
    let text = format!(
        "name: test\n\
         model: {{dim: 32, layers: 4, heads: 4, kv_heads: 4, ffn_dim: 64, vocab_size: 512}}\n\
         data: {{tokenizer: t, sequence_length: 32, sources: [{{name: a, path: a}}]}}\n\
         parallelism: {parallelism}\n\
         training: {{steps: {LAST_STEP}, global_batch: {batch}}}\n\
         restart: {{elastic: {{min_replicas: {least}}}}}\n\
         cluster: {{nodes: {nodes}, ranks_per_node: {per_node}, device: cpu}}\n"
    );
    let loaded = RunConfig::from_yaml_str(&text, Path::new("/"), &[]);
    loaded.unwrap_or_else(|errors| panic!("{errors}")).config
}

/// A generation that works.
#[derive(Clone, Debug)]
struct Working {
    size: Size,
    places: Vec<NodeId>,
    /// Ranks that have not ended.
    alive: BTreeSet<usize>,
}

/// A run, its nodes and its clock.
struct World {
    config: RunConfig,
    state: State,
    members: Members,
    now: Instant,
    /// Nodes whose agents run, and the number of agents that each name has had.
    present: Vec<Option<NodeId>>,
    agents: usize,
    gathering: Option<Option<u64>>,
    working: Option<Working>,
    last: Option<Working>,
    step: u64,
    committed: Option<u64>,
    /// When the run returned to more ranks.
    growths: Vec<Instant>,
    has_just_committed: bool,
    over: Option<(i32, String)>,
}

impl World {
    fn new(config: RunConfig) -> Self {
        let sizes = Sizes::of(&config);
        let elastic = Elastic { wait: WAIT, pause: PAUSE, last_step: LAST_STEP, has_begun: false };
        let policy = Policy {
            has_agents: true,
            elastic: Some(elastic),
            // Nothing but nodes fails here.
            max_no_progress: u32::MAX,
            max_same_failure: u32::MAX,
            hang: Duration::from_secs(1_000_000),
            ..Policy::new(sizes.whole().ranks, 3)
        };
        let nodes = sizes.whole().nodes;
        let mut world = Self {
            config,
            state: State::new(policy, 0),
            members: Members::new(Limits::new(sizes), BTreeSet::new()),
            now: Instant::now(),
            present: vec![None; nodes],
            agents: 0,
            gathering: None,
            working: None,
            last: None,
            step: 0,
            committed: None,
            growths: Vec::new(),
            has_just_committed: false,
            over: None,
        };
        for name in 0..nodes {
            world.arrive(name);
        }
        world.handle(Event::Begin { committed: None });
        world.pass(Duration::ZERO);
        world
    }

    /// An agent of this name begins anew.
    fn arrive(&mut self, name: usize) {
        self.agents += 1;
        let (agent, name_) = (self.agents.to_string(), format!("n{name}"));
        let info = NodeInfo { name: name_, agent, ..NodeInfo::default() };
        if let Joined::New(node) = self.members.join(info, self.now) {
            self.present[name] = Some(node);
        }
    }

    /// A node is gone, and silent from now on.
    fn lose(&mut self, name: usize) {
        self.present[name] = None;
    }

    /// Time passes, in which all that are there give signs of life.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            for node in self.present.iter().flatten() {
                self.members.heard(*node, self.now);
            }
            for change in self.members.tick(self.now) {
                if let Change::Died(node, _) = change {
                    self.died(node);
                }
            }
            self.handle(Event::Tick);
            self.look();
            if self.now >= end {
                return;
            }
            self.now = end.min(self.now + Duration::from_secs(1));
        }
    }

    fn died(&mut self, node: NodeId) {
        let Some(working) = &self.working else { return };
        let per_node = self.config.cluster.ranks_per_node.unwrap_or(1);
        let on_it = |rank: &usize| working.places.get(rank / per_node) == Some(&node);
        let ranks: Vec<usize> = working.alive.iter().copied().filter(on_it).collect();
        for rank in ranks {
            let report = FailureReport {
                class: FailureClass::Node,
                phase: Phase::Train,
                step: None,
                collective: None,
                lines: vec!["its node is lost".into()],
                roll_back: None,
            };
            self.handle(Event::Reported { rank, report });
            self.exit(rank);
        }
    }

    fn exit(&mut self, rank: usize) {
        if let Some(working) = &mut self.working
            && working.alive.remove(&rank)
        {
            self.handle(Event::Exited { rank, exit: Exit::default(), last_lines: Vec::new() });
        }
    }

    /// A step of all ranks, where they work; with a checkpoint.
    fn step(&mut self, saves: bool) {
        if self.working.is_none() || !self.state.is_working() {
            return;
        }
        self.step += 1;
        self.handle(Event::Step { rank: 0, step: self.step });
        if saves {
            let num_ranks = self.members.room().map_or(0, |size| size.ranks);
            self.handle(Event::Room { num_ranks });
            self.committed = Some(self.step);
            self.has_just_committed = true;
            self.handle(Event::Committed { step: self.step });
            self.has_just_committed = false;
        }
    }

    fn look(&mut self) {
        let Some(step) = self.gathering else { return };
        match self.members.found(self.now) {
            Seek::Waiting => {}
            Seek::Found(places) => {
                self.gathering = None;
                let size = self.members.size(places.len());
                self.check(&places, size);
                let alive = (0..size.ranks).collect();
                self.working = Some(Working { size, places, alive });
                self.last = self.working.clone();
                self.handle(Event::Gathered { step, num_ranks: size.ranks });
            }
            Seek::TooFew(_) => {
                self.gathering = None;
                self.handle(Event::Broken { code: 1, reason: "too few".into() });
            }
        }
    }

    /// What must hold for every generation.
    fn check(&self, places: &[NodeId], size: Size) {
        let c = &self.config;
        let least = c.restart.elastic.min_replicas.unwrap_or(usize::MAX);
        assert!(size.replicas >= least.min(c.replicas().unwrap_or(0)), "{size:?}");
        assert_eq!(size.ranks, size.replicas * c.replica_ranks(), "whole replicas");
        let per_pass = size.replicas * c.parallelism.shard.ranks * c.training.micro_batch;
        let batch = c.training.batch_stages[0].global_batch;
        assert!(batch.is_multiple_of(per_pass), "a batch of {batch} on {size:?}");
        let per_node = c.cluster.ranks_per_node.unwrap_or(1);
        assert_eq!(places.len(), size.ranks.div_ceil(per_node));
        for (place, node) in places.iter().enumerate() {
            assert!(self.members.is_alive(*node) && !places[..place].contains(node));
        }
        let Some(last) = &self.last else { return };
        for (place, node) in last.places.iter().enumerate().take(places.len()) {
            assert!(places[place] == *node || !self.members.is_alive(*node), "it stays");
        }
    }

    fn handle(&mut self, event: Event) {
        for action in self.state.handle(event, self.now) {
            match action {
                Action::FindCheckpoint => {
                    let step = self.committed;
                    self.step = step.unwrap_or(0);
                    self.working = None;
                    self.handle(Event::Found { step, is_committed: true });
                }
                Action::Gather { step, num_ranks, fewer_after } => {
                    self.gathering = Some(step);
                    self.members.seek(num_ranks, fewer_after, self.now);
                }
                Action::RecordGrowth { from, to } => {
                    assert!(from < to && self.has_just_committed);
                    self.growths.push(self.now);
                }
                Action::Abort { .. } | Action::Kill { .. } => {
                    let alive = self.working.as_ref().map(|working| working.alive.clone());
                    let per_node = self.config.cluster.ranks_per_node.unwrap_or(1);
                    for rank in alive.unwrap_or_default() {
                        // Those of a lost node end once it is known to be dead.
                        let node = self.working.as_ref().map(|w| w.places[rank / per_node]);
                        if node.is_some_and(|node| self.present.contains(&Some(node))) {
                            self.exit(rank);
                        }
                    }
                }
                Action::Finish { code, reason } => self.over = Some((code, reason)),
                _ => {}
            }
        }
    }

    fn ranks(&self) -> usize {
        self.working.as_ref().map_or(0, |working| working.size.ranks)
    }

    fn generation(&self) -> u64 {
        self.state.generation()
    }
}

#[test]
fn a_lost_node_is_waited_for_and_then_done_without_until_it_is_back() {
    let mut world = World::new(config(2, 2, "{}", 8, 1));
    assert_eq!((world.ranks(), world.generation()), (4, 1));
    world.step(true);
    world.lose(1);
    world.pass(Duration::from_secs(14));
    assert_eq!(world.ranks(), 0, "dead after 5 s, and 10 s of waiting");
    world.pass(Duration::from_secs(3));
    assert_eq!((world.ranks(), world.generation()), (2, 2));
    world.arrive(1);
    world.pass(Duration::from_secs(1));
    world.step(false);
    assert_eq!(world.generation(), 2, "it returns at a checkpoint alone");
    world.step(true);
    world.pass(Duration::from_secs(1));
    assert_eq!((world.ranks(), world.generation()), (4, 3));
    assert_eq!((world.growths.len(), world.step), (1, 3));
}

#[test]
fn a_spare_in_time_keeps_the_run_whole() {
    let mut world = World::new(config(2, 2, "{}", 8, 1));
    world.lose(0);
    world.pass(Duration::from_secs(12));
    world.arrive(0);
    world.pass(Duration::from_secs(1));
    assert_eq!((world.ranks(), world.generation()), (4, 2));
    assert!(world.growths.is_empty());
}

#[test]
fn below_the_minimum_the_run_waits_and_gives_up() {
    let mut world = World::new(config(4, 1, "{}", 8, 2));
    for name in 1..4 {
        world.lose(name);
    }
    world.pass(Duration::from_secs(500));
    assert_eq!((world.ranks(), world.over.clone()), (0, None));
    world.pass(Duration::from_secs(200));
    assert_eq!(world.over, Some((1, "too few".into())));
}

#[test]
fn growth_is_no_failure() {
    let mut world = World::new(config(2, 1, "{}", 8, 1));
    world.state = State::new(
        Policy {
            has_agents: true,
            elastic: Some(Elastic {
                wait: WAIT,
                pause: Duration::ZERO,
                last_step: LAST_STEP,
                has_begun: false,
            }),
            ..Policy::new(2, 1)
        },
        0,
    );
    world.handle(Event::Begin { committed: None });
    world.pass(Duration::ZERO);
    // With `max_no_progress: 1` any failed generation without a commit would be the end.
    for _ in 0..5 {
        world.step(true);
        world.lose(1);
        world.pass(Duration::from_secs(20));
        assert_eq!((world.ranks(), &world.over), (1, &None));
        world.arrive(1);
        world.step(true);
        world.pass(Duration::from_secs(1));
        assert_eq!((world.ranks(), &world.over), (2, &None));
    }
    assert_eq!(world.growths.len(), 5);
}

#[test]
fn nothing_is_gained_after_the_last_step_or_while_stopping() {
    for stops in [true, false] {
        let mut world = World::new(config(2, 1, "{}", 8, 1));
        world.lose(1);
        world.pass(Duration::from_secs(20));
        world.arrive(1);
        world.pass(Duration::from_secs(1));
        if stops {
            world.handle(Event::Stop { by: "SIGTERM".into() });
        } else {
            world.step = LAST_STEP - 1;
        }
        world.step(true);
        assert_eq!((world.ranks(), world.growths.len()), (1, 0));
    }
}

/// A node that comes and goes all the time brings about a bounded number of returns.
#[test]
fn a_flapping_node_is_taken_back_ever_more_seldom() {
    let mut world = World::new(config(2, 1, "{}", 8, 1));
    let start = world.now;
    while world.now - start < Duration::from_secs(7200) {
        world.lose(1);
        world.pass(Duration::from_secs(20));
        world.step(true);
        world.arrive(1);
        world.pass(Duration::from_secs(1));
        world.step(true);
        world.pass(Duration::from_secs(5));
    }
    // At 0, then after 200, 400, 800, 1600 and 3200 s and some.
    assert!((5..=6).contains(&world.growths.len()), "{}", world.growths.len());
}

fn layouts() -> impl Strategy<Value = RunConfig> {
    let parallelism = prop::sample::select(vec![
        (4, 1, "{}", 24),
        (4, 2, "{}", 24),
        (4, 2, "{tensor: 2}", 12),
        (4, 2, "{tensor: 4}", 12),
        (6, 1, "{pipeline: {stages: 2}}", 6),
        (4, 3, "{tensor: 2, shard: {ranks: 2, level: gradients}}", 12),
        (5, 1, "{}", 15),
    ]);
    (parallelism, 1_usize..3)
        .prop_map(|((nodes, per_node, p, batch), least)| config(nodes, per_node, p, batch, least))
}

proptest! {
    /// Whatever nodes are lost and come back: no generation is below the minimum, of part of a
    /// replica, or of a layout over which the batch does not divide; who has a place keeps it;
    /// returns come at a checkpoint alone, and never soon after one another; and with all nodes
    /// there for long enough the run is whole again.
    #[test]
    fn no_order_of_losses_breaks_the_rules(
        config in layouts(),
        events in prop::collection::vec((0_usize..6, 0_u8..4, 0_u64..20_000), 0..60),
    ) {
        let mut world = World::new(config);
        let whole = world.ranks();
        for (name, what, millis) in events {
            let name = name % world.present.len();
            match (what, world.present[name]) {
                (0, Some(_)) => world.lose(name),
                (1, None) => world.arrive(name),
                (2, _) => world.step(false),
                _ => world.step(true),
            }
            world.pass(Duration::from_millis(millis));
            if world.over.is_some() {
                return Ok(());
            }
        }
        for pair in world.growths.windows(2) {
            prop_assert!(pair[1] - pair[0] >= PAUSE);
        }
        for name in 0..world.present.len() {
            if world.present[name].is_none() {
                world.arrive(name);
            }
        }
        for _ in 0..2 {
            world.pass(Duration::from_secs(3600));
            world.step(true);
        }
        world.pass(Duration::from_secs(60));
        prop_assert_eq!(world.ranks(), whole);
        prop_assert!(world.over.is_none());
    }
}
