//! Nodes that are lost without a spare, and that come back: the run goes on with fewer
//! data-parallel replicas and returns to all of them at a checkpoint, with the same batches and
//! losses.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use end_to_end::losses::{assert_close, metrics};
use end_to_end::sandbox::{Running, Sandbox};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const ELASTIC: [&str; 2] =
    ["--set", "restart.elastic={min_replicas: 1, wait_s: 1, grow_pause_s: 0}"];

fn coordinator(sandbox: &Sandbox, sets: &[&str]) -> Running {
    let args = ["coordinator", "config.yaml", "--listen", "127.0.0.1:0"];
    let nodes = ["--set", "cluster.nodes=2"];
    sandbox.start(&[&args[..], &nodes, &ELASTIC, sets].concat())
}

fn agent(sandbox: &Sandbox, name: &str) -> Running {
    sandbox.start(&["agent", "test", "--name", name])
}

fn generation_of(sandbox: &Sandbox, number: u64) -> Value {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let started = sandbox.events_of("generation_started");
        if let Some(event) = started.iter().find(|event| event["generation"] == number) {
            return event.clone();
        }
        assert!(Instant::now() < deadline, "generation {number} was not started: {started:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn layout(replicate: usize, whole: usize) -> Value {
    sharded(1, replicate, whole)
}

fn sharded(shard: usize, replicate: usize, whole: usize) -> Value {
    json!({ "tensor": 1, "context": 1, "pipeline": 1, "shard": shard, "replicate": replicate,
        "whole_replicate": whole })
}

/// Both nodes, then `a` alone, then both again, as the events have it, with these layouts.
fn assert_shrunk_and_grown(sandbox: &Sandbox, one: &Value, whole: &Value) {
    let started = sandbox.events_of("generation_started");
    let layouts: Vec<&Value> = started.iter().map(|event| &event["layout"]).collect();
    assert_eq!(layouts, [whole, one, whole]);
    let is_restart: Vec<&Value> = started.iter().map(|event| &event["is_restart"]).collect();
    assert_eq!(is_restart, [false, true, false], "growth is no restart");
    let placed: Vec<Value> =
        sandbox.events_of("nodes_placed").iter().map(|event| event["nodes"].clone()).collect();
    assert_eq!(placed, [json!(["a", "b"]), json!(["a"]), json!(["a", "b"])]);
    let lost = sandbox.events_of("node_lost");
    assert_eq!((lost.len(), &lost[0]["node"]), (1, &"b".into()));
    // It grew at a checkpoint, right after it was committed, and from there.
    let events = sandbox.events();
    let growing = events.iter().position(|event| event["kind"] == "growing").unwrap();
    let committed = &events[growing - 1];
    assert_eq!(committed["kind"], "checkpoint_committed");
    assert_eq!(started[2]["resume_step"], committed["step"]);
    assert_eq!(sandbox.events_of("first_cause").len(), 1);
}

#[test]
fn a_run_goes_on_without_a_node_and_takes_it_back_at_a_checkpoint() {
    let sandbox =
        Sandbox::new(env!("CARGO_BIN_EXE_phalanx-under-test"), env!("CARGO_BIN_EXE_fake-trainer"))
            .env("FAKE_STEP_MS", 50);
    let coordinator = coordinator(&sandbox, &["--set", "training.steps=60"]);
    let [first, second] = ["a", "b"].map(|name| agent(&sandbox, name));
    sandbox.wait_for_step(7);
    second.signal(Signal::KILL);
    assert_eq!(generation_of(&sandbox, 2)["world_size"], 2);
    let status = sandbox.wait_for(|status| status["generation"] == 2);
    assert_eq!(status["layout"], layout(2, 4));
    let (text, _) = sandbox.expect(0, &["status", "test"]);
    assert!(text.contains("the run has 2 of 4 data-parallel replicas"), "{text}");
    let again = agent(&sandbox, "b");
    coordinator.expect(0);
    first.expect(0);
    again.expect(0);
    let steps: Vec<u64> = metrics(&sandbox, "test").iter().map(|report| report.step).collect();
    assert_eq!(steps, (1..=60).collect::<Vec<u64>>());
    assert_shrunk_and_grown(&sandbox, &layout(2, 4), &layout(4, 4));
    let (text, _) = sandbox.expect(0, &["status", "test"]);
    assert!(text.contains("3 (1 restarts)") && !text.contains("replicas"), "{text}");
    sandbox.assert_nothing_left();
}

/// What the real trainer learned is what it learns on both nodes throughout: the batches are the
/// same, and the sums differ by rounding alone.
#[test]
fn losses_and_tokens_are_those_of_the_whole_layout() {
    let sandbox = Sandbox::real(env!("CARGO_BIN_EXE_phalanx-under-test"));
    let sets = [
        "training.steps=60",
        "training.global_batch=64",
        "precision.compute=fp64",
        "cluster.threads_per_rank=1",
        // A node holds one replica, of two ranks.
        "parallelism={shard: {ranks: 2, level: gradients}, replicate: 2}",
    ];
    sandbox.train("straight", &[&sets[..], &["cluster.ranks_per_node=4"]].concat());
    let args: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    let coordinator = coordinator(&sandbox, &args);
    let [first, second] = ["a", "b"].map(|name| agent(&sandbox, name));
    sandbox.wait_for_metrics(7, 1);
    second.signal(Signal::KILL);
    generation_of(&sandbox, 2);
    let again = agent(&sandbox, "b");
    coordinator.expect(0);
    first.expect(0);
    again.expect(0);
    assert_shrunk_and_grown(&sandbox, &sharded(2, 1, 2), &sharded(2, 2, 2));
    let largest = assert_close(&sandbox, "straight", "test", 60, 1e-10);
    eprintln!("losses and norms within {largest:e}");
    let tokens =
        |run| -> Vec<u64> { metrics(&sandbox, run).iter().map(|report| report.tokens).collect() };
    assert_eq!(tokens("test"), tokens("straight"), "no sample is lost or read twice");
    let generations: Vec<u64> =
        metrics(&sandbox, "test").iter().map(|report| report.generation).collect();
    assert!(generations.contains(&2) && generations.contains(&3), "{generations:?}");
    sandbox.assert_nothing_left();
}

#[test]
fn without_a_minimum_a_lost_node_is_waited_for() {
    let sandbox =
        Sandbox::new(env!("CARGO_BIN_EXE_phalanx-under-test"), env!("CARGO_BIN_EXE_fake-trainer"))
            .env("FAKE_STEP_MS", 50);
    let all = ["--set", "restart.elastic.min_replicas=null"];
    let coordinator = coordinator(&sandbox, &all);
    let [first, second] = ["a", "b"].map(|name| agent(&sandbox, name));
    sandbox.wait_for_step(7);
    second.signal(Signal::KILL);
    sandbox.wait_for(|status| status["state"] == "starting" && status["generation"] == 1);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(sandbox.events_of("generation_started").len(), 1, "nothing runs on one node");
    let again = agent(&sandbox, "b");
    coordinator.expect(0);
    first.expect(0);
    again.expect(0);
    let started = sandbox.events_of("generation_started");
    assert_eq!((started.len(), &started[1]["layout"]), (2, &layout(4, 4)));
    sandbox.assert_nothing_left();
}

/// A new coordinator takes over a run that lacks a node, as it is.
#[test]
fn a_new_coordinator_takes_over_a_shrunk_run() {
    let sandbox =
        Sandbox::new(env!("CARGO_BIN_EXE_phalanx-under-test"), env!("CARGO_BIN_EXE_fake-trainer"))
            .env("FAKE_STEP_MS", 100);
    let killed = coordinator(&sandbox, &["--set", "training.steps=80"]);
    let [first, second] = ["a", "b"].map(|name| agent(&sandbox, name));
    sandbox.wait_for_step(7);
    second.signal(Signal::KILL);
    generation_of(&sandbox, 2);
    sandbox.wait_for(|status| status["generation"] == 2 && status["state"] == "running");
    killed.signal(Signal::KILL);
    drop(killed);
    let coordinator = sandbox.start(&["coordinator", "test", "--listen", "127.0.0.1:0"]);
    let status = sandbox
        .wait_for(|status| status["pid"] == coordinator.pid() && status["layout"] == layout(2, 4));
    assert_eq!(status["generation"], 2);
    let again = agent(&sandbox, "b");
    coordinator.expect(0);
    first.expect(0);
    again.expect(0);
    assert_eq!(sandbox.events_of("generation_adopted").len(), 1);
    assert_shrunk_and_grown(&sandbox, &layout(2, 4), &layout(4, 4));
    sandbox.assert_nothing_left();
}
