//! The conformance suite under `mpirun`, which starts this test binary once a rank.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant, SystemTime};

use collectives::mpi::Mpi;
use collectives::{
    CommError, Communicator, Group, GroupOptions, ReduceOp, Whereabouts, Work, conformance,
};
use common::Files;
use torch_shim::gloo::{Store, StoreBackend};
use torch_shim::tch::{Device, Kind, Tensor};

const FOLDER: &str = "CONFORMANCE_STORE";
const CASE: &str = "CONFORMANCE_CASE";
/// Longest wait for one message, where a test waits for it to pass.
const TIMEOUT: Duration = Duration::from_millis(1500);
/// The longest from a process's death to the end of all others.
const DEATH: Duration = Duration::from_secs(1);

/// What a process under `mpirun` runs; without the environment of one, nothing.
#[test]
fn rank() {
    let variable = |name: &str| std::env::var(name).ok();
    let (Some(case), Some(folder)) = (variable(CASE), variable(FOLDER)) else { return };
    let folder = PathBuf::from(folder);
    let store = Store::new(Box::new(Files(folder.clone())) as Box<dyn StoreBackend>);
    let mpi = Mpi::start().unwrap();
    let (rank, size) = (mpi.process(), mpi.size());
    let whereabouts = Whereabouts::new(&store, 1, rank).unwrap();
    let connect = |options: &GroupOptions| -> Result<Group, CommError> {
        Ok(mpi.connect(&store, rank, size, options)?.among(&whereabouts))
    };
    let group = |timeout: Duration| {
        let options = GroupOptions::new(&case, 1);
        connect(&GroupOptions { timeout, ..options }).unwrap()
    };
    match case.as_str() {
        "all" => conformance::test_all(&connect).unwrap(),
        "death" => {
            std::fs::write(folder.join(format!("pid-{rank}")), std::process::id().to_string())
                .unwrap();
            conformance::test_death(group(Duration::from_secs(60)), |_| {
                std::fs::write(folder.join("died"), "").unwrap();
                std::process::abort()
            })
            .unwrap();
            // Nothing but MPI itself ends a survivor.
            std::thread::sleep(Duration::from_secs(30));
        }
        "abort" => conformance::test_abort(&group(Duration::from_secs(60))).unwrap(),
        "leave-early" => leaves_early(&group(Duration::from_secs(60))),
        "elsewhere" => conformance::test_elsewhere(&connect).unwrap(),
        "stall" => {
            let comm = group(TIMEOUT);
            conformance::test_stall(&comm, TIMEOUT, || common::stop_for(4)).unwrap();
        }
        "subgroups" => subgroups(&mpi, &store),
        case => panic!("no case {case}"),
    }
    mpi.leave().unwrap();
}

fn ones(count: i64) -> Tensor {
    Tensor::ones([count], (Kind::Float, Device::Cpu))
}

/// The last rank drops its group; what it sent before still arrives, and what it did not ends in
/// an error.
fn leaves_early(comm: &Group) {
    let (tensor, last) = (ones(200_000), comm.size() - 1);
    if comm.rank() == last {
        let works: Vec<Work> = (0..last).map(|peer| comm.send(&tensor, peer, 3).unwrap()).collect();
        works.into_iter().for_each(|work| work.wait().unwrap());
        return;
    }
    std::thread::sleep(Duration::from_millis(300));
    let received = tensor.zeros_like();
    comm.recv(&received, last, 3).unwrap().wait().unwrap();
    assert_eq!(received, tensor);
    let start = Instant::now();
    let outcome = comm.recv(&received, last, 3).and_then(Work::wait);
    let text = outcome.unwrap_err().to_string();
    assert!(text.contains(&format!("lost rank {last}: it left the group")), "{text}");
    assert!(start.elapsed() < Duration::from_secs(1));
}

/// Groups of some of the processes, made in different orders, with the same tags at once.
fn subgroups(mpi: &Mpi, store: &Store) {
    let own = mpi.process();
    let join = |name: &str, members: &[usize]| {
        let rank = members.iter().position(|&member| member == own).unwrap();
        mpi.connect(store, rank, members.len(), &GroupOptions::new(name, 1)).unwrap()
    };
    // A row and a column of a square, named from last to first by half of the processes.
    let (row, column) = ([own / 2 * 2, own / 2 * 2 + 1], [own % 2, own % 2 + 2]);
    let (row_name, column_name) = (format!("row-{}", own / 2), format!("column-{}", own % 2));
    let rows = join(&row_name, &row);
    let columns = join(&column_name, &column);
    let (in_row, in_column) = (ones(50_000) * own as f64, ones(50_000) * own as f64);
    let works = if own == 1 {
        let second = columns.all_reduce(&in_column, ReduceOp::Sum).unwrap();
        [rows.all_reduce(&in_row, ReduceOp::Sum).unwrap(), second]
    } else {
        let first = rows.all_reduce(&in_row, ReduceOp::Sum).unwrap();
        [first, columns.all_reduce(&in_column, ReduceOp::Sum).unwrap()]
    };
    works.into_iter().for_each(|work| work.wait().unwrap());
    assert_eq!(in_row, ones(50_000) * (row[0] + row[1]) as f64);
    assert_eq!(in_column, ones(50_000) * (column[0] + column[1]) as f64);
}

/// A folder for a case, removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(case: &str, size: usize) -> Self {
        let name = format!("mpi-conformance-{}-{case}-{size}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        Folder(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs a case on `size` processes; `mpirun`'s status, and when it ended.
fn run(case: &str, size: usize, folder: &Path) -> (ExitStatus, SystemTime) {
    let mut mpirun = Command::new("mpirun")
        .args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"])
        // As the launcher does: no second between SIGTERM and SIGKILL.
        .args(["--mca", "odls_base_sigkill_timeout", "0", "-np"])
        .arg(size.to_string())
        .arg(std::env::current_exe().unwrap())
        .args(["rank", "--exact", "--nocapture"])
        .env(FOLDER, folder)
        .env(CASE, case)
        .env("OMP_NUM_THREADS", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let end = Instant::now() + Duration::from_secs(120);
    loop {
        if let Some(status) = mpirun.try_wait().unwrap() {
            return (status, SystemTime::now());
        }
        if Instant::now() > end {
            // This signal lets it end the ranks too.
            Command::new("kill").args(["-TERM", &mpirun.id().to_string()]).status().unwrap();
            mpirun.wait().unwrap();
            panic!("{case} on {size} processes did not end");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn passes(case: &str, size: usize) {
    let folder = Folder::new(case, size);
    let (status, _) = run(case, size, &folder.0);
    assert!(status.success(), "{case} on {size} processes: {status}");
}

#[test]
fn processes_pass_the_suite() {
    for size in [1, 2, 3, 4] {
        passes("all", size);
    }
}

#[test]
fn ranks_that_wait_for_each_other_in_two_groups_are_told() {
    passes("elsewhere", 3);
}

#[test]
fn an_abort_ends_every_wait() {
    passes("abort", 3);
}

#[test]
fn a_stopped_process_is_a_time_out() {
    passes("stall", 4);
}

#[test]
fn what_was_sent_before_leaving_arrives() {
    passes("leave-early", 4);
}

#[test]
fn groups_of_some_processes_do_not_disturb_each_other() {
    passes("subgroups", 4);
}

/// MPI's own way: a process that dies takes the whole job down, at once.
#[test]
fn a_dead_process_ends_the_job() {
    let folder = Folder::new("death", 4);
    let (status, ended) = run("death", 4, &folder.0);
    let died = folder.0.join("died").metadata().unwrap().modified().unwrap();
    let elapsed = ended.duration_since(died).unwrap();
    eprintln!("mpirun: {status}, {} ms after the death", elapsed.as_millis());
    assert_eq!(status.code(), Some(128 + 6), "that of the process that died");
    assert!(elapsed < DEATH, "{elapsed:?}");
    for rank in 0..4 {
        let pid = std::fs::read_to_string(folder.0.join(format!("pid-{rank}"))).unwrap();
        // One whose parent is gone may wait for another to take note of its end.
        let is_there = || {
            let stat = std::fs::read_to_string(Path::new("/proc").join(&pid).join("stat"));
            stat.is_ok_and(|stat| !stat.contains(") Z "))
        };
        // Killed they all are by now; to give its memory back may take one a moment.
        while is_there() {
            assert!(died.elapsed().unwrap() < DEATH, "rank {rank} is still there");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
