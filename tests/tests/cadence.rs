//! With `checkpoint.every_steps: auto` the run itself chooses how often it saves: by Young's and
//! Daly's rule from what it measures, the same step on every rank, and what it learns is the same.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use checkpoint_format::interval::{Interval, optimum_s};
use end_to_end::losses::assert_bit_equal;
use end_to_end::sandbox::{Sandbox, signal};
use rustix::process::Signal;
use serde_json::Value;

fn sandbox() -> Sandbox {
    Sandbox::real(env!("CARGO_BIN_EXE_phalanx-under-test"))
}

/// A failure is expected each 0.1 s, so that steps of milliseconds are worth a save.
const AUTO: [&str; 4] =
    ["--set", "checkpoint.every_steps=auto", "--set", "checkpoint.failures_per_node_day=864000"];

fn steps_of(events: &[Value]) -> Vec<u64> {
    events.iter().map(|event| event["step"].as_u64().unwrap()).collect()
}

#[test]
fn the_interval_follows_from_what_was_measured() {
    let sandbox = sandbox();
    let sets = ["--set", "training.steps=120", "--set", "checkpoint.keep_last=1000"];
    sandbox.expect(0, &[&["run", "config.yaml"], &AUTO[..], &sets].concat());
    let chosen: Vec<Interval> = sandbox
        .events_of("checkpoint_interval")
        .into_iter()
        .map(|event| serde_json::from_value(event).unwrap())
        .collect();
    assert!(!chosen.is_empty(), "the interval must have been told");
    let mut before = None;
    for interval in &chosen {
        let Interval { stall_s, write_s, step_s, mttf_s, .. } = *interval;
        assert!(stall_s > 0.0 && step_s > 0.0 && mttf_s > 0.1, "{interval:?}");
        let again = Interval::choose([stall_s, write_s, step_s], mttf_s, before);
        assert_eq!(again, *interval);
        let wanted = optimum_s(stall_s, mttf_s).max(write_s) / step_s;
        let near = wanted * 0.7 - 1.0..=wanted * 1.3 + 1.0;
        assert!(near.contains(&(interval.steps as f64)), "{wanted} steps: {interval:?}");
        before = Some(*interval);
    }
    let saved = steps_of(&sandbox.events_of("checkpoint_committed"));
    assert_eq!((saved[0], *saved.last().unwrap()), (5, 120), "{saved:?}");
    assert_eq!(saved[1], (5 + chosen[0].steps).min(120), "{saved:?} {chosen:?}");
    let gaps: Vec<u64> = saved.windows(2).map(|pair| pair[1] - pair[0]).collect();
    let (_, but_the_last) = gaps.split_last().unwrap();
    assert!(but_the_last.iter().all(|gap| chosen.iter().any(|c| c.steps == *gap)), "{saved:?}");
    let (status, _) = sandbox.expect(0, &["status", "test"]);
    assert!(status.contains("one every ") && status.contains("a save stalls for"), "{status}");

    sandbox.train("straight", &["training.steps=120"]);
    sandbox.expect(0, &["checkpoint", "diff", "straight", "test"]);
    assert_bit_equal(&sandbox, "straight", "test", 120);
}

#[test]
fn failures_count_milestones_are_saved_and_the_bits_stay() {
    let sandbox = sandbox();
    let sets = ["--set", "training.steps=90", "--set", "checkpoint.keep_every_steps=18"];
    let running = sandbox.start(&[&["run", "config.yaml"], &AUTO[..], &sets].concat());
    let status = sandbox.wait_for(|status| status["checkpoint_interval"]["steps"].is_u64());
    let pid = status["ranks"][1]["pid"].as_u64().unwrap();
    signal(u32::try_from(pid).unwrap(), Signal::KILL);
    running.expect(0);
    assert_eq!(sandbox.events_of("first_cause").len(), 1, "the rank must have been killed");
    let saved = steps_of(&sandbox.events_of("checkpoint_committed"));
    for milestone in [18, 36, 54, 72, 90] {
        assert!(saved.contains(&milestone), "{saved:?}");
    }
    // One failure in a run of seconds weighs as much as what was expected.
    let chosen = sandbox.events_of("checkpoint_interval");
    let of = |generation: u64| chosen.iter().find(|event| event["generation"] == generation);
    assert!(of(1).is_some() && of(2).is_some(), "{chosen:?}");
    sandbox.train("straight", &["training.steps=90"]);
    sandbox.expect(0, &["checkpoint", "diff", "straight", "test"]);
    assert_bit_equal(&sandbox, "straight", "test", 90);
    sandbox.assert_nothing_left();
}

#[test]
fn the_check_says_what_to_expect() {
    let sandbox = sandbox();
    let (plan, _) = sandbox.expect(0, &["check", "config.yaml", "--set", AUTO[1]]);
    assert!(plan.contains("as often as loses the least time"), "{plan}");
    assert!(
        plan.contains("a failure every 153 d 20:18 on 1 node(s) and a stall of 0.2 s"),
        "{plan}"
    );
    let (plan, _) = sandbox.expect(0, &["check", "config.yaml", "--json", "--set", AUTO[1]]);
    let plan: Value = serde_json::from_str(&plan).unwrap();
    assert!(plan["checkpoints"].is_null(), "{plan}");
    assert!(plan["checkpoint_interval_s"].as_f64().unwrap() > 2300.0, "{plan}");
}
