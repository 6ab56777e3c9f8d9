//! The rank's side of the control socket. Blocking, with one thread of its own, and no runtime.
//!
//! The control thread reads what the agent says without the training thread's help: it sets the
//! stop flag, hands out replies of the store, and on an abort or at the end of the stream (the
//! agent is gone) calls the abort callback and ends the process within [`LAST_WORDS`].
//!
//! Ranks see a stop at different moments: they must agree on it at a step boundary (one rank's flag
//! is enough), before they act on it.

use crate::env;
use crate::exit_code;
use crate::frame::{self, FrameError};
use crate::message::{
    Assignment, Event, FailureReport, FromRank, Phase, Position, StepReport, ToRank,
};
use crate::store::{StoreError, StoreReply, StoreRequest};
use std::collections::HashMap;
use std::io::BufReader;
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Time a rank has for its abort callback before it ends itself.
pub const LAST_WORDS: Duration = Duration::from_millis(300);
/// Longest wait for the assignment after the hello.
const ASSIGNMENT_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest time the agent may leave a message unread before it counts as gone.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// Time beyond a request's own time-out in which the agent must have answered.
const REPLY_SLACK: Duration = Duration::from_secs(30);

/// Why a rank cannot talk to its agent.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The process was not started by an agent.
    #[error(
        "this process was not started by an agent ({} is not set): start ranks with `phalanx run`",
        env::CONTROL
    )]
    NotARank,
    /// A variable does not say what it should.
    #[error("{variable} is {value:?}, expected {expected}")]
    BadVariable {
        /// Its name.
        variable: &'static str,
        /// Its value.
        value: String,
        /// What it should say.
        expected: &'static str,
    },
    /// The socket or a frame failed.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The socket failed outside a frame.
    #[error("control socket: {0}")]
    Io(#[from] std::io::Error),
    /// The agent closed the socket or said something else before the assignment.
    #[error("the agent sent no assignment: {found}")]
    NoAssignment {
        /// What came instead.
        found: String,
    },
}

type AbortCallback = Box<dyn Fn(&str) + Send>;
type WaitCallback = Box<dyn Fn(Phase) -> Option<String> + Send>;

struct Shared {
    assignment: Assignment,
    is_under_mpirun: bool,
    writer: Mutex<UnixStream>,
    is_stopping: AtomicBool,
    next_id: AtomicU64,
    replies: Mutex<HashMap<u64, SyncSender<StoreReply>>>,
    on_abort: Mutex<Vec<AbortCallback>>,
    place: Mutex<(Phase, Option<u64>)>,
    waits: Mutex<Vec<WaitCallback>>,
}

/// A rank's connection to its agent. Clones share it.
#[derive(Clone)]
pub struct RankClient {
    shared: Arc<Shared>,
}

impl RankClient {
    /// Connects over the socket that the agent left as standard input, says hello, waits for the
    /// assignment, and starts the control thread. SIGTERM, SIGINT, SIGHUP and SIGUSR2 to this
    /// process then ask the whole run to stop at a step boundary. Call it once, before any work.
    pub fn from_env() -> Result<Self, ClientError> {
        let value = std::env::var(env::CONTROL).map_err(|_| ClientError::NotARank)?;
        if let Some(name) = value.strip_prefix(env::CONTROL_NAMED) {
            return Self::from_mpirun(name);
        }
        if value != env::CONTROL_STDIN {
            let (variable, expected) = (env::CONTROL, env::CONTROL_STDIN);
            return Err(ClientError::BadVariable { variable, value, expected });
        }
        let socket = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
        // Nothing that this process starts shall inherit the socket.
        let null = std::fs::File::open("/dev/null")?;
        rustix::stdio::dup2_stdin(&null).map_err(std::io::Error::from)?;
        let client = Self::from_stream(socket)?;
        client.forward_signals()?;
        Ok(client)
    }

    /// Under `mpirun`, which passes on no socket and mixes what the ranks write: connects to the
    /// agent by name, once for the control socket and once for each output.
    fn from_mpirun(name: &str) -> Result<Self, ClientError> {
        let value = std::env::var(env::MPI_RANK).unwrap_or_default();
        let rank: usize = value.parse().map_err(|_| ClientError::BadVariable {
            variable: env::MPI_RANK,
            value,
            expected: "the rank that mpirun gives",
        })?;
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
            .map_err(std::io::Error::from)?;
        let address = SocketAddr::from_abstract_name(name)?;
        for is_error in [false, true] {
            let output = UnixStream::connect_addr(&address)?;
            frame::write(&mut &output, &FromRank::Output { rank, is_error })?;
            let moved = match is_error {
                false => rustix::stdio::dup2_stdout(&output),
                true => rustix::stdio::dup2_stderr(&output),
            };
            moved.map_err(std::io::Error::from)?;
        }
        let client = Self::connect(UnixStream::connect_addr(&address)?, Some(rank))?;
        client.forward_signals()?;
        Ok(client)
    }

    /// Connects over a given socket; for tests. Installs no signal handler.
    pub fn from_stream(socket: UnixStream) -> Result<Self, ClientError> {
        Self::connect(socket, None)
    }

    fn connect(socket: UnixStream, rank: Option<usize>) -> Result<Self, ClientError> {
        socket.set_write_timeout(Some(WRITE_TIMEOUT))?;
        socket.set_read_timeout(Some(ASSIGNMENT_TIMEOUT))?;
        let mut reader = BufReader::new(socket.try_clone()?);
        let build = env!("CARGO_PKG_VERSION").to_owned();
        let pid = std::process::id();
        frame::write(&mut &socket, &FromRank::Hello { pid, build, rank })?;
        let assignment = match frame::read(&mut reader)? {
            Some(ToRank::Assignment(assignment)) => *assignment,
            Some(other) => return Err(ClientError::NoAssignment { found: format!("{other:?}") }),
            None => {
                return Err(ClientError::NoAssignment { found: "it closed the socket".into() });
            }
        };
        socket.set_read_timeout(None)?;
        let shared = Arc::new(Shared {
            assignment,
            is_under_mpirun: rank.is_some(),
            writer: Mutex::new(socket),
            is_stopping: AtomicBool::new(false),
            next_id: AtomicU64::new(1),
            replies: Mutex::default(),
            on_abort: Mutex::default(),
            place: Mutex::new((Phase::Init, None)),
            waits: Mutex::default(),
        });
        let listener = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("control".into())
            .spawn(move || listener.listen(&mut reader))?;
        Ok(Self { shared })
    }

    /// The rank's place.
    pub fn assignment(&self) -> &Assignment {
        &self.shared.assignment
    }

    /// Whether this rank was told to stop at the next step boundary, save and exit with 75.
    pub fn stop_requested(&self) -> bool {
        self.shared.is_stopping.load(Ordering::Acquire)
    }

    /// Reports an optimizer step.
    pub fn report_step(&self, report: StepReport) -> Result<(), ClientError> {
        lock(&self.shared.place).1 = Some(report.step);
        self.shared.send(&FromRank::Step(Box::new(report)))
    }

    /// Reports what the rank does from now on.
    pub fn phase(&self, phase: Phase) -> Result<(), ClientError> {
        lock(&self.shared.place).0 = phase;
        self.shared.send(&FromRank::Phase(phase))
    }

    /// Has something written to `events.jsonl`.
    pub fn event(&self, event: Event) -> Result<(), ClientError> {
        self.shared.send(&FromRank::Event(event))
    }

    /// Reports a committed checkpoint; rank 0 only, after COMMIT is durable.
    pub fn checkpoint_committed(&self, step: u64) -> Result<(), ClientError> {
        self.shared.send(&FromRank::CheckpointCommitted { step })
    }

    /// Reports why the rank is about to exit with an error. Lines are cut to what a frame holds.
    pub fn failure(&self, mut report: FailureReport) -> Result<(), ClientError> {
        report.lines.truncate(100);
        for line in &mut report.lines {
            if line.len() > 4096 {
                *line = line.chars().take(1024).chain("…".chars()).collect();
            }
        }
        self.shared.send(&FromRank::Failure(Box::new(report)))
    }

    /// Reports that the last step is done and saved; then exit with 0.
    pub fn finished(&self, step: u64) -> Result<(), ClientError> {
        self.shared.send(&FromRank::Finished { step })
    }

    /// The code to exit with, where the rank ends with `code`. `mpirun` takes any but 0 for a
    /// failure of the whole job, so that it gets 0 for an orderly stop too, and the agent is told.
    pub fn exiting(&self, code: i32) -> i32 {
        if !self.shared.is_under_mpirun {
            return code;
        }
        // Without an agent there is nobody to tell, and the control thread ends the process.
        let _ = self.shared.send(&FromRank::Exiting { code });
        if code == exit_code::PREEMPTED { exit_code::DONE } else { code }
    }

    /// The rendezvous store of this generation.
    pub fn store(&self) -> StoreClient {
        StoreClient { shared: Arc::clone(&self.shared) }
    }

    /// What to do when the generation ends early: abort a communicator, so that no thread stays
    /// in a collective. Each callback is called once, on the control thread, with the reason, in
    /// the order in which they were given; the process ends soon after, whether they return or not.
    pub fn on_abort(&self, callback: impl Fn(&str) + Send + 'static) {
        lock(&self.shared.on_abort).push(Box::new(callback));
    }

    /// What holds the rank up in its phase, where something does, for an agent that asks where it
    /// is: called on the control thread, which must not be made to wait.
    pub fn on_where(&self, callback: impl Fn(Phase) -> Option<String> + Send + 'static) {
        lock(&self.shared.waits).push(Box::new(callback));
    }

    fn forward_signals(&self) -> Result<(), ClientError> {
        use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR2};
        let mut taken = vec![SIGINT, SIGUSR2];
        if !self.shared.is_under_mpirun {
            // mpirun sends it to those that are left when one has died.
            taken.push(SIGTERM);
        }
        if !crate::signals::ignores_hangup() {
            taken.push(SIGHUP);
        }
        let mut signals = signal_hook::iterator::Signals::new(taken)?;
        let shared = Arc::clone(&self.shared);
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            for signal in signals.forever() {
                let name = signal_hook::low_level::signal_name(signal).unwrap_or("a signal");
                shared.is_stopping.store(true, Ordering::Release);
                // A lost agent is the control thread's business.
                let _ = shared.send(&FromRank::StopRequested { signal: name.to_owned() });
            }
        })?;
        Ok(())
    }
}

impl Shared {
    fn send(&self, message: &FromRank) -> Result<(), ClientError> {
        let frame = frame::encode(message)?;
        let mut writer = lock(&self.writer);
        Ok(std::io::Write::write_all(&mut *writer, &frame)?)
    }

    fn listen(&self, reader: &mut BufReader<UnixStream>) {
        let reason = loop {
            match frame::read(reader) {
                Ok(Some(ToRank::Stop { now: false })) => {
                    self.is_stopping.store(true, Ordering::Release);
                }
                Ok(Some(ToRank::Where)) => {
                    // An agent that is gone shows at the next read.
                    let _ = self.send(&FromRank::Here(self.position()));
                }
                Ok(Some(ToRank::Stop { now: true })) => break "told to stop at once".to_owned(),
                Ok(Some(ToRank::Abort { reason })) => break reason,
                Ok(Some(ToRank::Store { id, reply })) => {
                    // The asker may have given up, which is no fault.
                    let asker = lock(&self.replies).remove(&id);
                    let _ = asker.map(|asker| asker.try_send(reply));
                }
                Ok(Some(ToRank::Assignment(_))) => break "assigned twice".to_owned(),
                Ok(None) => break "the agent is gone".to_owned(),
                Err(error) => break format!("the agent is gone: {error}"),
            }
        };
        self.end(&reason);
    }

    fn position(&self) -> Position {
        let (phase, step) = *lock(&self.place);
        let waits = lock(&self.waits).iter().filter_map(|wait| wait(phase)).collect();
        Position { phase, step, waits }
    }

    /// Ends the process. SIGKILL, because exit handlers of a library whose threads still run may
    /// hang, and because nobody reads the status: the agent asked for it or is gone.
    fn end(&self, reason: &str) {
        // Should a callback hang.
        let watchdog = std::thread::Builder::new().name("last-words".into()).spawn(|| {
            std::thread::sleep(LAST_WORDS);
            kill_self();
        });
        lock(&self.replies).clear();
        tracing_line(&self.assignment, reason);
        if watchdog.is_ok() {
            self.abort(reason);
        }
        kill_self();
    }

    fn abort(&self, reason: &str) {
        let callbacks = std::mem::take(&mut *lock(&self.on_abort));
        callbacks.iter().for_each(|callback| callback(reason));
    }
}

fn kill_self() {
    let own = rustix::process::getpid();
    let _ = rustix::process::kill_process(own, rustix::process::Signal::KILL);
}

/// One line in the form of the rank's other log lines; written here because the process is about to
/// end and its subscriber may be held by a thread that hangs.
fn tracing_line(assignment: &Assignment, reason: &str) {
    let line = serde_json::json!({
        "level": "INFO",
        "target": "rank_protocol",
        "fields": { "message": format!("rank {} ends: {reason}", assignment.rank) },
    });
    let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("{line}\n").as_bytes());
}

/// A handle on the rendezvous store; every call is bounded in time. Clones share it.
#[derive(Clone)]
pub struct StoreClient {
    shared: Arc<Shared>,
}

impl StoreClient {
    /// Writes a value over whatever is there.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        let request = StoreRequest::Set { key: key.to_owned(), value: value.to_vec() };
        match self.ask(request, Duration::ZERO)? {
            StoreReply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// The value, as soon as it is there.
    pub fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>, StoreError> {
        let request = StoreRequest::Get { key: key.to_owned(), timeout_ms: millis(timeout) };
        match self.ask(request, timeout)? {
            StoreReply::Value(value) => Ok(value),
            other => Err(unexpected(&other)),
        }
    }

    /// Adds to a decimal counter, 0 where absent; returns the sum.
    pub fn add(&self, key: &str, amount: i64) -> Result<i64, StoreError> {
        match self.ask(StoreRequest::Add { key: key.to_owned(), amount }, Duration::ZERO)? {
            StoreReply::Sum(sum) => Ok(sum),
            other => Err(unexpected(&other)),
        }
    }

    /// Returns as soon as all keys are there.
    pub fn wait(&self, keys: &[String], timeout: Duration) -> Result<(), StoreError> {
        let request = StoreRequest::Wait { keys: keys.to_vec(), timeout_ms: millis(timeout) };
        match self.ask(request, timeout)? {
            StoreReply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Whether all keys are there now.
    pub fn check(&self, keys: &[String]) -> Result<bool, StoreError> {
        match self.ask(StoreRequest::Check { keys: keys.to_vec() }, Duration::ZERO)? {
            StoreReply::Bool(is_there) => Ok(is_there),
            other => Err(unexpected(&other)),
        }
    }

    /// Removes a key; whether it was there.
    pub fn delete(&self, key: &str) -> Result<bool, StoreError> {
        match self.ask(StoreRequest::Delete { key: key.to_owned() }, Duration::ZERO)? {
            StoreReply::Bool(was_there) => Ok(was_there),
            other => Err(unexpected(&other)),
        }
    }

    fn ask(&self, request: StoreRequest, timeout: Duration) -> Result<StoreReply, StoreError> {
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = sync_channel(1);
        lock(&self.shared.replies).insert(id, sender);
        let lost = |reason: String| {
            lock(&self.shared.replies).remove(&id);
            StoreError::Lost { reason }
        };
        let message = FromRank::Store { id, request };
        self.shared.send(&message).map_err(|error| lost(error.to_string()))?;
        let bound = timeout.saturating_add(REPLY_SLACK);
        match receiver.recv_timeout(bound) {
            Ok(StoreReply::Error(error)) => Err(error),
            Ok(reply) => Ok(reply),
            Err(error) => Err(lost(format!("{error} ({} s)", bound.as_secs()))),
        }
    }
}

fn unexpected(reply: &StoreReply) -> StoreError {
    StoreError::Lost { reason: format!("it sent {reply:?} to another request") }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A lock that a panicking thread left behind guards plain data that is still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_abort_calls_every_callback_once() {
        let (own, agent) = UnixStream::pair().unwrap();
        let assignment = Assignment {
            run_id: "run".to_owned(),
            generation: 1,
            rank: 0,
            world_size: 1,
            local_rank: 0,
            local_world_size: 1,
            address: "127.0.0.1".to_owned(),
            threads: 1,
            run_dir: "run".into(),
            resume_step: None,
            replicas: None,
            stop_after: None,
            roll_backs: Vec::new(),
            memory_dir: None,
            resume_dir: None,
            failures: 0,
            observed_s: 0,
            profile: None,
        };
        frame::write(&mut &agent, &ToRank::Assignment(Box::new(assignment))).unwrap();
        let client = RankClient::from_stream(own).unwrap();
        let (sender, called) = std::sync::mpsc::channel();
        for group in ["world", "tensor"] {
            let sender = sender.clone();
            client.on_abort(move |reason| sender.send(format!("{group}: {reason}")).unwrap());
        }
        client.shared.abort("a peer died");
        client.shared.abort("again");
        let called: Vec<String> = called.try_iter().collect();
        assert_eq!(called, ["world: a peer died", "tensor: a peer died"]);
        // The control thread ends the process once the agent is gone.
        std::mem::forget(agent);
    }
}
