//! What carries the messages between ranks: Gloo, or MPI where `mpirun` started them.

use crate::error::{Result, TrainError};
use collectives::{CommError, Group, GroupOptions};
use rank_protocol::Assignment;
use run_config::{ClusterKind, RunConfig};
use torch_shim::gloo::Store;

/// The backends that this program was built with.
pub const BUILT: &[&str] = if cfg!(feature = "mpi") { &["gloo", "mpi"] } else { &["gloo"] };

/// What carries the messages of this rank.
pub enum Backend {
    /// Connections of libtorch's own, at this address of the node.
    Gloo(String),
    /// The MPI job that this process is part of.
    #[cfg(feature = "mpi")]
    Mpi(collectives::mpi::Mpi),
}

impl Backend {
    /// The one that the config asks for.
    ///
    /// # Errors
    /// Where this program has it not, or it does not start.
    pub fn start(config: &RunConfig, assignment: &Assignment) -> Result<Backend> {
        if config.cluster.kind != ClusterKind::Mpi {
            return Ok(Backend::Gloo(assignment.address.clone()));
        }
        Self::start_mpi(assignment.rank, assignment.world_size)
    }

    #[cfg(feature = "mpi")]
    fn start_mpi(rank: usize, world_size: usize) -> Result<Backend> {
        let mpi = collectives::mpi::Mpi::start()?;
        if (mpi.process(), mpi.size()) != (rank, world_size) {
            return Err(TrainError::Config(format!(
                "this is rank {rank} of {world_size} for the launcher, and process {} of {} for \
                 MPI; hint: is the mpirun on the PATH that of the MPI library?",
                mpi.process(),
                mpi.size()
            )));
        }
        Ok(Backend::Mpi(mpi))
    }

    #[cfg(not(feature = "mpi"))]
    fn start_mpi(_rank: usize, _world_size: usize) -> Result<Backend> {
        Err(TrainError::Config(
            "cluster.kind is mpi, and this trainer was built without; hint: `ops/setup --mpi`, \
             then `cargo build --release --features trainer/mpi`"
                .into(),
        ))
    }

    /// Joins a group of `size` ranks, of which this is `rank`, through a store that all share.
    ///
    /// # Errors
    /// When the others do not come in time.
    pub fn connect(
        &self,
        store: &Store,
        rank: usize,
        size: usize,
        options: &GroupOptions,
    ) -> std::result::Result<Group, CommError> {
        match self {
            Backend::Gloo(address) => {
                collectives::gloo::connect(store, rank, size, address, options)
            }
            #[cfg(feature = "mpi")]
            Backend::Mpi(mpi) => mpi.connect(store, rank, size, options),
        }
    }

    /// Parts from the other ranks, when all is done and the groups are gone. A rank that fails does
    /// not come to it.
    ///
    /// # Errors
    /// When messages are still under way.
    pub fn leave(self) -> Result<()> {
        match self {
            Backend::Gloo(_) => Ok(()),
            #[cfg(feature = "mpi")]
            Backend::Mpi(mpi) => Ok(mpi.leave()?),
        }
    }
}
