//! Numeric trouble with the real trainer: spikes and numbers that are not finite, of data and of
//! devices; what was found, and that the run comes out as one to which nothing happened, or which
//! never had the samples.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use end_to_end::losses::{assert_bit_equal, metrics};
use end_to_end::sandbox::Sandbox;
use serde_json::{Value, json};

/// Few steps before the watch begins, and limits that nothing but a fault reaches.
const SETS: [&str; 4] = [
    "numeric={window: 4, loss_zscore: 100, grad_norm_zscore: 50}",
    "schedule.kind=constant",
    "validation.every_steps=0",
    "cluster.threads_per_rank=1",
];

/// A sample of step 12, which reads samples 88 to 95, in the second rank's share of two.
const BAD_SAMPLE: &str = "sample:93:1e3";

fn sandbox() -> Sandbox {
    Sandbox::real(env!("CARGO_BIN_EXE_phalanx-under-test"))
}

fn with_faults(sandbox: Sandbox, faults: &str) -> Sandbox {
    sandbox.env("PHALANX_NUMERIC_FAULT", faults)
}

/// The run `test` with these `--set`s, which must end with this code; what it wrote on standard
/// error.
fn run(sandbox: &Sandbox, code: i32, sets: &[&str]) -> String {
    let sets = SETS.iter().chain(sets).flat_map(|set| ["--set", *set]);
    let args: Vec<&str> = ["run", "config.yaml"].into_iter().chain(sets).collect();
    sandbox.expect(code, &args).1
}

/// The same run under another name, before any fault.
fn train(sandbox: &Sandbox, name: &str, sets: &[&str]) {
    sandbox.train(name, &[&SETS[..], sets].concat());
}

/// The only trouble of the run, with these fields.
fn assert_trouble(sandbox: &Sandbox, expected: &Value) {
    let events = sandbox.events_of("numeric_trouble");
    let [event] = &events[..] else { panic!("{events:#?}") };
    for (name, value) in expected.as_object().unwrap() {
        assert_eq!(&event[name], value, "{name} of {event:#}");
    }
}

fn assert_struck(sandbox: &Sandbox, times: usize) {
    let struck = sandbox.events_of("fault_injected");
    assert_eq!(struck.len(), times, "{struck:?}");
}

fn assert_as(sandbox: &Sandbox, name: &str, steps: usize) {
    assert_bit_equal(sandbox, name, "test", steps);
    let (stdout, stderr) = sandbox.expect(0, &["checkpoint", "diff", name, "test"]);
    assert!(stdout.contains("equal"), "{stdout}{stderr}");
}

fn skipped(sandbox: &Sandbox) -> Vec<u64> {
    metrics(sandbox, "test").iter().filter(|r| r.skipped).map(|r| r.step).collect()
}

fn state(sandbox: &Sandbox, step: u64) -> Value {
    let path = sandbox.run_dir().checkpoint(step).join("state.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn resumed_from(sandbox: &Sandbox) -> Vec<Value> {
    let started = sandbox.events_of("generation_started");
    started.iter().map(|event| event["resume_step"].clone()).collect()
}

/// A device that is wrong once: it is named, the step is done again, and the run ends with the bits
/// of one without the fault.
fn check_flip(fault: &str, sets: &[&str], expected: &Value) {
    let sandbox = sandbox();
    train(&sandbox, "straight", sets);
    let sandbox = with_faults(sandbox, fault);
    let stderr = run(&sandbox, 0, &[sets, &["numeric.on_spike=rollback"]].concat());
    assert_struck(&sandbox, 1);
    assert_trouble(&sandbox, &json!({ "finding": "bad_device", "action": "repeat", "step": 12 }));
    assert_trouble(&sandbox, expected);
    assert!(stderr.contains("were wrong once"), "{stderr}");
    assert_eq!(sandbox.events_of("generation_started").len(), 1);
    assert_as(&sandbox, "straight", 20);
    sandbox.assert_nothing_left();
}

#[test]
fn a_rank_that_is_wrong_once_is_named_and_the_step_done_again() {
    let expected = json!({ "trouble": "loss_spike", "ranks": [1], "repeated_on": "other_ranks" });
    check_flip("once:1:12:1e3", &[], &expected);
}

#[test]
fn a_gradient_that_is_wrong_once_is_found_without_a_word_from_the_loss() {
    let expected = json!({ "trouble": "grad_norm_spike", "ranks": [1] });
    check_flip("gradient:1:12:1e18", &[], &expected);
}

#[test]
fn a_number_that_is_not_finite_once_is_found() {
    let expected = json!({ "trouble": "not_finite", "ranks": [0], "loss": null });
    check_flip("once:0:12:NaN", &[], &expected);
}

#[test]
fn a_single_rank_is_compared_with_itself() {
    let expected = json!({ "ranks": [0], "repeated_on": "same_ranks" });
    check_flip("once:0:12:1e3", &["cluster.ranks_per_node=1"], &expected);
}

#[test]
fn a_rank_is_named_where_weights_are_cut() {
    let expected = json!({ "ranks": [1], "repeated_on": "other_ranks" });
    check_flip("once:1:12:1e3", &["parallelism={shard: {ranks: 2, level: parameters}}"], &expected);
    check_flip("once:1:12:1e3", &["parallelism={shard: {ranks: 2, level: optimizer}}"], &expected);
}

/// Two replicas of two pipeline stages: the second stage makes the loss, and sends its gradient to
/// the first one, so that both are wrong.
#[test]
fn ranks_of_a_replica_are_named_together() {
    let sets = ["cluster.ranks_per_node=4", "parallelism={pipeline: {stages: 2}}"];
    check_flip("once:3:12:1e3", &sets, &json!({ "ranks": [2, 3] }));
}

/// Of two repeats in one generation the node is given up: it is no chance any more.
#[test]
fn a_rank_that_is_wrong_twice_ends_a_run_on_one_machine() {
    let sandbox = with_faults(sandbox(), "once:1:8:1e3;once:1:12:1e3");
    let stderr = run(&sandbox, 76, &[]);
    assert_struck(&sandbox, 2);
    let events = sandbox.events_of("numeric_trouble");
    let actions: Vec<&Value> = events.iter().map(|event| &event["action"]).collect();
    assert_eq!(actions, ["repeat", "give_up_node"]);
    let cause = &sandbox.events_of("first_cause")[0];
    assert_eq!((&cause["rank"], &cause["class"]), (&json!(1), &json!("node")), "{cause}");
    assert!(stderr.contains("use another node"), "{stderr}");
    sandbox.assert_nothing_left();
}

#[test]
fn a_rank_that_is_always_wrong_is_named_among_four() {
    let sandbox = with_faults(sandbox(), "always:2:12:1e3");
    run(&sandbox, 76, &["cluster.ranks_per_node=4"]);
    assert_struck(&sandbox, 1);
    assert_trouble(
        &sandbox,
        &json!({ "finding": "bad_device", "ranks": [2], "action": "give_up_node", "step": 12 }),
    );
    let cause = &sandbox.events_of("first_cause")[0];
    assert_eq!((&cause["rank"], &cause["class"]), (&json!(2), &json!("node")), "{cause}");
}

#[test]
fn of_two_ranks_that_differ_each_time_none_is_named() {
    let sandbox = with_faults(sandbox(), "always:1:12:1e3");
    run(&sandbox, 0, &["numeric.on_spike=skip", "training.steps=12"]);
    assert_struck(&sandbox, 1);
    let expected = json!({ "finding": "unclear", "ranks": [], "action": "skip" });
    assert_trouble(&sandbox, &expected);
    assert_eq!(skipped(&sandbox), [12]);
}

#[test]
fn bad_data_is_told_of_and_the_step_counts() {
    let sandbox = with_faults(sandbox(), BAD_SAMPLE);
    let stderr = run(&sandbox, 0, &[]);
    assert_struck(&sandbox, 2);
    let expected = json!({
        "finding": "bad_data", "ranks": [], "action": "report", "trouble": "loss_spike",
        "step": 12, "first_sample": 88, "last_sample": 95, "repeated_on": "other_ranks",
    });
    assert_trouble(&sandbox, &expected);
    assert!(stderr.contains("with equal results: it is the data, or the weights"), "{stderr}");
    assert!(skipped(&sandbox).is_empty());
}

#[test]
fn without_a_replay_there_is_no_finding() {
    let sandbox = with_faults(sandbox(), BAD_SAMPLE);
    run(&sandbox, 0, &["numeric.replay=false", "training.steps=12"]);
    assert_struck(&sandbox, 1);
    assert_trouble(&sandbox, &json!({ "finding": "none", "repeated_on": null }));
}

#[test]
fn bad_data_is_skipped_before_it_changes_a_weight() {
    let sandbox = with_faults(sandbox(), BAD_SAMPLE);
    let sets = ["numeric.on_spike=skip", "checkpoint.every_steps=1"];
    run(&sandbox, 0, &sets);
    assert_trouble(&sandbox, &json!({ "finding": "bad_data", "action": "skip", "step": 12 }));
    assert_eq!(skipped(&sandbox), [12]);
    assert_eq!(state(&sandbox, 20)["skipped_steps"], 1);
    let folder = |step| sandbox.run_dir().checkpoint(step).to_string_lossy().into_owned();
    let diff = |a, b| ["checkpoint".to_owned(), "diff".to_owned(), folder(a), folder(b)];
    let args = diff(11, 12);
    sandbox.expect(0, &args.each_ref().map(String::as_str));
    let args = diff(12, 13);
    sandbox.expect(1, &args.each_ref().map(String::as_str));
    let status = sandbox.expect(0, &["status", "test"]).0;
    assert!(status.contains("skipped     1 steps"), "{status}");
}

/// A run that stops in the middle decides as one that does not: one whose window was filled before
/// the stop, and one of the steps that it skipped.
#[test]
fn a_run_that_is_resumed_decides_alike() {
    let faults = "sample:93:1e3;sample:117:1e3";
    let sandbox = with_faults(sandbox(), faults);
    let skip = "numeric={window: 8, loss_zscore: 100, grad_norm_zscore: 50, on_spike: skip}";
    train(&sandbox, "straight", &[skip]);
    run(&sandbox, 0, &[skip, "training.steps=10"]);
    sandbox.expect(0, &["resume", "test", "--set", "training.steps=13"]);
    sandbox.expect(0, &["resume", "test", "--set", "training.steps=20"]);
    assert_eq!(skipped(&sandbox), [12, 15]);
    assert_as(&sandbox, "straight", 20);
    let extra = |step| state(&sandbox, step)["extra"]["numeric"].clone();
    assert_eq!(extra(20)["losses"].as_array().unwrap().len(), 8);
    assert_eq!(extra(20)["skipped"], json!([12, 15]));
}

/// Back to the checkpoint of step 10, and on without the samples of step 12, as a run that never
/// had them; so it stays when the run goes on elsewhere.
#[test]
fn a_run_goes_back_and_on_without_the_samples() {
    let sandbox = sandbox();
    train(&sandbox, "without", &["data.skip_samples=[{first: 88, last: 95}]"]);
    train(&sandbox, "with", &[]);
    let sandbox = with_faults(sandbox, BAD_SAMPLE);
    run(&sandbox, 0, &["numeric.on_spike=rollback"]);
    assert_struck(&sandbox, 2);
    assert_trouble(&sandbox, &json!({ "finding": "bad_data", "action": "rollback", "step": 12 }));
    let events = sandbox.events_of("rolled_back");
    assert_eq!(events.len(), 1);
    assert_eq!(events[0]["step"], 12);
    assert_eq!((&events[0]["first"], &events[0]["last"]), (&json!(88), &json!(95)));
    assert_eq!(resumed_from(&sandbox), [Value::Null, 10.into()]);
    assert_as(&sandbox, "without", 20);
    // They were in use otherwise.
    let last = |run| metrics(&sandbox, run).last().unwrap().clone();
    assert_ne!(last("with").loss.to_bits(), last("test").loss.to_bits());
    assert_eq!((last("with").tokens, last("test").tokens), (20 * 8 * 32, 20 * 8 * 32));
    assert_eq!(state(&sandbox, 10)["data_cursor"]["left_out"], Value::Null);
    assert_eq!(
        state(&sandbox, 15)["data_cursor"]["left_out"],
        json!([{ "first": 88, "last": 95 }])
    );
    assert_eq!(state(&sandbox, 15)["tokens"], 15 * 8 * 32);
    let why = sandbox.expect(0, &["why", "test"]).0;
    assert!(why.contains("numeric failure, step 12"), "{why}");

    // On another layout, and where the events are lost.
    let events = std::fs::read_to_string(sandbox.run_dir().events()).unwrap();
    let kept: Vec<&str> = events.lines().filter(|line| !line.contains("rolled_back")).collect();
    assert_eq!(kept.len() + 1, events.lines().count());
    std::fs::write(sandbox.run_dir().events(), kept.join("\n") + "\n").unwrap();
    for run in ["test", "without"] {
        let sets = ["--set", "training.steps=24", "--set", "cluster.ranks_per_node=1"];
        sandbox.expect(0, &[&["resume", run], &sets[..]].concat());
    }
    assert_as(&sandbox, "without", 24);
    assert_eq!(
        state(&sandbox, 24)["data_cursor"]["left_out"],
        json!([{ "first": 88, "last": 95 }])
    );
    sandbox.expect(0, &["resume", "test", "--verify", "4"]);
    sandbox.assert_nothing_left();
}

#[test]
fn a_run_goes_back_to_its_start_where_nothing_was_saved() {
    let sandbox = sandbox();
    train(&sandbox, "without", &["data.skip_samples=[{first: 48, last: 55}]"]);
    let sandbox = with_faults(sandbox, "sample:50:NaN");
    let sets = ["numeric.on_non_finite=rollback", "checkpoint.every_steps=10"];
    run(&sandbox, 0, &sets);
    assert_trouble(&sandbox, &json!({ "trouble": "not_finite", "action": "rollback", "step": 7 }));
    assert_eq!(resumed_from(&sandbox), [Value::Null, Value::Null]);
    assert_as(&sandbox, "without", 20);
}

#[test]
fn going_back_to_one_place_again_and_again_ends() {
    let faults: Vec<String> = [93, 101, 109, 117].map(|id| format!("sample:{id}:1e3")).into();
    let sandbox = with_faults(sandbox(), &faults.join(";"));
    let stderr = run(&sandbox, 1, &["numeric.on_spike=rollback", "restart.max_no_progress=2"]);
    let roll_backs = sandbox.events_of("rolled_back");
    let first: Vec<&Value> = roll_backs.iter().map(|event| &event["first"]).collect();
    assert_eq!(first, [88, 96, 104]);
    assert_eq!(resumed_from(&sandbox), [Value::Null, 10.into(), 10.into()]);
    assert!(stderr.contains("2 generations in a row committed no new step"), "{stderr}");
    sandbox.assert_nothing_left();
}

#[test]
fn too_many_steps_in_trouble_end_the_run() {
    let sandbox = with_faults(sandbox(), "sample:61:1e3;sample:93:1e3;sample:109:1e3");
    let sets = ["numeric.on_spike=skip", "numeric.max_interventions=3"];
    let stderr = run(&sandbox, 1, &sets);
    assert_eq!(skipped(&sandbox), [8, 12, 14]);
    for expected in [
        "3 steps skipped or gone back behind within 1000 steps",
        "limit numeric.max_interventions = 3",
        "samples 104 to 111 of the data order",
        "failed at step 14 (numeric)",
    ] {
        assert!(stderr.contains(expected), "{stderr} lacks {expected:?}");
    }
    assert_eq!(sandbox.events_of("generation_started").len(), 1, "no restart");
}

/// Those counted lie within so many steps, and steps that were gone back behind count too.
#[test]
fn trouble_now_and_then_does_not_end_the_run() {
    let sandbox = with_faults(sandbox(), "sample:61:NaN;sample:93:1e3;sample:125:1e3");
    let sets = [
        "numeric.on_spike=skip",
        "numeric.on_non_finite=rollback",
        "numeric.max_interventions=2",
        "numeric.interventions_within_steps=3",
    ];
    run(&sandbox, 0, &sets);
    assert_eq!(resumed_from(&sandbox), [Value::Null, 5.into()]);
    // Without samples 56 to 63, each of those behind comes a step earlier.
    assert_eq!(skipped(&sandbox), [11, 15]);
}

#[test]
fn a_run_can_be_told_to_stop_at_a_number_that_is_not_finite() {
    let sandbox = with_faults(sandbox(), "sample:93:NaN");
    let stderr = run(&sandbox, 1, &["numeric.on_non_finite=stop"]);
    assert_trouble(&sandbox, &json!({ "action": "stop", "step": 12, "finding": "bad_data" }));
    assert!(stderr.contains("numeric.on_non_finite is stop"), "{stderr}");
    assert_eq!(metrics(&sandbox, "test").len(), 11);
}

#[test]
fn samples_that_were_read_cannot_be_left_out() {
    let sandbox = sandbox();
    train(&sandbox, "test", &["training.steps=10"]);
    let set = |first| format!("data.skip_samples=[{{first: {first}, last: 90}}]");
    let more = ["--set", "training.steps=14", "--set"];
    let (_, stderr) = sandbox.expect(64, &[&["resume", "test"], &more[..], &[&set(79)]].concat());
    assert!(stderr.contains("the samples left out so far was none"), "{stderr}");
    sandbox.expect(0, &[&["resume", "test"], &more[..], &[&set(80)]].concat());
}
