//! Rows of the fault table (`ops/faults.md`) that no other test shows, with the real trainer: a
//! rank that stands still, one that is slow, disks that fail or are slow, stops in every phase, a
//! status that cannot be written.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use end_to_end::losses::{assert_bit_equal, metrics};
use end_to_end::sandbox::{PATIENCE, Running, Sandbox, signal};
use rustix::process::Signal;
use serde_json::Value;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

fn sandbox() -> Sandbox {
    Sandbox::real(env!("CARGO_BIN_EXE_phalanx-under-test"))
}

fn start(sandbox: &Sandbox, sets: &[&str]) -> Running {
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", *set]).collect();
    sandbox.start(&[&["run", "config.yaml"], &sets[..]].concat())
}

fn pid(status: &Value, rank: usize) -> u32 {
    u32::try_from(status["ranks"][rank]["pid"].as_u64().unwrap()).unwrap()
}

fn assert_as_straight(sandbox: &Sandbox, steps: usize) {
    sandbox.expect(0, &["checkpoint", "diff", "straight", "test"]);
    assert_bit_equal(sandbox, "straight", "test", steps);
    sandbox.assert_nothing_left();
}

/// Seconds after midnight of an event's `time`, which ends in `HH:MM:SS.fffZ`.
fn seconds(event: &Value) -> f64 {
    let time = event["time"].as_str().unwrap();
    let clock = time.split_once('T').unwrap().1.trim_end_matches('Z');
    clock.split(':').fold(0.0, |sum, part| sum * 60.0 + part.parse::<f64>().unwrap())
}

fn since(from: &Value, to: &Value) -> f64 {
    (seconds(to) - seconds(from)).rem_euclid(86_400.0)
}

/// Row 3.
#[test]
fn a_stopped_rank_is_named_in_time_and_training_goes_on() {
    let sandbox = sandbox();
    let sets = ["training.steps=60", "training.global_batch=16"];
    sandbox.train("straight", &sets);
    let running = start(&sandbox, &[&sets[..], &["restart.hang_timeout_s=2"]].concat());
    let status = sandbox.wait_for_step(7);
    let stopped = Instant::now();
    signal(pid(&status, 1), Signal::STOP);
    while sandbox.events_of("rank_failed").is_empty() {
        // A deadline of 2 s, and 5 for the answers of the others.
        assert!(stopped.elapsed() < Duration::from_secs(8), "it is found within deadline + 5 s");
        std::thread::sleep(Duration::from_millis(10));
    }
    running.expect(0);
    let cause = &sandbox.events_of("first_cause")[0];
    assert_eq!((&cause["rank"], &cause["class"]), (&1.into(), &"hang".into()), "{cause}");
    let first_steps = sandbox.events_of("first_step");
    let found = &sandbox.events_of("rank_failed")[0];
    assert!(since(found, &first_steps[1]) < 60.0, "{first_steps:?}");
    assert_as_straight(&sandbox, 60);
}

/// Row 8: a control plane that cannot be read or written is unknown, never failed.
#[test]
fn a_status_that_cannot_be_written_costs_no_restart() {
    let sandbox = sandbox();
    let running = start(&sandbox, &["training.steps=40", "training.global_batch=16"]);
    sandbox.wait_for_step(2);
    let status = sandbox.run_dir().status();
    std::fs::remove_file(&status).unwrap();
    std::fs::create_dir(&status).unwrap();
    std::fs::write(status.join("in-the-way"), "").unwrap();
    running.expect(0);
    assert_eq!(sandbox.events_of("generation_started").len(), 1);
    assert_eq!(metrics(&sandbox, "test").len(), 40);
    assert!(status.is_dir(), "nothing could be written");
}

/// Row 11: a save that fails with EIO. Training goes on, the alarm is there soon, the checkpoint
/// before stays, and the next save is good.
#[test]
fn a_disk_that_fails_once_costs_one_checkpoint_and_no_restart() {
    let sandbox = sandbox();
    let sets = ["training.steps=40", "training.global_batch=16", "checkpoint.keep_last=100"];
    sandbox.train("straight", &sets);
    let fired = sandbox.path().join("fired");
    let failpoint = format!("write_tensors:2=eio@{}", fired.display());
    let sandbox = sandbox.env("PHALANX_FAILPOINT", failpoint);
    start(&sandbox, &sets).expect(0);
    assert!(fired.exists(), "the fault must fire");
    assert_eq!(sandbox.events_of("generation_started").len(), 1, "no restart");
    let failed = sandbox.events_of("checkpoint_failed");
    assert_eq!(failed.len(), 1, "{failed:?}");
    let reason = failed[0]["reason"].as_str().unwrap();
    assert!(reason.contains("os error 5"), "{reason}");
    let committed = sandbox.events_of("checkpoint_committed");
    let before =
        committed.iter().rfind(|event| event["step"].as_u64() < failed[0]["step"].as_u64());
    assert!(before.is_none_or(|before| since(before, &failed[0]) < 30.0), "the alarm comes soon");
    let steps: Vec<u64> = committed.iter().map(|event| event["step"].as_u64().unwrap()).collect();
    assert_eq!(steps.len(), 7, "all but one of 8: {steps:?}");
    let (list, _) = sandbox.expect(0, &["checkpoint", "verify", "test"]);
    assert!(list.lines().count() == 7 && !list.contains("DAMAGED"), "{list}");
    assert_as_straight(&sandbox, 40);
}

/// Row 11: a disk that takes 5 s for one call. Training goes on meanwhile.
#[test]
fn a_slow_disk_does_not_stop_training() {
    let sandbox = sandbox();
    let sets = ["training.steps=60", "training.global_batch=16", "checkpoint.every_steps=20"];
    sandbox.train("straight", &sets);
    let fired = sandbox.path().join("fired");
    let failpoint = format!("fsync_tensors=slow@{}", fired.display());
    let sandbox = sandbox.env("PHALANX_FAILPOINT", failpoint);
    let running = start(&sandbox, &sets);
    wait_until(|| fired.exists());
    let at = metrics(&sandbox, "test").len();
    sandbox.wait_for_metrics(at as u64 + 5, 1);
    let committed = sandbox.events_of("checkpoint_committed");
    assert!(committed.is_empty(), "the first save is not done yet: {committed:?}");
    running.expect(0);
    assert_eq!(sandbox.events_of("generation_started").len(), 1, "no restart");
    assert_as_straight(&sandbox, 60);
}

fn wait_until(is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "it did not come to that");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Whether a process has a handler for SIGTERM.
fn listens(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let caught = caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    caught.is_some_and(|mask| mask & 1 << (Signal::TERM.as_raw() - 1) != 0)
}

/// Row 12: one rank alone is told to stop in this phase; the run saves its step and ends with 75,
/// and goes on with the same bits.
fn check_stop(phase: &str, by: Signal, failpoint: &str) {
    let sandbox = sandbox();
    let sets = [
        "training.steps=60",
        "training.global_batch=16",
        "validation={every_steps: 20, steps: 300}",
    ];
    sandbox.train("straight", &sets);
    let fired = sandbox.path().join("fired");
    let sandbox = match failpoint {
        "" => sandbox,
        point => sandbox.env("PHALANX_FAILPOINT", format!("{point}@{}", fired.display())),
    };
    let running = start(&sandbox, &sets);
    let is_there = |status: &Value| match phase {
        "warm-up" => status["ranks"][1]["pid"].as_u64().is_some_and(|pid| listens(pid as u32)),
        "train" => status["step"].as_u64() >= Some(7),
        phase => status["ranks"][1]["phase"] == phase,
    };
    let status = sandbox.wait_for(is_there);
    eprintln!("{by:?} to rank 1 in {phase}, after step {}", status["step"]);
    signal(pid(&status, 1), by);
    let asked = Instant::now();
    running.expect(75);
    assert!(asked.elapsed() < Duration::from_secs(30), "{:?}", asked.elapsed());
    assert!(failpoint.is_empty() || fired.exists(), "the fault must fire");
    let stop = &sandbox.events_of("stop_requested")[0]["by"];
    assert!(stop.as_str().unwrap().ends_with("to rank 1"), "{stop}");
    let done = metrics(&sandbox, "test").last().map(|report| report.step);
    let saved = sandbox.events_of("preempted")[0]["committed"].as_u64();
    assert_eq!(saved, done, "no step is lost");
    assert_eq!(sandbox.events_of("generation_started").len(), 1);
    let again = match saved {
        Some(_) => vec!["resume", "test"],
        None => vec!["resume", "test", "--from-start"],
    };
    sandbox.expect(0, &again);
    assert_as_straight(&sandbox, 60);
}

#[test]
fn a_stop_of_one_rank_before_the_first_step_is_heard() {
    check_stop("warm-up", Signal::TERM, "");
}

#[test]
fn a_stop_of_one_rank_while_it_trains_saves() {
    check_stop("train", Signal::USR2, "");
}

#[test]
fn a_stop_of_one_rank_while_it_evaluates_saves() {
    check_stop("validate", Signal::TERM, "");
}

/// One that would take hours is left.
#[test]
fn a_stop_of_one_rank_cuts_a_long_evaluation_short() {
    let sandbox = sandbox();
    let validation = "validation={every_steps: 20, steps: 1000000}";
    let running = start(&sandbox, &["training.steps=60", "training.global_batch=16", validation]);
    let status = sandbox.wait_for(|status| status["ranks"][1]["phase"] == "validate");
    signal(pid(&status, 1), Signal::USR2);
    let asked = Instant::now();
    running.expect(75);
    assert!(asked.elapsed() < Duration::from_secs(25), "{:?}", asked.elapsed());
    assert_eq!(sandbox.events_of("preempted")[0]["committed"], 20);
    let last = metrics(&sandbox, "test").pop().unwrap();
    assert_eq!((last.step, last.validation_loss), (20, None));
    sandbox.assert_nothing_left();
}

#[test]
fn a_stop_of_one_rank_while_it_saves_saves() {
    // The save of step 10 waits for that of step 5.
    check_stop("save", Signal::USR2, "fsync_tensors=slow");
}

/// Row 15: a rank that gets half of its time.
#[test]
fn a_rank_that_is_twice_as_slow_is_named_within_5_reports() {
    let sandbox = sandbox();
    // Steps that are long beside what the machine does otherwise.
    let sets = ["training.steps=400", "training.global_batch=128", "validation.every_steps=0"];
    let running = start(&sandbox, &[&sets[..], &["cluster.threads_per_rank=1"]].concat());
    let status = sandbox.wait_for_step(8);
    let (victim, is_over) = (pid(&status, 1), AtomicBool::new(false));
    let from = metrics(&sandbox, "test").last().unwrap().step;
    assert!(sandbox.events_of("slow_rank").is_empty(), "nobody is slow yet");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                for which in [Signal::STOP, Signal::CONT] {
                    signal(victim, which);
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        });
        let deadline = Instant::now() + PATIENCE;
        while sandbox.events_of("slow_rank").is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        is_over.store(true, Ordering::Relaxed);
    });
    running.signal(Signal::INT);
    running.expect(75);
    let slow = &sandbox.events_of("slow_rank")[0];
    assert_eq!(slow["rank"], 1, "{slow}");
    // The step that was under way is no report of a slow rank yet.
    assert!(slow["step"].as_u64().unwrap() <= from + 1 + 5, "from step {from}: {slow}");
    assert!(slow["own_s"].as_f64() > slow["usual_s"].as_f64().map(|usual| 1.5 * usual));
}

/// Row 16: a rank is killed while the others still write a checkpoint.
#[test]
fn a_restart_during_a_save_leaves_nothing_behind() {
    let sandbox = sandbox();
    let sets = ["training.steps=40", "training.global_batch=16"];
    sandbox.train("straight", &sets);
    let fired = sandbox.path().join("fired");
    let failpoint = format!("fsync_tensors:2=slow@{}", fired.display());
    let sandbox = sandbox.env("PHALANX_FAILPOINT", failpoint);
    let running = start(&sandbox, &sets);
    let status = sandbox.wait_for_step(1);
    wait_until(|| fired.exists());
    let shared = |pid: u32| {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
        maps.contains("/dev/shm")
    };
    let ranks: Vec<u32> = (0..2).map(|rank| pid(&status, rank)).collect();
    assert!(!ranks.iter().copied().any(shared), "ranks share no memory that could outlive them");
    signal(ranks[1], Signal::KILL);
    sandbox.wait_for(|status| status["generation"] == 2);
    let living: Vec<u32> = sandbox.processes().into_iter().map(|(pid, _)| pid).collect();
    assert!(!living.contains(&ranks[1]), "the one that was killed is gone");
    running.expect(0);
    let started = sandbox.events_of("generation_started");
    assert_eq!(started.len(), 2);
    assert_eq!(living.contains(&ranks[0]), started[1]["kept"] == 1, "the other is of use, or gone");
    assert_as_straight(&sandbox, 40);
}
