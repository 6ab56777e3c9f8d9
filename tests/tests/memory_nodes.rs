//! Checkpoints in the memories of several nodes, each played by an agent on this machine: a node is
//! lost with its memory, or a whole group of ranks, or one whose copy has not arrived, and the run
//! goes on from what others have, with the same bits.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use end_to_end::losses::{assert_bit_equal, assert_close};
use end_to_end::sandbox::{Running, Sandbox, signal};
use rustix::process::Signal;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Every fifth step is kept in memory, and the last on disk.
const EVERY: u64 = 5;
const STEPS: usize = 120;
const SETS: [&str; 4] = [
    "training.steps=120",
    "training.global_batch=16",
    "checkpoint.every_steps=1000",
    "cluster.threads_per_rank=1",
];

/// Nodes, and ranks on each.
struct Shape<'a> {
    nodes: usize,
    ranks: usize,
    sets: &'a [&'a str],
}

const TWO_BY_TWO: Shape<'_> = Shape { nodes: 2, ranks: 2, sets: &[] };

/// A run, its coordinator, and its agents by name.
struct Run {
    sandbox: Sandbox,
    coordinator: Running,
    agents: Vec<(String, Running)>,
}

impl Run {
    fn start(shape: &Shape<'_>, sets: &[&str]) -> Run {
        Self::start_with(Sandbox::real(env!("CARGO_BIN_EXE_phalanx-under-test")), shape, sets)
    }

    /// `straight` has no agents, no memory, and no failure.
    fn start_with(sandbox: Sandbox, shape: &Shape<'_>, sets: &[&str]) -> Run {
        let ranks = format!("cluster.ranks_per_node={}", shape.nodes * shape.ranks);
        sandbox.train("straight", &[&SETS[..], shape.sets, &[ranks.as_str()]].concat());
        Self::start_alone(sandbox, shape, sets)
    }

    fn start_alone(sandbox: Sandbox, shape: &Shape<'_>, sets: &[&str]) -> Run {
        let nodes = format!("cluster.nodes={}", shape.nodes);
        let ranks = format!("cluster.ranks_per_node={}", shape.ranks);
        let memory = format!("checkpoint.memory.every_steps={EVERY}");
        let own = [nodes.as_str(), ranks.as_str(), memory.as_str()];
        let sets = [&SETS[..], shape.sets, &own, sets].concat();
        let sets = sets.into_iter().flat_map(|set| ["--set", set]);
        let args = ["coordinator", "config.yaml", "--listen", "127.0.0.1:0"];
        let args: Vec<&str> = args.into_iter().chain(sets).collect();
        let coordinator = sandbox.start(&args);
        Run { sandbox, coordinator, agents: Vec::new() }
    }

    fn agent(&mut self, name: &str) {
        self.agent_by(&[], name);
    }

    /// Agents that get the places, and later others that wait.
    fn agents(&mut self, placed: &[&str], spares: &[&str]) {
        placed.iter().for_each(|name| self.agent(name));
        self.sandbox.wait_for_metrics(1, 1);
        spares.iter().for_each(|name| self.agent(name));
    }

    fn agent_by(&mut self, before: &[&str], name: &str) {
        let agent = self.sandbox.start_by(before, &["agent", "test", "--name", name]);
        self.agents.push((name.to_owned(), agent));
    }

    fn pid(&self, name: &str) -> u32 {
        self.agents.iter().find(|(other, _)| other == name).unwrap().1.pid()
    }

    /// The folder in memory of an agent, while it is there.
    fn folder(&self, name: &str) -> Option<PathBuf> {
        let mark = format!("phalanx-test-{:x}-", self.pid(name));
        let entries = std::fs::read_dir("/dev/shm").unwrap().flatten();
        let is_it = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with(&mark);
        entries.map(|entry| entry.path()).find(is_it)
    }

    /// Kills agents at one moment: their ranks and their memories go with them.
    fn lose(&mut self, names: &[&str]) {
        let folders: Vec<PathBuf> = names.iter().map(|name| self.folder(name).unwrap()).collect();
        for name in names {
            signal(self.pid(name), Signal::KILL);
        }
        self.agents.retain(|(name, _)| !names.contains(&name.as_str()));
        let deadline = Instant::now() + Duration::from_secs(5);
        while folders.iter().any(|folder| folder.exists()) {
            assert!(Instant::now() < deadline, "the memory was to go with its node: {folders:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until a step is in memory with a copy of each part; returns it.
    fn wait_for_copies(&self, step: u64) -> u64 {
        let status = self.sandbox.wait_for(|status| status["memory_copied"].as_u64() >= Some(step));
        status["memory_copied"].as_u64().unwrap()
    }

    /// Step and tier that each generation but the first went on from.
    fn resumed(&self) -> Vec<(Option<u64>, String)> {
        let started = self.sandbox.events_of("generation_started");
        let from = |event: &Value| {
            let tier = event["resume_tier"].as_str().unwrap_or_default();
            (event["resume_step"].as_u64(), tier.to_owned())
        };
        started[1..].iter().map(from).collect()
    }

    /// The one restart there was went on from memory, and from no step before `least`.
    fn assert_from_memory(&self, least: u64) {
        let resumed = self.resumed();
        let [(step, tier)] = &resumed[..] else { panic!("{resumed:?}") };
        assert_eq!(tier, "memory", "{resumed:?}");
        assert!(*step >= Some(least) && step.unwrap().is_multiple_of(EVERY), "{step:?} {least}");
    }

    /// All ends well, and nothing is left in memory; returns the sandbox.
    fn end(self) -> Sandbox {
        let pids: Vec<u32> = self.agents.iter().map(|(_, agent)| agent.pid()).collect();
        self.coordinator.expect_within(Duration::from_secs(120), 0);
        for (_, agent) in self.agents {
            agent.expect(0);
        }
        for pid in pids {
            let mark = format!("phalanx-test-{pid:x}-");
            let names = std::fs::read_dir("/dev/shm").unwrap().flatten();
            let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
            let left: Vec<String> = names.filter(|name| name.starts_with(&mark)).collect();
            assert!(left.is_empty(), "{left:?}");
        }
        self.sandbox.assert_nothing_left();
        self.sandbox
    }
}

/// The run ended as the one to which nothing happened.
fn assert_as_straight(sandbox: &Sandbox) {
    assert_as_straight_after(sandbox, STEPS);
}

fn assert_as_straight_after(sandbox: &Sandbox, steps: usize) {
    sandbox.expect(0, &["checkpoint", "diff", "straight", "test"]);
    assert_bit_equal(sandbox, "straight", "test", steps);
}

fn lost(sandbox: &Sandbox) -> Vec<String> {
    let lost = sandbox.events_of("node_lost");
    lost.iter().map(|event| event["node"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_lost_node_is_restored_from_its_peers_memory() {
    let mut run = Run::start(&TWO_BY_TWO, &[]);
    run.agents(&["a", "b"], &["spare"]);
    let copied = run.wait_for_copies(15);
    run.lose(&["b"]);
    run.sandbox.wait_for(|status| status["generation"] == 2);
    let (why, _) = run.sandbox.expect(0, &["why", "test"]);
    assert!(why.contains(", out of the nodes' memories"), "{why}");
    run.assert_from_memory(copied);
    let sandbox = run.end();
    assert_eq!(lost(&sandbox), ["b"]);
    let committed = sandbox.events_of("checkpoint_committed");
    assert_eq!(committed.len(), 1, "a step in memory is no commit: {committed:?}");
    assert_as_straight(&sandbox);
}

/// Nothing is on disk yet, and every step is kept: at the moment of the kill the newest copy may be
/// under way, and the one before is there.
#[test]
fn at_most_one_interval_is_lost() {
    let mut run = Run::start(&TWO_BY_TWO, &["checkpoint.memory.every_steps=1"]);
    run.agents(&["a", "b"], &["spare"]);
    run.sandbox.wait_for_metrics(23, 1);
    run.lose(&["b"]);
    run.sandbox.wait_for_metrics(23, 2);
    let resumed = run.resumed();
    assert!(resumed[0].1 == "memory" && resumed[0].0 >= Some(21), "{resumed:?}");
    let sandbox = run.end();
    assert_eq!(lost(&sandbox), ["b"]);
    assert_as_straight(&sandbox);
}

/// Two stages and two replicas, a rank on each of four nodes: two nodes go at one moment.
fn check_group(group: [&str; 2]) {
    let sets = &["parallelism={pipeline: {stages: 2}, replicate: 2}"];
    let mut run = Run::start(&Shape { nodes: 4, ranks: 1, sets }, &["restart.warm_spares=false"]);
    run.agents(&["a", "b", "c", "d"], &["s", "t"]);
    let placed = run.sandbox.events_of("nodes_placed");
    assert_eq!(placed[0]["nodes"], serde_json::json!(["a", "b", "c", "d"]));
    let copied = run.wait_for_copies(15);
    run.lose(&group);
    run.sandbox.wait_for(|status| status["generation"].as_u64() >= Some(2));
    run.sandbox.wait_for_metrics(copied + 1, 2);
    let resumed = run.resumed();
    // The second loss may be found after the first has led to a start.
    assert!(resumed.iter().all(|(step, tier)| tier == "memory" && *step >= Some(copied)));
    let sandbox = run.end();
    let mut lost = lost(&sandbox);
    lost.sort();
    assert_eq!(lost, group);
    assert_as_straight(&sandbox);
}

/// All that has to do with the first stage.
#[test]
fn a_whole_stage_is_restored() {
    check_group(["a", "c"]);
}

/// All of a pipeline.
#[test]
fn a_whole_replica_is_restored() {
    check_group(["c", "d"]);
}

/// The third copy of one node does not come to its end: that step is not used, but the one before.
#[test]
fn a_step_whose_copy_had_not_arrived_is_passed_over() {
    let mut run = Run::start(&TWO_BY_TWO, &[]);
    let fired = run.sandbox.path().join("fired");
    let fault = format!("PHALANX_FAILPOINT=copy_bundle:3=slow@{}", fired.display());
    run.agent("a");
    run.agent_by(&["env", &fault], "b");
    run.sandbox.wait_for_metrics(1, 1);
    run.agent("spare");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !fired.exists() {
        assert!(Instant::now() < deadline, "the fault must happen");
        std::thread::sleep(Duration::from_millis(5));
    }
    run.lose(&["b"]);
    run.sandbox.wait_for(|status| status["generation"] == 2);
    assert_eq!(run.resumed(), [(Some(2 * EVERY), "memory".to_owned())]);
    let sandbox = run.end();
    assert_eq!(lost(&sandbox), ["b"]);
    assert_as_straight(&sandbox);
}

/// A node and the one that has its copy: what is left is on disk.
#[test]
fn what_is_lost_with_its_copy_is_on_disk() {
    let mut run = Run::start(&TWO_BY_TWO, &["checkpoint.every_steps=20"]);
    run.agents(&["a", "b"], &["s", "t"]);
    run.wait_for_copies(25);
    run.sandbox.wait_for(|status| status["last_checkpoint"].as_u64() >= Some(20));
    run.lose(&["a", "b"]);
    run.sandbox.wait_for(|status| status["generation"].as_u64() >= Some(2));
    run.sandbox.wait_for_metrics(41, 2);
    let resumed = run.resumed();
    // Before the second loss is known, a start may have been tried.
    let (step, tier) = resumed.last().unwrap();
    assert!(tier == "local" && *step >= Some(20), "{resumed:?}");
    let sandbox = run.end();
    let mut lost = lost(&sandbox);
    lost.sort();
    assert_eq!(lost, ["a", "b"]);
    assert_as_straight(&sandbox);
}

/// No node is lost, so that nothing is fetched which a node's own ranks do not have, but for what
/// replicas share.
#[test]
fn a_killed_rank_goes_on_from_memory_and_the_others_keep_their_processes() {
    let mut run = Run::start(&TWO_BY_TWO, &[]);
    ["a", "b"].iter().for_each(|name| run.agent(name));
    let copied = run.wait_for_copies(15);
    let status = run.sandbox.wait_for(|status| status["ranks"][3]["pid"].as_u64() > Some(0));
    signal(u32::try_from(status["ranks"][3]["pid"].as_u64().unwrap()).unwrap(), Signal::KILL);
    run.sandbox.wait_for(|status| status["generation"] == 2);
    run.assert_from_memory(copied);
    let sandbox = run.end();
    assert_eq!(sandbox.events_of("first_cause").len(), 1, "the rank must have been killed");
    assert_eq!(sandbox.events_of("generation_started")[1]["kept"], 3);
    assert_as_straight(&sandbox);
}

/// Ranks whose parts are cut in some way read what others wrote.
fn check_layout(layout: &'static str) {
    // So many messages go about in a step that few steps and large micro-batches are enough.
    let sets = &[layout, "training.steps=60", "training.micro_batch=4"];
    let mut run = Run::start(&Shape { nodes: 2, ranks: 2, sets }, &[]);
    run.agents(&["a", "b"], &["spare"]);
    let copied = run.wait_for_copies(15);
    run.lose(&["a"]);
    run.sandbox.wait_for(|status| status["generation"] == 2);
    run.assert_from_memory(copied);
    let sandbox = run.end();
    assert_eq!(lost(&sandbox), ["a"], "{layout}");
    assert_as_straight_after(&sandbox, 60);
}

#[test]
fn tensors_and_stages_are_restored() {
    check_layout("parallelism={tensor: 2, pipeline: {stages: 2}}");
}

#[test]
fn sharded_parameters_are_restored() {
    check_layout("parallelism={shard: {ranks: 4, level: parameters}}");
}

#[test]
fn tensors_and_sharded_gradients_are_restored() {
    check_layout("parallelism={tensor: 2, shard: {ranks: 2, level: gradients}}");
}

/// Without a spare the run goes on with one replica, from what both nodes had kept.
#[test]
fn fewer_replicas_go_on_from_memory() {
    let sets = &[
        "precision.compute=fp64",
        "parallelism={shard: {ranks: 2, level: gradients}, replicate: 2}",
    ];
    let elastic = "restart.elastic={min_replicas: 1, wait_s: 1, grow_pause_s: 1000}";
    let mut run = Run::start(&Shape { nodes: 2, ranks: 2, sets }, &[elastic]);
    ["a", "b"].iter().for_each(|name| run.agent(name));
    let copied = run.wait_for_copies(15);
    run.lose(&["b"]);
    run.sandbox.wait_for(|status| status["generation"] == 2);
    run.assert_from_memory(copied);
    // Its memory is of one node now, which has no peer, and is used all the same.
    let status =
        run.sandbox.wait_for(|status| status["memory_checkpoint"].as_u64() >= Some(copied + 10));
    let kept = status["memory_checkpoint"].as_u64().unwrap();
    signal(u32::try_from(status["ranks"][1]["pid"].as_u64().unwrap()).unwrap(), Signal::KILL);
    run.sandbox.wait_for(|status| status["generation"] == 3);
    let resumed = run.resumed();
    assert!(resumed[1].1 == "memory" && resumed[1].0 >= Some(kept), "{resumed:?}");
    let sandbox = run.end();
    assert_eq!(lost(&sandbox), ["b"]);
    assert_close(&sandbox, "straight", "test", STEPS, 1e-10);
}

/// What every node has is of the trouble itself, or as near to it as can be.
#[test]
fn a_roll_back_empties_all_memories() {
    let sandbox = Sandbox::real(env!("CARGO_BIN_EXE_phalanx-under-test"))
        // A sample of step 12, as in `memory.rs`.
        .env("PHALANX_NUMERIC_FAULT", "sample:93:1e3");
    let sets = [
        "numeric={window: 4, loss_zscore: 100, grad_norm_zscore: 50, on_spike: rollback}",
        "schedule.kind=constant",
        "validation.every_steps=0",
        "training.global_batch=8",
        "training.steps=20",
        "checkpoint.every_steps=5",
        "checkpoint.memory.every_steps=1",
    ];
    let mut run = Run::start_alone(sandbox, &Shape { nodes: 2, ranks: 1, sets: &[] }, &sets);
    ["a", "b"].iter().for_each(|name| run.agent(name));
    run.sandbox.wait_for(|status| status["generation"] == 2);
    assert_eq!(run.resumed(), [(Some(10), "local".to_owned())]);
    let sandbox = run.end();
    assert_eq!(sandbox.events_of("rolled_back").len(), 1, "the fault must have happened");
}

/// Agents outlive their coordinator, and so does what they keep: the next one finds it.
#[test]
fn a_new_coordinator_goes_on_from_the_nodes_memories() {
    let often = ["checkpoint.every_steps=10", "checkpoint.memory.every_steps=1"];
    let mut run = Run::start(&TWO_BY_TWO, &often);
    run.agents(&["a", "b"], &["spare"]);
    let copied = run.wait_for_copies(25);
    signal(run.coordinator.pid(), Signal::KILL);
    run.lose(&["b"]);
    run.coordinator = run.sandbox.start(&["coordinator", "test", "--listen", "127.0.0.1:0"]);
    run.sandbox.wait_for(|status| status["generation"] == 2);
    let resumed = run.resumed();
    let [(step, tier)] = &resumed[..] else { panic!("{resumed:?}") };
    // Steps that are saved on disk are not kept in memory, too.
    let is_on_disk = step.is_some_and(|step| step.is_multiple_of(10)) && tier == "local";
    assert!((tier == "memory" || is_on_disk) && *step >= Some(copied), "{resumed:?}");
    let sandbox = run.end();
    assert_as_straight(&sandbox);
}

/// The link to the peer fails for a while: it is told, and training goes on.
#[test]
fn a_copy_that_fails_is_told_of_and_harms_nothing() {
    let mut run = Run::start(&TWO_BY_TWO, &[]);
    let fired = run.sandbox.path().join("fired");
    let fault = format!("PHALANX_FAILPOINT=copy_bundle:2=eio@{}", fired.display());
    run.agent("a");
    run.agent_by(&["env", &fault], "b");
    let sandbox = run.end();
    assert!(fired.exists(), "the fault must have happened");
    let failed = sandbox.events_of("checkpoint_not_copied");
    assert_eq!(failed.len(), 1, "{failed:?}");
    assert_eq!((&failed[0]["step"], &failed[0]["rank"]), (&10.into(), &2.into()));
    assert_eq!(sandbox.events_of("generation_started").len(), 1, "no restart");
    assert_as_straight(&sandbox);
}

/// Files of the memory are for nobody else.
#[test]
fn a_nodes_memory_is_its_owners_alone() {
    let mut run = Run::start(&TWO_BY_TWO, &[]);
    ["a", "b"].iter().for_each(|name| run.agent(name));
    run.wait_for_copies(5);
    let mode = |path: &Path| {
        std::os::unix::fs::PermissionsExt::mode(&path.metadata().unwrap().permissions()) & 0o777
    };
    assert_eq!(mode(&run.folder("a").unwrap()), 0o700);
    assert_eq!(mode(&run.sandbox.run_dir().doors()), 0o600);
    assert_as_straight(&run.end());
}
