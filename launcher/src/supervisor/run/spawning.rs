//! The executor's part for the start of a generation: every rank with its place.

use super::{Event, Executor, LOOPBACK};
use crate::cluster::sizes::Size;
use crate::supervisor::cause::Exit;
use crate::supervisor::ledger::Spent;
use crate::supervisor::mpirun;
use crate::supervisor::rank::{Input, News, RankHandle, set_environment, start};
use crate::supervisor::record::Layout;
use crate::supervisor::relay::RankLog;
use crate::supervisor::restore::{Branch, Tier, went_back};
use rank_protocol::store::Store;
use rank_protocol::{Assignment, env, exit_code};
use run_config::{ClusterKind, RunConfig};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

/// Whether ranks that are well keep their processes when another fails. Under MPI the whole job
/// ends with one of them.
pub(super) fn keeps_processes(config: &RunConfig) -> bool {
    config.restart.keep_processes && config.cluster.kind != ClusterKind::Mpi
}

impl Executor {
    /// Of the generation, or of the one about to start.
    pub(super) fn size(&self) -> Size {
        let whole = Size {
            replicas: self.plan.config.replicas().unwrap_or(1),
            ranks: self.plan.world_size,
            nodes: 1,
        };
        self.elsewhere.as_ref().map_or(whole, |elsewhere| elsewhere.size())
    }

    /// Starts a generation; `kept` of its ranks go on in the processes that they have.
    pub(super) fn spawn(&mut self, generation: u64, resume_step: Option<u64>, kept: &[usize]) {
        let has_adopted =
            self.elsewhere.as_mut().is_some_and(|e| std::mem::take(&mut e.has_adopted));
        let is_growth = std::mem::take(&mut self.is_growing);
        let is_first = self.recorder.status.generation == self.plan.last_generation;
        let is_restart = !is_growth && (has_adopted || !is_first);
        self.recorder.status.restarts += u64::from(is_restart);
        self.recorder.status.generation = generation;
        self.recorder.forget_speed();
        self.store = Store::default();
        self.generation_start = Instant::now();
        self.has_stepped = false;
        self.recorder.ledger.enter(Spent::Start, self.generation_start);
        self.recorder.tell_ledger();
        let size = self.size();
        let layout = Layout::of(&self.plan.config, size.replicas);
        let fields = json!({
            "world_size": size.ranks,
            "layout": layout,
            "resume_step": resume_step,
            "resume_tier": self.recorder.status.resumed.map(|resumed| resumed.tier),
            "is_restart": is_restart,
            "kept": kept.len(),
        });
        self.recorder.event("generation_started", fields);
        if let Some(missing) = layout.missing() {
            tracing::warn!("generation {generation} has {missing}");
        }
        self.recorder.status.layout = Some(layout);
        if let Some(step) = resume_step {
            tracing::info!("generation {generation} continues from step {step}");
        }
        went_back(&mut self.plan.resumes, Branch { step: resume_step.unwrap_or(0), generation });
        let before = std::mem::take(&mut self.ranks);
        if self.elsewhere.is_some() {
            self.start_elsewhere(generation, resume_step, kept);
            return self.update_status();
        }
        let started = match self.plan.config.cluster.kind {
            ClusterKind::Mpi => self.start_under_mpirun(generation),
            _ => self.start_ranks(generation, before, kept),
        };
        for (rank, handle) in self.ranks.iter().enumerate() {
            handle.assign(self.assignment(generation, rank, resume_step));
        }
        match started {
            Ok(()) => self.update_status(),
            Err((rank, error)) => self.could_not_start(rank, &error),
        }
    }

    /// Starts every rank that has no process of those `before`; an error comes with the one that it
    /// was. What is left of those ends with its handle.
    fn start_ranks(
        &mut self,
        generation: u64,
        before: Vec<RankHandle>,
        kept: &[usize],
    ) -> Result<(), (usize, std::io::Error)> {
        let mut before: BTreeMap<usize, RankHandle> = before.into_iter().enumerate().collect();
        before.retain(|rank, _| kept.contains(rank));
        for rank in 0..self.plan.world_size {
            if let Some(handle) = before.remove(&rank) {
                self.ranks.push(handle);
                continue;
            }
            let log = RankLog::open(&self.plan.run, generation, rank);
            let mut command = Command::new(&self.plan.trainer);
            command.arg("rank").env(env::CONTROL, env::CONTROL_STDIN);
            command.env(env::RANK, rank.to_string());
            self.set_environment(&mut command);
            let handle = start(command, generation, rank, log, self.inputs.clone());
            self.ranks.push(handle.map_err(|error| (rank, error))?);
        }
        Ok(())
    }

    fn start_under_mpirun(&mut self, generation: u64) -> Result<(), (usize, std::io::Error)> {
        let log = |rank| RankLog::open(&self.plan.run, generation, rank);
        let logs = (0..self.plan.world_size).map(log).collect();
        let mut command = mpirun::command(&self.plan.trainer, self.plan.world_size);
        self.set_environment(&mut command);
        let handles = mpirun::start(command, generation, logs, self.inputs.clone());
        self.ranks = handles.map_err(|error| (0, error))?;
        Ok(())
    }

    /// The ranks that never were count as exited, so that the others' end ends the run.
    fn could_not_start(&mut self, rank: usize, error: &std::io::Error) {
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

    /// Where the checkpoint is that the ranks go on from, where it is not in the run's folder.
    fn resume_dir(&self) -> Option<PathBuf> {
        let is_kept = self.recorder.status.resumed.is_some_and(|from| from.tier == Tier::Memory);
        self.plan.memory.clone().filter(|_| is_kept)
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
        let size = self.size();
        let on_node = self.plan.cluster.as_ref().map(|cluster| cluster.ranks_per_node);
        let on_node = on_node.unwrap_or(size.ranks).max(1);
        let address = self.elsewhere.as_ref().and_then(|e| e.address_of(rank / on_node));
        Assignment {
            run_id: self.plan.run_id.clone(),
            generation,
            rank,
            world_size: size.ranks,
            local_rank: rank % on_node,
            // The last node may have room for more.
            local_world_size: on_node.min(size.ranks - rank / on_node * on_node),
            address: address.unwrap_or_else(|| LOOPBACK.to_owned()),
            threads: self.plan.threads,
            run_dir: self.plan.run.root().to_owned(),
            resume_step,
            replicas: self.elsewhere.is_some().then_some(size.replicas),
            stop_after: self.plan.stop_after,
            roll_backs: self.plan.roll_backs.clone(),
            memory_dir: self.plan.memory.clone(),
            node: self.node_place(rank / on_node, size.nodes),
            resume_dir: self.resume_dir(),
            failures: self.failures,
            observed_s: self.recorder.ledger.sums(Instant::now()).wall_s as u64,
            profile: self.plan.profile,
            may_stay: keeps_processes(&self.plan.config),
        }
    }
}
