//! The executor's part for ranks that this process starts, and what any rank is told of its place.

use super::{Event, Executor, LOOPBACK};
use crate::supervisor::cause::Exit;
use crate::supervisor::mpirun;
use crate::supervisor::rank::{Input, News, set_environment, start};
use crate::supervisor::relay::RankLog;
use rank_protocol::{Assignment, env, exit_code};
use std::process::Command;

impl Executor {
    /// Starts every rank; an error comes with the one that it was.
    pub(super) fn start_ranks(&mut self, generation: u64) -> Result<(), (usize, std::io::Error)> {
        for rank in 0..self.plan.world_size {
            let log = RankLog::open(&self.plan.run.log(generation, rank), rank);
            let mut command = Command::new(&self.plan.trainer);
            command.arg("rank").env(env::CONTROL, env::CONTROL_STDIN);
            command.env(env::RANK, rank.to_string());
            self.set_environment(&mut command);
            let handle = start(command, generation, rank, log, self.inputs.clone());
            self.ranks.push(handle.map_err(|error| (rank, error))?);
        }
        Ok(())
    }

    pub(super) fn start_under_mpirun(
        &mut self,
        generation: u64,
    ) -> Result<(), (usize, std::io::Error)> {
        let log = |rank| RankLog::open(&self.plan.run.log(generation, rank), rank);
        let logs = (0..self.plan.world_size).map(log).collect();
        let mut command = mpirun::command(&self.plan.trainer, self.plan.world_size);
        self.set_environment(&mut command);
        let handles = mpirun::start(command, generation, logs, self.inputs.clone());
        self.ranks = handles.map_err(|error| (0, error))?;
        Ok(())
    }

    /// The ranks that never were count as exited, so that the others' end ends the run.
    pub(super) fn could_not_start(&mut self, rank: usize, error: &std::io::Error) {
        let trainer = self.plan.trainer.display();
        let reason = format!("cannot start rank {rank} ({trainer}): {error}");
        for absent in rank..self.plan.world_size {
            let exit = Exit::default();
            let last_lines = vec![reason.clone()];
            let input = Input {
                generation: self.state.generation(),
                rank: absent,
                news: News::Exited { exit, last_lines },
            };
            let _ = self.inputs.try_send(input);
        }
        self.handle(Event::Broken { code: exit_code::CONFIG, reason });
    }

    fn set_environment(&self, command: &mut Command) {
        set_environment(command, self.plan.threads, self.plan.library_path.as_deref());
    }

    pub(super) fn assignment(
        &self,
        generation: u64,
        rank: usize,
        resume_step: Option<u64>,
    ) -> Assignment {
        let on_node = self.plan.cluster.as_ref().map(|cluster| cluster.ranks_per_node);
        let on_node = on_node.unwrap_or(self.plan.world_size).max(1);
        let address = self.elsewhere.as_ref().and_then(|e| e.address_of(rank / on_node));
        Assignment {
            run_id: self.plan.run_id.clone(),
            generation,
            rank,
            world_size: self.plan.world_size,
            local_rank: rank % on_node,
            local_world_size: on_node,
            address: address.unwrap_or_else(|| LOOPBACK.to_owned()),
            threads: self.plan.threads,
            run_dir: self.plan.run.root().to_owned(),
            resume_step,
            stop_after: self.plan.stop_after,
            roll_backs: self.plan.roll_backs.clone(),
        }
    }
}
