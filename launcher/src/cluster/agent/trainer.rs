//! What ranks are started from on this node.

use crate::error::UserError;
use crate::machine;
use crate::supervisor::rank::{Input, RankHandle, set_environment, start};
use crate::supervisor::relay::RankLog;
use rank_protocol::{Assignment, RunDir, ToRank, env};
use run_config::RunConfig;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;
use tokio::sync::mpsc;

/// The trainer, and where it finds libtorch.
pub struct Trainer {
    path: PathBuf,
    library_path: Option<OsString>,
}

impl Trainer {
    /// Found once, before the node joins: it may take seconds.
    ///
    /// # Errors
    /// Where something is absent that every rank would miss.
    pub fn find(config: &RunConfig) -> Result<Self, UserError> {
        let library_path = machine::library_path(config.cluster.device)?;
        let (device, gpus) = (config.cluster.device, machine::num_gpus());
        let ranks = config.cluster.ranks_per_node.unwrap_or(1);
        machine::check_gpus(device, ranks, gpus)?;
        machine::check_cuda(device, gpus, library_path.as_deref())?;
        Ok(Self { path: machine::trainer()?, library_path })
    }

    /// Starts a rank and tells it its place.
    ///
    /// # Errors
    /// Why it cannot be started.
    pub fn start(
        &self,
        assignment: Assignment,
        inputs: mpsc::Sender<Input>,
    ) -> Result<RankHandle, String> {
        let run = RunDir::new(&assignment.run_dir);
        let Self { path, library_path } = self;
        let rank = assignment.rank;
        let mut command = Command::new(path);
        command.arg("rank").env(env::CONTROL, env::CONTROL_STDIN);
        command.env(env::RANK, rank.to_string());
        set_environment(&mut command, assignment.threads, library_path.as_deref());
        let log = RankLog::open(&run.log(assignment.generation, rank), rank);
        let handle = start(command, assignment.generation, rank, log, inputs)
            .map_err(|error| format!("{}: {error}", path.display()))?;
        handle.tell(ToRank::Assignment(Box::new(assignment)));
        Ok(handle)
    }
}
