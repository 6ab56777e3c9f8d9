//! The conformance suite over NCCL, a process a rank. It needs a GPU, so that the tests are ignored
//! where nobody asks for them; `ops/gpu-check` does.
//!
//! Several ranks share one GPU, which NCCL 2.30 and later allow with
//! `NCCL_MULTI_RANK_GPU_ENABLE=1`. `PHALANX_NCCL` names the library.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::process::{Child, Command};
use std::time::{Duration, Instant};

use collectives::{
    CommError, Communicator, Group, GroupOptions, ReduceOp, Whereabouts, Work, conformance, nccl,
};
use common::Files;
use nccl_rs::{Nccl, Search};
use torch_shim::cuda;
use torch_shim::gloo::{Store, StoreBackend};
use torch_shim::tch::{Device, Kind, Tensor};

const RANK: &str = "CONFORMANCE_RANK";
const SIZE: &str = "CONFORMANCE_SIZE";
const FOLDER: &str = "CONFORMANCE_STORE";
const CASE: &str = "CONFORMANCE_CASE";
const NCCL: &str = "PHALANX_NCCL";

/// What a child process runs; without the environment of one, nothing.
#[test]
fn rank() {
    let variable = |name: &str| std::env::var(name).ok();
    let Some(rank) = variable(RANK) else { return };
    let (rank, size): (usize, usize) =
        (rank.parse().unwrap(), variable(SIZE).unwrap().parse().unwrap());
    cuda::load().unwrap();
    let num_gpus = cuda::start().unwrap();
    let device = rank % num_gpus;
    cuda::set_device(device).unwrap();
    let search = Search { path: variable(NCCL).map(Into::into), ..Search::default() };
    let nccl = Nccl::load(&search).unwrap();
    println!("{nccl:?}, GPU {device} of {num_gpus}");
    let store =
        Store::new(Box::new(Files(variable(FOLDER).unwrap().into())) as Box<dyn StoreBackend>);
    let whereabouts = Whereabouts::new(&store, 1, rank).unwrap();
    let connect = |options: &GroupOptions| -> Result<Group, CommError> {
        let group = nccl::connect(&nccl, device, &store, (rank, size), options)?;
        Ok(group.among(&whereabouts))
    };
    match variable(CASE).unwrap().as_str() {
        "all" => conformance::test_all(&connect).unwrap(),
        "elsewhere" => conformance::test_elsewhere(&connect).unwrap(),
        "absent" => absent(&connect),
        "abort" => ended(&connect, &store, || std::thread::sleep(Duration::from_secs(4))),
        "death" => ended(&connect, &store, || std::process::abort()),
        case => panic!("no case {case}"),
    }
}

/// A rank that does not come is a time-out on the others, whose streams go on.
fn absent(connect: &conformance::Connect<'_>) {
    let mut options = GroupOptions::new("absent", 1);
    options.timeout = Duration::from_secs(2);
    let comm = connect(&options).unwrap();
    let tensor = Tensor::ones([1 << 16], (Kind::Float, comm.device()));
    for _round in 0..3 {
        comm.all_reduce(&tensor, ReduceOp::Sum).unwrap().wait().unwrap();
    }
    if comm.rank() + 1 == comm.size() {
        let _ = tensor.to_device(Device::Cpu);
        std::thread::sleep(Duration::from_secs(6));
        return;
    }
    let start = Instant::now();
    comm.all_reduce(&tensor, ReduceOp::Sum).unwrap().wait().unwrap();
    // The host waits here, until the abort has ended NCCL's kernel.
    let _ = tensor.to_device(Device::Cpu);
    let error = comm.alive().unwrap_err().to_string();
    assert!(error.contains("has not ended 2000 ms"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

/// The last rank does not come any more, or dies. NCCL tells nobody: the others are told from
/// outside, as an agent does, and abort, which ends NCCL's kernel and the host's wait for it within
/// a second.
fn ended(connect: &conformance::Connect<'_>, store: &Store, end: impl FnOnce()) {
    let comm = connect(&GroupOptions::new("ended", 1)).unwrap();
    let tensor = Tensor::ones([1 << 16], (Kind::Float, comm.device()));
    for _round in 0..3 {
        comm.all_reduce(&tensor, ReduceOp::Sum).unwrap().wait().unwrap();
    }
    let _ = tensor.to_device(Device::Cpu);
    if comm.rank() + 1 == comm.size() {
        store.set("ended", b"").unwrap();
        end();
        return;
    }
    let told = std::thread::scope(|scope| {
        let agent = scope.spawn(|| {
            store.get("ended", Duration::from_secs(60)).unwrap();
            std::thread::sleep(Duration::from_millis(100));
            let told = Instant::now();
            comm.abort();
            told
        });
        let outcome = comm.all_reduce(&tensor, ReduceOp::Sum).and_then(Work::wait);
        eprintln!("the operation, as far as the host knows: {outcome:?}");
        let _ = tensor.to_device(Device::Cpu);
        agent.join().unwrap()
    });
    assert!(told.elapsed() < Duration::from_secs(1), "{:?}", told.elapsed());
    let error = comm.alive().unwrap_err().to_string();
    assert!(error.contains("aborted on request"), "{error}");
}

/// Runs a case on `size` processes, all of which must succeed.
fn run(case: &str, size: usize) {
    assert_eq!(outcomes(case, size), vec![true; size], "{case}");
}

/// Runs a case on `size` processes; which of them succeeded.
fn outcomes(case: &str, size: usize) -> Vec<bool> {
    let folder = std::env::temp_dir().join(format!("nccl-{}-{case}-{size}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let start = |rank: usize| -> Child {
        Command::new(std::env::current_exe().unwrap())
            .args(["rank", "--exact", "--nocapture"])
            .env(RANK, rank.to_string())
            .env(SIZE, size.to_string())
            .env(FOLDER, &folder)
            .env(CASE, case)
            .env("CUDA_DEVICE_MAX_CONNECTIONS", "32")
            .spawn()
            .unwrap()
    };
    let mut children: Vec<Child> = (0..size).map(start).collect();
    let end = Instant::now() + Duration::from_secs(90);
    let mut succeeded = Vec::new();
    for child in &mut children {
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > end {
                child.kill().unwrap();
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        succeeded.push(status.success());
    }
    std::fs::remove_dir_all(&folder).unwrap();
    succeeded
}

#[test]
#[ignore = "needs a GPU: ops/gpu-check"]
fn one_rank() {
    run("all", 1);
}

#[test]
#[ignore = "needs two GPUs, or one to share: ops/gpu-check"]
fn two_ranks() {
    run("all", 2);
}

#[test]
#[ignore = "needs four GPUs, or one to share: ops/gpu-check"]
fn four_ranks() {
    run("all", 4);
}

#[test]
#[ignore = "needs two GPUs, or one to share: ops/gpu-check"]
fn an_absent_rank() {
    run("absent", 2);
}

#[test]
#[ignore = "needs two GPUs, or one to share: ops/gpu-check"]
fn ranks_in_two_groups() {
    run("elsewhere", 2);
}

#[test]
#[ignore = "needs two GPUs, or one to share: ops/gpu-check"]
fn an_abort() {
    run("abort", 2);
}

#[test]
#[ignore = "needs two GPUs, or one to share: ops/gpu-check"]
fn a_dead_rank() {
    assert_eq!(outcomes("death", 2), [true, false]);
}
