//! The supervisor with real processes: what it does when ranks, users or the launcher itself fail.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use end_to_end::sandbox::{Sandbox, signal};
use rank_protocol::jsonl::read_metrics;
use rustix::process::Signal;
use serde_json::Value;
use std::time::{Duration, Instant};

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_phalanx-under-test"), env!("CARGO_BIN_EXE_fake-trainer"))
}

const RUN: [&str; 2] = ["run", "config.yaml"];

fn kinds(sandbox: &Sandbox) -> Vec<String> {
    let kind = |event: &Value| event["kind"].as_str().unwrap_or("?").to_owned();
    let kinds = sandbox.events().iter().map(kind).collect::<Vec<String>>();
    // The books are kept beside what happens.
    kinds.into_iter().filter(|kind| kind != "ledger").collect()
}

/// All 20 steps were done, each once in what readers keep.
fn assert_all_steps(sandbox: &Sandbox) {
    let metrics = read_metrics(&sandbox.run_dir().metrics()).unwrap();
    let steps: Vec<u64> = metrics.iter().map(|report| report.step).collect();
    assert_eq!(steps, (1..=20).collect::<Vec<u64>>());
}

fn rank_pid(status: &Value, rank: usize) -> u32 {
    u32::try_from(status["ranks"][rank]["pid"].as_u64().unwrap()).unwrap()
}

#[test]
fn a_run_without_faults_is_done() {
    let sandbox = sandbox();
    let (stdout, stderr) = sandbox.expect(0, &RUN);
    assert_eq!(stdout, "", "standard output is for JSON");
    assert!(stderr.contains("step 20/20 loss 0.5000"), "{stderr}");
    assert_all_steps(&sandbox);
    let expected = ["run_started", "generation_started", "first_step"];
    assert_eq!(kinds(&sandbox)[..3], expected);
    assert_eq!(kinds(&sandbox).last().unwrap(), "run_finished");
    let steps: Vec<_> =
        sandbox.events_of("checkpoint_committed").iter().map(|e| e["step"].clone()).collect();
    assert_eq!(steps, [5, 10, 15, 20]);
    let status: Value =
        serde_json::from_str(&sandbox.expect(0, &["status", "test", "--json"]).0).unwrap();
    assert_eq!(status["state"], "finished");
    assert_eq!((&status["step"], &status["restarts"]), (&20.into(), &0.into()));
    let (text, _) = sandbox.expect(0, &["resume", "test"]);
    assert_eq!(text, "");
    assert!(sandbox.expect(0, &["resume", "test"]).1.contains("has finished: step 20 of 20"));
    assert!(sandbox.expect(0, &["why", "test"]).0.contains("no rank has failed"));
    let (error, hint) = sandbox.expect(64, &RUN);
    assert!(hint.contains("phalanx resume test"), "{error}{hint}");
    sandbox.assert_nothing_left();
}

/// The ranks of these tests take nothing; those that the config is for would take thousands of GiB.
#[test]
fn a_run_that_may_not_fit_the_machine_says_so_at_its_start() {
    let sandbox = sandbox();
    let large = "model={dim: 16384, layers: 126, heads: 128, kv_heads: 8, ffn_dim: 53248, \
                 vocab_size: 512}";
    let (_, stderr) = sandbox.expect(0, &["run", "config.yaml", "--set", large]);
    let warnings =
        stderr.lines().filter(|line| line.starts_with("warning: cluster.ranks_per_node"));
    let warnings: Vec<&str> = warnings.filter(|line| line.contains("2 ranks x ")).collect();
    assert_eq!(warnings.len(), 1, "{stderr}");
    assert!(warnings[0].contains("GiB, and this "), "{stderr}");
    let (_, stderr) = sandbox.expect(0, &["run", "config.yaml", "--set", "name=small"]);
    assert!(!stderr.contains("ranks x "), "{stderr}");
}

#[test]
fn json_step_reports_are_alone_on_standard_output() {
    let sandbox = sandbox();
    let (stdout, _) = sandbox.expect(0, &["run", "config.yaml", "--json"]);
    let steps: Vec<u64> = stdout
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, (1..=20).collect::<Vec<u64>>());
}

#[test]
fn a_killed_rank_brings_all_back_from_the_newest_checkpoint() {
    let sandbox = sandbox().env("FAKE_STEP_MS", 50);
    let running = sandbox.start(&RUN);
    let status = sandbox.wait_for_step(7);
    assert_eq!(status["ranks"].as_array().unwrap().len(), 2);
    signal(rank_pid(&status, 1), Signal::KILL);
    running.expect(0);
    assert_all_steps(&sandbox);
    let generations = sandbox.events_of("generation_started");
    assert_eq!(generations.len(), 2, "{generations:?}");
    assert_eq!(generations[1]["is_restart"], true);
    assert!(generations[1]["resume_step"].as_u64().unwrap() >= 5);
    let cause = &sandbox.events_of("first_cause")[0];
    assert_eq!((&cause["rank"], &cause["generation"]), (&1.into(), &1.into()));
    let file = std::fs::read_to_string(sandbox.run_dir().error(1, 1)).unwrap();
    let error: Value = serde_json::from_str(&file).unwrap();
    assert_eq!((&error["signal"], &error["is_first_cause"]), (&"SIGKILL".into(), &true.into()));
    assert!(sandbox.expect(0, &["why", "test"]).0.contains("rank 1 failed first"));
    assert!(sandbox.run_dir().log(2, 1).exists());
    sandbox.assert_nothing_left();
}

/// With these faults the run ends with `code`, after this many generations, for this reason.
fn check_faults(faults: &str, code: i32, num_generations: usize, reason: &str) -> Sandbox {
    let sandbox = sandbox().env("FAKE_FAULTS", faults);
    let (_, stderr) = sandbox.expect(code, &RUN);
    assert!(stderr.contains(reason), "{stderr:?} lacks {reason:?}");
    assert_eq!(sandbox.events_of("generation_started").len(), num_generations);
    assert!(sandbox.events_of("fault_injected").len() >= num_generations, "faults must fire");
    sandbox.assert_nothing_left();
    sandbox
}

#[test]
fn the_same_crash_three_times_ends_with_93() {
    let sandbox = check_faults("abort:1:3:*", 93, 3, "the same failure at the same step, 3 times");
    let (why, _) = sandbox.expect(0, &["why", "test"]);
    assert!(why.contains("killed by SIGABRT"), "{why}");
}

#[test]
fn reports_that_differ_in_numbers_alone_are_the_same_crash() {
    let sandbox = check_faults("report:1:3:*", 93, 3, "CUDA error");
    let (why, _) = sandbox.expect(0, &["why", "test"]);
    assert!(why.contains("in all_reduce #3 of data"), "{why}");
}

#[test]
fn three_generations_without_progress_end_with_1() {
    check_faults("kill:1:g:*", 1, 3, "3 generations in a row committed no new step");
}

#[test]
fn a_config_failure_is_not_tried_again() {
    check_faults("exit64:1:3:*", 64, 1, "trying again is of no use");
}

#[test]
fn an_early_exit_with_0_is_a_failure_and_is_mended() {
    let sandbox = check_faults_to_the_end("exit0:1:7:1");
    let cause = &sandbox.events_of("first_cause")[0];
    assert_eq!(cause["message"], "exited with 0 before the last step was done");
}

#[test]
fn a_crash_of_each_rank_at_many_steps_is_mended() {
    check_faults_to_the_end("kill:0:2:1;abort:1:9:2;report:0:17:3");
}

fn check_faults_to_the_end(faults: &str) -> Sandbox {
    let sandbox = sandbox().env("FAKE_FAULTS", faults);
    sandbox.expect(0, &RUN);
    let num_faults = faults.split(';').count();
    assert_eq!(sandbox.events_of("fault_injected").len(), num_faults, "faults must fire");
    assert_eq!(sandbox.events_of("generation_started").len(), num_faults + 1);
    assert_all_steps(&sandbox);
    sandbox.assert_nothing_left();
    sandbox
}

#[test]
fn an_interrupt_saves_and_ends_with_75_and_resume_goes_on() {
    let sandbox = sandbox().env("FAKE_STEP_MS", 30);
    let running = sandbox.start(&RUN);
    sandbox.wait_for_step(7);
    running.signal(Signal::INT);
    running.expect(75);
    let saved = sandbox.events_of("preempted")[0]["committed"].as_u64().unwrap();
    assert!((7..20).contains(&saved), "saved at {saved}");
    sandbox.assert_nothing_left();
    sandbox.expect(0, &["resume", "test"]);
    assert_eq!(sandbox.events_of("generation_started")[1]["resume_step"], saved);
    assert_eq!(sandbox.events_of("generation_started")[1]["is_restart"], false);
    assert_all_steps(&sandbox);
    let other = ["resume", "test", "--set", "training.steps=30", "--set", "model.norm_eps=1e-3"];
    let (_, stderr) = sandbox.expect(64, &other);
    assert!(stderr.contains("model.norm_eps: 0.001 makes another model of it"), "{stderr}");
    assert_eq!(sandbox.events_of("config_changed").len(), 0, "the run is as it was");
    let metrics = read_metrics(&sandbox.run_dir().metrics()).unwrap();
    assert!(metrics.iter().all(|r| r.generation == if r.step <= saved { 1 } else { 2 }));
}

#[test]
fn a_hangup_saves_and_ends_with_75() {
    if rank_protocol::signals::ignores_hangup() {
        return; // Under `nohup` a hangup is nothing, to the launcher neither.
    }
    let sandbox = sandbox().env("FAKE_STEP_MS", 30);
    let running = sandbox.start(&RUN);
    let status = sandbox.wait_for_step(3);
    signal(rank_pid(&status, 1), Signal::HUP);
    running.expect(75);
    assert_eq!(sandbox.events_of("stop_requested")[0]["by"], "SIGHUP to rank 1");
    let running = sandbox.start(&["resume", "test", "--set", "training.steps=1000"]);
    sandbox.wait_for(|status| status["generation"] == 2 && !status["last_step_at"].is_null());
    let (status, _) = sandbox.expect(0, &["status", "test"]);
    assert!(status.contains("last step   ") && status.contains(" s ago"), "{status}");
    running.signal(Signal::HUP);
    running.expect(75);
    assert_eq!(sandbox.events_of("stop_requested")[1]["by"], "SIGHUP");
    sandbox.assert_nothing_left();
}

#[test]
fn a_run_outlives_its_standard_error() {
    let sandbox = sandbox().env("FAKE_STEP_MS", 20);
    let script = "\"$0\" \"$@\" 2>&1 >/dev/null | head -1; exit ${PIPESTATUS[0]}";
    let (first, _) = sandbox.start_by(&["bash", "-c", script], &RUN).expect(0);
    assert_eq!(first.lines().count(), 1, "{first}");
    assert_all_steps(&sandbox);
    sandbox.assert_nothing_left();
    let refused = sandbox.start_by(&["bash", "-c", "\"$0\" \"$@\" 2>/dev/full"], &RUN);
    refused.expect(64);
}

#[test]
fn sigterm_to_one_rank_stops_the_run() {
    let sandbox = sandbox().env("FAKE_STEP_MS", 30);
    let running = sandbox.start(&RUN);
    let status = sandbox.wait_for_step(3);
    signal(rank_pid(&status, 1), Signal::TERM);
    running.expect(75);
    assert_eq!(sandbox.events_of("stop_requested")[0]["by"], "SIGTERM to rank 1");
    sandbox.assert_nothing_left();
}

#[test]
fn a_second_interrupt_stops_at_once() {
    let sandbox = sandbox().env("FAKE_FAULTS", "hang:0:3:*");
    let running = sandbox.start(&RUN);
    sandbox.wait_for(|_| !sandbox.events_of("fault_injected").is_empty());
    // Two in one moment are one request; a terminal that goes away sends as many.
    running.signal(Signal::INT);
    running.signal(Signal::TERM);
    sandbox.wait_for(|status| status["state"] == "stopping");
    std::thread::sleep(Duration::from_millis(1100));
    sandbox.wait_for(|status| status["state"] == "stopping");
    let start = Instant::now();
    running.signal(Signal::INT);
    running.expect(130);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    sandbox.assert_nothing_left();
    let (_, stderr) = sandbox.expect(64, &["resume", "test"]);
    assert!(stderr.contains("--from-start"), "{stderr}");
}

#[test]
fn ranks_are_gone_within_half_a_second_of_their_launcher() {
    let sandbox = sandbox().env("FAKE_STEP_MS", 30);
    let running = sandbox.start(&RUN);
    sandbox.wait_for_step(6);
    assert_eq!(sandbox.processes().len(), 3);
    running.signal(Signal::KILL);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(sandbox.processes(), []);
    drop(running);
    let status = sandbox.expect(0, &["status", "test"]).0;
    assert!(status.contains("test: lost"), "{status}");
    sandbox.expect(0, &["resume", "test"]);
    assert_all_steps(&sandbox);
}

#[test]
fn a_run_in_use_names_the_process_that_holds_it() {
    let sandbox = sandbox().env("FAKE_STEP_MS", 50);
    let running = sandbox.start(&RUN);
    sandbox.wait_for_step(1);
    let (_, stderr) = sandbox.expect(64, &["resume", "test"]);
    assert!(stderr.contains(&format!("in use by process {}", running.pid())), "{stderr}");
    let (stdout, _) = sandbox.expect(0, &["cancel", "test"]);
    assert!(stdout.contains("stopped by SIGTERM, saved at step"), "{stdout}");
    running.expect(75);
}

#[test]
fn cancel_now_does_not_wait() {
    let sandbox = sandbox().env("FAKE_FAULTS", "hang:0:3:*");
    let running = sandbox.start(&RUN);
    sandbox.wait_for(|_| !sandbox.events_of("fault_injected").is_empty());
    sandbox.expect(0, &["cancel", "test", "--now"]);
    let (_, stderr) = running.expect(130);
    assert!(stderr.contains("stopping at once") && !stderr.contains("finishing"), "{stderr}");
    assert_eq!(sandbox.events_of("stop_requested")[0]["now"], true);
    sandbox.assert_nothing_left();
}

#[test]
fn a_rank_that_ignores_sigterm_is_killed() {
    // Rank 0 hangs outside every wait; its client takes SIGTERM for a wish to stop and ends it
    // only because the generation is over.
    let sandbox = sandbox().env("FAKE_FAULTS", "hang:0:3:1;kill:1:3:1");
    let start = Instant::now();
    sandbox.expect(0, &RUN);
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    assert_all_steps(&sandbox);
    sandbox.assert_nothing_left();
}

/// A rank that stands still, in this way, is found, named and replaced.
fn check_hang(sandbox: Sandbox, stop: impl Fn(&Value), why: &str) {
    let set = ["--set", "restart.hang_timeout_s=2"];
    let running = sandbox.start(&[&RUN[..], &set].concat());
    stop(&sandbox.wait_for_step(7));
    running.expect(0);
    assert_all_steps(&sandbox);
    let cause = &sandbox.events_of("first_cause")[0];
    assert_eq!((&cause["rank"], &cause["class"]), (&1.into(), &"hang".into()));
    assert!(cause["message"].as_str().unwrap().contains(why), "{cause}");
    assert_eq!(sandbox.events_of("stalled").len(), 1);
    sandbox.assert_nothing_left();
}

#[test]
fn a_rank_that_is_stopped_is_found_and_replaced() {
    let stop = |status: &Value| signal(rank_pid(status, 1), Signal::STOP);
    check_hang(sandbox().env("FAKE_STEP_MS", 50), stop, "does not answer");
}

#[test]
fn a_rank_that_never_joins_is_found_and_replaced() {
    let sandbox = sandbox().env("FAKE_STEP_MS", 50).env("FAKE_FAULTS", "hang:1:9:1");
    check_hang(sandbox, |_| {}, "never joined what others wait in: a meeting");
}

/// What is known of the run's time is all of it.
#[test]
fn the_causes_of_time_add_up_to_the_wall_time() {
    let sandbox = sandbox().env("FAKE_STEP_MS", 100).env("FAKE_FAULTS", "kill:1:8:1");
    let started = Instant::now();
    sandbox.expect(0, &RUN);
    let wall = started.elapsed().as_secs_f64();
    let books = sandbox.events_of("ledger").pop().unwrap();
    let seconds = books["seconds"].as_object().unwrap();
    let sum: f64 = seconds.values().map(|seconds| seconds.as_f64().unwrap()).sum();
    let told = books["wall_s"].as_f64().unwrap();
    assert!((sum - told).abs() <= 1e-3 * told, "{books}");
    // A process starts before its books, and ends after them.
    assert!(told <= wall && wall - told < 0.3, "{told} of {wall}");
    let spent = |name: &str| seconds.get(name).and_then(Value::as_f64).unwrap_or(0.0);
    assert!(spent("first_time_steps") > 1.9, "20 steps of 0.1 s: {books}");
    assert!(spent("repeated_steps") > 0.15, "steps 6 and 7 again: {books}");
    let status = sandbox.expect(0, &["status", "test"]).0;
    assert!(status.contains("first-time steps / wall time"), "{status}");
}
