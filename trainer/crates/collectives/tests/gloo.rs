//! The conformance suite on processes: this test binary starts itself once a rank.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use collectives::{
    CommError, Communicator, Group, GroupOptions, Whereabouts, Work, conformance, gloo,
};
use common::Files;
use torch_shim::gloo::{Store, StoreBackend};
use torch_shim::tch::{Device, Kind, Tensor};

const RANK: &str = "CONFORMANCE_RANK";
const SIZE: &str = "CONFORMANCE_SIZE";
const FOLDER: &str = "CONFORMANCE_STORE";
const CASE: &str = "CONFORMANCE_CASE";
/// Longest wait for one message, where a test waits for it to pass.
const TIMEOUT: Duration = Duration::from_millis(1500);

/// What a child process runs; without the environment of one, nothing.
#[test]
fn rank() {
    let variable = |name: &str| std::env::var(name).ok();
    let Some(rank) = variable(RANK) else { return };
    let (rank, size): (usize, usize) =
        (rank.parse().unwrap(), variable(SIZE).unwrap().parse().unwrap());
    let store =
        Store::new(Box::new(Files(variable(FOLDER).unwrap().into())) as Box<dyn StoreBackend>);
    let whereabouts = Whereabouts::new(&store, 1, rank).unwrap();
    let connect = |options: &GroupOptions| -> Result<Group, CommError> {
        let group = gloo::connect(&store, rank, size, "127.0.0.1", options)?;
        Ok(group.among(&whereabouts))
    };
    match variable(CASE).unwrap().as_str() {
        "all" => conformance::test_all(&connect).unwrap(),
        "elsewhere" => conformance::test_elsewhere(&connect).unwrap(),
        "untaken" => untaken(&connect),
        "death" => {
            let comm = connect(&GroupOptions::new("death", 1)).unwrap();
            conformance::test_death(comm, |_| std::process::abort()).unwrap();
        }
        "death-in-messages" => {
            let comm = connect(&GroupOptions::new("death", 1)).unwrap();
            conformance::test_death_in_messages(comm, |_| std::process::abort()).unwrap();
        }
        "stall" => {
            let options = GroupOptions { timeout: TIMEOUT, ..GroupOptions::new("stall", 1) };
            let comm = connect(&options).unwrap();
            conformance::test_stall(&comm, TIMEOUT, || common::stop_for(4)).unwrap();
        }
        "abort" => {
            let comm = connect(&GroupOptions::new("abort", 1)).unwrap();
            conformance::test_abort(&comm).unwrap();
            std::thread::sleep(Duration::from_millis(300));
        }
        case => panic!("no case {case}"),
    }
}

/// Rank 0 waits for a message to be taken, which Gloo's senders do; rank 1 waits for rank 0 in
/// another group.
fn untaken(connect: &conformance::Connect<'_>) {
    let [messages, barriers] =
        ["messages", "barriers"].map(|name| connect(&GroupOptions::new(name, 1)).unwrap());
    let (start, tensor) = (Instant::now(), Tensor::ones([4], (Kind::Float, Device::Cpu)));
    let outcome = match messages.rank() {
        0 => messages.send(&tensor, 1, 3).and_then(Work::wait),
        _ => barriers.barrier().and_then(Work::wait),
    };
    let text = outcome.unwrap_err().to_string();
    let waits = "rank 0 waits in the send of message 0 with tag 3 to rank 1 of group messages";
    assert!(text.contains(waits) && text.contains("(barrier) of group barriers"), "{text}");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
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
fn ranks_that_wait_for_each_other_in_two_groups_are_told() {
    assert_eq!(run("elsewhere", 3), [true; 3]);
    assert_eq!(run("untaken", 2), [true; 2]);
}

#[test]
fn a_dead_process_is_an_error_in_every_survivor() {
    assert_eq!(run("death", 4), [true, true, true, false]);
    assert_eq!(run("death-in-messages", 4), [true, true, true, false]);
}

#[test]
fn a_stopped_process_is_a_time_out_in_every_other() {
    assert_eq!(run("stall", 4), [true; 4]);
}

#[test]
fn an_abort_ends_every_wait() {
    assert_eq!(run("abort", 3), [true; 3]);
}
