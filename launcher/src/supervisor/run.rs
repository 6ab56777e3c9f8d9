//! Carries out what the policy decides. The sole owner of a run's state; every event passes through
//! one loop on one thread.

use super::ledger::{Ledger, Spent};
use super::mpirun;
use super::rank::{Input, News, RankHandle, set_environment, start};
use super::record::{RankStatus, Recorder, Status, ended};
use super::relay::RankLog;
use super::restore::{Branch, Restored};
use super::state::{Action, Event, Policy, State};
use crate::cluster::nodes::{ClusterPlan, Happening, Nodes};
use crate::remote::Place;
use crate::remote::uploads::News as CopyNews;
use crate::view::View;
use checkpoints::{Copies, next_of_copies};
use elsewhere::{Elsewhere, next_of};
use rank_protocol::store::{Requester, Store};
use rank_protocol::{Assignment, FailureClass, FromRank, RunDir, ToRank, env, exit_code};
use run_config::{ClusterKind, RunConfig};
use serde_json::json;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

/// Where the ranks of one machine reach each other.
const LOOPBACK: &str = "127.0.0.1";

/// Messages of all ranks that wait for the loop; a rank that says more waits.
const NUM_INPUTS: usize = 4096;

/// All that a launcher knows when it begins.
pub struct Plan {
    /// The resolved config, `auto`s of the machine resolved too.
    pub config: RunConfig,
    /// The run's directory, locked by the caller.
    pub run: RunDir,
    /// Identity of the run.
    pub run_id: String,
    /// Ranks to start.
    pub world_size: usize,
    /// CPU threads of each.
    pub threads: usize,
    /// The trainer's binary.
    pub trainer: PathBuf,
    /// Where the dynamic linker shall look for libtorch.
    pub library_path: Option<OsString>,
    /// The last generation of earlier launchers; 0: none.
    pub last_generation: u64,
    /// Newest step that earlier launchers committed.
    pub committed: Option<u64>,
    /// Earlier resumes at a step that was not the newest.
    pub branches: Vec<Branch>,
    /// Step that the first generation must continue from.
    pub first_step: Option<u64>,
    /// Restarts after a failure so far.
    pub restarts: u64,
    /// What earlier launchers spent the run's time on.
    pub ledger: Ledger,
    /// Set where agents start the ranks.
    pub cluster: Option<ClusterPlan>,
    /// The nodes of the last generation by place, where its ranks may still run: its coordinator
    /// ended without a word.
    pub adopt: Option<Vec<String>>,
    /// Whether the run may begin from its initial weights.
    pub may_begin: bool,
    /// Step after which it is saved and stopped.
    pub stop_after: Option<u64>,
    /// Where checkpoints are copied to, and read from where they are missing here.
    pub remote: Option<Place>,
}

mod checkpoints;
mod elsewhere;

struct Executor {
    plan: Plan,
    state: State,
    recorder: Recorder,
    view: View,
    store: Store,
    ranks: Vec<RankHandle>,
    /// The ranks' machines, where agents start them.
    elsewhere: Option<Elsewhere>,
    /// The copying of checkpoints to an object store.
    copies: Option<Copies>,
    inputs: mpsc::Sender<Input>,
    searches: mpsc::Sender<Result<Restored, String>>,
    generation_start: Instant,
    has_stepped: bool,
    is_first_search: bool,
    finish: Option<(i32, String)>,
    /// The first cause that was printed last.
    told_cause: String,
}

/// Runs the run to its end; returns the exit code. `begun` is written to `events.jsonl` first, as
/// `(kind, fields)`.
pub fn supervise(
    plan: Plan,
    view: View,
    begun: Vec<(&'static str, serde_json::Value)>,
) -> std::io::Result<i32> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // Ranks are spawned on this thread, which lives as long as the launcher.
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let (inputs, received) = mpsc::channel(NUM_INPUTS);
        let (searches, found) = mpsc::channel(1);
        let (nodes, happened) = match &plan.cluster {
            Some(cluster) => {
                let (nodes, happened) = Nodes::listen(cluster.clone(), &plan.run).await?;
                (Some(nodes), Some(happened))
            }
            None => (None, None),
        };
        let mut executor = Executor::new(plan, view, inputs, searches);
        executor.elsewhere = nodes.map(Elsewhere::new);
        let copied = executor.start_copies()?;
        for (kind, fields) in begun {
            executor.recorder.event(kind, fields);
        }
        executor.run(received, found, happened, copied).await
    })
}

/// The next signal, where it is listened to; never, otherwise.
async fn received(signal: &mut Option<Signal>) -> Option<()> {
    match signal {
        Some(signal) => signal.recv().await,
        None => std::future::pending().await,
    }
}

impl Executor {
    fn new(
        plan: Plan,
        mut view: View,
        inputs: mpsc::Sender<Input>,
        searches: mpsc::Sender<Result<Restored, String>>,
    ) -> Self {
        let policy = Policy {
            has_agents: plan.cluster.is_some(),
            has_last_step: plan.stop_after.is_some(),
            hang: Duration::from_secs(plan.config.restart.hang_timeout_s),
            ..Policy::new(plan.world_size, plan.config.restart.max_no_progress)
        };
        let policy = policy.outlasting(Duration::from_secs(plan.config.cluster.timeout_s));
        let state = State::new(policy, plan.last_generation);
        let status = Status {
            name: plan.config.name.clone(),
            run_id: plan.run_id.clone(),
            pid: std::process::id(),
            state: "starting".into(),
            generation: plan.last_generation,
            steps: plan.config.training.steps,
            last_checkpoint: plan.committed,
            restarts: plan.restarts,
            started: crate::time::now(),
            ..Status::default()
        };
        let recorder = Recorder::open(plan.run.clone(), status, plan.ledger.clone());
        view.begin(plan.config.training.steps);
        Self {
            plan,
            state,
            recorder,
            view,
            store: Store::default(),
            ranks: Vec::new(),
            elsewhere: None,
            copies: None,
            inputs,
            searches,
            generation_start: Instant::now(),
            has_stepped: false,
            is_first_search: true,
            finish: None,
            told_cause: String::new(),
        }
    }

    async fn run(
        &mut self,
        mut inputs: mpsc::Receiver<Input>,
        mut searches: mpsc::Receiver<Result<Restored, String>>,
        mut happened: Option<mpsc::Receiver<Happening>>,
        mut copied: Option<mpsc::Receiver<CopyNews>>,
    ) -> std::io::Result<i32> {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut quit = signal(SignalKind::quit())?;
        // A terminal that goes away stops the run, but for `nohup`.
        let mut hangup = match rank_protocol::signals::ignores_hangup() {
            false => Some(signal(SignalKind::hangup())?),
            true => None,
        };
        self.update_status();
        if !self.expect_ranks_elsewhere() {
            self.handle(Event::Begin { committed: self.plan.committed });
        }
        let mut num_signals = 0;
        while self.finish.is_none() || self.still_copies() {
            let wake = tokio::time::Instant::from_std(self.next_wake());
            let by = tokio::select! {
                Some(input) = inputs.recv() => { self.take(input); None }
                Some(search) = searches.recv() => { self.take_search(search); None }
                Some(happening) = next_of(&mut happened) => { self.happened(happening); None }
                news = next_of_copies(&mut copied) => { self.copied(news); None }
                _ = interrupt.recv() => Some("SIGINT"),
                _ = terminate.recv() => Some("SIGTERM"),
                Some(_) = received(&mut hangup) => Some("SIGHUP"),
                _ = quit.recv() => { num_signals += 1; Some("SIGQUIT") }
                () = tokio::time::sleep_until(wake) => { self.wake(); None }
            };
            if let Some(by) = by {
                num_signals += 1;
                let by = by.to_owned();
                self.end_copies_once_over();
                match num_signals {
                    1 => self.asked_to_stop(by),
                    _ => self.handle(Event::StopNow { by }),
                }
            }
            self.look_elsewhere();
        }
        let (code, reason) = self.finish.take().unwrap_or((exit_code::FAILED, String::new()));
        if let Some(elsewhere) = &mut self.elsewhere {
            elsewhere.nodes.over(code, &reason).await;
        }
        Ok(self.end(code, reason))
    }

    fn next_wake(&self) -> Instant {
        let times = [self.state.next_tick(), self.store.next_deadline()];
        let next_status = self.recorder.next_write() + Duration::from_millis(500);
        let next = times.into_iter().flatten().fold(next_status, Instant::min);
        self.elsewhere.as_ref().map_or(next, |elsewhere| next.min(elsewhere.next_wake()))
    }

    fn wake(&mut self) {
        let now = Instant::now();
        let replies = self.store.expire(now);
        self.reply(replies);
        self.wake_elsewhere(now);
        self.handle(Event::Tick);
        if self.recorder.next_write() <= now {
            self.update_status();
        }
    }

    fn take(&mut self, input: Input) {
        if input.generation != self.state.generation() {
            return;
        }
        let rank = input.rank;
        match input.news {
            News::Message(message) => self.hear(rank, message),
            News::Garbled(error) => {
                tracing::error!("rank {rank} speaks nonsense: {error}");
                if let Some(handle) = self.ranks.get(rank) {
                    handle.kill();
                }
            }
            News::Exited { exit, last_lines } => {
                tracing::debug!("rank {rank} {}", exit.describe());
                self.handle(Event::Exited { rank, exit, last_lines });
                self.update_status();
            }
        }
    }

    fn hear(&mut self, rank: usize, message: FromRank) {
        match message {
            FromRank::Hello { pid, build, .. } => {
                tracing::debug!("rank {rank} is process {pid}");
                let ours = env!("CARGO_PKG_VERSION");
                if build != ours {
                    let reason = format!("the trainer is of build {build}, the launcher of {ours}");
                    self.handle(Event::Broken { code: exit_code::CONFIG, reason });
                }
            }
            FromRank::Phase(phase) => {
                if rank == 0 && self.state.is_working() {
                    self.recorder.ledger.phase(phase, Instant::now());
                }
                self.handle(Event::Phase { rank, phase });
            }
            FromRank::Step(report) => {
                self.handle(Event::Step { rank, step: report.step });
                if rank == 0 {
                    self.show_step(&report);
                }
            }
            FromRank::CheckpointCommitted { step } => self.committed(step),
            FromRank::Here(position) => {
                let waits = position.waits.join("; ");
                tracing::info!("rank {rank} is in {} {waits}", position.phase.name());
                self.handle(Event::Here { rank, position });
            }
            FromRank::Event(event) => self.hear_event(rank, event),
            FromRank::Failure(report) => {
                self.handle(Event::Reported { rank, report: *report });
            }
            // What only `mpirun`'s tasks need.
            FromRank::Output { .. } | FromRank::Exiting { .. } => {}
            FromRank::Finished { .. } => self.handle(Event::Finished { rank }),
            FromRank::StopRequested { signal } => {
                self.handle(Event::RankAskedToStop { rank, signal });
            }
            FromRank::Store { id, request } => {
                let requester = Requester { rank, id };
                let replies = self.store.handle(requester, request, Instant::now());
                self.reply(replies);
            }
        }
    }

    fn reply(&self, replies: Vec<(Requester, rank_protocol::store::StoreReply)>) {
        for (to, reply) in replies {
            if let Some(rank) = self.ranks.get(to.rank) {
                rank.tell(ToRank::Store { id: to.id, reply });
            }
        }
    }

    fn show_step(&mut self, report: &rank_protocol::StepReport) {
        let has_adopted = self.elsewhere.as_ref().is_some_and(|e| e.has_adopted);
        if self.state.is_working() {
            self.recorder.ledger.stepped(report, has_adopted, Instant::now());
        }
        if !self.has_stepped {
            self.has_stepped = true;
            let seconds = self.generation_start.elapsed().as_secs_f64();
            let fields = json!({ "step": report.step, "seconds": seconds });
            self.recorder.event("first_step", fields);
        }
        let eta_s = self.recorder.step(report);
        self.view.step(report, self.plan.config.training.steps, eta_s);
        if self.recorder.next_write() <= Instant::now() {
            self.update_status();
        }
    }

    fn handle(&mut self, event: Event) {
        for action in self.state.handle(event, Instant::now()) {
            self.act(action);
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::FindCheckpoint => self.search(),
            Action::Gather { step } => {
                self.recorder.ledger.enter(Spent::Rendezvous, Instant::now());
                if let Some(elsewhere) = &mut self.elsewhere {
                    elsewhere.gather(step);
                }
            }
            Action::Spawn { generation, resume_step } => self.spawn(generation, resume_step),
            Action::AskToStop => self.tell_all(&ToRank::Stop { now: false }),
            Action::Abort { reason } => {
                tracing::info!("ending generation {}: {reason}", self.state.generation());
                self.tell_all(&ToRank::Abort { reason });
                self.ranks.iter().for_each(RankHandle::terminate);
            }
            Action::Kill { reason } => {
                tracing::info!("killing the ranks: {reason}");
                self.ranks.iter().for_each(RankHandle::kill);
            }
            Action::RecordFailure(cause) => {
                let is_hang = cause.class == FailureClass::Hang;
                self.recorder.ledger.failed(is_hang, Instant::now());
                self.recorder.failure(&cause);
            }
            Action::RecordFirstCause(cause) => {
                self.told_cause = cause.summary();
                tracing::error!("first cause: {}", self.told_cause);
                self.recorder.first_cause(&cause);
            }
            Action::RecordStop { by, now } => {
                match now {
                    true => tracing::info!("{by}: stopping at once; the step is not saved"),
                    false => {
                        tracing::info!("{by}: finishing the step and saving; again to stop at once")
                    }
                }
                self.recorder.event("stop_requested", json!({ "by": by, "now": now }));
                self.update_status();
            }
            Action::RecordStall(stall) => {
                tracing::warn!("{}", stall.describe());
                self.recorder.event("stalled", json!(stall));
            }
            Action::AskWhere => self.tell_all(&ToRank::Where),
            Action::Finish { code, reason } => {
                self.finish_copies(code);
                self.finish = Some((code, reason));
            }
        }
    }

    fn tell_all(&self, message: &ToRank) {
        for rank in &self.ranks {
            rank.tell(message.clone());
        }
    }

    fn spawn(&mut self, generation: u64, resume_step: Option<u64>) {
        let has_adopted =
            self.elsewhere.as_mut().is_some_and(|e| std::mem::take(&mut e.has_adopted));
        let is_restart = has_adopted || self.recorder.status.generation > self.plan.last_generation;
        self.recorder.status.restarts += u64::from(is_restart);
        self.recorder.status.generation = generation;
        self.recorder.forget_speed();
        self.store = Store::default();
        self.generation_start = Instant::now();
        self.has_stepped = false;
        self.recorder.ledger.enter(Spent::Start, self.generation_start);
        self.recorder.tell_ledger();
        let fields = json!({
            "world_size": self.plan.world_size,
            "resume_step": resume_step,
            "is_restart": is_restart,
        });
        self.recorder.event("generation_started", fields);
        if let Some(step) = resume_step {
            tracing::info!("generation {generation} continues from step {step}");
        }
        self.ranks.clear();
        if self.elsewhere.is_some() {
            self.start_elsewhere(generation, resume_step);
            return self.update_status();
        }
        let started = match self.plan.config.cluster.kind {
            ClusterKind::Mpi => self.start_under_mpirun(generation),
            _ => self.start_ranks(generation),
        };
        for (rank, handle) in self.ranks.iter().enumerate() {
            handle.tell(ToRank::Assignment(self.assignment(generation, rank, resume_step)));
        }
        match started {
            Ok(()) => self.update_status(),
            Err((rank, error)) => self.could_not_start(rank, &error),
        }
    }

    /// Starts every rank; an error comes with the one that it was.
    fn start_ranks(&mut self, generation: u64) -> Result<(), (usize, std::io::Error)> {
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

    fn start_under_mpirun(&mut self, generation: u64) -> Result<(), (usize, std::io::Error)> {
        let log = |rank| RankLog::open(&self.plan.run.log(generation, rank), rank);
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
            let exit = super::cause::Exit::default();
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

    fn assignment(&self, generation: u64, rank: usize, resume_step: Option<u64>) -> Assignment {
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
            failures: self.recorder.status.restarts,
            observed_s: self.recorder.ledger.sums(Instant::now()).wall_s as u64,
        }
    }

    fn update_status(&mut self) {
        let ranks = self.state.ranks().zip(&self.ranks).enumerate();
        let ranks = ranks.map(|(rank, ((state, phase, step), handle))| RankStatus {
            rank,
            node: self.elsewhere.as_ref().and_then(|elsewhere| elsewhere.nodes.node_of(rank)),
            pid: handle.pid(),
            state: state.name().to_owned(),
            phase: phase.name().to_owned(),
            step,
        });
        self.recorder.status.ranks = ranks.collect();
        self.recorder.status.last_checkpoint = self.state.committed();
        if self.recorder.status.exit_code.is_none() {
            let state = if self.finish.is_some() { "copying" } else { self.state.name() };
            self.recorder.status.state = state.to_owned();
        }
        self.recorder.write_status();
    }

    fn end(&mut self, code: i32, reason: String) -> i32 {
        self.view.end();
        let (state, kind) = ended(code);
        self.recorder.tell_ledger();
        let fields = json!({
            "exit_code": code,
            "step": self.recorder.status.step,
            "committed": self.state.committed(),
            "reason": reason,
        });
        self.recorder.event(kind, fields);
        self.recorder.status.eta_s = None;
        self.recorder.status.exit_code = Some(code);
        self.recorder.status.reason = Some(reason.clone());
        self.recorder.status.state = state.to_owned();
        self.update_status();
        match code {
            exit_code::DONE | exit_code::PREEMPTED => tracing::info!("{state}: {reason}"),
            _ => {
                // The cause has just been said; what follows from it has not.
                let rest = reason.strip_prefix(&self.told_cause).unwrap_or(&reason);
                tracing::error!("{state}: {}", rest.trim_start_matches("; "));
            }
        }
        code
    }
}
