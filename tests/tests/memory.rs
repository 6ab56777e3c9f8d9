//! Checkpoints in memory: ranks that fail are started again from the newest of them, the memory
//! goes with the launcher, and whatever becomes of it, what is on disk is there.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use end_to_end::losses::assert_bit_equal;
use end_to_end::sandbox::{Running, Sandbox, signal};
use rustix::process::Signal;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Every fifth step is kept in memory, every fiftieth on disk.
const SETS: [&str; 3] =
    ["training.steps=120", "checkpoint.every_steps=50", "checkpoint.memory.every_steps=5"];

fn sandbox() -> Sandbox {
    Sandbox::real(env!("CARGO_BIN_EXE_phalanx-under-test"))
}

fn start(sandbox: &Sandbox, sets: &[&str]) -> Running {
    let sets = SETS.iter().chain(sets).flat_map(|set| ["--set", *set]);
    let args: Vec<&str> = ["run", "config.yaml"].into_iter().chain(sets).collect();
    sandbox.start(&args)
}

/// The folder in memory of the run `test`.
fn folder(sandbox: &Sandbox) -> PathBuf {
    let run_id = sandbox.events_of("run_started")[0]["run_id"].clone();
    Path::new("/dev/shm").join(format!("phalanx-{}", run_id.as_str().unwrap()))
}

/// Kills a rank of the generation that runs, sooner than a status could name it.
fn kill(sandbox: &Sandbox, rank: usize) {
    let mark = format!("PHALANX_RANK={rank}");
    let is_it = |pid: u32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
    };
    let ranks = sandbox.processes().into_iter().map(|(pid, _)| pid).filter(|pid| is_it(*pid));
    let ranks: Vec<u32> = ranks.collect();
    assert_eq!(ranks.len(), 1, "rank {rank}");
    signal(ranks[0], Signal::KILL);
}

/// (step, tier) that each generation but the first went on from.
fn resumed(sandbox: &Sandbox) -> Vec<(Option<u64>, String)> {
    let started = sandbox.events_of("generation_started");
    let from = |event: &Value| {
        let tier = event["resume_tier"].as_str().unwrap_or_default();
        (event["resume_step"].as_u64(), tier.to_owned())
    };
    started[1..].iter().map(from).collect()
}

/// The run ended as one to which nothing happened, and nothing is left of its memory.
fn check_end(sandbox: &Sandbox) {
    sandbox.train("straight", &SETS[..2]);
    sandbox.expect(0, &["checkpoint", "diff", "straight", "test"]);
    assert_bit_equal(sandbox, "straight", "test", 120);
    assert!(!folder(sandbox).exists(), "{:?}", folder(sandbox));
    sandbox.assert_nothing_left();
}

#[test]
fn a_killed_rank_goes_on_from_memory() {
    let sandbox = sandbox();
    let running = start(&sandbox, &[]);
    let status = sandbox.wait_for(|status| status["memory_checkpoint"].as_u64() >= Some(15));
    assert!(status["last_checkpoint"].is_null(), "nothing is on disk yet: {status}");
    let kept = status["memory_checkpoint"].as_u64();
    kill(&sandbox, 1);
    running.expect(0);
    assert_eq!(sandbox.events_of("first_cause").len(), 1, "the rank must have been killed");
    let [(step, tier)] = &resumed(&sandbox)[..] else { panic!("{:?}", resumed(&sandbox)) };
    assert_eq!(tier, "memory");
    assert!(*step >= kept && step.unwrap().is_multiple_of(5), "{step:?} {kept:?}");
    let (why, _) = sandbox.expect(0, &["why", "test"]);
    let told = format!("went on from step {}, out of this machine's memory", step.unwrap());
    assert!(why.contains(&told), "{why}");
    check_end(&sandbox);
}

/// Again and again, wherever it is: also while it writes into memory.
#[test]
fn each_kill_costs_at_most_the_steps_since_the_last_one_kept() {
    let sandbox = sandbox();
    let running =
        start(&sandbox, &["checkpoint.memory.every_steps=1", "restart.max_no_progress=9"]);
    let kills = [(12, 0), (25, 1), (38, 0), (61, 1), (77, 0)];
    for (generation, (at, rank)) in (1..).zip(kills) {
        sandbox.wait_for_metrics(at, generation);
        kill(&sandbox, rank);
    }
    running.expect(0);
    let resumed = resumed(&sandbox);
    assert_eq!(resumed.len(), 5, "{resumed:?}");
    for ((step, tier), (at, _)) in resumed.iter().zip(kills) {
        // What is on disk may be of the very step.
        assert!(tier == "memory" || *step == Some(50) || *step == Some(100), "{resumed:?}");
        // One may be kept, and the next be on its way.
        assert!(*step >= Some(at - 2), "{resumed:?}");
    }
    check_end(&sandbox);
}

#[test]
fn a_killed_launcher_takes_its_memory_with_it() {
    let sandbox = sandbox();
    let running = start(&sandbox, &[]);
    sandbox.wait_for(|status| status["memory_checkpoint"].as_u64() >= Some(60));
    let folder = folder(&sandbox);
    assert!(folder.join("checkpoints").is_dir());
    running.signal(Signal::KILL);
    running.wait();
    let deadline = Instant::now() + Duration::from_secs(10);
    while folder.exists() || !sandbox.processes().is_empty() {
        assert!(Instant::now() < deadline, "{folder:?} {:?}", sandbox.processes());
        std::thread::sleep(Duration::from_millis(20));
    }
    sandbox.expect(0, &["resume", "test"]);
    let committed = sandbox.events_of("checkpoint_committed");
    let before = committed.iter().filter(|event| event["generation"] == 1);
    let newest = before.filter_map(|event| event["step"].as_u64()).max();
    assert!(newest >= Some(50), "{committed:?}");
    assert_eq!(resumed(&sandbox), [(newest, "local".to_owned())]);
    check_end(&sandbox);
}

/// A folder whose keeper was killed too is removed by the next launcher.
#[test]
fn what_nobody_removed_is_removed_at_the_next_start() {
    let sandbox = sandbox();
    let running = start(&sandbox, &[]);
    sandbox.wait_for(|status| status["memory_checkpoint"].as_u64() >= Some(5));
    let folder = folder(&sandbox);
    let keepers = sandbox.processes();
    let keepers = keepers.iter().filter(|(_, command)| command.contains("memory-keeper"));
    let keepers: Vec<u32> = keepers.map(|(pid, _)| *pid).collect();
    assert_eq!(keepers.len(), 1);
    signal(keepers[0], Signal::KILL);
    running.signal(Signal::KILL);
    running.wait();
    std::thread::sleep(Duration::from_millis(500));
    assert!(folder.exists(), "it was to stay behind");
    sandbox.expect(0, &["resume", "test", "--from-start"]);
    check_end(&sandbox);
}

/// It is as near to the trouble as can be: the run goes back to what is on disk.
#[test]
fn a_roll_back_does_not_go_to_memory() {
    let sandbox = sandbox();
    let sets = [
        "numeric={window: 4, loss_zscore: 100, grad_norm_zscore: 50, on_spike: rollback}",
        "schedule.kind=constant",
        "validation.every_steps=0",
        "cluster.threads_per_rank=1",
        "training.steps=20",
        "checkpoint.every_steps=5",
        "checkpoint.memory.every_steps=1",
    ];
    // A sample of step 12, as in `numeric.rs`.
    let sandbox = sandbox.env("PHALANX_NUMERIC_FAULT", "sample:93:1e3");
    start(&sandbox, &sets).expect(0);
    assert_eq!(sandbox.events_of("rolled_back").len(), 1, "the fault must have happened");
    assert_eq!(resumed(&sandbox), [(Some(10), "local".to_owned())]);
    assert!(!folder(&sandbox).exists());
}

#[test]
fn memory_without_room_is_told_of_and_training_goes_on() {
    let sandbox = sandbox();
    let fired = sandbox.path().join("fired");
    // The first checkpoint is one in memory.
    let fault = format!("write_tensors:2=enospc@{}", fired.display());
    let sandbox = sandbox.env("PHALANX_FAILPOINT", fault);
    start(&sandbox, &[]).expect(0);
    assert!(fired.exists(), "the fault must have happened");
    let failed = sandbox.events_of("checkpoint_not_kept");
    assert_eq!(failed.len(), 1, "{failed:?}");
    assert_eq!(failed[0]["step"], 5);
    assert_eq!(sandbox.events_of("generation_started").len(), 1, "no restart");
    let (status, _) = sandbox.expect(0, &["status", "test"]);
    assert!(!status.contains("ALARM"), "later ones found room: {status}");
    check_end(&sandbox);
}

#[test]
fn what_cannot_hold_checkpoints_is_refused() {
    let sandbox = sandbox();
    let check = |verb: &str, set: &str, words: &str| {
        let sets = ["--set", "checkpoint.memory.every_steps=5", "--set", set];
        let (_, stderr) = sandbox.expect(64, &[&[verb, "config.yaml"], &sets[..]].concat());
        assert!(stderr.contains(words), "{stderr}");
        assert!(!sandbox.run_dir().root().exists(), "its name stays free");
    };
    check("run", "checkpoint.memory.folder=/nowhere", "/nowhere: it is no folder");
}
