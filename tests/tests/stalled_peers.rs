//! A rank of a real run over Gloo that stands still: the others have an error within the time-out
//! of the config, in every parallel form, and say who it is that does nothing.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use end_to_end::sandbox::{Sandbox, signal};
use end_to_end::survivors::Survivors;
use rustix::process::Signal;
use std::time::{Duration, Instant};

/// `cluster.timeout_s`.
const TIMEOUT: Duration = Duration::from_secs(3);
/// What may come on top: what was under way before, and the agent's word to those that wait for
/// one that had an error first.
const SLACK: Duration = Duration::from_secs(2);

/// Four ranks in this layout, one of which is stopped.
fn check(layout: &str, rank: usize) {
    let sandbox = Sandbox::real(env!("CARGO_BIN_EXE_phalanx-under-test"));
    let sets = [
        "cluster.ranks_per_node=4",
        "cluster.threads_per_rank=1",
        "cluster.timeout_s=3",
        "training.steps=2000",
        "training.global_batch=8",
        "checkpoint.every_steps=2000",
        "validation.every_steps=0",
        layout,
    ];
    let args: Vec<&str> = sets.iter().flat_map(|set| ["--set", *set]).collect();
    let running = sandbox.start(&[&["run", "config.yaml"], &args[..]].concat());
    let status = sandbox.wait_for_step(3);
    let pid = u32::try_from(status["ranks"][rank]["pid"].as_u64().unwrap()).unwrap();
    let (survivors, stopped) = (Survivors::of(&sandbox, &status, rank), Instant::now());
    signal(pid, Signal::STOP);
    let words = survivors.assert_told(stopped, TIMEOUT + SLACK);
    // Some waited already when it stopped.
    let least = TIMEOUT.mul_f64(0.9);
    assert!(words.iter().all(|words| words.after >= least), "too soon: {words:?}");
    // Each that waited in vain names the one that stands still, be it that others wait for it too.
    let in_vain: Vec<&str> = words
        .iter()
        .filter(|words| words.is_own && words.text.contains("nothing in 3000 ms"))
        .map(|words| words.text.as_str())
        .collect();
    let named = |text: &&str| text.contains(&format!("lost rank {rank}: it "));
    assert!(in_vain.iter().any(named), "{words:?}");
    let known = |text: &&str| named(text) || text.contains(&format!("for rank {rank}, which"));
    assert!(in_vain.iter().all(known), "{words:?}");
    running.signal(Signal::KILL);
    let deadline = Instant::now() + Duration::from_secs(5);
    while !sandbox.processes().is_empty() {
        assert!(Instant::now() < deadline, "left behind: {:?}", sandbox.processes());
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_stopped_rank_of_stages_that_are_split_is_named() {
    check("parallelism={tensor: 2, pipeline: {stages: 2}}", 3);
}

#[test]
fn a_stopped_rank_of_pieces_of_the_sequence_with_shards_is_named() {
    check("parallelism={context: 2, shard: {ranks: 2, level: parameters}}", 1);
}

#[test]
fn a_stopped_replica_is_named() {
    check("parallelism={replicate: 4}", 2);
}
