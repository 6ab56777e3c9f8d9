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
    ranks: usize,
    threads: usize,
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
        let threads = config.cluster.threads_per_rank.unwrap_or(1);
        Ok(Self { path: machine::trainer()?, library_path, ranks, threads })
    }

    /// Ranks for which there is room.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Starts a trainer that waits for its place as the `local_rank`-th of this node, under that
    /// number and generation 0.
    ///
    /// # Errors
    /// Why it cannot be started.
    pub fn warm_up(
        &self,
        run: &RunDir,
        local_rank: usize,
        inputs: mpsc::Sender<Input>,
    ) -> Result<RankHandle, String> {
        let mut command = Command::new(&self.path);
        command.arg("rank").env(env::CONTROL, env::CONTROL_STDIN);
        let mut told = OsString::from(format!("{local_rank}:"));
        told.push(run.root());
        command.env(env::WARM, told);
        set_environment(&mut command, self.threads, self.library_path.as_deref());
        start(command, 0, local_rank, RankLog::of_nobody(run), inputs)
            .map_err(|error| format!("{}: {error}", self.path.display()))
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
        let Self { path, library_path, .. } = self;
        let rank = assignment.rank;
        let mut command = Command::new(path);
        command.arg("rank").env(env::CONTROL, env::CONTROL_STDIN);
        command.env(env::RANK, rank.to_string());
        set_environment(&mut command, assignment.threads, library_path.as_deref());
        let log = RankLog::open(&run, assignment.generation, rank);
        let handle = start(command, assignment.generation, rank, log, inputs)
            .map_err(|error| format!("{}: {error}", path.display()))?;
        handle.tell(ToRank::Assignment(Box::new(assignment)));
        Ok(handle)
    }
}
