//! Checkpoints are copied to an object store while training goes on, and come back from there when
//! they are missing or damaged here. Whatever the store does, training does not wait.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use end_to_end::losses::assert_bit_equal;
use end_to_end::object_store::{BUCKET, ObjectStore};
use end_to_end::proxy::Fault;
use end_to_end::sandbox::{Running, Sandbox, signal};
use rustix::process::Signal;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A failure must be seen by then.
const ALARM_BY: Duration = Duration::from_secs(30);

/// A sandbox, and the folder that is its object store.
fn with_folder() -> (Sandbox, PathBuf) {
    let sandbox = Sandbox::real(env!("CARGO_BIN_EXE_phalanx-under-test"));
    let folder = sandbox.path().join("store");
    (sandbox, folder)
}

/// A sandbox whose processes reach the object store.
fn with_store() -> (Sandbox, ObjectStore) {
    let store = ObjectStore::start();
    let sandbox = Sandbox::real(env!("CARGO_BIN_EXE_phalanx-under-test"));
    let sandbox = store.env().into_iter().fold(sandbox, |s, (name, value)| s.env(name, value));
    (sandbox, store)
}

/// More steps must not change those that were done.
const CONSTANT: &str = "schedule.kind=constant";

fn start(sandbox: &Sandbox, remote: &str, sets: &[&str]) -> Running {
    let remote = format!("checkpoint.remote={remote}");
    let sets = [remote.as_str(), CONSTANT].into_iter().chain(sets.iter().copied());
    let sets = sets.flat_map(|set| ["--set", set]);
    let args: Vec<&str> = ["run", "config.yaml"].into_iter().chain(sets).collect();
    sandbox.start(&args)
}

fn url(folder: &Path) -> String {
    format!("file://{}", folder.display())
}

/// (step, tiers) of the good checkpoints, as `phalanx checkpoint list` has them.
fn listed(sandbox: &Sandbox) -> Vec<(u64, Vec<String>)> {
    let (stdout, _) = sandbox.expect(0, &["checkpoint", "list", "test", "--json"]);
    let list: Value = serde_json::from_str(&stdout).unwrap();
    let entries = list["checkpoints"].as_array().unwrap().iter();
    let tiers = |entry: &Value| serde_json::from_value(entry["tiers"].clone()).unwrap();
    entries.map(|entry| (entry["step"].as_u64().unwrap(), tiers(entry))).collect()
}

fn steps_of(sandbox: &Sandbox, kind: &str) -> Vec<u64> {
    sandbox.events_of(kind).iter().filter_map(|event| event["step"].as_u64()).collect()
}

/// Continues the run to step 25, which must end as a run to which nothing happened.
fn check_resumes(sandbox: &Sandbox) {
    sandbox.expect(0, &["resume", "test", "--set", "training.steps=25"]);
    sandbox.train("straight", &["training.steps=25", CONSTANT]);
    sandbox.expect(0, &["checkpoint", "diff", "straight", "test"]);
    assert_bit_equal(sandbox, "straight", "test", 25);
    sandbox.assert_nothing_left();
}

fn flip_a_bit(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let at = bytes.len() - 9;
    bytes[at] ^= 4;
    std::fs::write(path, bytes).unwrap();
}

const TENSORS: &str = "rank-00001-000.safetensors";

#[test]
fn a_lost_folder_of_checkpoints_comes_back() {
    let (sandbox, folder) = with_folder();
    start(&sandbox, &url(&folder), &["checkpoint.keep_last=2"]).expect(0);
    let both = || vec!["local".to_owned(), "remote".to_owned()];
    assert_eq!(listed(&sandbox).last(), Some(&(20, both())));
    let copied = steps_of(&sandbox, "checkpoint_copied");
    assert_eq!(copied.last(), Some(&20), "{copied:?}");
    let mut kept: Vec<String> = std::fs::read_dir(folder.join("test"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    kept.sort();
    assert!(kept.len() <= 3 && kept.contains(&"step-0000020.g0001".to_owned()), "{kept:?}");
    assert_eq!(kept[0], "RUN");
    let (status, _) = sandbox.expect(0, &["status", "test"]);
    assert!(status.contains("step 20, in file://"), "{status}");

    std::fs::remove_dir_all(sandbox.run_dir().checkpoints()).unwrap();
    assert_eq!(listed(&sandbox).last(), Some(&(20, vec!["remote".to_owned()])));
    check_resumes(&sandbox);
    assert_eq!(steps_of(&sandbox, "checkpoint_fetched"), [20]);
}

#[test]
fn a_damaged_checkpoint_is_replaced_by_its_copy() {
    let (sandbox, folder) = with_folder();
    start(&sandbox, &url(&folder), &[]).expect(0);
    flip_a_bit(&sandbox.run_dir().checkpoint(20).join(TENSORS));
    sandbox.expect(1, &["checkpoint", "verify", "test"]);
    check_resumes(&sandbox);
    assert_eq!(steps_of(&sandbox, "checkpoint_fetched"), [20]);
    let (verified, _) = sandbox.expect(0, &["checkpoint", "verify", "test"]);
    assert!(!verified.contains("DAMAGED"), "{verified}");
}

#[test]
fn a_damaged_copy_is_passed_over() {
    let (sandbox, folder) = with_folder();
    start(&sandbox, &url(&folder), &[]).expect(0);
    let newest = folder.join("test/step-0000020.g0001");
    flip_a_bit(&newest.join(TENSORS));
    std::fs::remove_dir_all(sandbox.run_dir().checkpoint(20)).unwrap();
    check_resumes(&sandbox);
    let troubles = sandbox.events_of("fetch_failed");
    let reason = troubles[0]["reason"].as_str().unwrap();
    assert!(reason.contains("step 20") && reason.contains("checksum"), "{reason}");
    assert_eq!(sandbox.events_of("generation_started")[1]["resume_step"], 15);
}

#[test]
fn an_unfinished_copy_is_none() {
    let (sandbox, folder) = with_folder();
    start(&sandbox, &url(&folder), &[]).expect(0);
    std::fs::remove_file(folder.join("test/step-0000020.g0001/COMMIT")).unwrap();
    std::fs::remove_dir_all(sandbox.run_dir().checkpoint(20)).unwrap();
    check_resumes(&sandbox);
    assert_eq!(sandbox.events_of("generation_started")[1]["resume_step"], 15);
}

/// A rank is killed and the folder of checkpoints is lost, at one moment: the other ranks are held
/// meanwhile, so that none of them saves.
#[test]
fn a_restarted_generation_goes_on_from_the_copy() {
    let (sandbox, folder) = with_folder();
    let sets = ["training.steps=200", "checkpoint.every_steps=20", "checkpoint.keep_last=2"];
    let running = start(&sandbox, &url(&folder), &sets);
    let status = sandbox.wait_for(|status| status["remote_checkpoint"].as_u64() >= Some(40));
    let ranks = status["ranks"].as_array().unwrap().iter();
    let pids = ranks.map(|rank| u32::try_from(rank["pid"].as_u64().unwrap()).unwrap());
    let pids: Vec<u32> = pids.collect();
    pids.iter().for_each(|pid| signal(*pid, Signal::STOP));
    // What was committed by now may still be on its way there.
    let last = || steps_of(&sandbox, "checkpoint_committed").last().copied();
    sandbox.wait_for(|status| status["remote_checkpoint"].as_u64() >= last());
    let saved = last();
    std::fs::remove_dir_all(sandbox.run_dir().checkpoints()).unwrap();
    pids.iter().for_each(|pid| signal(*pid, Signal::KILL));
    running.expect(0);
    assert_eq!(sandbox.events_of("first_cause").len(), 1);
    let fetched = steps_of(&sandbox, "checkpoint_fetched");
    assert_eq!(fetched.len(), 1);
    assert!(fetched.first() >= saved.as_ref(), "{fetched:?} {saved:?}");
    let started = &sandbox.events_of("generation_started")[1];
    assert_eq!(
        (&started["resume_step"], &started["resume_tier"]),
        (&fetched[0].into(), &"remote".into())
    );
    let (why, _) = sandbox.expect(0, &["why", "test"]);
    let told = format!("generation 2 went on from step {}, out of the object store", fetched[0]);
    assert!(why.contains(&told), "{why}");
    let (status, _) = sandbox.expect(0, &["status", "test"]);
    assert!(status.contains("out of the object store"), "{status}");
    let sets = ["training.steps=200", "checkpoint.every_steps=0", CONSTANT];
    sandbox.train("straight", &sets);
    sandbox.expect(0, &["checkpoint", "diff", "straight", "test"]);
}

/// Whatever a run is told of its object store, it says what is wrong and what may help, from its
/// start on, and trains.
fn check_told(sandbox: &Sandbox, remote: &str, words: &[&str]) {
    let running = start(sandbox, remote, &["checkpoint.every_steps=0"]);
    let status = sandbox.wait_for(|status| status["remote_alarm"].is_string());
    let alarm = status["remote_alarm"].as_str().unwrap();
    for word in words.iter().chain([&remote]) {
        assert!(alarm.contains(word), "{word:?} is not in {alarm:?}");
    }
    assert!(!alarm.contains(|c: char| c.is_control()), "{alarm:?}");
    sandbox.wait_for(|status| status["state"] == "copying" || status["state"] == "finished");
    // Where it waits for a better store.
    running.signal(Signal::TERM);
    running.expect(0);
    assert_eq!(sandbox.events_of("generation_started").len(), 1);
}

#[test]
fn a_bucket_that_is_not_there_is_told_with_a_hint() {
    let (sandbox, _store) = with_store();
    check_told(&sandbox, "s3://nowhere", &["hint: make the bucket, or mend checkpoint.remote"]);
}

#[test]
fn credentials_that_are_not_accepted_are_told_with_a_hint() {
    let (sandbox, store) = with_store();
    store.set(Fault::Forbidden);
    let names = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY";
    check_told(&sandbox, &format!("s3://{BUCKET}"), &["InvalidAccessKeyId", "hint: do ", names]);
    assert!(store.fired() > 0, "the fault must have happened");
}

#[test]
fn an_address_that_nobody_listens_at_is_told_with_a_hint() {
    let (sandbox, _store) = with_store();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let sandbox = sandbox.env("AWS_ENDPOINT_URL", nobody);
    check_told(&sandbox, &format!("s3://{BUCKET}"), &["can this machine reach it"]);
}

#[test]
fn an_address_without_tls_is_told_with_a_hint() {
    let (sandbox, _store) = with_store();
    let sandbox = sandbox.env("AWS_ALLOW_HTTP", "false");
    check_told(&sandbox, &format!("s3://{BUCKET}"), &["AWS_ALLOW_HTTP=true"]);
}

#[test]
fn a_machine_without_certificates_is_told_with_a_hint() {
    let (sandbox, _store) = with_store();
    let nowhere = sandbox.path().join("nowhere");
    let sandbox = sandbox.env("SSL_CERT_FILE", nowhere.display());
    let sandbox = sandbox.env("SSL_CERT_DIR", nowhere.display());
    check_told(&sandbox, &format!("s3://{BUCKET}"), &["No CA certificates", "SSL_CERT_FILE"]);
}

#[test]
fn another_runs_folder_is_refused_and_the_run_goes_on() {
    let (sandbox, folder) = with_folder();
    start(&sandbox, &url(&folder), &[]).expect(0);
    std::fs::rename(sandbox.path().join("runs/test"), sandbox.path().join("runs/first")).unwrap();
    let (_, stderr) = start(&sandbox, &url(&folder), &[]).expect(0);
    assert!(stderr.contains("holds the checkpoints of another run"), "{stderr}");
    assert!(steps_of(&sandbox, "checkpoint_copied").is_empty());
    let (status, _) = sandbox.expect(0, &["status", "test"]);
    assert!(status.contains("ALARM") && status.contains("another run"), "{status}");
    assert!(listed(&sandbox).iter().all(|(_, tiers)| *tiers == ["local"]));
}

#[test]
fn a_bucket_holds_what_the_disk_does() {
    let (sandbox, store) = with_store();
    start(&sandbox, &format!("s3://{BUCKET}/some/where"), &["checkpoint.keep_last=2"]).expect(0);
    let keys = store.keys();
    assert!(keys.contains(&"some/where/test/step-0000020.g0001/COMMIT".to_owned()), "{keys:?}");
    let commits = keys.iter().filter(|key| key.ends_with("/COMMIT")).count();
    assert!((1..=2).contains(&commits), "{keys:?}");
    std::fs::remove_dir_all(sandbox.run_dir().checkpoints()).unwrap();
    check_resumes(&sandbox);
    assert_eq!(steps_of(&sandbox, "checkpoint_fetched"), [20]);
}

/// A fault from the first request on: training comes to its end all the same, within the time the
/// alarm is there, and once the store works again the newest checkpoint is copied.
fn check_fault(fault: Fault) {
    let (sandbox, store) = with_store();
    store.set(fault);
    let began = Instant::now();
    let sets = ["training.steps=60", "checkpoint.every_steps=10"];
    let running = start(&sandbox, &format!("s3://{BUCKET}"), &sets);
    let status = sandbox.wait_for(|status| status["remote_alarm"].is_string());
    assert!(began.elapsed() < ALARM_BY, "{:?}", began.elapsed());
    assert!(store.fired() > 0, "the fault must have happened");
    let alarm = status["remote_alarm"].as_str().unwrap().to_owned();
    let status = sandbox.wait_for_step(60);
    assert_eq!(status["restarts"], 0, "{status}");
    let (told, _) = sandbox.expect(0, &["status", "test"]);
    assert!(told.contains("ALARM       copying to the object store fails: "), "{told}");
    assert!(told.contains(&alarm) && alarm.contains("s3://"), "{alarm}\n{told}");
    assert!(steps_of(&sandbox, "checkpoint_copied").is_empty());
    store.set(Fault::None);
    running.expect(0);
    assert_eq!(steps_of(&sandbox, "checkpoint_copied"), [60]);
    assert!(!sandbox.events_of("copy_failed").is_empty());
    assert_eq!(sandbox.events_of("generation_started").len(), 1);
    assert!(store.keys().contains(&"test/step-0000060.g0001/COMMIT".to_owned()));
    let status = sandbox.wait_for(|status| status["state"] == "finished");
    assert!(status["remote_alarm"].is_null(), "{status}");
}

#[test]
fn a_bucket_that_answers_503_is_told_of_and_tried_again() {
    check_fault(Fault::Unavailable);
}

#[test]
fn a_bucket_that_does_not_answer_is_told_of_and_tried_again() {
    check_fault(Fault::Hang);
}

#[test]
fn a_bucket_that_is_slow_is_waited_for_by_nobody_but_the_end() {
    let (sandbox, store) = with_store();
    store.set(Fault::Slow(Duration::from_millis(500)));
    start(&sandbox, &format!("s3://{BUCKET}"), &[]).expect(0);
    assert!(store.fired() > 0, "the fault must have happened");
    assert!(sandbox.events_of("copy_failed").is_empty());
    assert_eq!(steps_of(&sandbox, "checkpoint_copied").last(), Some(&20));
    let saved = sandbox.events_of("checkpoint_committed");
    assert_eq!(saved.len(), 4);
}

/// A rank is killed while a copy of what its generation saved is on its way: the copy gets there,
/// and so do those of the next generation.
#[test]
fn a_restart_while_a_copy_runs_costs_neither() {
    let (sandbox, store) = with_store();
    store.set(Fault::Slow(Duration::from_millis(400)));
    let sets = ["training.steps=60", "checkpoint.keep_last=1"];
    let running = start(&sandbox, &format!("s3://{BUCKET}"), &sets);
    let status = sandbox.wait_for(|status| status["last_checkpoint"].as_u64() >= Some(5));
    let pid = status["ranks"][1]["pid"].as_u64().unwrap();
    signal(u32::try_from(pid).unwrap(), Signal::KILL);
    running.expect(0);
    assert!(store.fired() > 0, "the fault must have happened");
    assert_eq!(sandbox.events_of("first_cause").len(), 1, "the rank must have been killed");
    assert!(sandbox.events_of("copy_failed").is_empty(), "{:?}", sandbox.events_of("copy_failed"));
    let copied = sandbox.events_of("checkpoint_copied");
    let last = copied.last().unwrap();
    assert_eq!((&last["step"], &last["written_by"]), (&60.into(), &2.into()));
    std::fs::remove_dir_all(sandbox.run_dir().checkpoints()).unwrap();
    store.set(Fault::None);
    sandbox.expect(0, &["resume", "test", "--set", "training.steps=65"]);
    assert_eq!(steps_of(&sandbox, "checkpoint_fetched"), [60]);
}

/// The launcher is killed in the middle of a copy: what is there of it is none, and the next
/// launcher finishes it.
#[test]
fn half_a_copy_of_a_launcher_that_died_is_finished_by_the_next() {
    let (sandbox, store) = with_store();
    store.set(Fault::Slow(Duration::from_secs(2)));
    let running = start(&sandbox, &format!("s3://{BUCKET}"), &["checkpoint.every_steps=0"]);
    let deadline = Instant::now() + ALARM_BY;
    // The owner, and two files.
    while store.fired() < 3 {
        assert!(Instant::now() < deadline, "the fault must have happened");
        std::thread::sleep(Duration::from_millis(10));
    }
    running.signal(Signal::KILL);
    running.wait();
    store.set(Fault::None);
    let is_complete = |key: &String| key.ends_with("/COMMIT");
    assert!(!store.keys().iter().any(is_complete), "{:?}", store.keys());
    sandbox.expect(0, &["resume", "test", "--set", "training.steps=25"]);
    let copied = steps_of(&sandbox, "checkpoint_copied");
    assert_eq!(copied.last(), Some(&25), "{copied:?}");
}

#[test]
fn a_signal_ends_the_wait_for_a_bucket() {
    let (sandbox, store) = with_store();
    store.set(Fault::Unavailable);
    let running = start(&sandbox, &format!("s3://{BUCKET}"), &[]);
    sandbox.wait_for(|status| status["state"] == "copying");
    running.signal(Signal::INT);
    running.expect(0);
    assert!(store.fired() > 0, "the fault must have happened");
    assert!(steps_of(&sandbox, "checkpoint_copied").is_empty());
}

#[test]
fn a_bucket_that_cannot_be_read_leaves_what_is_here() {
    let (sandbox, store) = with_store();
    start(&sandbox, &format!("s3://{BUCKET}"), &[]).expect(0);
    std::fs::remove_dir_all(sandbox.run_dir().checkpoint(20)).unwrap();
    store.set(Fault::UnavailableForAll);
    let running = sandbox.start(&["resume", "test", "--set", "training.steps=25"]);
    sandbox.wait_for(|status| status["step"] == 25);
    assert!(store.fired() > 0, "the fault must have happened");
    store.set(Fault::None);
    running.expect(0);
    assert!(!sandbox.events_of("fetch_failed").is_empty());
    assert_eq!(sandbox.events_of("generation_started")[1]["resume_step"], 15);
}
