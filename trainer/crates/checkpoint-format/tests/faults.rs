//! Real processes that die, or whose disk fails, at every step of a save: the newest committed
//! checkpoint always loads whole.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use checkpoint_format::failpoint::{self, VARIABLE};
use checkpoint_format::scan::newest_verified;
use checkpoint_format::{Checkpoint, FormatError};
use common::{How, assert_holds, entries, save_all, tensors};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

/// Tells the test below that it runs as the child that saves, and where.
const FOLDER: &str = "CHECKPOINT_TEST_FOLDER";
const KEEP: &str = "CHECKPOINT_TEST_KEEP";

/// Run by the other tests in a process of its own: saves step 2, over two ranks.
#[test]
fn child_saves_step_2() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    let keep_last = std::env::var(KEEP).unwrap().parse().unwrap();
    let how = How { generation: 2, world_size: 2, keep_last, max_file_bytes: 2 << 20 };
    let results = save_all(Path::new(&folder), 2, &tensors(2), &how);
    for result in &results {
        println!("RESULT {}", result.as_ref().map_or_else(|e| e.to_string(), |_| "saved".into()));
    }
}

/// Runs the child with a fault armed; what it printed, and whether it aborted.
fn run_child(folder: &Path, fault: &str, fired: &Path) -> (String, bool) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_saves_step_2", "--nocapture", "--test-threads=1"])
        .env(FOLDER, folder)
        .env(KEEP, "1")
        .env(VARIABLE, format!("{fault}@{}", fired.display()))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    (text, output.status.signal() == Some(6))
}

fn with_step_1() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let checkpoints = folder.path().join("checkpoints");
    save_all(&checkpoints, 1, &tensors(1), &How::default()).remove(0).unwrap();
    folder
}

#[track_caller]
fn assert_newest_is_whole(checkpoints: &Path, context: &str) -> u64 {
    let newest = newest_verified(checkpoints).unwrap();
    assert_eq!(newest.passed_over, [], "{context}");
    let found = newest.found.unwrap();
    assert_holds(&Checkpoint::open(&found.path).unwrap(), &tensors(found.step));
    found.step
}

#[test]
fn a_process_that_dies_at_any_point_leaves_a_good_checkpoint() {
    for point in failpoint::ALL {
        // The second and third write or fsync of a kind, where there is one, too.
        for count in 1..=3 {
            let folder = with_step_1();
            let checkpoints = folder.path().join("checkpoints");
            let fired = folder.path().join("fired");
            let context = format!("{point}:{count}");
            let (text, aborted) = run_child(&checkpoints, &context, &fired);
            assert_eq!(aborted, fired.exists(), "{context}: {text}");
            assert!(aborted || count > 1, "{context} was never reached: {text}");
            let step = assert_newest_is_whole(&checkpoints, &context);
            let committed = ["fsync_parent", "retire_rename", "retire_remove"].contains(point);
            assert_eq!(step, if committed || !aborted { 2 } else { 1 }, "{context}");
            // The next generation saves over what is left, and leaves nothing of it.
            let how = How { generation: 3, world_size: 2, keep_last: 1, ..How::default() };
            for result in save_all(&checkpoints, 3, &tensors(3), &how) {
                result.unwrap();
            }
            assert_eq!(assert_newest_is_whole(&checkpoints, &context), 3);
            let left = entries(&checkpoints);
            assert_eq!(left, [".generation", ".lock", "step-0000003"], "{context}");
        }
    }
}

#[test]
fn a_full_or_failing_disk_is_an_error_on_every_rank_and_loses_nothing() {
    let until_commit = failpoint::ALL.iter().position(|p| *p == failpoint::RENAME_STEP).unwrap();
    for point in &failpoint::ALL[..=until_commit] {
        for error in ["enospc", "eio"] {
            let folder = with_step_1();
            let checkpoints = folder.path().join("checkpoints");
            let fired = folder.path().join("fired");
            let context = format!("{point}={error}");
            let (text, aborted) = run_child(&checkpoints, &context, &fired);
            assert!(!aborted && fired.exists(), "{context}: {text}");
            let results: Vec<&str> =
                text.lines().filter_map(|line| line.split_once("RESULT ")).map(|r| r.1).collect();
            assert_eq!(results.len(), 2, "{context}: {text}");
            let code = if error == "enospc" { "os error 28" } else { "os error 5" };
            assert!(results.iter().any(|r| r.contains(code)), "{context}: {results:?}");
            assert!(results.iter().all(|r| *r != "saved"), "{context}: {results:?}");
            assert_eq!(assert_newest_is_whole(&checkpoints, &context), 1);
            assert_eq!(
                entries(&checkpoints),
                [".generation", ".lock", "step-0000001"],
                "{context}"
            );
        }
    }
}

#[test]
fn too_little_room_is_said_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let save = checkpoint_format::Save::new(folder.path(), 1, 1);
    let error = save.begin(u64::MAX).unwrap_err();
    assert!(
        matches!(error, FormatError::NoSpace { needed: u64::MAX, .. }) && error.is_out_of_space()
    );
    assert!(error.to_string().contains("lower checkpoint.keep_last"), "{error}");
    assert_eq!(entries(folder.path()), [".generation", ".lock"]);
}

#[test]
fn a_barrier_that_fails_ends_the_save_and_leaves_nothing() {
    for failing in 1..=2 {
        let folder = with_step_1();
        let checkpoints = folder.path().join("checkpoints");
        let set = tensors(2);
        let state = checkpoint_format::TrainState::at(2);
        let joint = checkpoint_format::JointSave {
            save: checkpoint_format::Save::new(&checkpoints, 2, 1),
            rank: 0,
            world_size: 1,
            total_bytes: 0,
            pieces: common::pieces(&set, 0, 1),
            state: &state,
            keep_last: 1,
            keep_every_steps: 0,
        };
        let mut calls = 0;
        let result = joint.run(&mut || {
            calls += 1;
            if calls == failing { Err("rank 1 is gone".to_string()) } else { Ok(()) }
        });
        assert!(result.unwrap_err().to_string().contains("rank 1 is gone"));
        assert_eq!(entries(&checkpoints), [".generation", ".lock", "step-0000001"]);
    }
}
