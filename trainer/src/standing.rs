//! What a rank's process keeps from one generation to the next, and what it makes ready before the
//! first: nothing that numbers hang on.

use crate::error::{Result, TrainError};
use crate::gpu::{self, Chosen};
use crate::identity;
use crate::setup::{check_libtorch, kernels, read_config};
use data_pipeline::Split;
use data_pipeline::prefetch::Dataset;
use kernels::Kernels;
use rank_protocol::env;
use rank_protocol::run_dir::RunDir;
use torch_shim::tch::{Device, Kind, Tensor};

/// Beside what libtorch and CUDA keep by themselves: contexts, memory, threads.
#[derive(Default)]
pub struct Standing {
    kernels: Option<(Device, Option<Kernels>)>,
}

impl Standing {
    /// The kernels of its device: a GPU's modules are loaded once.
    ///
    /// # Errors
    /// As [`kernels`].
    pub fn kernels(&mut self, device: Device) -> Result<Option<Kernels>> {
        if let Some((of, found)) = &self.kernels
            && *of == device
        {
            return Ok(found.clone());
        }
        let found = kernels(device)?;
        self.kernels = Some((device, found.clone()));
        Ok(found)
    }

    /// Of a process that gets its place later, if it is one (see [`env::WARM`]): what takes long
    /// and does not depend on the place is made ready. What fails here fails again once there is a
    /// place, and is told then.
    pub fn before_a_place() -> Self {
        let mut standing = Self::default();
        let Some(told) = std::env::var_os(env::WARM) else { return standing };
        match standing.warm_up(&told.to_string_lossy()) {
            Ok(()) => tracing::debug!("ready for a place"),
            Err(error) => tracing::debug!("not all is ready for a place: {error}"),
        }
        standing
    }

    fn warm_up(&mut self, told: &str) -> Result<()> {
        let (local_rank, run_dir) = told.split_once(':').unwrap_or(("0", told));
        check_libtorch()?;
        let config = read_config(&RunDir::new(run_dir).config())?;
        identity::own_build().map_err(|error| TrainError::Config(error.to_string()))?;
        let Chosen { device, .. } = gpu::choose(&config, local_rank.parse().unwrap_or(0))?;
        // The first tensor makes a GPU's context.
        drop(Tensor::f_zeros([1], (Kind::Float, device))?);
        self.kernels(device)?;
        Dataset::open(&config, Split::Train)?;
        Ok(())
    }
}
