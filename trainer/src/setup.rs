//! From the assignment and the config to a model ready to train.

use crate::backend::Backend;
use crate::error::{Result, TrainError};
use crate::gpu::{self, Chosen, Gpu};
use crate::store::LauncherStore;
use checkpoint::{CheckpointError, Target};
use checkpoint_format::hf::HfSource;
use checkpoint_format::meta::MetaSource;
use checkpoint_format::source::CheckpointSource;
use checkpoint_format::{Checkpoint, FormatError, WeightSource, scan};
use collectives::{Check, CommError, Communicator, Group, GroupOptions, Whereabouts};
use kernels::{Kernels, Options};
use layout::Mesh;
use model::{Dense, Llama, Stage, allocate, llama};
use model_spec::LocalParameter;
use nccl_rs::{Nccl, Search};
use parallel::Groups;
use rank_protocol::client::RankClient;
use rank_protocol::{Phase, STORAGE_TIMEOUT, env, libtorch};
use run_config::{CollectiveCheck, InitFrom, Matmul, Parallelism, RunConfig};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use torch_shim::gloo::Store;
use torch_shim::params::ParameterSet;
use torch_shim::tch::Device;

/// Memory of dropped CPU tensors that is kept for the next ones, at the most: a micro-batch's
/// activations of the models that one trains on a CPU.
const UNUSED_CPU_BYTES: usize = 1 << 30;
/// Name of the group in which ranks wait for each other's storage, while training goes on.
const STORAGE: &str = "storage";
/// The group in which ranks wait for what they keep in memory.
const MEMORY: &str = "memory";

/// A model and its parameters.
pub struct Trainee {
    /// The model; its weights are views of `params`.
    pub model: Llama,
    /// The parameters.
    pub params: ParameterSet,
    /// What the parameters were allocated from.
    pub held: Vec<LocalParameter>,
    /// Where both live.
    pub device: Device,
    /// The GPU, where that is one.
    pub gpu: Option<Gpu>,
}

/// Reads a resolved config.
///
/// # Errors
/// [`TrainError::Config`] with all that is wrong with it.
pub fn read_config(path: &Path) -> Result<RunConfig> {
    let loaded = RunConfig::load(path, &[]).map_err(|e| TrainError::Config(e.to_string()))?;
    Ok(loaded.config)
}

/// Refuses to run with a libtorch of another release: the one that the dynamic linker chose, which
/// need not be the one of the build.
///
/// # Errors
/// [`TrainError::Config`] with both versions.
pub fn check_libtorch() -> Result<()> {
    // Where the system does not say what is loaded, there is nothing to compare.
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    match libtorch_prefix(&maps) {
        Some(prefix) => libtorch::check(prefix).map_err(TrainError::Config),
        None => Ok(()),
    }
}

/// Sets the number of threads libtorch computes with, and lets it keep the memory of CPU tensors
/// from step to step.
///
/// # Errors
/// Where libtorch refuses.
pub fn prepare_libtorch(threads: usize) -> Result<()> {
    torch_shim::tch::set_num_threads(i32::try_from(threads).unwrap_or(1));
    Ok(torch_shim::memory::keep_cpu_memory(UNUSED_CPU_BYTES)?)
}

/// The folder of the libtorch that is loaded.
fn libtorch_lib() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    libtorch_prefix(&maps).map(|prefix| prefix.join("lib"))
}

/// The folder that holds `lib/libtorch_cpu.so`, of a list of mapped files.
fn libtorch_prefix(maps: &str) -> Option<&Path> {
    let is_libtorch = |path: &&Path| path.file_name().is_some_and(|n| n == "libtorch_cpu.so");
    let mut paths = maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])));
    paths.find(is_libtorch)?.parent()?.parent()
}

/// The kernels of a GPU. There are none on the CPU, and none where `PHALANX_KERNELS` is `off`.
///
/// # Errors
/// Where NVRTC or the driver cannot be used, or the variable is something else.
pub fn kernels(device: Device) -> Result<Option<Kernels>> {
    let variable = env::KERNELS;
    match std::env::var(variable).as_deref() {
        Ok("off") => return Ok(None),
        Err(std::env::VarError::NotPresent) | Ok("on") => {}
        Ok(other) => {
            return Err(TrainError::Config(format!("{variable} is `{other}`, expected on or off")));
        }
        Err(error) => return Err(TrainError::Config(format!("{variable}: {error}"))),
    }
    let Device::Cuda(index) = device else { return Ok(None) };
    let search = kernels::Search { folder: None, libtorch_lib: libtorch_lib() };
    let options = Options { search, cache: cache_folder().map(|cache| cache.join("kernels")) };
    let kernels = Kernels::open(index, &options).map_err(|error| {
        TrainError::Config(format!("{error}; {variable}=off computes without our own kernels"))
    })?;
    Ok(Some(kernels))
}

/// Where this machine's user keeps what can be made again.
fn cache_folder() -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let cache = folder(env::CACHE_HOME).map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(folder(env::HOME)?).join(".cache")));
    cache.map(|cache| cache.join("phalanx"))
}

/// The whole model on this rank, its weights all zero, and the products of its blocks as `matmul`
/// says: for generation and measurements.
///
/// # Errors
/// Where memory runs out.
pub fn trainee(config: &RunConfig, num_positions: usize, matmul: Matmul) -> Result<Trainee> {
    let Chosen { device, gpu } = gpu::choose(config, 0)?;
    let stage = Stage::whole(&config.model);
    let specs = stage.parameters(&config.model);
    let held: Vec<LocalParameter> = specs.iter().map(LocalParameter::whole).collect();
    let decay_norms = config.optimizer.decay_norms;
    let params = allocate(&held, decay_norms, config.precision.compute, device)?;
    let dense = Arc::new(Dense::new(kernels(device)?).with_products(matmul));
    let model = Llama::new(&config.model, stage, &params, dense, num_positions)?;
    Ok(Trainee { model, params, held, device, gpu })
}

/// The initial weights of what is held: random, or those that `model.init_from` names.
///
/// # Errors
/// Where the source cannot be read or is of another model.
pub fn initialize(
    config: &RunConfig,
    held: &[LocalParameter],
    params: &ParameterSet,
    runs: &Path,
) -> Result<()> {
    let unusable = |error: checkpoint_format::FormatError| {
        TrainError::Config(format!("model.init_from: {error}"))
    };
    let source: Box<dyn WeightSource> = match &config.model.init_from {
        None => return Ok(llama::init::initialize(config.seed, held, params)?),
        Some(InitFrom::HuggingFace(dir)) => Box::new(HfSource::open(dir).map_err(unusable)?),
        Some(InitFrom::Meta(dir)) => Box::new(MetaSource::open(dir).map_err(unusable)?),
        Some(InitFrom::Run { run, step }) => {
            let dir = Path::new(run);
            let dir = if dir.is_dir() { dir.to_owned() } else { runs.join(run) };
            let step_dir = scan::checkpoint_of_run(&dir, *step).map_err(unusable)?;
            let checkpoint = Checkpoint::open(&step_dir).map_err(unusable)?;
            Box::new(CheckpointSource::new(checkpoint))
        }
    };
    let whole = model_spec::hf_tensors(&config.model);
    let target = Target { whole: &whole, held, params };
    match checkpoint::load_weights(source.as_ref(), target) {
        // The same bytes would be read again.
        Err(CheckpointError::Format(error @ FormatError::Damaged { .. })) => Err(unusable(error)),
        other => Ok(other?),
    }
}

/// The groups of a rank.
pub struct Connections {
    /// Those that train together.
    pub groups: Groups,
    /// All ranks, to wait for each other's storage, which may take much longer than a step.
    pub storage: Arc<dyn Communicator>,
    /// All ranks, to wait for each other's memory, where checkpoints are kept there.
    pub memory: Option<Arc<dyn Communicator>>,
}

/// The groups: NCCL's between GPUs, and this backend's; an abort by the agent ends every wait in
/// them.
///
/// # Errors
/// Where the degrees do not make the number of ranks, or the ranks do not find each other.
pub fn connect(
    client: &RankClient,
    config: &RunConfig,
    device: Device,
    backend: &Backend,
) -> Result<Connections> {
    let place = client.assignment();
    let replicate = place.replicas.or(config.parallelism.replicate);
    let parallelism = Parallelism { replicate, ..config.parallelism.clone() };
    let mesh = Mesh::new(&parallelism, place.world_size)
        .map_err(|error| TrainError::Config(error.to_string()))?;
    let all: Vec<usize> = (0..place.world_size).collect();
    let timeout = Duration::from_secs(config.cluster.timeout_s);
    let check = match config.cluster.check_collectives {
        CollectiveCheck::FirstUse => Check::FirstUse,
        CollectiveCheck::All => Check::All,
        CollectiveCheck::Off => Check::Off,
    };
    let options =
        |name: &str| GroupOptions { timeout, check, ..GroupOptions::new(name, place.generation) };
    let gpu = match device {
        Device::Cuda(index) => Some((load_nccl()?, index)),
        _ => None,
    };
    // Those in which the thread that trains waits: the others are used by one beside it.
    let whereabouts = Whereabouts::new(&store(client), place.generation, place.rank)?;
    let mut connect = |name: &str, ranks: &[usize]| -> Result<Arc<dyn Communicator>, CommError> {
        let group = join(client, backend, ranks, &options(name), gpu.as_ref())?;
        Ok(shared(client, group.among(&whereabouts), false))
    };
    let groups = Groups::connect(config, mesh, place.rank, &mut connect)?;
    let beside = |name: &str| -> Result<Arc<dyn Communicator>, CommError> {
        let options = GroupOptions { timeout: STORAGE_TIMEOUT.max(timeout), ..options(name) };
        Ok(shared(client, join(client, backend, &all, &options, None)?, true))
    };
    let storage = beside(STORAGE)?;
    let memory = place.memory_dir.as_ref().map(|_| beside(MEMORY)).transpose()?;
    Ok(Connections { groups, storage, memory })
}

/// The launcher's store, for this run alone.
fn store(client: &RankClient) -> Store {
    let store = Store::new(Arc::new(LauncherStore(client.store())) as Arc<_>);
    store.with_prefix(&client.assignment().run_id)
}

/// NCCL: the library that `PHALANX_NCCL` names, or libtorch's.
fn load_nccl() -> Result<Nccl> {
    let search = Search {
        path: std::env::var_os(env::NCCL).map(Into::into),
        libtorch_lib: libtorch_lib(),
        ..Search::default()
    };
    let nccl = Nccl::load(&search).map_err(|error| TrainError::Config(error.to_string()))?;
    tracing::debug!("{nccl:?}");
    Ok(nccl)
}

/// Joins a group of `ranks`, of which this is one; on a GPU where one is given.
fn join(
    client: &RankClient,
    backend: &Backend,
    ranks: &[usize],
    options: &GroupOptions,
    gpu: Option<&(Nccl, usize)>,
) -> std::result::Result<Group, CommError> {
    let store = store(client);
    let place = client.assignment();
    let rank = ranks.iter().position(|&rank| rank == place.rank).unwrap_or(0);
    let options = &options.clone().of(ranks);
    match gpu {
        Some((nccl, device)) => {
            collectives::nccl::connect(nccl, *device, &store, (rank, ranks.len()), options)
        }
        None => backend.connect(&store, rank, ranks.len(), options),
    }
}

/// The group for all who use it, and for the agent, which asks what it waits for and ends its
/// waits.
fn shared(client: &RankClient, group: Group, is_storage: bool) -> Arc<dyn Communicator> {
    let group = Arc::new(group);
    let weak = Arc::downgrade(&group);
    client.on_where(move |phase| {
        // Training goes on while a checkpoint is written.
        let is_held_up = !(is_storage && phase == Phase::Train);
        weak.upgrade().filter(|_| is_held_up).and_then(|group| group.waits_in())
    });
    let weak = Arc::downgrade(&group);
    client.on_abort(move |_| {
        if let Some(group) = weak.upgrade() {
            group.abort();
        }
    });
    group
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loaded_libtorch_is_found_and_checked() {
        let maps = "7f0-7f1 r-xp 00000000 08:01 12  /usr/lib/libc.so.6\n\
                    7f2-7f3 r-xp 00000000 08:01 13  /opt/other torch/lib/libtorch_cpu.so\n";
        assert_eq!(libtorch_prefix(maps), Some(Path::new("/opt/other torch")));
        assert_eq!(libtorch_prefix("7f0-7f1 rw-p 00000000 00:00 0  [heap]\n"), None);
        torch_shim::tch::manual_seed(0);
        let own = std::fs::read_to_string("/proc/self/maps").unwrap();
        let prefix = libtorch_prefix(&own).unwrap();
        let version = libtorch::version_in(prefix).unwrap();
        assert!(version.starts_with(libtorch::RELEASE), "{version}");
        check_libtorch().unwrap();
    }
}
