//! The real trainer, killed, interrupted, resumed and given damaged checkpoints: it ends with the
//! same bits as a run to which nothing happened.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use end_to_end::losses::{assert_bit_equal, assert_close};
use end_to_end::random::Random;
use end_to_end::sandbox::{Sandbox, signal};
use end_to_end::survivors::Survivors;
use rustix::process::Signal;
use serde_json::Value;
use std::path::Path;
use std::time::{Duration, Instant};

const STEPS: usize = 60;

/// In which the survivors of a rank that was killed have an error, and have let go of all that
/// belonged to the generation.
const SOON: Duration = Duration::from_secs(1);

/// Steps that take long enough to be hit.
const SETS: [&str; 4] = ["--set", "training.steps=60", "--set", "training.global_batch=16"];

fn sandbox() -> Sandbox {
    Sandbox::real(env!("CARGO_BIN_EXE_phalanx-under-test"))
}

/// The same run without a fault, named `straight`.
fn train_straight(sandbox: &Sandbox) {
    sandbox.train("straight", &[SETS[1], SETS[3]]);
}

fn start(sandbox: &Sandbox) -> end_to_end::sandbox::Running {
    sandbox.start(&[&["run", "config.yaml"], &SETS[..]].concat())
}

/// Weights, optimizer state and all that was printed are those of the run without a fault.
fn assert_as_straight(sandbox: &Sandbox) {
    let (stdout, stderr) = sandbox.expect(0, &["checkpoint", "diff", "straight", "test"]);
    assert!(stdout.contains("equal"), "{stdout}{stderr}");
    assert_bit_equal(sandbox, "straight", "test", STEPS);
    sandbox.assert_nothing_left();
}

/// Step from which each generation went on.
fn resumed_from(sandbox: &Sandbox) -> Vec<Value> {
    let started = sandbox.events_of("generation_started");
    started.iter().map(|event| event["resume_step"].clone()).collect()
}

/// Kills the rank at three random steps, far enough apart that each generation saves something.
fn check_killed_rank(rank: usize) {
    let sandbox = sandbox();
    train_straight(&sandbox);
    let mut random = Random::from_env();
    let running = start(&sandbox);
    for (index, range) in [(5, 15), (25, 33), (43, 50)].into_iter().enumerate() {
        let generation = index as u64 + 1;
        let step = random.from_to(range.0, range.1);
        let is_up = |status: &Value| {
            let has_pid = |rank: usize| status["ranks"][rank]["pid"].as_u64().is_some();
            status["generation"] == generation && (0..2).all(has_pid)
        };
        let status = sandbox.wait_for(is_up);
        let pid = status["ranks"][rank]["pid"].as_u64().unwrap();
        sandbox.wait_for_metrics(step, generation);
        eprintln!("killing rank {rank} after step {step}");
        let (survivors, killed) = (Survivors::of(&sandbox, &status, rank), Instant::now());
        signal(u32::try_from(pid).unwrap(), Signal::KILL);
        survivors.assert_told(killed, SOON);
    }
    running.expect(0);
    let causes = sandbox.events_of("first_cause");
    assert_eq!(causes.len(), 3, "{causes:?}");
    assert!(causes.iter().all(|cause| cause["rank"] == rank), "{causes:?}");
    assert_eq!(resumed_from(&sandbox).len(), 4);
    assert_as_straight(&sandbox);
}

#[test]
fn rank_0_killed_three_times_ends_with_the_same_bits() {
    check_killed_rank(0);
}

#[test]
fn rank_1_killed_three_times_ends_with_the_same_bits() {
    check_killed_rank(1);
}

/// Four ranks in this layout, one of which is killed: each of the others has an error soon, and in
/// the end there are the same bits as of a run to which nothing happened, in every parallel form.
fn check_killed_in(layout: &str, rank: usize) {
    let sandbox = sandbox();
    let sets = [
        "cluster.ranks_per_node=4",
        "cluster.threads_per_rank=1",
        "training.steps=24",
        "training.global_batch=8",
        layout,
    ];
    sandbox.train("straight", &sets);
    let step = Random::from_env().from_to(6, 16);
    let args: Vec<&str> = sets.iter().flat_map(|set| ["--set", *set]).collect();
    let running = sandbox.start(&[&["run", "config.yaml"], &args[..]].concat());
    let status = sandbox.wait_for_step(1);
    let pid = status["ranks"][rank]["pid"].as_u64().unwrap();
    sandbox.wait_for_metrics(step, 1);
    // It is written while training goes on.
    sandbox.wait_for(|_| !sandbox.events_of("checkpoint_committed").is_empty());
    eprintln!("{layout}: killing rank {rank} after step {step}");
    let (survivors, killed) = (Survivors::of(&sandbox, &status, rank), Instant::now());
    signal(u32::try_from(pid).unwrap(), Signal::KILL);
    survivors.assert_told(killed, SOON);
    running.expect(0);
    let causes = sandbox.events_of("first_cause");
    assert!(causes.len() == 1 && causes[0]["rank"] == rank, "{causes:?}");
    let resumed = resumed_from(&sandbox);
    assert!(resumed.len() == 2 && resumed[1].as_u64() >= Some(5), "{resumed:?}");
    assert_bit_equal(&sandbox, "straight", "test", 24);
    sandbox.expect(0, &["checkpoint", "diff", "straight", "test"]);
    sandbox.assert_nothing_left();
}

#[test]
fn a_rank_of_stages_that_are_split_is_killed() {
    check_killed_in("parallelism={tensor: 2, pipeline: {stages: 2}}", 3);
}

#[test]
fn a_rank_of_zero_bubble_stages_with_shards_is_killed() {
    let layout = "parallelism={pipeline: {stages: 2, schedule: zero-bubble}, \
                  shard: {ranks: 2, level: gradients}}";
    check_killed_in(layout, 0);
}

#[test]
fn a_rank_of_pieces_of_the_sequence_with_shards_is_killed() {
    let layout = "parallelism={context: 2, shard: {ranks: 2, level: parameters}, recompute: full}";
    check_killed_in(layout, 2);
}

#[test]
fn a_launcher_killed_twice_and_resumed_ends_with_the_same_bits() {
    let sandbox = sandbox();
    train_straight(&sandbox);
    let mut random = Random::from_env();
    let mut running = start(&sandbox);
    // From step 6 on, because step 5 is reported before its checkpoint, the first, is committed.
    for (generation, range) in [(1, (6, 20)), (2, (30, 50))] {
        let step = random.from_to(range.0, range.1);
        sandbox.wait_for_metrics(step, generation);
        eprintln!("killing the launcher after step {step}");
        running.signal(Signal::KILL);
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(sandbox.processes(), []);
        running = sandbox.start(&["resume", "test"]);
    }
    running.expect(0);
    let resumed = resumed_from(&sandbox);
    assert!(resumed.len() == 3 && resumed[2].as_u64() >= Some(25), "{resumed:?}");
    assert_as_straight(&sandbox);
}

#[test]
fn an_interrupted_run_resumed_ends_with_the_same_bits() {
    let sandbox = sandbox();
    train_straight(&sandbox);
    let mut random = Random::from_env();
    let mut running = start(&sandbox);
    for (generation, range, by) in [(1, (3, 20), Signal::INT), (2, (30, 50), Signal::TERM)] {
        let step = random.from_to(range.0, range.1);
        sandbox.wait_for_metrics(step, generation);
        running.signal(by);
        running.expect(75);
        let saved = sandbox.events_of("preempted").last().unwrap()["committed"].as_u64();
        assert!(saved >= Some(step) && saved < Some(60), "asked at {step}, saved {saved:?}");
        running = sandbox.start(&["resume", "test"]);
    }
    running.expect(0);
    assert_as_straight(&sandbox);
}

#[test]
fn other_numbers_of_ranks_go_on_with_the_same_data() {
    let sandbox = sandbox();
    let constant = "schedule.kind=constant";
    sandbox.train("straight", &["training.steps=40", constant]);
    sandbox.train("test", &["training.steps=10", constant]);
    for (steps, ranks) in [(20, 1), (30, 4), (40, 2)] {
        let sets = [format!("training.steps={steps}"), format!("cluster.ranks_per_node={ranks}")];
        sandbox.expect(0, &["resume", "test", "--set", &sets[0], "--set", &sets[1]]);
    }
    assert_eq!(resumed_from(&sandbox), [Value::Null, 10.into(), 20.into(), 30.into()]);
    assert_close(&sandbox, "straight", "test", 40, 1e-5);
}

/// 10 steps, and 10 more after a resume, give the same bits as 20 in one go.
fn check_resume(sets: &[&str]) {
    let sandbox = sandbox();
    let sets = [sets, &["schedule.kind=constant"]].concat();
    sandbox.train("straight", &sets);
    sandbox.train("test", &[&sets[..], &["training.steps=10"]].concat());
    sandbox.expect(0, &["resume", "test", "--set", "training.steps=20"]);
    assert_bit_equal(&sandbox, "straight", "test", 20);
    sandbox.expect(0, &["checkpoint", "diff", "straight", "test"]);
}

#[test]
fn a_resume_is_bit_equal_in_bf16_with_its_master_weights() {
    check_resume(&["precision.compute=bf16"]);
}

#[test]
fn a_resume_is_bit_equal_in_fp64_with_tied_embeddings() {
    check_resume(&["precision.compute=fp64", "model.tied_embeddings=true"]);
}

#[test]
fn a_resume_is_bit_equal_in_the_middle_of_a_ramp() {
    let ramp = "training.global_batch=[{from_tokens: 0, global_batch: 4, sequence_length: 16}, \
                {from_tokens: 448, global_batch: 6, sequence_length: 32}]";
    check_resume(&[ramp]);
}

#[test]
fn a_resume_is_bit_equal_with_two_packed_sources() {
    let sources = "data.sources=[{name: a, path: shards/*.parquet, weight: 0.7}, \
                   {name: b, path: shards, weight: 0.3}]";
    check_resume(&[sources, "data.packing=best_fit"]);
}

/// After this damage to the newest checkpoint, it is reported and the one before it is used.
fn check_damage(sandbox: &Sandbox, damage: impl Fn(&Path), reason: &str) {
    let before = resumed_from(sandbox).len();
    let newest = newest_step(sandbox);
    damage(&sandbox.run_dir().checkpoint(newest));
    let more = format!("training.steps={}", newest + 5);
    let (_, stderr) = sandbox.expect(0, &["resume", "test", "--set", &more]);
    let report = format!("the checkpoint of step {newest} is damaged");
    assert!(stderr.contains(&report) && stderr.contains(reason), "{stderr}");
    assert_eq!(sandbox.events_of("checkpoint_damaged").last().unwrap()["step"], newest);
    assert_eq!(resumed_from(sandbox)[before], newest - 5);
}

fn newest_step(sandbox: &Sandbox) -> u64 {
    let committed = sandbox.events_of("checkpoint_committed");
    committed.last().unwrap()["step"].as_u64().unwrap()
}

const TENSORS: &str = "rank-00001-000.safetensors";

#[test]
fn a_damaged_newest_checkpoint_is_passed_over() {
    let sandbox = sandbox();
    let constant = "schedule.kind=constant";
    sandbox.train("straight", &["training.steps=35", constant]);
    sandbox.train("test", &[constant]);
    let mut random = Random::from_env();
    let at = random.below(100_000) as usize;
    check_damage(
        &sandbox,
        |dir| {
            let mut bytes = std::fs::read(dir.join(TENSORS)).unwrap();
            let at = bytes.len() - 1 - at;
            bytes[at] ^= 1;
            std::fs::write(dir.join(TENSORS), bytes).unwrap();
        },
        TENSORS,
    );
    check_damage(
        &sandbox,
        |dir| {
            let file = std::fs::OpenOptions::new().write(true).open(dir.join(TENSORS)).unwrap();
            file.set_len(file.metadata().unwrap().len() / 2).unwrap();
        },
        TENSORS,
    );
    check_damage(&sandbox, |dir| std::fs::remove_file(dir.join("COMMIT")).unwrap(), "COMMIT");
    assert_eq!(newest_step(&sandbox), 35);
    assert_bit_equal(&sandbox, "straight", "test", 35);
    sandbox.expect(0, &["checkpoint", "diff", "straight", "test"]);
    check_passed_over_by_others(&sandbox);
}

/// Whoever else takes the newest checkpoint passes over a damaged one, and says so.
fn check_passed_over_by_others(sandbox: &Sandbox) {
    std::fs::remove_file(sandbox.run_dir().checkpoint(35).join("COMMIT")).unwrap();
    let (_, stderr) = sandbox.expect(0, &["generate", "test", "--prompt", "a"]);
    assert!(stderr.contains("step 35 is damaged and passed over"), "{stderr}");
    // Not seen but by a look at all bytes.
    let tensors = sandbox.run_dir().checkpoint(30).join(TENSORS);
    let mut bytes = std::fs::read(&tensors).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&tensors, bytes).unwrap();
    let run = ["run", "config.yaml", "--set", "name=other", "--set", "training.steps=1"];
    let from = |source| [&run[..], &["--set", source]].concat();
    let (_, stderr) = sandbox.expect(0, &from("model.init_from=run:test"));
    assert!(stderr.contains("step 35 is damaged, passed over"), "{stderr}");
    assert!(stderr.contains("step 30 is damaged, passed over"), "{stderr}");
    let config = std::fs::read_to_string(sandbox.run_dir_of("other").config()).unwrap();
    assert!(config.contains("run:test@25"), "{config}");
}

/// A rank that dies at this point of its second save costs nothing but time.
fn check_failpoint(point: &str) {
    let sandbox = sandbox();
    let sets = ["--set", "training.steps=15", "--set", "checkpoint.keep_last=1"];
    sandbox.train("straight", &[sets[1], sets[3]]);
    let fired = sandbox.path().join("fired");
    let failpoint = format!("{point}:2@{}", fired.display());
    let sandbox = sandbox.env("PHALANX_FAILPOINT", failpoint);
    sandbox.expect(0, &[&["run", "config.yaml"], &sets[..]].concat());
    assert!(fired.exists(), "{point} was never reached");
    let resumed = resumed_from(&sandbox);
    assert!(resumed.len() == 2 && resumed[1].as_u64() >= Some(5), "{point}: {resumed:?}");
    assert_bit_equal(&sandbox, "straight", "test", 15);
    sandbox.expect(0, &["checkpoint", "diff", "straight", "test"]);
    let mut left: Vec<_> = std::fs::read_dir(sandbox.run_dir().checkpoints())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| ![".generation", ".lock"].contains(&name.as_str()))
        .collect();
    left.sort();
    assert_eq!(left, ["step-0000015"], "{point}");
    sandbox.assert_nothing_left();
}

#[test]
fn a_rank_killed_while_it_writes_tensors_leaves_the_checkpoint_before() {
    check_failpoint("fsync_tensors");
}

#[test]
fn a_rank_killed_before_the_commit_leaves_the_checkpoint_before() {
    check_failpoint("write_manifest");
    check_failpoint("rename_commit");
}

#[test]
fn a_rank_killed_after_the_commit_leaves_a_checkpoint() {
    check_failpoint("rename_step");
    check_failpoint("fsync_parent");
}

#[test]
fn a_rank_killed_while_it_removes_an_old_checkpoint_leaves_the_new_one() {
    // The old one has lost its name, and no later save comes to remove its files.
    check_failpoint("retire_remove");
}

#[test]
fn steps_done_again_come_out_the_same_and_a_difference_is_found() {
    let sandbox = sandbox();
    sandbox.train("test", &[SETS[1], SETS[3]]);
    let verify = ["resume", "test", "--verify", "10"];
    let (stdout, stderr) = sandbox.expect(0, &verify);
    assert!(stdout.contains("steps 51 to 60: 10 losses and gradient norms are equal"), "{stderr}");
    assert!(stdout.contains("tensors of step 60"), "{stdout}");
    sandbox.assert_nothing_left();
    let metrics = sandbox.run_dir().metrics();
    let text = std::fs::read_to_string(&metrics).unwrap();
    let mut lines: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let loss = lines[54]["loss"].as_f64().unwrap();
    lines[54]["loss"] = f64::from_bits(loss.to_bits() + 1).into();
    let text: Vec<String> = lines.iter().map(|line| format!("{line}\n")).collect();
    std::fs::write(&metrics, text.concat()).unwrap();
    let (stdout, _) = sandbox.expect(1, &verify);
    assert!(stdout.contains("step 55 differs"), "{stdout}");
    assert!(stdout.contains("1 of 10 steps differ"), "{stdout}");
    assert!(sandbox.expect(64, &["resume", "test", "--verify", "99"]).1.contains("has done 60"));
    // On another config the same steps come out otherwise, and nothing is wrong.
    sandbox.expect(0, &["resume", "test", "--set", "training.steps=65"]);
    let stderr = sandbox.expect(64, &["resume", "test", "--verify", "10", "--step", "50"]).1;
    assert!(stderr.contains("since then changed: training.steps"), "{stderr}");
    sandbox.expect(0, &["resume", "test", "--verify", "5", "--step", "60"]);
}
