//! The real trainer on four ranks, one of which is killed at each of the steps 1 to 50: it ends
//! with the bits of a run to which nothing happened, and has read the same samples.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use end_to_end::losses::assert_bit_equal;
use end_to_end::random::Random;
use end_to_end::sandbox::Sandbox;
use serde_json::Value;
use std::time::Duration;

const RANKS: u64 = 4;
/// Steps at which a rank is killed, from 1 on; the run has two more.
const KILLS: u64 = 50;
const STEPS: usize = 52;
/// Longest time of a run with so many recoveries.
const PATIENCE: Duration = Duration::from_secs(600);

fn sets() -> Vec<String> {
    let sets = [
        "cluster.ranks_per_node=4",
        "cluster.threads_per_rank=1",
        "training.steps=52",
        "training.global_batch=8",
        "checkpoint.every_steps=1",
        "checkpoint.keep_last=2",
        "validation.every_steps=0",
        "metrics.tensorboard=false",
        // Each generation gets one step further; a kill before its commit may repeat one.
        "restart.max_no_progress=100",
    ];
    sets.map(str::to_owned).to_vec()
}

/// What the last checkpoint says of the run's data and steps, but for who wrote it.
fn state(sandbox: &Sandbox, run: &str) -> Value {
    let path = sandbox.run_dir_of(run).checkpoint(STEPS as u64).join("state.json");
    let mut state: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let fields = state.as_object_mut().unwrap();
    let told = ["step", "tokens", "data_cursor", "learning_rate", "skipped_steps"];
    fields.retain(|name, _| told.contains(&name.as_str()));
    assert_eq!(fields.len(), told.len(), "{fields:?}");
    state
}

/// In the `n`-th generation a rank is killed at step `n`: that step's in turn, `offset` further.
/// The kill falls up to `micros` after the step's beginning.
fn check(sandbox: Sandbox, offset: u64, micros: u64) {
    let mut random = Random::from_env();
    let kill = |step: u64| {
        let after = if micros == 0 { 0 } else { random.below(micros) };
        format!("kill:{}:{step}:{step}:{after}", (step - 1 + offset) % RANKS)
    };
    let faults: Vec<String> = (1..=KILLS).map(kill).collect();
    let sandbox = sandbox.env("PHALANX_STEP_FAULTS", faults.join(";"));
    let sets = sets();
    let args: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    let running = sandbox.start(&[&["run", "config.yaml"], &args[..]].concat());
    running.expect_within(PATIENCE, 0);
    let fired = sandbox.events_of("fault_injected");
    let number = |event: &Value, name: &str| event[name].as_u64().unwrap();
    let found: Vec<(u64, u64)> =
        fired.iter().map(|event| (number(event, "step"), number(event, "rank"))).collect();
    let expected: Vec<(u64, u64)> =
        (1..=KILLS).map(|step| (step, (step - 1 + offset) % RANKS)).collect();
    assert_eq!(found, expected, "every fault must fire");
    let causes = sandbox.events_of("first_cause");
    let ranks: Vec<u64> = causes.iter().map(|cause| number(cause, "rank")).collect();
    assert_eq!(ranks, expected.iter().map(|(_, rank)| *rank).collect::<Vec<u64>>());
    assert!(causes.iter().all(|cause| cause["class"] == "process"), "{causes:?}");
    assert_bit_equal(&sandbox, "straight", "test", STEPS);
    sandbox.expect(0, &["checkpoint", "diff", "straight", "test"]);
    assert_eq!(state(&sandbox, "straight"), state(&sandbox, "test"), "the same samples");
    sandbox.assert_nothing_left();
}

fn sandbox() -> Sandbox {
    let sandbox = Sandbox::real(env!("CARGO_BIN_EXE_phalanx-under-test"));
    sandbox.train("straight", &sets().iter().map(String::as_str).collect::<Vec<_>>());
    sandbox
}

#[test]
fn a_rank_killed_at_every_step_costs_no_bit_and_no_sample() {
    check(sandbox(), 0, 0);
}

/// All 200: each of the steps with each of the ranks, at a random moment of the step. By
/// `cargo nextest run -p end-to-end --test every_step --run-ignored only`.
#[test]
#[ignore = "takes many minutes"]
fn each_rank_killed_at_every_step_costs_no_bit_and_no_sample() {
    for offset in 0..RANKS {
        check(sandbox(), offset, 5_000);
    }
}
