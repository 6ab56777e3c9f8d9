//! The conformance suite on processes: this test binary starts itself once a rank.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use collectives::{CommError, Group, GroupOptions, conformance, gloo};
use common::Files;
use torch_shim::gloo::{Store, StoreBackend};

const RANK: &str = "CONFORMANCE_RANK";
const SIZE: &str = "CONFORMANCE_SIZE";
const FOLDER: &str = "CONFORMANCE_STORE";
const CASE: &str = "CONFORMANCE_CASE";

/// What a child process runs; without the environment of one, nothing.
#[test]
fn rank() {
    let variable = |name: &str| std::env::var(name).ok();
    let Some(rank) = variable(RANK) else { return };
    let (rank, size): (usize, usize) =
        (rank.parse().unwrap(), variable(SIZE).unwrap().parse().unwrap());
    let store =
        Store::new(Box::new(Files(variable(FOLDER).unwrap().into())) as Box<dyn StoreBackend>);
    let connect = |options: &GroupOptions| -> Result<Group, CommError> {
        gloo::connect(&store, rank, size, "127.0.0.1", options)
    };
    match variable(CASE).unwrap().as_str() {
        "all" => conformance::test_all(&connect).unwrap(),
        "death" => {
            let comm = connect(&GroupOptions::new("death", 1)).unwrap();
            conformance::test_death(comm, |_| std::process::abort()).unwrap();
        }
        "abort" => {
            let comm = connect(&GroupOptions::new("abort", 1)).unwrap();
            conformance::test_abort(&comm).unwrap();
            std::thread::sleep(Duration::from_millis(300));
        }
        case => panic!("no case {case}"),
    }
}

/// Runs a case on `size` processes; returns which of them succeeded.
fn run(case: &str, size: usize) -> Vec<bool> {
    let folder =
        std::env::temp_dir().join(format!("conformance-{}-{case}-{size}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let start = |rank: usize| -> Child {
        Command::new(std::env::current_exe().unwrap())
            .args(["rank", "--exact", "--nocapture"])
            .env(RANK, rank.to_string())
            .env(SIZE, size.to_string())
            .env(FOLDER, &folder)
            .env(CASE, case)
            .env("OMP_NUM_THREADS", "1")
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut children: Vec<Child> = (0..size).map(start).collect();
    let end = Instant::now() + Duration::from_secs(120);
    let succeeded = children
        .iter_mut()
        .map(|child| {
            loop {
                if let Some(status) = child.try_wait().unwrap() {
                    break status.success();
                }
                if Instant::now() > end {
                    child.kill().unwrap();
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        })
        .collect();
    std::fs::remove_dir_all(&folder).unwrap();
    succeeded
}

#[test]
fn processes_pass_the_suite() {
    for size in [2, 3] {
        assert_eq!(run("all", size), vec![true; size]);
    }
}

#[test]
fn a_dead_process_is_an_error_in_every_survivor() {
    assert_eq!(run("death", 4), [true, true, true, false]);
}

#[test]
fn an_abort_ends_every_wait() {
    assert_eq!(run("abort", 3), [true; 3]);
}
