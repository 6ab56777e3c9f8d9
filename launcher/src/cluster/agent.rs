//! `phalanx agent`: starts the ranks of this node, and passes on what they and the coordinator say
//! to each other.
//!
//! The loss of the coordinator ends no rank: the agent keeps what they say and connects again.

use super::depot::{Command, News as DepotNews};
use super::journal::Journal;
use super::nodes::host_name;
use super::server::raise_limit;
use super::wire;
use crate::error::UserError;
use crate::health::{self, Depth};
use crate::machine;
use crate::runs;
use crate::supervisor::rank::{Input, News, RankHandle};
use crate::view::View;
use connect::Whereabouts;
use memory::{Kept, keep_in_memory, next_of_depot};
use outside::{Machine, Outside};
use rank_protocol::agent::{ALIVE_EVERY_MS, FromAgent, NodeInfo, Start, ToAgent};
use rank_protocol::session::{Numbered, Session};
use rank_protocol::{FromRank, RunDir, ToRank, exit_code};
use run_config::RunConfig;
use spares::Spares;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use trainer::Trainer;

pub mod connect;
mod link;
mod memory;
pub(super) mod outside;
mod spares;
mod starting;
mod trainer;

/// Messages of all ranks that wait for the loop.
const NUM_INPUTS: usize = 4096;
/// Messages to the coordinator that are kept until it has taken them in.
const NUM_KEPT: usize = 64 << 10;
/// Time between two attempts.
const RETRY: Duration = Duration::from_millis(500);
/// The same, where each asks a store for the coordinator.
const STORE_RETRY: Duration = Duration::from_secs(1);
/// Time between two looks into a store, whether another coordinator has taken over.
const LOOK: Duration = Duration::from_secs(5);
/// Silence after which a connection counts as lost.
const SILENCE: Duration = Duration::from_secs(5);
/// Longest time without a coordinator while no rank runs here.
const PATIENCE: Duration = Duration::from_secs(600);
/// Characters of a rank's last lines that are passed on.
const MAX_LINE_CHARS: usize = 2000;

/// Arguments of `phalanx agent`.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct AgentArgs {
    /// The run's directory or name, as all nodes see it.
    pub run: String,
    /// This node's name; the host's, where it is not given.
    #[arg(long)]
    pub name: Option<String>,
    /// This node's place in the infrastructure's order.
    #[arg(long)]
    pub index: Option<u64>,
    /// Address at which the ranks of other nodes reach those of this one; by default that from
    /// which the coordinator is reached.
    #[arg(long)]
    pub address: Option<String>,
    /// The coordinator, HOST:PORT; by default what it wrote into the run's directory.
    #[arg(long, value_name = "HOST:PORT")]
    pub coordinator: Option<String>,
    /// When the launcher started whose end is no news: another is about to go on with the run.
    #[arg(skip)]
    pub after: Option<String>,
}

/// Sends again what was not taken in, and then what the returned queue is given, over the
/// connection that has this number from now on.
pub(super) type Talk =
    Box<dyn FnOnce(u64, Vec<Numbered<FromAgent>>) -> mpsc::Sender<Numbered<FromAgent>>>;

/// What happened on the connection.
pub(super) enum Happening {
    Connected {
        conversation: u64,
        taken: u64,
        epoch: u64,
        talk: Talk,
    },
    Failed {
        why: String,
    },
    Refused {
        code: i32,
        why: String,
    },
    /// A store names a coordinator of this epoch.
    Seen {
        epoch: u64,
    },
    Said {
        connection: u64,
        frame: Box<Numbered<ToAgent>>,
    },
    Ended {
        connection: u64,
        why: String,
    },
}

/// What an agent knows and decides; what it does elsewhere is [`Outside`]'s. Its time is that of
/// [`Agent::at`].
pub(super) struct Agent {
    outside: Box<dyn Outside>,
    now: Instant,
    info: NodeInfo,
    /// The latest coordinator's that was heard of.
    epoch: u64,
    next_look: Instant,
    session: Session<FromAgent>,
    conversation: u64,
    connection: u64,
    outbox: Option<mpsc::Sender<Numbered<FromAgent>>>,
    is_connecting: bool,
    next_attempt: Instant,
    next_alive: Instant,
    /// When the coordinator was last heard of.
    heard: Instant,
    has_told_loss: bool,
    /// When the run's events were last read for its end.
    looked: Instant,
    ranks: BTreeMap<usize, RankHandle>,
    /// What each rank of the generation said last (why it fails, that it has finished), and the
    /// ends of those that have ended.
    last_words: BTreeMap<usize, Vec<FromAgent>>,
    exited: Vec<usize>,
    /// Ranks that have let go of the generation, and whose processes wait for the next.
    waiting: BTreeSet<usize>,
    spares: Spares,
    /// What is kept of checkpoints in memory here.
    kept: Kept,
    journal: Journal,
    /// The newest step and phase of each rank, while there is nobody to tell.
    unsaid: BTreeMap<(usize, bool), FromAgent>,
    generation: u64,
    /// A generation that waits for the ranks of the last one to be gone.
    next: Option<Box<Start>>,
    /// What its ranks were told meanwhile.
    untold: Vec<(usize, ToRank)>,
    end: Option<(i32, String)>,
}

/// Runs this node's share of a run to its end; returns the exit code.
pub fn run(args: AgentArgs) -> Result<i32, UserError> {
    let mut view = View::start(false);
    let run = find(&args.run)?;
    let config = RunConfig::load(&run.config(), &[])?.config;
    let trainer = Trainer::find(&config)?;
    raise_limit();
    let whereabouts = Whereabouts::new(args.coordinator.clone(), &config)?;
    let (depot, depot_news) = match keep_in_memory(&run, &config)? {
        Some((depot, news)) => (Some(depot), Some(news)),
        None => (None, None),
    };
    let health = config.restart.health_check.then(|| health::check(run.root(), Depth::Full));
    for note in health.iter().flat_map(|health| &health.notes) {
        tracing::info!("{note}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| UserError::failed(format!("the agent cannot start: {error}")))?;
    // Ranks are spawned on this thread, which lives as long as the agent.
    let code = tokio::task::LocalSet::new().block_on(&runtime, async {
        let (inputs, received) = mpsc::channel(NUM_INPUTS);
        let (happenings, happened) = mpsc::channel(wire::NUM_QUEUED);
        let info = NodeInfo { health, ..describe(&args) };
        let after = args.after;
        let warms_up = config.restart.warm_spares;
        let machine =
            Machine { run, whereabouts, after, trainer, depot, warms_up, inputs, happenings };
        let mut agent = Agent::new(Box::new(machine), info, Instant::now());
        agent.run(received, happened, depot_news).await
    });
    view.end();
    code.map_err(|error| UserError::failed(format!("the agent failed: {error}")))
}

/// The run, which the coordinator may not have made yet.
fn find(name: &str) -> Result<RunDir, UserError> {
    let deadline = Instant::now() + PATIENCE;
    let mut has_told = false;
    loop {
        let error = match runs::find(name) {
            Ok(run) => return Ok(run),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(error) => error,
        };
        if !std::mem::replace(&mut has_told, true) {
            tracing::info!("waiting for the coordinator to make the run: {}", error.message);
        }
        std::thread::sleep(RETRY);
    }
}

/// A line that fits into a message together with others.
fn shortened(line: &str) -> String {
    match line.char_indices().nth(MAX_LINE_CHARS) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.to_owned(),
    }
}

fn boot_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

fn describe(args: &AgentArgs) -> NodeInfo {
    NodeInfo {
        name: args.name.clone().unwrap_or_else(host_name),
        index: args.index,
        boot_id: boot_id(),
        agent: format!("{}-{}", std::process::id(), crate::time::now()),
        address: args.address.clone().unwrap_or_default(),
        cores: machine::num_cores(),
        gpus: machine::num_gpus(),
        build: env!("CARGO_PKG_VERSION").to_owned(),
        health: None,
    }
}

impl Agent {
    pub(super) fn new(outside: Box<dyn Outside>, info: NodeInfo, now: Instant) -> Self {
        Self {
            outside,
            now,
            info,
            epoch: 0,
            next_look: now,
            session: Session::new(NUM_KEPT),
            conversation: 0,
            connection: 0,
            outbox: None,
            is_connecting: false,
            next_attempt: now,
            next_alive: now,
            heard: now,
            has_told_loss: false,
            looked: now,
            ranks: BTreeMap::new(),
            last_words: BTreeMap::new(),
            exited: Vec::new(),
            waiting: BTreeSet::new(),
            spares: Spares::new(now),
            kept: Kept::default(),
            journal: Journal::default(),
            unsaid: BTreeMap::new(),
            generation: 0,
            next: None,
            untold: Vec::new(),
            end: None,
        }
    }

    /// It is this late.
    pub(super) fn at(&mut self, now: Instant) -> &mut Self {
        self.now = now;
        self
    }

    /// When [`Agent::wake`] is next of use.
    pub(super) fn next_wake(&self) -> Instant {
        match self.is_connecting || self.outbox.is_some() {
            true => self.next_alive,
            false => self.next_alive.min(self.next_attempt),
        }
    }

    /// The exit code, and why it ends, once it does.
    pub(super) fn end(&self) -> Option<&(i32, String)> {
        self.end.as_ref()
    }

    async fn run(
        &mut self,
        mut inputs: mpsc::Receiver<Input>,
        mut happened: mpsc::Receiver<Happening>,
        mut depot: Option<mpsc::Receiver<DepotNews>>,
    ) -> std::io::Result<i32> {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut user = signal(SignalKind::user_defined2())?;
        let mut num_signals = 0;
        while self.end().is_none() {
            let wake = self.next_wake();
            let now = Instant::now;
            let by = tokio::select! {
                Some(input) = inputs.recv() => { self.at(now()).take(input); None }
                Some(happening) = happened.recv() => { self.at(now()).happened(happening); None }
                Some(news) = next_of_depot(&mut depot) => { self.at(now()).hear_depot(news); None }
                _ = interrupt.recv() => Some("SIGINT"),
                _ = terminate.recv() => Some("SIGTERM"),
                // A scheduler's warning; however often it comes, the run has time to save.
                _ = user.recv() => { self.at(now()).asked_to_stop("SIGUSR2", 1); None }
                () = tokio::time::sleep_until(wake.into()) => { self.at(now()).wake(); None }
            };
            if let Some(by) = by {
                num_signals += 1;
                self.asked_to_stop(by, num_signals);
            }
        }
        let (code, reason) = self.end.take().unwrap_or((exit_code::FAILED, String::new()));
        tracing::info!("the run is over here: {reason}");
        self.clear(&mut inputs).await;
        // What was said last is being written.
        tokio::time::sleep(Duration::from_millis(50)).await;
        Ok(code)
    }

    /// A stop of one node is a stop of the run.
    fn asked_to_stop(&mut self, by: &str, num_signals: u32) {
        if num_signals > 1 {
            self.end = Some((exit_code::INTERRUPTED, format!("stopped at once by {by}")));
            return;
        }
        if self.generation == 0 {
            self.end = Some((exit_code::PREEMPTED, format!("{by}, and no rank runs here")));
            return;
        }
        tracing::info!("{by}: the run finishes the step and saves; again to stop here at once");
        self.tell(FromAgent::StopRequested { signal: by.to_owned() });
    }

    pub(super) fn wake(&mut self) {
        let now = self.now;
        if now >= self.next_alive {
            self.next_alive = now + Duration::from_millis(ALIVE_EVERY_MS);
            let alive = self.session.alive();
            self.send(alive);
            if self.outbox.is_some() && now.saturating_duration_since(self.heard) >= SILENCE {
                self.lost("it is silent");
            }
            if self.outbox.is_some() && now >= self.next_look {
                self.look_for_another();
            }
        }
        if self.outbox.is_none() && !self.is_connecting && now >= self.next_attempt {
            self.connect();
        }
        self.warm_up();
        let silence = now.saturating_duration_since(self.heard);
        if self.ranks.is_empty() && silence >= PATIENCE {
            let reason = format!("no coordinator for {} s", PATIENCE.as_secs());
            self.end = Some((exit_code::FAILED, reason));
        }
    }

    pub(super) fn happened(&mut self, happening: Happening) {
        match happening {
            Happening::Connected { conversation, taken, epoch, talk } => {
                self.connected((conversation, taken), epoch, talk);
            }
            Happening::Failed { why } => {
                self.is_connecting = false;
                self.next_attempt = self.now + self.retry();
                self.look_for_the_end();
                if !self.has_told_loss {
                    self.has_told_loss = true;
                    tracing::info!("waiting for the coordinator: {why}");
                }
            }
            Happening::Refused { code, why } => {
                self.is_connecting = false;
                self.end = Some((code, format!("refused by the coordinator: {why}")));
            }
            Happening::Seen { epoch } if epoch > self.epoch => {
                self.epoch = epoch;
                if self.outbox.is_some() {
                    self.lost("another has taken over");
                }
            }
            Happening::Seen { .. } => {}
            Happening::Said { connection, frame } if connection == self.connection => {
                self.heard = self.now;
                match self.session.take(*frame) {
                    Ok(Some(message)) => self.obey(message),
                    Ok(None) => {}
                    Err(error) => self.lost(&error.to_string()),
                }
            }
            Happening::Ended { connection, why } if connection == self.connection => {
                if self.outbox.is_some() {
                    self.lost(&why);
                }
            }
            Happening::Said { .. } | Happening::Ended { .. } => {}
        }
    }

    fn obey(&mut self, message: ToAgent) {
        match message {
            ToAgent::Start(start) => {
                let goes_on = |rank: &usize| {
                    start.kept.contains(rank) && start.ranks.iter().any(|place| place.rank == *rank)
                };
                self.waiting.retain(goes_on);
                let others = self.ranks.iter().filter(|(rank, _)| !self.waiting.contains(rank));
                others.for_each(|(_, handle)| handle.kill());
                self.untold.clear();
                self.fetch_for(start);
                self.start_next();
            }
            ToAgent::Terminate { generation, .. } | ToAgent::Kill { generation, .. }
                if self.is_next(generation) =>
            {
                self.drop_next();
            }
            ToAgent::Tell {
                generation,
                message: ToRank::Abort { .. } | ToRank::Release { .. },
                ..
            } if self.is_next(generation) => self.drop_next(),
            ToAgent::Tell { generation, rank, message } if self.is_next(generation) => {
                self.untold.push((rank, message));
            }
            ToAgent::Tell { generation, rank, message } => {
                if generation == self.generation {
                    self.journal.told(rank, &message);
                }
                self.with(generation, rank, |handle| handle.tell(message));
            }
            ToAgent::Terminate { generation, rank } => {
                self.with(generation, rank, RankHandle::terminate);
            }
            ToAgent::Kill { generation, rank } => {
                if generation == self.generation {
                    self.waiting.remove(&rank);
                }
                self.with(generation, rank, RankHandle::kill);
            }
            ToAgent::Forget { but } => self.order(Command::Forget { but }),
            ToAgent::Over { code, reason } => self.end = Some((code, reason)),
        }
    }

    fn with(&self, generation: u64, rank: usize, body: impl FnOnce(&RankHandle)) {
        if generation == self.generation
            && let Some(handle) = self.ranks.get(&rank)
        {
            body(handle);
        }
    }

    /// Passes on what a rank did.
    pub(super) fn take(&mut self, input: Input) {
        if input.generation == 0 {
            return self.spares.take(&input, self.now);
        }
        let Input { generation, rank, news } = input;
        let message = match news {
            News::Message(message) => {
                if generation == self.generation {
                    if self.is_of_memory(rank, &message) {
                        return;
                    }
                    self.journal.said(rank, &message);
                    // One that is being killed for the next generation does not go on in it.
                    if message == FromRank::Released && self.next.is_none() {
                        self.waiting.insert(rank);
                    }
                }
                FromAgent::Said { generation, rank, message }
            }
            News::Garbled(error) => FromAgent::Garbled { generation, rank, error },
            // It has a later place, and its end is told of that, too.
            News::Exited { .. } if generation != self.generation => return,
            News::Exited { exit, mut last_lines } => {
                self.ranks.remove(&rank);
                self.waiting.remove(&rank);
                last_lines.iter_mut().for_each(|line| *line = shortened(line));
                FromAgent::Exited { generation, rank, exit, last_lines }
            }
        };
        self.pass_on(rank, message);
        self.start_next();
    }

    /// Tells the coordinator of a rank; while it is away, of steps and phases only the newest,
    /// which are many and of which only those count.
    fn pass_on(&mut self, rank: usize, message: FromAgent) {
        match &message {
            FromAgent::Said { message: FromRank::Step(_) | FromRank::Phase(_), .. }
                if self.outbox.is_none() =>
            {
                let is_step = matches!(message, FromAgent::Said { message: FromRank::Step(_), .. });
                self.unsaid.insert((rank, is_step), message);
                return;
            }
            FromAgent::Said {
                message: FromRank::Failure(_) | FromRank::Finished { .. } | FromRank::Released,
                ..
            } => self.last_words.entry(rank).or_default().push(message.clone()),
            FromAgent::Exited { .. } => {
                self.last_words.entry(rank).or_default().push(message.clone());
                self.exited.push(rank);
            }
            _ => {}
        }
        self.tell(message);
    }

    /// Tells what became of a rank that was not started; another coordinator hears it again.
    fn say_last(&mut self, rank: usize, message: FromAgent) {
        self.last_words.entry(rank).or_default().push(message.clone());
        self.tell(message);
    }

    /// Tells the coordinator, now or once it is back.
    fn tell(&mut self, message: FromAgent) {
        match self.session.push(message) {
            Ok(frame) => self.send(frame),
            Err(error) => {
                self.ranks.values().for_each(RankHandle::kill);
                let reason = format!("the coordinator is away for too long: {error}");
                self.end = Some((exit_code::FAILED, reason));
            }
        }
    }

    fn send(&mut self, frame: Numbered<FromAgent>) {
        if self.outbox.as_ref().is_some_and(|outbox| outbox.try_send(frame).is_err()) {
            self.lost("it takes nothing in");
        }
    }
}
