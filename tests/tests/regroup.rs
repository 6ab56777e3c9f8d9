//! Ranks that keep their processes while another is started anew: the real trainer, whose runs end
//! with the bits of one to which nothing happened, and whose survivors gather nothing.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use end_to_end::losses::assert_bit_equal;
use end_to_end::sandbox::{PATIENCE, Running, Sandbox, signal};
use rustix::process::Signal;
use serde_json::Value;
use std::time::{Duration, Instant};

/// Four ranks that share the machine.
const SETS: [&str; 4] = [
    "cluster.ranks_per_node=4",
    "cluster.threads_per_rank=1",
    "training.global_batch=16",
    "restart.max_no_progress=1000",
];

fn sandbox() -> Sandbox {
    Sandbox::real(env!("CARGO_BIN_EXE_phalanx-under-test"))
}

fn fake() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_phalanx-under-test"), env!("CARGO_BIN_EXE_fake-trainer"))
}

fn start(sandbox: &Sandbox, sets: &[&str]) -> Running {
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", *set]).collect();
    sandbox.start(&[&["run", "config.yaml"], &sets[..]].concat())
}

fn pids_in(status: &Value) -> Vec<u32> {
    let ranks = status["ranks"].as_array().unwrap();
    ranks.iter().map(|rank| u32::try_from(rank["pid"].as_u64().unwrap()).unwrap()).collect()
}

/// The ranks' processes, once the generation has done a step.
fn pids(sandbox: &Sandbox, generation: u64) -> Vec<u32> {
    let has_begun = |rank: &Value| rank["pid"].as_u64() > Some(0) && rank["step"].is_u64();
    let status = sandbox.wait_for(|status| {
        let ranks = status["ranks"].as_array();
        status["generation"] == generation && ranks.is_some_and(|all| all.iter().all(has_begun))
    });
    pids_in(&status)
}

/// How many processes each generation kept.
fn kept(sandbox: &Sandbox) -> Vec<u64> {
    let started = sandbox.events_of("generation_started");
    started.iter().map(|event| event["kept"].as_u64().unwrap()).collect()
}

fn assert_as_straight(sandbox: &Sandbox, steps: usize) {
    sandbox.expect(0, &["checkpoint", "diff", "straight", "test"]);
    assert_bit_equal(sandbox, "straight", "test", steps);
    sandbox.assert_nothing_left();
}

/// All are alike but that of `rank`.
fn assert_kept(before: &[u32], after: &[u32], rank: usize) {
    for (index, (before, after)) in before.iter().zip(after).enumerate() {
        assert_eq!(before != after, index == rank, "rank {index}: {before}, then {after}");
    }
}

#[test]
fn each_rank_is_killed_and_the_others_keep_their_processes() {
    let sandbox = sandbox();
    let sets = [&SETS[..], &["training.steps=60"]].concat();
    sandbox.train("straight", &sets);
    let running = start(&sandbox, &sets);
    let mut before = pids(&sandbox, 1);
    for rank in 0..4 {
        let generation = rank as u64 + 1;
        // Each generation saves something.
        sandbox.wait_for_metrics(12 * generation - 5, generation);
        signal(before[rank], Signal::KILL);
        let after = pids(&sandbox, generation + 1);
        assert_kept(&before, &after, rank);
        before = after;
    }
    running.expect(0);
    assert_eq!(kept(&sandbox), [0, 3, 3, 3, 3]);
    let causes = sandbox.events_of("first_cause");
    let ranks: Vec<&Value> = causes.iter().map(|cause| &cause["rank"]).collect();
    assert_eq!(ranks, [0, 1, 2, 3]);
    assert_as_straight(&sandbox, 60);
    assert_logs_are_of_their_generations(&sandbox);
}

/// Each generation has logs of its own, also those of processes that went on.
fn assert_logs_are_of_their_generations(sandbox: &Sandbox) {
    let log = |generation, rank| {
        std::fs::read_to_string(sandbox.run_dir().log(generation, rank)).unwrap_or_default()
    };
    for generation in 2..=5 {
        for rank in 0..4 {
            let (is_new, text) = (generation == rank as u64 + 2, log(generation, rank));
            let is_ready = format!("rank {rank} of 4 is ready");
            assert!(text.matches(&is_ready).count() == 1, "{generation} {rank}: {text}");
            let goes_on = format!("rank {rank} goes on in generation {generation}");
            assert_eq!(text.lines().next().unwrap().contains(&goes_on), !is_new, "{text}");
        }
    }
    assert!(log(1, 1).contains("rank 1 has let go of the generation"), "{}", log(1, 1));
}

/// What a process has gathered.
#[derive(Debug, PartialEq, Eq)]
struct Size {
    descriptors: usize,
    threads: usize,
    resident_kib: u64,
}

fn size(pid: u32) -> Size {
    let count = |what: &str| std::fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    Size {
        descriptors: count("fd"),
        threads: count("task"),
        resident_kib: resident.trim().trim_end_matches(" kB").parse().unwrap(),
    }
}

/// The least of several looks: threads come and go with saves.
fn least_size(pid: u32) -> Size {
    let sizes: Vec<Size> = (0..20)
        .map(|_| {
            std::thread::sleep(Duration::from_millis(10));
            size(pid)
        })
        .collect();
    let least = |of: fn(&Size) -> usize| sizes.iter().map(of).min().unwrap();
    Size {
        descriptors: least(|size| size.descriptors),
        threads: least(|size| size.threads),
        resident_kib: least(|size| size.resident_kib as usize) as u64,
    }
}

/// Between the two looks at the survivors. Threads of saves and of the loader come and go, so that
/// counts differ by a few; one that each regroup left behind would add as many as there are.
const REGROUPS: usize = 16;

/// Memory that 16 regroups may add. What a generation needs is 50 times as much.
const GROWTH_KIB: u64 = 8 << 10;

/// Until rank 1 is past where it failed: a third failure at one step would end the run.
fn wait_for_a_new_step(sandbox: &Sandbox) {
    let causes = sandbox.events_of("first_cause");
    let failed = causes.iter().map(|cause| cause["step"].as_u64().unwrap()).max();
    sandbox.wait_for(|status| status["ranks"][1]["step"].as_u64() >= failed);
}

#[test]
fn twenty_kills_leave_nothing_behind_in_the_survivors() {
    let sandbox = sandbox();
    let sets = [&SETS[..], &["training.steps=100000", "checkpoint.keep_last=1"]].concat();
    let running = start(&sandbox, &sets);
    let first = pids(&sandbox, 1);
    let survivors = [0, 2, 3];
    let (mut early, mut last) = (Vec::new(), Vec::new());
    for generation in 1..=20 {
        let before = pids(&sandbox, generation);
        wait_for_a_new_step(&sandbox);
        signal(before[1], Signal::KILL);
        assert_kept(&before, &pids(&sandbox, generation + 1), 1);
        let sizes = || survivors.iter().map(|rank| least_size(first[*rank])).collect();
        // What is made once is there after a few.
        match generation {
            4 => early = sizes(),
            20 => last = sizes(),
            _ => {}
        }
    }
    running.signal(Signal::INT);
    running.expect(75);
    eprintln!("after 4 kills {early:?}\nafter 20 {last:?}");
    for (early, last) in early.iter().zip(&last) {
        assert!(last.descriptors <= early.descriptors, "{early:?}, {last:?}");
        assert!(last.threads < early.threads + REGROUPS / 2, "{early:?}, {last:?}");
        assert!(last.resident_kib < early.resident_kib + GROWTH_KIB, "{early:?}, {last:?}");
    }
    assert_eq!(kept(&sandbox)[1..], [3; 20]);
    sandbox.assert_nothing_left();
}

fn wait_for_event(sandbox: &Sandbox, kind: &str) {
    let deadline = Instant::now() + PATIENCE;
    while sandbox.events_of(kind).is_empty() {
        assert!(Instant::now() < deadline, "there is no {kind}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A run of 40 steps that has done and saved some in its first generation, and its processes.
/// Beside it is what the same run does undisturbed.
fn midway(more: &[&str]) -> (Sandbox, Running, Vec<u32>) {
    let sandbox = sandbox();
    let sets = [&SETS[..], &["training.steps=40"]].concat();
    sandbox.train("straight", &sets);
    let running = start(&sandbox, &[&sets[..], more].concat());
    let before = pids(&sandbox, 1);
    sandbox.wait_for_metrics(7, 1);
    // Saves are beside training: what comes then finds something saved.
    wait_for_event(&sandbox, "checkpoint_committed");
    (sandbox, running, before)
}

/// Another rank dies while the others wait for the next generation, or right after.
#[test]
fn a_rank_killed_while_they_regroup_costs_no_bit() {
    let (sandbox, running, before) = midway(&[]);
    signal(before[1], Signal::KILL);
    wait_for_event(&sandbox, "first_cause");
    signal(before[2], Signal::KILL);
    running.expect(0);
    let failed = sandbox.events_of("rank_failed");
    let is_killed = |failed: &&Value| failed["exit"] == "killed by SIGKILL";
    let mut killed: Vec<&Value> =
        failed.iter().filter(is_killed).map(|failed| &failed["rank"]).collect();
    killed.dedup();
    assert_eq!(killed[..2], [1, 2], "{failed:?}");
    assert_as_straight(&sandbox, 40);
}

/// A survivor that stands still cannot let go: it is killed, and the others keep their processes.
#[test]
fn a_survivor_that_does_not_let_go_is_killed() {
    let (sandbox, running, before) = midway(&[]);
    signal(before[0], Signal::STOP);
    signal(before[1], Signal::KILL);
    let after = pids(&sandbox, 2);
    assert_eq!((before[2], before[3]), (after[2], after[3]));
    assert!(before[0] != after[0] && before[1] != after[1], "{before:?}, {after:?}");
    running.expect(0);
    assert_eq!(sandbox.events_of("first_cause")[0]["rank"], 1);
    assert_eq!(kept(&sandbox), [0, 2]);
    assert_as_straight(&sandbox, 40);
}

#[test]
fn a_rank_that_hangs_is_ended_and_the_others_keep_their_processes() {
    let (sandbox, running, before) = midway(&["restart.hang_timeout_s=2"]);
    signal(before[3], Signal::STOP);
    assert_kept(&before, &pids(&sandbox, 2), 3);
    running.expect(0);
    let cause = &sandbox.events_of("first_cause")[0];
    assert_eq!((&cause["rank"], &cause["class"]), (&3.into(), &"hang".into()), "{cause}");
    assert_as_straight(&sandbox, 40);
}

#[test]
fn without_keep_processes_all_are_started_anew() {
    let (sandbox, running, before) = midway(&["restart.keep_processes=false"]);
    signal(before[2], Signal::KILL);
    let after = pids(&sandbox, 2);
    assert!(before.iter().all(|pid| !after.contains(pid)), "{before:?}, {after:?}");
    running.expect(0);
    assert_eq!(kept(&sandbox), [0, 0]);
    assert_as_straight(&sandbox, 40);
}

/// SIGTERM to a process that waits for its next place: the run stops, with all that is saved.
#[test]
fn a_stop_of_a_rank_that_waits_is_heard() {
    let (sandbox, running, before) = midway(&[]);
    signal(before[1], Signal::KILL);
    wait_for_event(&sandbox, "first_cause");
    signal(before[2], Signal::TERM);
    running.expect(75);
    let stop = &sandbox.events_of("stop_requested")[0]["by"];
    assert_eq!(stop, "SIGTERM to rank 2");
    sandbox.expect(0, &["resume", "test"]);
    assert_as_straight(&sandbox, 40);
}

/// The stand-in trainer: what the launcher does, with ranks that never let go.
#[test]
fn ranks_that_hold_on_are_killed_after_the_grace() {
    let sandbox = fake().env("FAKE_FAULTS", "kill:1:7:1").env("FAKE_HOLDS_ON", 1);
    let begun = Instant::now();
    let (_, stderr) = sandbox.expect(0, &["run", "config.yaml"]);
    assert!(begun.elapsed() >= Duration::from_secs(5), "{:?}", begun.elapsed());
    assert!(stderr.contains("killing 1 ranks: still there 5 s after they were told"), "{stderr}");
    assert_eq!(kept(&sandbox), [0, 0]);
    sandbox.assert_nothing_left();
}

/// The same failure again and again: the processes that wait are ended with the run.
#[test]
fn a_run_that_gives_up_ends_those_that_wait() {
    let sandbox = fake().env("FAKE_FAULTS", "kill:1:g:*");
    let (_, stderr) =
        sandbox.expect(1, &["run", "config.yaml", "--set", "checkpoint.every_steps=0"]);
    assert!(stderr.contains("restart.max_no_progress"), "{stderr}");
    assert_eq!(kept(&sandbox)[1], 1);
    sandbox.assert_nothing_left();
}
