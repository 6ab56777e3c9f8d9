//! The GPU that a rank computes on, and in words what does not fit where it cannot be used: the
//! driver, libtorch's CUDA part, or the GPU itself.

mod fit;
mod peak;
mod speed;

pub use fit::{Found, Misfit};
pub use peak::peak_tflops;
pub use speed::{Speed, Speedometer};

use crate::error::{Result, TrainError};
use rank_protocol::{env, gpus};
use run_config::{DeviceKind, Matmul, RunConfig};
use std::path::Path;
use torch_shim::cuda::driver::{self, Card};
use torch_shim::cuda::{self, MemoryUse};
use torch_shim::tch::Device;

/// What libtorch's allocator is told of `cluster.expandable_segments`, in its own words.
const EXPANDABLE: &str = "expandable_segments:True";

/// Where a rank computes.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// For libtorch.
    pub device: Device,
    /// The GPU, where it is one.
    pub gpu: Option<Gpu>,
}

/// A GPU that computes.
#[derive(Clone, Debug)]
pub struct Gpu {
    /// Its number among those that CUDA lets this process see.
    pub index: usize,
    /// What the driver says of it.
    pub card: Card,
}

impl Gpu {
    /// What is in use of its memory; the peaks begin anew.
    ///
    /// # Errors
    /// Where libtorch refuses.
    pub fn take_memory_use(&self) -> Result<MemoryUse> {
        let memory = cuda::memory_use(self.index)?;
        cuda::reset_peaks(self.index)?;
        Ok(memory)
    }
}

/// The device of the `local_rank`-th process on this machine: its GPU, or the CPU where the config
/// asks for that, or leaves it to a machine without GPUs.
///
/// # Errors
/// Where the machine has GPUs, or the config asks for one, and none can be used: what was found,
/// what is needed, and what may help.
pub fn choose(config: &RunConfig, local_rank: usize) -> Result<Chosen> {
    let wanted = config.cluster.device;
    let listed = gpus::usable();
    if wanted == DeviceKind::Cpu || (wanted == DeviceKind::Auto && listed == 0) {
        return Ok(Chosen { device: Device::Cpu, gpu: None });
    }
    let settings = config.cluster.expandable_segments.then_some(EXPANDABLE);
    let is_given = env::ALLOCATOR.iter().any(|name| std::env::var_os(name).is_some());
    let place =
        fit::Place { listed, local_rank, is_shared: std::env::var_os(env::SHARE_GPUS).is_some() };
    let found = look(place, settings.filter(|_| !is_given));
    if let Some(misfit) = found.misfit() {
        let wanted = if wanted == DeviceKind::Cuda { "cuda" } else { "auto" };
        return Err(TrainError::Config(format!("cluster.device is {wanted}: {misfit}")));
    }
    let index = found.index();
    let cards = found.driver.map(|driver| driver.cards).unwrap_or_default();
    let card = cards.into_iter().nth(index).unwrap_or_default();
    if config.precision.matmul == Matmul::Fp8
        && let Some(misfit) = fit::without_fp8(index, &card)
    {
        return Err(TrainError::Config(format!("precision.matmul is fp8: {misfit}")));
    }
    let gib = card.bytes as f64 / f64::from(1 << 30);
    tracing::debug!("GPU {index}: {}, {gib:.0} GiB", card.name);
    Ok(Chosen { device: Device::Cuda(index), gpu: Some(Gpu { index, card }) })
}

/// Looks at one thing after another, as long as all fits; makes the GPU the current one.
fn look(place: fit::Place, allocator: Option<&str>) -> Found {
    let text = |error: torch_shim::ShimError| error.to_string();
    let driver = driver::look(Path::new(driver::LIBRARY)).map_err(text);
    let mut found = Found::new(place, driver);
    if found.misfit().is_none() {
        found.library = Some(cuda::load().map_err(text));
    }
    if found.misfit().is_none() {
        let set = allocator.map_or(Ok(()), cuda::set_allocator);
        found.devices = Some(set.and_then(|()| cuda::start()).map_err(text));
    }
    if found.misfit().is_none() {
        let index = found.index();
        let probed = cuda::set_device(index).and_then(|()| cuda::probe(index));
        found.probed = Some(probed.map_err(text));
    }
    found
}
