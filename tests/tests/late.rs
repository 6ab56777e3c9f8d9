//! Numbers that are read one step late, as on a GPU, here on the CPU: the same runs come of it, bit
//! by bit, with and without numeric trouble, whatever follows from that.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use end_to_end::losses::{assert_bit_equal, metrics};
use end_to_end::sandbox::Sandbox;
use rustix::process::Signal;
use serde_json::Value;

/// As in the tests of numeric trouble: few steps before the watch begins, and limits that nothing
/// but a fault reaches.
const SETS: [&str; 3] = [
    "numeric={window: 4, loss_zscore: 100, grad_norm_zscore: 50}",
    "schedule.kind=constant",
    "cluster.threads_per_rank=1",
];

/// Of step 12, which reads samples 88 to 95; its numbers are read in step 13.
const BAD_SAMPLE: &str = "sample:93:1e3";

fn sandbox(is_late: bool) -> Sandbox {
    let sandbox = Sandbox::real(env!("CARGO_BIN_EXE_phalanx-under-test"));
    sandbox.env("PHALANX_LATE_NUMBERS", u8::from(is_late))
}

/// What is known of a run's numeric trouble, but when and where it was found out.
fn trouble(sandbox: &Sandbox) -> Vec<Value> {
    let mut events = sandbox.events_of("numeric_trouble");
    for event in &mut events {
        event.as_object_mut().unwrap().remove("time");
    }
    events
}

/// Each step's generation, numbers, and whether it was skipped.
fn steps(sandbox: &Sandbox) -> Vec<(u64, u64, [u64; 3], bool)> {
    let bits = |value: f64| value.to_bits();
    let of = |report: &rank_protocol::StepReport| {
        let validation = report.validation_loss.map_or(0, bits);
        let numbers = [bits(report.loss), bits(report.grad_norm), validation];
        (report.step, report.generation, numbers, report.skipped)
    };
    metrics(sandbox, "test").iter().map(of).collect()
}

/// Runs both ways, which must end with this code, and compares all that came of it.
fn check(code: i32, faults: &str, sets: &[&str]) -> Sandbox {
    let run = |is_late| {
        let sandbox = sandbox(is_late).env("PHALANX_NUMERIC_FAULT", faults);
        let sets = SETS.iter().chain(sets).flat_map(|set| ["--set", *set]);
        let args: Vec<&str> = ["run", "config.yaml"].into_iter().chain(sets).collect();
        let (_, stderr) = sandbox.expect(code, &args);
        (sandbox, stderr)
    };
    let ((at_once, _), (late, stderr)) = (run(false), run(true));
    // Which way it was: a late report does not say how long the rank waited for others.
    let waits =
        |sandbox: &Sandbox| metrics(sandbox, "test").iter().any(|r| r.comm_wait_s.is_some());
    assert_eq!((waits(&at_once), waits(&late)), (true, false));
    assert_eq!(trouble(&late), trouble(&at_once), "{stderr}");
    assert_eq!(steps(&late), steps(&at_once), "{stderr}");
    let folder = |sandbox: &Sandbox, step| {
        let folder = sandbox.run_dir().checkpoint(step);
        folder.is_dir().then(|| folder.to_string_lossy().into_owned())
    };
    for step in 1..=20 {
        match (folder(&at_once, step), folder(&late, step)) {
            (Some(one), Some(other)) => {
                late.expect(0, &["checkpoint", "diff", &one, &other]);
            }
            (one, other) => assert_eq!(one, other, "step {step}"),
        }
    }
    late.assert_nothing_left();
    late
}

#[test]
fn runs_without_trouble_are_the_same_in_every_form() {
    for sets in [
        &[][..],
        &["cluster.ranks_per_node=1", "precision.compute=bf16"],
        &["parallelism={shard: {ranks: 2, level: parameters}}", "training.clip_norm=null"],
        &["parallelism={pipeline: {stages: 2}}", "precision.compute=fp64"],
        &["parallelism={tensor: 2}", "numeric.replay=false", "checkpoint.every_steps=7"],
    ] {
        let late = check(0, "", sets);
        assert_eq!(metrics(&late, "test").len(), 20, "{sets:?}");
    }
}

#[test]
fn a_device_that_is_wrong_once_is_found_with_the_weights_of_its_step() {
    let late = check(0, "once:1:12:1e3", &["numeric.on_spike=rollback"]);
    let events = trouble(&late);
    assert_eq!(events.len(), 1);
    assert_eq!((&events[0]["finding"], &events[0]["step"]), (&"bad_device".into(), &12.into()));
    let shards = "parallelism={shard: {ranks: 2, level: parameters}}";
    assert_eq!(trouble(&check(0, "once:0:12:NaN", &[shards]))[0]["action"], "repeat");
    assert_eq!(trouble(&check(0, "gradient:1:12:1e18", &[]))[0]["action"], "repeat");
    let one = ["cluster.ranks_per_node=1"];
    assert_eq!(trouble(&check(0, "once:0:12:1e3", &one))[0]["repeated_on"], "same_ranks");
}

#[test]
fn bad_data_is_reported_skipped_or_gone_back_behind() {
    assert_eq!(trouble(&check(0, BAD_SAMPLE, &[]))[0]["action"], "report");
    let late = check(0, BAD_SAMPLE, &["numeric.on_spike=skip"]);
    assert_eq!(trouble(&late)[0]["action"], "skip");
    let skipped: Vec<u64> = steps(&late).iter().filter(|step| step.3).map(|step| step.0).collect();
    assert_eq!(skipped, [12]);
    let late = check(0, BAD_SAMPLE, &["numeric.on_spike=rollback"]);
    assert_eq!(late.events_of("rolled_back").len(), 1);
    // Two in trouble, one behind the other.
    let both = "sample:93:1e3;sample:101:NaN";
    assert_eq!(trouble(&check(0, both, &["numeric.on_spike=skip"])).len(), 2);
}

#[test]
fn without_a_replay_a_step_in_trouble_counts_all_the_same() {
    let late = check(0, BAD_SAMPLE, &["numeric.replay=false"]);
    assert_eq!(trouble(&late)[0]["finding"], "none");
    let sets = ["numeric.replay=false", "numeric.on_spike=skip"];
    assert_eq!(trouble(&check(0, BAD_SAMPLE, &sets))[0]["action"], "skip");
}

#[test]
fn too_much_trouble_ends_the_run_at_the_same_step() {
    let faults = "sample:61:1e3;sample:93:1e3;sample:109:1e3";
    check(1, faults, &["numeric.on_spike=skip", "numeric.max_interventions=3"]);
    check(1, "sample:93:NaN", &["numeric.on_non_finite=stop"]);
}

/// A rank that is killed takes the numbers of one step with it, and the run goes on from a
/// checkpoint, which never holds a step whose numbers were not known.
#[test]
fn a_killed_rank_and_a_stop_leave_nothing_out() {
    let late = sandbox(true);
    late.train("straight", &SETS);
    let late = late.env("PHALANX_STEP_FAULTS", "kill:1:13:1:0");
    late.train("test", &SETS);
    assert_bit_equal(&late, "straight", "test", 20);
    assert_eq!(late.events_of("generation_started").len(), 2);

    let late = sandbox(true);
    late.train("straight", &[&SETS[..], &["training.steps=400"]].concat());
    let sets = SETS.iter().chain(&["training.steps=400"]).flat_map(|set| ["--set", *set]);
    let args: Vec<&str> = ["run", "config.yaml"].into_iter().chain(sets).collect();
    let running = late.start(&args);
    late.wait_for_metrics(12, 1);
    running.signal(Signal::TERM);
    running.expect(75);
    let done = metrics(&late, "test");
    let last = done.last().unwrap().step;
    assert!((12..400).contains(&last) && done.len() as u64 == last, "{last}");
    assert!(late.run_dir().checkpoint(last).is_dir(), "the last step is saved");
    late.expect(0, &["resume", "test"]);
    assert_bit_equal(&late, "straight", "test", 400);
    late.assert_nothing_left();
}

/// Nor does what is kept in memory, nor a checkpoint whose step the run itself chose.
#[test]
fn a_killed_rank_goes_on_from_memory_with_whole_steps() {
    let late = sandbox(true);
    late.train("straight", &SETS);
    let late = late.env("PHALANX_STEP_FAULTS", "kill:1:13:1:0");
    let own = ["checkpoint.every_steps=auto", "checkpoint.memory.every_steps=3"];
    late.train("test", &[&SETS[..], &own].concat());
    assert_bit_equal(&late, "straight", "test", 20);
    let started = late.events_of("generation_started");
    assert_eq!(started.len(), 2, "{started:?}");
    assert_eq!(started[1]["resume_tier"], "memory", "{started:?}");
    // That of step 12 may not have been whole by the time of the kill.
    assert!([9, 12].map(Value::from).contains(&started[1]["resume_step"]), "{started:?}");
    late.assert_nothing_left();
}
