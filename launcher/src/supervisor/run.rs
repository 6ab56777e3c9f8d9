//! Carries out what the policy decides. The sole owner of a run's state; every event passes through
//! one loop on one thread.

use super::ledger::{Ledger, Spent};
use super::pace::pace_of;
use super::rank::{Input, News, RankHandle};
use super::record::{RankStatus, Recorder, Status, ended};
use super::restore::{Branch, Restored};
use super::state::{Action, Elastic, Event, Policy, State};
use crate::cluster::nodes::{ClusterPlan, Happening, Nodes};
use crate::cluster::store::keeper::Keeper;
use crate::remote::Place;
use crate::remote::upload::Uploader;
use crate::remote::uploads::News as CopyNews;
use crate::view::View;
use checkpoints::next_of_copies;
use elsewhere::{Elsewhere, Next, changed, next_of};
use memory::Doubt;
use rank_protocol::store::{Requester, Store};
use rank_protocol::{FailureClass, FromRank, Phase, RollBack, RunDir, Steps, ToRank, exit_code};
use run_config::RunConfig;
use serde_json::json;
use signals::Signals;
use spawning::keeps_processes;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Where the ranks of one machine reach each other.
const LOOPBACK: &str = "127.0.0.1";

/// Messages of all ranks that wait for the loop; a rank that says more waits.
const NUM_INPUTS: usize = 4096;
/// A wake-up that comes so much too late was slept through, by this process or the machine.
const AWAY: Duration = Duration::from_secs(1);
/// Signals within so short a time are one request to stop: terminals and managers send several.
const SAME_REQUEST: Duration = Duration::from_secs(1);

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
    /// Newest step that was ever committed, here still or not, where nobody went back behind it.
    pub ever_committed: Option<u64>,
    /// Earlier resumes at a step that was not the newest.
    pub branches: Vec<Branch>,
    /// What each generation went on from.
    pub resumes: Vec<Branch>,
    /// Steps that the run went back behind: their samples are left out.
    pub roll_backs: Vec<RollBack>,
    /// Step that the first generation must continue from.
    pub first_step: Option<u64>,
    /// Restarts after a failure so far.
    pub restarts: u64,
    /// Failures so far of what the run runs on.
    pub failures: u64,
    /// What earlier launchers spent the run's time on.
    pub ledger: Ledger,
    /// Set where agents start the ranks.
    pub cluster: Option<ClusterPlan>,
    /// Whether nodes of the last generation may be there without having been told of its end: its
    /// coordinator ended without a word.
    pub has_lost_coordinator: bool,
    /// The nodes of that generation by place, where its ranks may still run.
    pub adopt: Option<Adopt>,
    /// Holds the run, where its state is in a store.
    pub keeper: Option<Keeper>,
    /// Whether the run may begin from its initial weights.
    pub may_begin: bool,
    /// Step after which it is saved and stopped.
    pub stop_after: Option<u64>,
    /// Where checkpoints are copied to, and read from where they are missing here.
    pub remote: Option<Place>,
    /// The folder of checkpoints in memory, where ranks are started here.
    pub memory: Option<PathBuf>,
    /// Steps of which the ranks write a timeline.
    pub profile: Option<Steps>,
}

/// The generation of an earlier coordinator.
pub struct Adopt {
    /// Its nodes, by place.
    pub nodes: Vec<String>,
    /// Its ranks.
    pub num_ranks: usize,
}

mod checkpoints;
mod elsewhere;
mod memory;
mod roll_backs;
mod signals;
mod spawning;

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
    copies: Option<Uploader>,
    inputs: mpsc::Sender<Input>,
    searches: mpsc::Sender<Result<Restored, String>>,
    /// Failures of what the run runs on: how often one is to be expected follows from them.
    failures: u64,
    /// Whether the last generation failed while it read a checkpoint.
    has_failed_to_load: bool,
    /// What that says of the one in the nodes' memories.
    doubt: Doubt,
    generation_start: Instant,
    has_stepped: bool,
    is_first_search: bool,
    /// Whether the generation was ended so that the next one has more ranks.
    is_growing: bool,
    finish: Option<(i32, String)>,
    /// What waits for the store to take in the next generation.
    awaited: Option<(u64, Next)>,
    /// Who holds the run now: this coordinator does nothing any more.
    superseded: Option<String>,
    /// The first cause that was printed last.
    told_cause: String,
}

/// Runs the run to its end; returns the exit code. `begun` is written to `events.jsonl` first, as
/// `(kind, fields)`.
pub fn supervise(
    mut plan: Plan,
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
                let (mut nodes, happened) = Nodes::listen(cluster.clone(), &plan.run).await?;
                nodes.set_run(&plan.run_id);
                if let Some(keeper) = &mut plan.keeper {
                    nodes.set_epoch(keeper.standing().epoch);
                    keeper.announce(nodes.address().clone());
                }
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

impl Executor {
    fn new(
        mut plan: Plan,
        mut view: View,
        inputs: mpsc::Sender<Input>,
        searches: mpsc::Sender<Result<Restored, String>>,
    ) -> Self {
        let restart = &plan.config.restart;
        let elastic = restart.elastic.min_replicas.filter(|_| plan.cluster.is_some());
        let elastic = elastic.map(|_| Elastic {
            wait: Duration::from_secs(restart.elastic.wait_s),
            pause: Duration::from_secs(restart.elastic.grow_pause_s),
            last_step: plan.config.training.steps,
            has_begun: plan.has_lost_coordinator,
        });
        let policy = Policy {
            elastic,
            has_agents: plan.cluster.is_some(),
            has_last_step: plan.stop_after.is_some(),
            keep_processes: keeps_processes(&plan.config),
            hang: Duration::from_secs(restart.hang_timeout_s),
            ..Policy::new(plan.world_size, restart.max_no_progress)
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
        let pace = pace_of(&plan.config, plan.world_size);
        let mut recorder = Recorder::open(plan.run.clone(), status, plan.ledger.clone(), pace);
        recorder.keeper = plan.keeper.take();
        let failures = plan.failures;
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
            failures,
            has_failed_to_load: false,
            doubt: Doubt::default(),
            generation_start: Instant::now(),
            has_stepped: false,
            is_first_search: true,
            is_growing: false,
            finish: None,
            awaited: None,
            superseded: None,
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
        let mut signals = Signals::listen()?;
        let mut standing = self.recorder.keeper.as_ref().map(Keeper::watch);
        self.update_status();
        if !self.expect_ranks_elsewhere() {
            self.handle(Event::Begin { committed: self.plan.committed });
        }
        let mut first_signal = None;
        while self.finish.is_none() && self.superseded.is_none() {
            let wake = tokio::time::Instant::from_std(self.next_wake());
            let by = tokio::select! {
                Some(input) = inputs.recv() => { self.take(input); None }
                Some(search) = searches.recv() => { self.take_search(search); None }
                Some(happening) = next_of(&mut happened) => { self.happened(happening); None }
                () = changed(&mut standing) => { self.store_changed(); None }
                news = next_of_copies(&mut copied) => { self.copied(news); None }
                signal = signals.next() => Some(signal),
                () = tokio::time::sleep_until(wake) => None,
            };
            let now = Instant::now();
            let late = now.saturating_duration_since(wake.into_std());
            if late >= AWAY {
                self.handle(Event::WasAway { time: late });
            }
            if wake.into_std() <= now {
                self.wake();
            }
            match by {
                None => {}
                // A scheduler's warning that time is nearly up; never a wish to stop at once.
                Some("SIGUSR2") => self.asked_to_stop("SIGUSR2".to_owned()),
                Some(by) => {
                    let first = *first_signal.get_or_insert(now);
                    match by == "SIGQUIT" || now.duration_since(first) >= SAME_REQUEST {
                        true => self.handle(Event::StopNow { by: by.to_owned() }),
                        false => self.asked_to_stop(by.to_owned()),
                    }
                }
            }
            self.look_elsewhere();
        }
        if self.superseded.is_none() {
            let (code, reason) = self.finish.clone().unwrap_or_default();
            // Nodes are kept waiting for nothing that is no longer theirs.
            if let Some(elsewhere) = &mut self.elsewhere {
                elsewhere.nodes.over(code, &reason).await;
            }
            drop(happened);
            self.update_status();
            self.outlast_copies(&mut copied, &mut signals, &mut standing).await;
        }
        if let Some(holder) = self.superseded.take() {
            return Ok(self.give_way(&holder));
        }
        let (code, reason) = self.finish.take().unwrap_or((exit_code::FAILED, String::new()));
        Ok(self.end(code, reason))
    }

    fn next_wake(&self) -> Instant {
        let times = [self.state.next_tick(), self.store.next_deadline()];
        let next = times.into_iter().flatten().fold(self.recorder.wake(), Instant::min);
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
                // One status for all that end at one moment.
                self.recorder.is_stale = true;
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
                self.recorder.paced(rank, &report);
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
            // What only `mpirun`'s tasks need, and what agents keep to themselves.
            FromRank::Output { .. }
            | FromRank::Exiting { .. }
            | FromRank::BundleWritten { .. }
            | FromRank::BundleKept { .. } => {}
            FromRank::Finished { .. } => self.handle(Event::Finished { rank }),
            FromRank::Released => {
                self.handle(Event::Released { rank });
                self.recorder.is_stale = true;
            }
            FromRank::Joined { .. } => tracing::debug!("rank {rank} goes on in its process"),
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
            Action::FindCheckpoint => self.when_claimed(Next::Search),
            Action::Gather { step, num_ranks, fewer_after } => {
                self.recorder.ledger.enter(Spent::Rendezvous, Instant::now());
                if let Some(elsewhere) = &mut self.elsewhere {
                    elsewhere.gather(step, num_ranks, fewer_after);
                }
            }
            Action::Spawn { generation, resume_step, kept } => {
                self.spawn(generation, resume_step, &kept);
            }
            Action::AskToStop => self.tell_all(&ToRank::Stop { now: false }),
            Action::Abort { reason, ranks } => {
                let (generation, count) = (self.state.generation(), ranks.len());
                tracing::info!("ending generation {generation}, {count} processes: {reason}");
                for rank in self.handles(&ranks) {
                    rank.tell(ToRank::Abort { reason: reason.clone() });
                    rank.terminate();
                }
            }
            Action::Release { reason, ranks } => {
                let (generation, count) = (self.state.generation(), ranks.len());
                tracing::info!("ending generation {generation}, {count} ranks stay: {reason}");
                for rank in self.handles(&ranks) {
                    rank.tell(ToRank::Release { generation, reason: reason.clone() });
                }
            }
            Action::Kill { reason, ranks } => {
                tracing::info!("killing {} ranks: {reason}", ranks.len());
                self.handles(&ranks).for_each(RankHandle::kill);
            }
            Action::RecordFailure(cause) => {
                let is_hang = cause.class == FailureClass::Hang;
                self.recorder.ledger.failed(is_hang, Instant::now());
                self.recorder.failure(&cause);
            }
            Action::RecordGrowth { from, to } => {
                self.is_growing = true;
                // The step under way is done again.
                self.recorder.ledger.failed(false, Instant::now());
                self.recorder.event("growing", json!({ "from_ranks": from, "to_ranks": to }));
            }
            Action::RecordFirstCause(cause) => {
                self.is_growing = false;
                self.failures += u64::from(cause.class.is_of_the_machines());
                self.has_failed_to_load = cause.phase == Phase::Load;
                self.doubt.failed(&cause);
                self.told_cause = cause.summary();
                tracing::error!("first cause: {}", self.told_cause);
                self.recorder.first_cause(&cause);
                self.blame_node(&cause);
            }
            Action::RecordRollBack(roll_back) => self.record_roll_back(roll_back),
            Action::RecordStop { by, now } => self.record_stop(&by, now),
            Action::RecordStall(stall) => {
                tracing::warn!("{}", stall.describe());
                self.recorder.event("stalled", json!(stall));
            }
            Action::RecordLingering { ranks, time } => self.record_lingering(&ranks, time),
            Action::AskWhere => self.tell_all(&ToRank::Where),
            Action::Finish { code, reason } => self.finish = Some((code, reason)),
        }
    }

    fn record_stop(&mut self, by: &str, now: bool) {
        match now {
            true => tracing::info!("{by}: stopping at once; the step is not saved"),
            false => tracing::info!("{by}: finishing the step and saving; again to stop at once"),
        }
        self.recorder.event("stop_requested", json!({ "by": by, "now": now }));
        self.update_status();
    }

    fn record_lingering(&mut self, ranks: &[usize], time: Duration) {
        let pids: Vec<_> =
            ranks.iter().filter_map(|rank| self.ranks.get(*rank)).map(RankHandle::pid).collect();
        let seconds = time.as_secs();
        let reason = format!(
            "ranks {ranks:?} (processes {pids:?}) were killed {seconds} s ago and are not gone: \
             the system ends none that waits for a device or a file system that is silent"
        );
        tracing::warn!("{reason}");
        let fields = json!({ "ranks": ranks, "pids": pids, "seconds": seconds });
        self.recorder.event("ranks_linger", fields);
        self.recorder.status.alarm = Some(reason);
    }

    fn handles(&self, ranks: &[usize]) -> impl Iterator<Item = &RankHandle> {
        ranks.iter().filter_map(|rank| self.ranks.get(*rank))
    }

    fn tell_all(&self, message: &ToRank) {
        for rank in &self.ranks {
            rank.tell(message.clone());
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
            let is_copying = self.finish.is_some() && self.copies.is_some();
            let state = if is_copying { "copying" } else { self.state.name() };
            self.recorder.status.state = state.to_owned();
        }
        self.recorder.write_status();
    }

    fn end(&mut self, code: i32, reason: String) -> i32 {
        self.view.end();
        let (state, kind) = ended(code);
        self.recorder.ledger.close(Instant::now());
        self.recorder.tell_ledger();
        let fields = json!({
            "exit_code": code,
            "step": self.recorder.status.step,
            "committed": self.state.committed(),
            "reason": reason,
        });
        self.recorder.event(kind, fields);
        self.recorder.status.eta_s = None;
        let status = &mut self.recorder.status;
        (status.memory_checkpoint, status.memory_copied) = (None, None);
        self.recorder.status.exit_code = Some(code);
        self.recorder.status.reason = Some(reason.clone());
        self.recorder.status.state = state.to_owned();
        self.update_status();
        match code {
            exit_code::DONE | exit_code::PREEMPTED => tracing::info!("{state}: {reason}"),
            _ => {
                // The cause has just been said; what follows from it has not.
                let rest = reason.strip_prefix(&self.told_cause).unwrap_or(&reason);
                tracing::error!("{state}: {}", rest.trim_start_matches([';', ',', ' ']));
            }
        }
        code
    }
}
