//! Training under `mpirun`, by the trainer built with the feature `mpi`: the numbers of Gloo, and
//! the launcher's ways with failures and stops.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use end_to_end::losses::{assert_bit_equal, metrics};
use end_to_end::sandbox::{Running, Sandbox, signal};
use rustix::process::Signal;
use serde_json::Value;
use std::time::{Duration, Instant};

/// A run on four ranks.
struct Layout {
    sets: &'static [&'static str],
    steps: usize,
}

/// Tensor parallel in pairs, and two replicas.
const TENSOR: Layout = Layout {
    sets: &[
        "cluster.ranks_per_node=4",
        "cluster.threads_per_rank=1",
        "parallelism={tensor: 2, replicate: 2}",
        "training.steps=48",
    ],
    steps: 48,
};
/// Single messages between stages of two chunks, and gathered weights.
const PIPELINE: Layout = Layout {
    sets: &[
        "cluster.ranks_per_node=4",
        "cluster.threads_per_rank=1",
        "model.layers=4",
        "parallelism={pipeline: {stages: 2, schedule: interleaved-1f1b, virtual_stages: 2}, \
         shard: {ranks: 2, level: parameters}}",
        "training.steps=12",
    ],
    steps: 12,
};
const MPI: &str = "cluster.kind=mpi";

/// With the same run over Gloo done, named `straight`.
fn sandbox(layout: &Layout) -> Sandbox {
    let sandbox = Sandbox::real(env!("CARGO_BIN_EXE_phalanx-under-test"));
    sandbox.train("straight", layout.sets);
    sandbox
}

fn start(sandbox: &Sandbox, layout: &Layout) -> Running {
    let sets = layout.sets.iter().copied().chain([MPI]).flat_map(|set| ["--set", set]);
    let args: Vec<&str> = ["run", "config.yaml"].into_iter().chain(sets).collect();
    sandbox.start(&args)
}

/// Losses, norms, weights and optimizer state are those of the run over Gloo, bit for bit.
fn assert_as_straight(sandbox: &Sandbox, layout: &Layout) {
    assert_bit_equal(sandbox, "straight", "test", layout.steps);
    let (stdout, stderr) = sandbox.expect(0, &["checkpoint", "diff", "straight", "test"]);
    assert!(stdout.contains("equal"), "{stdout}{stderr}");
    sandbox.assert_nothing_left();
}

fn pid_of(status: &Value, rank: usize) -> u32 {
    u32::try_from(status["ranks"][rank]["pid"].as_u64().unwrap()).unwrap()
}

#[test]
fn two_by_two_trains_as_over_gloo() {
    let sandbox = sandbox(&TENSOR);
    start(&sandbox, &TENSOR).expect(0);
    assert_as_straight(&sandbox, &TENSOR);
    let last = metrics(&sandbox, "test").pop().unwrap();
    eprintln!("loss {} at step {}, as over Gloo", last.loss, last.step);
    for rank in 0..4 {
        let log = std::fs::read_to_string(sandbox.run_dir().log(1, rank)).unwrap();
        assert!(log.contains(&format!("rank {rank} of 4 is ready for step 1")), "{log}");
    }
}

#[test]
fn a_pipeline_of_shards_trains_as_over_gloo() {
    let sandbox = sandbox(&PIPELINE);
    start(&sandbox, &PIPELINE).expect(0);
    assert_as_straight(&sandbox, &PIPELINE);
}

/// A rank's death ends the whole job (within a second: `collectives/tests/mpi.rs`); the launcher
/// starts it again. A stop is taken at a step, and the run goes on from there.
#[test]
fn a_run_that_was_killed_and_stopped_ends_with_the_same_bits() {
    let sandbox = sandbox(&TENSOR);
    let running = start(&sandbox, &TENSOR);
    sandbox.wait_for_metrics(7, 1);
    let status = sandbox.wait_for_step(6);
    let killed = Instant::now();
    signal(pid_of(&status, 2), Signal::KILL);
    sandbox.wait_for(|status| status["generation"] == 2);
    eprintln!("the next generation began {} ms after the kill", killed.elapsed().as_millis());
    assert!(killed.elapsed() < Duration::from_secs(4));
    sandbox.wait_for_metrics(9, 2);
    running.signal(Signal::TERM);
    running.expect(75);
    sandbox.assert_nothing_left();
    sandbox.expect(0, &["resume", "test"]);
    let failed = sandbox.events_of("rank_failed");
    let is_kill = |event: &Value| event["rank"] == 2 && event["exit"] == "killed by SIGKILL";
    assert!(failed.iter().any(is_kill), "{failed:?}");
    let (why, _) = sandbox.expect(0, &["why", "test"]);
    assert!(why.contains("rank 2") && why.contains("SIGKILL"), "{why}");
    assert_as_straight(&sandbox, &TENSOR);
}

/// A rank that hangs ends with the launcher too, and so does `mpirun`.
#[test]
fn nothing_outlives_a_killed_launcher() {
    let sandbox = Sandbox::real(env!("CARGO_BIN_EXE_phalanx-under-test"));
    let running = start(&sandbox, &TENSOR);
    sandbox.wait_for_metrics(3, 1);
    let status = sandbox.wait_for_step(2);
    signal(pid_of(&status, 1), Signal::STOP);
    running.signal(Signal::KILL);
    drop(running);
    let deadline = Instant::now() + Duration::from_secs(5);
    while !sandbox.processes().is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    // A checkpoint that was being written stays behind unfinished, until the run is resumed.
    assert_eq!(sandbox.processes(), []);
}

#[test]
fn a_trainer_without_mpi_is_refused() {
    let fake = env!("CARGO_BIN_EXE_fake-trainer");
    let sandbox = Sandbox::new(env!("CARGO_BIN_EXE_phalanx-under-test"), fake);
    let (_, stderr) = start(&sandbox, &TENSOR).expect(64);
    assert!(stderr.contains("was built without"), "{stderr}");
    assert!(stderr.contains("hint: `ops/setup --mpi`"), "{stderr}");
    assert!(!sandbox.run_dir().root().exists());
}
