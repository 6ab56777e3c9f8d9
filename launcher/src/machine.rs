//! What depends on this machine: cores, GPUs, the trainer's binary, and libtorch.

use crate::error::UserError;
use crate::supervisor::mpirun::MPIRUN;
use rank_protocol::{env, gpus, libtorch};
use run_config::{ClusterKind, DeviceKind, Loaded, RunConfig};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Longest time that a program may take to answer a question: python3 where its torch is, say.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// The part of libtorch that computes on GPUs.
const CUDA_PART: &str = "libtorch_cuda.so";

/// Prints torch's folder without importing it, which would take seconds.
const FIND_TORCH: &str = "import importlib.util as u; s = u.find_spec('torch'); \
                          print(s.submodule_search_locations[0] if s else '')";

/// Who starts the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Starter {
    /// This process.
    Launcher,
    /// An agent on each node, of which this machine may be none.
    Agents,
    /// An agent on each node, the first of which is this machine.
    FirstNode,
}

impl Starter {
    /// Whether ranks are started on this machine.
    pub fn is_here(self) -> bool {
        self != Starter::Agents
    }
}

/// A config with every `auto` of this machine resolved.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The config and its notes.
    pub loaded: Loaded,
    /// Ranks to start, on all nodes.
    pub world_size: usize,
    /// CPU threads of each.
    pub threads: usize,
    /// Whether these are what `auto` came to.
    pub has_auto_threads: bool,
}

/// Cores that this process may use.
pub fn num_cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// GPUs that ranks on this machine may use.
pub fn num_gpus() -> usize {
    gpus::usable()
}

/// Refuses a run on GPUs where there are too few: a rank wants one of its own, unless NCCL is told
/// to let several share one.
pub fn check_gpus(device: DeviceKind, ranks: usize, gpus: usize) -> Result<(), UserError> {
    let shared = std::env::var_os(env::SHARE_GPUS).is_some();
    if device == DeviceKind::Cuda && gpus == 0 {
        let message =
            "cluster.device is cuda: this machine has no GPU that the NVIDIA driver knows";
        return Err(UserError::usage(message).hint("`--set cluster.device=cpu`"));
    }
    if device != DeviceKind::Cpu && gpus > 0 && ranks > gpus && !shared {
        let message = format!("cluster.ranks_per_node: {ranks} ranks on a machine of {gpus} GPUs");
        let hint = format!("`--set cluster.ranks_per_node={gpus}`, or `cluster.device=cpu`");
        return Err(UserError::usage(message).hint(hint));
    }
    Ok(())
}

/// Loads the config at `path` and resolves `ranks_per_node` and `threads_per_rank`, once: what they
/// came to is part of the config from then on. The nodes of agents are taken to have as many cores
/// as this machine.
pub fn resolve(path: &Path, set: &[String], starter: Starter) -> Result<Resolved, UserError> {
    let mut overrides = set.to_vec();
    let cluster = RunConfig::load(path, &overrides)?.config.cluster;
    refuse_other_clusters(cluster.kind, cluster.nodes, starter)?;
    if starter == Starter::Agents && cluster.ranks_per_node.is_none() {
        let message = "cluster.ranks_per_node is auto, and this machine may be no node of the run";
        return Err(UserError::usage(message).hint("--set cluster.ranks_per_node=…"));
    }
    let ranks = match (cluster.ranks_per_node, cluster.device) {
        (Some(ranks), _) => ranks,
        (None, DeviceKind::Cpu) => 1,
        (None, _) => num_gpus().max(1),
    };
    let cores = num_cores();
    let threads = cluster.threads_per_rank.unwrap_or((cores / ranks.max(1)).max(1));
    // What the file gives keeps its place in messages.
    if cluster.ranks_per_node.is_none() {
        overrides.push(format!("cluster.ranks_per_node={ranks}"));
    }
    if cluster.threads_per_rank.is_none() {
        overrides.push(format!("cluster.threads_per_rank={threads}"));
    }
    let loaded = RunConfig::load(path, &overrides)?;
    let has_auto_threads = cluster.threads_per_rank.is_none();
    let world_size = ranks * cluster.nodes;
    Ok(Resolved { loaded, world_size, threads, has_auto_threads })
}

fn refuse_other_clusters(
    kind: ClusterKind,
    nodes: usize,
    starter: Starter,
) -> Result<(), UserError> {
    let is_supported = match starter {
        Starter::Launcher => matches!(kind, ClusterKind::Local | ClusterKind::Mpi),
        Starter::Agents | Starter::FirstNode => kind == ClusterKind::Local,
    };
    if !is_supported {
        let message = format!("cluster.kind: {kind:?} is not supported here yet");
        return Err(UserError::usage(message.to_lowercase()).hint("`--set cluster.kind=local`"));
    }
    if nodes != 1 && starter == Starter::Launcher {
        let message = format!("cluster.nodes: {nodes}, and this machine is one");
        let hint = "--set cluster.nodes=1 and all ranks here, if this machine can run them";
        return Err(UserError::usage(message).hint(hint));
    }
    Ok(())
}

/// The trainer's binary: beside the launcher's own, or where `$PHALANX_TRAINER` says.
pub fn trainer() -> Result<PathBuf, UserError> {
    let given = std::env::var_os(env::TRAINER).map(PathBuf::from);
    let beside = || {
        let own = std::env::current_exe().ok()?;
        Some(own.parent()?.join("phalanx-trainer"))
    };
    let path = given.or_else(beside).unwrap_or_else(|| "phalanx-trainer".into());
    if path.is_file() {
        return Ok(path);
    }
    let error = UserError::usage(format!("there is no trainer at {}", path.display()));
    Err(error.hint(format!("build both binaries (cargo build), or set {}", env::TRAINER)))
}

/// Refuses to hand ranks to `mpirun` where it, or the trainer's part of MPI, is absent.
pub fn check_mpi(trainer: &Path, library_path: Option<&OsStr>) -> Result<(), UserError> {
    let mut mpirun = Command::new(MPIRUN);
    let Some(version) = first_output(mpirun.arg("--version"), ANSWER_TIMEOUT) else {
        let error = UserError::usage(format!("cluster.kind is mpi, and there is no {MPIRUN}"));
        return Err(error.hint("`ops/setup --mpi`, or `--set cluster.kind=local`"));
    };
    if !version.contains("Open MPI") {
        let name = version.lines().next().unwrap_or_default().to_owned();
        let error = UserError::usage(format!("{MPIRUN} is not Open MPI's, but: {name}"));
        return Err(error.hint("put Open MPI's first on the PATH"));
    }
    let mut command = Command::new(trainer);
    command.arg("backends").envs(library_path.map(|path| (env::LIBRARY_PATH, path)));
    let backends = first_output(&mut command, ANSWER_TIMEOUT).unwrap_or_default();
    if !backends.lines().any(|line| line == "mpi") {
        let trainer = trainer.display();
        let error =
            UserError::usage(format!("cluster.kind is mpi, and {trainer} was built without"));
        let hint = "`ops/setup --mpi`, then `cargo build --release --features trainer/mpi`";
        return Err(error.hint(hint));
    }
    Ok(())
}

/// Where the dynamic linker shall look for libtorch before its own places: the given one, or on a
/// machine with a GPU the python3 one with CUDA. `None`: what the trainer was built with.
pub fn library_path(device: DeviceKind) -> Result<Option<OsString>, UserError> {
    let folders = match std::env::var_os(env::LIBTORCH) {
        Some(given) => {
            let lib = Path::new(&given).join("lib");
            if !lib.join("libtorch_cpu.so").is_file() {
                return Err(UserError::usage(format!(
                    "{} is {}, and there is no lib/libtorch_cpu.so in it",
                    env::LIBTORCH,
                    Path::new(&given).display()
                )));
            }
            libtorch::check(Path::new(&given)).map_err(UserError::usage)?;
            vec![lib]
        }
        None if device != DeviceKind::Cpu && num_gpus() > 0 => {
            python_torch().map(|torch| cuda_folders(&torch)).unwrap_or_default()
        }
        None => Vec::new(),
    };
    if folders.is_empty() {
        return Ok(None);
    }
    let before = std::env::var_os(env::LIBRARY_PATH).unwrap_or_default();
    let all = folders.into_iter().chain(std::env::split_paths(&before));
    let all = all.filter(|folder| !folder.as_os_str().is_empty());
    std::env::join_paths(all).map(Some).map_err(|error| UserError::usage(error.to_string()))
}

/// torch's own libraries, and the NVIDIA packages beside it (NCCL is one), where it has CUDA.
fn cuda_folders(torch: &Path) -> Vec<PathBuf> {
    let lib = torch.join("lib");
    // One of another release would not even load; what the trainer was built with is used then.
    if !lib.join(CUDA_PART).is_file() || libtorch::check(torch).is_err() {
        return Vec::new();
    }
    let nvidia = torch.parent().map(|packages| packages.join("nvidia"));
    let packages = nvidia.into_iter().filter_map(|nvidia| std::fs::read_dir(nvidia).ok()).flatten();
    let mut folders: Vec<PathBuf> = packages
        .flatten()
        .map(|entry| entry.path().join("lib"))
        .filter(|folder| folder.is_dir())
        .collect();
    folders.sort();
    folders.insert(0, lib);
    folders
}

/// Refuses a run on GPUs where no libtorch with CUDA is found, before each rank says so by itself.
pub fn check_cuda(
    device: DeviceKind,
    gpus: usize,
    library_path: Option<&OsStr>,
) -> Result<(), UserError> {
    if device == DeviceKind::Cpu || gpus == 0 {
        return Ok(());
    }
    let before = || std::env::var_os(env::LIBRARY_PATH).unwrap_or_default();
    let searched = library_path.map_or_else(before, OsStr::to_owned);
    if std::env::split_paths(&searched).any(|folder| folder.join(CUDA_PART).is_file()) {
        return Ok(());
    }
    let given = std::env::var_os(env::LIBTORCH);
    let torch = given.is_none().then(python_torch).flatten();
    Err(no_cuda(gpus, given.as_deref(), torch.as_deref()))
}

fn no_cuda(gpus: usize, given: Option<&OsStr>, torch: Option<&Path>) -> UserError {
    let release = libtorch::RELEASE;
    let found = match (given, torch) {
        (Some(given), _) => {
            let given = Path::new(given).display();
            format!("{} is {given}, and there is no lib/{CUDA_PART} in it", env::LIBTORCH)
        }
        (None, None) => "the python3 on the PATH has no torch".to_owned(),
        (None, Some(torch)) => {
            let version = libtorch::version_in(torch).unwrap_or("of an unknown version".to_owned());
            let has_cuda = torch.join("lib").join(CUDA_PART).is_file();
            let without = if has_cuda { "" } else { ", without CUDA" };
            format!("the python3 on the PATH has torch {version}{without}")
        }
    };
    let message = format!(
        "this machine has {gpus} GPU(s), and no libtorch {release} with CUDA is found: {found}"
    );
    let hint = format!(
        "`pip install 'torch=={release}.*'`, or set {} to a libtorch {release} with CUDA, or \
         `--set cluster.device=cpu`",
        env::LIBTORCH
    );
    UserError::usage(message).hint(hint)
}

fn python_torch() -> Option<PathBuf> {
    let printed = first_output(Command::new("python3").args(["-c", FIND_TORCH]), ANSWER_TIMEOUT)?;
    let path = PathBuf::from(printed.trim());
    path.is_dir().then_some(path)
}

/// What a program prints, where it ends in time. For a few lines: nobody reads until it has ended.
fn first_output(command: &mut Command, timeout: Duration) -> Option<String> {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().ok()?;
    let deadline = Instant::now() + timeout;
    while child.try_wait().ok()?.is_none() {
        if Instant::now() >= deadline {
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    String::from_utf8(child.wait_with_output().ok()?.stdout).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_wants_a_gpu_of_its_own() {
        let refused = |device, ranks, gpus| {
            let error: Option<UserError> = check_gpus(device, ranks, gpus).err();
            error.map(|error| error.message)
        };
        assert_eq!(refused(DeviceKind::Cpu, 9, 0), None);
        assert_eq!(refused(DeviceKind::Auto, 9, 0), None);
        assert_eq!(refused(DeviceKind::Cuda, 8, 8), None);
        assert!(refused(DeviceKind::Cuda, 1, 0).unwrap().contains("no GPU"));
        for device in [DeviceKind::Cuda, DeviceKind::Auto] {
            assert!(refused(device, 9, 8).unwrap().contains("9 ranks on a machine of 8 GPUs"));
        }
    }

    #[test]
    fn gpus_want_a_libtorch_with_cuda() {
        let folder = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let torch = folder.path().join("torch");
        let check = |given: Option<&Path>, torch: Option<&Path>, parts: &[&str]| {
            let error = no_cuda(8, given.map(Path::as_os_str), torch).to_string();
            for part in [&["8 GPU(s)", "libtorch 2.11 with CUDA", "device=cpu"], parts].concat() {
                assert!(error.contains(part), "{part:?} is not in {error}");
            }
        };
        check(None, None, &["has no torch"]);
        write("torch/version.py", "__version__ = '2.11.0+cpu'\n");
        check(None, Some(&torch), &["has torch 2.11.0+cpu, without CUDA"]);
        check(Some(&torch), None, &["PHALANX_LIBTORCH is", "no lib/libtorch_cuda.so in it"]);
        let found = |lib: &Path| check_cuda(DeviceKind::Auto, 8, Some(lib.as_os_str()));
        assert!(found(&torch.join("lib")).is_err());
        assert!(cuda_folders(&torch).is_empty());
        write("torch/lib/libtorch_cuda.so", "");
        assert!(found(&torch.join("lib")).is_ok());
        write("nvidia/cu13/lib/libcudart.so.13", "");
        let folders = [torch.join("lib"), folder.path().join("nvidia/cu13/lib")];
        assert_eq!(cuda_folders(&torch), folders);
        write("torch/version.py", "__version__ = '2.10.0+cu130'\n");
        check(None, Some(&torch), &["the PATH has torch 2.10.0+cu130"]);
        assert!(cuda_folders(&torch).is_empty(), "another release");
        for (device, gpus) in [(DeviceKind::Cpu, 8), (DeviceKind::Auto, 0)] {
            assert!(check_cuda(device, gpus, None).is_ok());
        }
    }
}
