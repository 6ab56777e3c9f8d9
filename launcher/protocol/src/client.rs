//! The rank's side of the control socket. Blocking, with one thread of its own, and no runtime.
//!
//! The control thread reads what the agent says without the training thread's help: it sets the
//! stop flag, hands out replies of the store, and on an abort or at the end of the stream (the
//! agent is gone) calls the abort callback and ends the process within [`LAST_WORDS`].
//!
//! Ranks see a stop at different moments: they must agree on it at a step boundary (one rank's flag
//! is enough), before they act on it.
//!
//! A process may outlive its generation: told to let go (or after it has reported why it fails), it
//! drops what belongs to the generation, says so with [`RankClient::let_go`], and gets its next
//! place. A client is one generation's; what is said with one of an earlier generation is dropped.

use crate::bundle::{Copied, NodePlace};
use crate::env;
use crate::exit_code;
use crate::frame::{self, FrameError};
use crate::message::{Assignment, Event, FailureReport, FromRank, Phase, StepReport, ToRank};
use link::{Link, Place};
use std::io::BufReader;
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

mod link;
mod store;

pub use store::StoreClient;

/// Time a rank has for its abort callback before it ends itself.
pub const LAST_WORDS: Duration = Duration::from_millis(300);
/// Longest wait for the assignment after the hello.
const ASSIGNMENT_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest time the agent may leave a message unread before it counts as gone.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest wait for the next place: nodes may be waited for, and a checkpoint be fetched. The end
/// of the agent ends it too.
const NEXT_PLACE_TIMEOUT: Duration = Duration::from_secs(24 * 3600);
/// Longest wait for the copy of a bundle; an agent gives up sooner.
const COPY_TIMEOUT: Duration = Duration::from_secs(600);
/// The `target` of the log lines that are written here.
pub const LOG_TARGET: &str = "rank_protocol";
/// The field of such a line that says which generation the lines after it are of.
pub const ENTERED: &str = "entered_generation";
/// The field beside it that says which rank's they are.
pub const ENTERED_AS: &str = "entered_as";

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
    /// The generation is over, and the rank was told to let go of it.
    #[error("the generation is over: {reason}")]
    Released {
        /// Why.
        reason: String,
    },
}

type AbortCallback = Box<dyn Fn(&str) + Send>;
type WaitCallback = Box<dyn Fn(Phase) -> Option<String> + Send>;

/// A rank's connection to its agent, in one generation. Clones share it.
#[derive(Clone)]
pub struct RankClient {
    link: Arc<Link>,
    place: Arc<Place>,
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
        let is_warm = std::env::var_os(env::WARM).is_some();
        let client = Self::connect(socket, None, is_warm)?;
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
        let socket = UnixStream::connect_addr(&address)?;
        let client = Self::connect(socket, Some(rank), false)?;
        client.forward_signals()?;
        Ok(client)
    }

    /// Connects over a given socket; for tests. Installs no signal handler.
    pub fn from_stream(socket: UnixStream) -> Result<Self, ClientError> {
        Self::connect(socket, None, false)
    }

    fn connect(
        socket: UnixStream,
        rank: Option<usize>,
        is_warm: bool,
    ) -> Result<Self, ClientError> {
        let timeout = if is_warm { NEXT_PLACE_TIMEOUT } else { ASSIGNMENT_TIMEOUT };
        socket.set_write_timeout(Some(WRITE_TIMEOUT))?;
        socket.set_read_timeout(Some(timeout))?;
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
        let place = Place::new(assignment);
        let link = Link::new(socket, rank.is_some(), &place);
        if is_warm {
            // What it said before is of no rank.
            link.enter(&place)?;
        }
        let listener = Arc::clone(&link);
        std::thread::Builder::new()
            .name("control".into())
            .spawn(move || listener.listen(&mut reader))?;
        Ok(Self { link, place })
    }

    /// Says that nothing of the generation is held any more, and waits for the place in a later
    /// one. The thread that calls it holds no group, and no other works for the generation.
    ///
    /// # Errors
    /// Where the agent is gone or assigns no place within a day.
    pub fn let_go(self) -> Result<RankClient, ClientError> {
        let (sender, receiver) = sync_channel(1);
        self.link.wait_for_place(sender);
        self.send(&FromRank::Released)?;
        let place = receiver.recv_timeout(NEXT_PLACE_TIMEOUT).map_err(|error| {
            let found = format!("{error} ({} s)", NEXT_PLACE_TIMEOUT.as_secs());
            ClientError::NoAssignment { found }
        })?;
        Ok(RankClient { link: self.link, place })
    }

    /// The rank's place.
    pub fn assignment(&self) -> &Assignment {
        &self.place.assignment
    }

    /// An error once the rank was told to let go of its generation.
    ///
    /// # Errors
    /// [`ClientError::Released`].
    pub fn alive(&self) -> Result<(), ClientError> {
        self.place.alive()
    }

    /// Whether this rank was told to stop at the next step boundary, save and exit with 75.
    pub fn stop_requested(&self) -> bool {
        self.link.is_stopping.load(Ordering::Acquire)
    }

    /// Reports an optimizer step; an error where the generation is over.
    pub fn report_step(&self, report: StepReport) -> Result<(), ClientError> {
        self.alive()?;
        lock(&self.place.at).1 = Some(report.step);
        self.send(&FromRank::Step(Box::new(report)))
    }

    /// Reports what the rank does from now on; an error where the generation is over.
    pub fn phase(&self, phase: Phase) -> Result<(), ClientError> {
        self.alive()?;
        lock(&self.place.at).0 = phase;
        self.send(&FromRank::Phase(phase))
    }

    /// Has something written to `events.jsonl`.
    pub fn event(&self, event: Event) -> Result<(), ClientError> {
        self.send(&FromRank::Event(event))
    }

    /// Reports a committed checkpoint; rank 0 only, after COMMIT is durable.
    pub fn checkpoint_committed(&self, step: u64) -> Result<(), ClientError> {
        self.send(&FromRank::CheckpointCommitted { step })
    }

    /// Has the agent copy what this node's ranks have just kept of a step in its memory, and waits
    /// for what becomes of it.
    ///
    /// # Errors
    /// Where the generation is over, or the agent gone.
    pub fn copy_bundle(&self, step: u64, place: NodePlace) -> Result<Copied, ClientError> {
        let (sender, receiver) = sync_channel(1);
        *lock(&self.place.copying) = Some((step, sender));
        // Whoever ends the generation from here on ends the wait.
        self.alive()?;
        self.send(&FromRank::BundleWritten { step, place })?;
        let lost = |error| match error {
            RecvTimeoutError::Timeout => Copied::Failed { reason: "no word of it".to_owned() },
            RecvTimeoutError::Disconnected => Copied::NotTried,
        };
        let copied = receiver.recv_timeout(COPY_TIMEOUT).unwrap_or_else(lost);
        self.alive()?;
        Ok(copied)
    }

    /// Ends a wait for a copy, if there is one.
    pub fn give_up_copy(&self) {
        lock(&self.place.copying).take();
    }

    /// Says that all nodes have done with copying what is kept of a step.
    ///
    /// # Errors
    /// Where the agent is gone.
    pub fn bundle_kept(&self, step: u64) -> Result<(), ClientError> {
        self.send(&FromRank::BundleKept { step })
    }

    /// Reports why the rank is about to exit with an error. Lines are cut to what a frame holds.
    pub fn failure(&self, mut report: FailureReport) -> Result<(), ClientError> {
        report.lines.truncate(100);
        for line in &mut report.lines {
            if line.len() > 4096 {
                *line = line.chars().take(1024).chain("…".chars()).collect();
            }
        }
        self.send(&FromRank::Failure(Box::new(report)))
    }

    /// Reports that the last step is done and saved; then exit with 0.
    pub fn finished(&self, step: u64) -> Result<(), ClientError> {
        self.send(&FromRank::Finished { step })
    }

    /// The code to exit with, where the rank ends with `code`. `mpirun` takes any but 0 for a
    /// failure of the whole job, so that it gets 0 for an orderly stop too, and the agent is told.
    pub fn exiting(&self, code: i32) -> i32 {
        if !self.link.is_under_mpirun {
            return code;
        }
        // Without an agent there is nobody to tell, and the control thread ends the process.
        let _ = self.send(&FromRank::Exiting { code });
        if code == exit_code::PREEMPTED { exit_code::DONE } else { code }
    }

    /// The rendezvous store of this generation.
    pub fn store(&self) -> StoreClient {
        StoreClient { link: Arc::clone(&self.link), place: Arc::clone(&self.place) }
    }

    /// What to do when the generation ends early: abort a communicator, so that no thread stays
    /// in a collective. Each callback is called once, on the control thread (at once, where it has
    /// ended already), with the reason, in the order in which they were given; unless the rank is
    /// told to let go, the process ends soon after, whether they return or not.
    pub fn on_abort(&self, callback: impl Fn(&str) + Send + 'static) {
        self.place.on_abort(Box::new(callback));
    }

    /// What holds the rank up in its phase, where something does, for an agent that asks where it
    /// is: called on the control thread, which must not be made to wait.
    pub fn on_where(&self, callback: impl Fn(Phase) -> Option<String> + Send + 'static) {
        lock(&self.place.waits).push(Box::new(callback));
    }

    fn forward_signals(&self) -> Result<(), ClientError> {
        use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR2};
        let mut taken = vec![SIGINT, SIGUSR2];
        if !self.link.is_under_mpirun {
            // mpirun sends it to those that are left when one has died.
            taken.push(SIGTERM);
        }
        if !crate::signals::ignores_hangup() {
            taken.push(SIGHUP);
        }
        let mut signals = signal_hook::iterator::Signals::new(taken)?;
        let link = Arc::clone(&self.link);
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            for signal in signals.forever() {
                let name = signal_hook::low_level::signal_name(signal).unwrap_or("a signal");
                link.signalled(name);
            }
        })?;
        Ok(())
    }

    fn send(&self, message: &FromRank) -> Result<(), ClientError> {
        self.link.send(&self.place, message)
    }
}

/// A lock that a panicking thread left behind guards plain data that is still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assignment(generation: u64) -> Assignment {
        Assignment {
            run_id: "run".to_owned(),
            generation,
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
            node: None,
            resume_dir: None,
            failures: 0,
            observed_s: 0,
            profile: None,
            may_stay: true,
        }
    }

    fn tell(agent: &UnixStream, message: ToRank) {
        frame::write(&mut &*agent, &message).unwrap();
    }

    fn hear(agent: &mut BufReader<UnixStream>) -> FromRank {
        frame::read(agent).unwrap().unwrap()
    }

    fn begin() -> (RankClient, UnixStream, BufReader<UnixStream>) {
        let (own, agent) = UnixStream::pair().unwrap();
        tell(&agent, ToRank::Assignment(Box::new(assignment(1))));
        let client = RankClient::from_stream(own).unwrap();
        let mut said = BufReader::new(agent.try_clone().unwrap());
        assert!(matches!(hear(&mut said), FromRank::Hello { .. }));
        (client, agent, said)
    }

    #[test]
    fn an_abort_calls_every_callback_once() {
        let (client, agent, _said) = begin();
        let (sender, called) = std::sync::mpsc::channel();
        for group in ["world", "tensor"] {
            let sender = sender.clone();
            client.on_abort(move |reason| sender.send(format!("{group}: {reason}")).unwrap());
        }
        client.place.abort("a peer died");
        client.place.abort("again");
        let called: Vec<String> = called.try_iter().collect();
        assert_eq!(called, ["world: a peer died", "tensor: a peer died"]);
        // The control thread ends the process once the agent is gone.
        std::mem::forget(agent);
    }

    #[test]
    fn a_rank_that_lets_go_speaks_for_the_next_generation() {
        let (client, agent, mut said) = begin();
        client.phase(Phase::Train).unwrap();
        assert_eq!(hear(&mut said), FromRank::Phase(Phase::Train));
        let (sender, called) = std::sync::mpsc::channel();
        client.on_abort(move |reason| sender.send(reason.to_owned()).unwrap());
        let (store, patience) = (client.store(), Duration::from_secs(20));
        let waiting = std::thread::spawn(move || store.get("never", patience));
        assert!(matches!(hear(&mut said), FromRank::Store { .. }));
        // Of another generation it is no business of this one.
        for (generation, reason) in [(2, "not yet"), (1, "a peer died")] {
            tell(&agent, ToRank::Release { generation, reason: reason.into() });
        }
        assert_eq!(called.recv_timeout(patience).unwrap(), "a peer died");
        let lost = waiting.join().unwrap().unwrap_err().to_string();
        assert!(lost.contains("a peer died"), "{lost}");
        let over = client.phase(Phase::Save).unwrap_err();
        assert!(matches!(over, ClientError::Released { .. }), "{over}");
        let (sender, called) = std::sync::mpsc::channel();
        client.on_abort(move |reason| sender.send(reason.to_owned()).unwrap());
        assert_eq!(called.try_recv().unwrap(), "a peer died", "at once");
        let old = client.clone();
        let next = std::thread::spawn(move || client.let_go());
        assert_eq!(hear(&mut said), FromRank::Released);
        tell(&agent, ToRank::Assignment(Box::new(assignment(3))));
        let next = next.join().unwrap().unwrap();
        assert_eq!(next.assignment().generation, 3);
        assert_eq!(hear(&mut said), FromRank::Joined { generation: 3 });
        // What a thread of the old one still says is dropped.
        old.checkpoint_committed(5).unwrap();
        next.checkpoint_committed(7).unwrap();
        assert_eq!(hear(&mut said), FromRank::CheckpointCommitted { step: 7 });
        std::mem::forget(agent);
    }

    #[test]
    fn a_stop_that_nobody_took_is_asked_for_again() {
        let (client, agent, mut said) = begin();
        tell(&agent, ToRank::Release { generation: 1, reason: "a peer died".into() });
        client.link.signalled("SIGTERM");
        let asked = FromRank::StopRequested { signal: "SIGTERM".into() };
        assert_eq!(hear(&mut said), asked);
        let next = std::thread::spawn(move || client.let_go());
        assert_eq!(hear(&mut said), FromRank::Released);
        tell(&agent, ToRank::Assignment(Box::new(assignment(2))));
        assert_eq!(hear(&mut said), FromRank::Joined { generation: 2 });
        assert_eq!(hear(&mut said), asked);
        assert!(next.join().unwrap().unwrap().stop_requested());
        std::mem::forget(agent);
    }
}
