//! The backend between processes that `mpirun` started: messages over MPI, whatever carries them.
//!
//! One thread per process speaks MPI ([`engine`]); all others hand it messages and wait outside of
//! MPI, for at most the group's time-out. Messages are copied into memory that nobody else has, so
//! that a wait can end while MPI still holds it. Groups are told apart by the tags of messages:
//! each member announces, in the store, the number by which it wants to be reached, and no call of
//! MPI is made that all members would have to enter together.
//!
//! A process that dies without [`Mpi::leave`] takes the whole job down: that is MPI's way.

mod engine;
mod group;
mod raw;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use torch_shim::gloo::Store;
use torch_shim::reduce;
use torch_shim::tch::Tensor;

use self::engine::{Command, Notice, Start, tell};
use self::group::{GroupState, Outcome};
use self::raw::{Direction, Private};
use crate::error::{CommError, Result};
use crate::group::{Group, GroupOptions};
use crate::transport::{Pending, Transport};

/// The longest wait for MPI to start, and to end: both wait for all processes of the job.
const ALL_COME: Duration = Duration::from_secs(60);

/// Bits of a tag that are the message's own: half for users, half for the collectives.
const TAG_BITS: u32 = 17;

/// This process's part in an MPI job. Clones share it.
#[derive(Clone)]
pub struct Mpi {
    shared: Arc<Shared>,
}

struct Shared {
    commands: Mutex<Option<Sender<Command>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    process: i32,
    size: i32,
    /// The largest number that a group may have.
    last_number: u32,
    next_number: AtomicU32,
}

impl Mpi {
    /// Starts MPI: once in a process, which `mpirun` has started.
    ///
    /// # Errors
    /// When MPI was started before, refuses, or the other processes do not come.
    pub fn start() -> Result<Mpi> {
        let (commands, received) = channel();
        let (started, answer) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("mpi".to_string())
            .spawn(move || engine::run(&received, &started))
            .map_err(|error| CommError::Backend(format!("no thread for MPI: {error}")))?;
        // A thread that hangs in MPI ends with the process.
        let (process, size, largest_tag) =
            answer.recv_timeout(ALL_COME).map_err(|error| absent("start", error))??;
        let shared = Shared {
            commands: Mutex::new(Some(commands)),
            thread: Mutex::new(Some(thread)),
            process,
            size,
            last_number: last_number(largest_tag),
            next_number: AtomicU32::new(1),
        };
        Ok(Mpi { shared: Arc::new(shared) })
    }

    /// This process's number in the job.
    pub fn process(&self) -> usize {
        usize::try_from(self.shared.process).unwrap_or(0)
    }

    /// The number of processes in the job.
    pub fn size(&self) -> usize {
        usize::try_from(self.shared.size).unwrap_or(0)
    }

    /// Joins a group of `size` ranks, of which this is `rank`, through a store that all share.
    ///
    /// # Errors
    /// When the others do not come within the options' time-out, or there are too many groups.
    pub fn connect(
        &self,
        store: &Store,
        rank: usize,
        size: usize,
        options: &GroupOptions,
    ) -> Result<Group> {
        let failed = |what: String| {
            let name = &options.name;
            CommError::Backend(format!(
                "group {name}: rank {rank} of {size} cannot connect: {what}"
            ))
        };
        let store = store.with_prefix(&options.prefix());
        let number = self.shared.next_number.fetch_add(1, Ordering::Relaxed);
        let last = self.shared.last_number;
        if number > last {
            return Err(failed(format!("this MPI library has tags for {last} groups")));
        }
        let group = Arc::new(GroupState::new(number));
        self.shared.tell(Command::Open(group.clone()))?;
        let own = Address { process: self.shared.process, number };
        let members = meet(&store, rank, size, own, options.timeout).map_err(failed)?;
        let mpi = self.shared.clone();
        let transport = MpiTransport { mpi, group, rank, members, timeout: options.timeout };
        Group::new(Box::new(transport), store, rank, size, options)
    }

    /// Ends MPI, together with all other processes: all must come to it. Drop the groups before.
    /// A process that has failed must not call it, and exits with an error instead.
    ///
    /// # Errors
    /// When messages are still under way, or the other processes do not come.
    pub fn leave(self) -> Result<()> {
        let (answer, left) = sync_channel(1);
        self.shared.tell(Command::Leave(answer))?;
        left.recv_timeout(ALL_COME).map_err(|error| {
            // Nobody waits for a thread that hangs in MPI: it ends with the process.
            drop(self.shared.thread.lock().unwrap_or_else(PoisonError::into_inner).take());
            absent("end", error)
        })?
    }
}

impl Shared {
    fn tell(&self, command: Command) -> Result<()> {
        let commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        match commands.as_ref() {
            Some(commands) => tell(commands, command),
            None => Err(CommError::Backend("MPI has ended".to_string())),
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner).take();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

/// Why MPI has not come to its start or end.
fn absent(what: &str, error: RecvTimeoutError) -> CommError {
    CommError::Backend(match error {
        RecvTimeoutError::Timeout => {
            let seconds = ALL_COME.as_secs();
            format!("MPI did not {what} in {seconds} s: a process of the job has not come to it")
        }
        RecvTimeoutError::Disconnected => format!("MPI did not {what}: its thread is gone"),
    })
}

/// How a member of a group is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Address {
    process: i32,
    number: u32,
}

impl Address {
    fn parse(text: &[u8]) -> Option<Address> {
        let (process, number) = std::str::from_utf8(text).ok()?.split_once(' ')?;
        Some(Address { process: process.parse().ok()?, number: number.parse().ok()? })
    }

    /// The tag of a message to this member.
    fn tag(self, tag: u32) -> i32 {
        // Both parts fit: `connect` and `Group` saw to it.
        i32::try_from(self.number << TAG_BITS | tag).unwrap_or(i32::MAX)
    }
}

/// The largest number of a group whose tags are all allowed.
fn last_number(largest_tag: i32) -> u32 {
    let tags = u32::try_from(largest_tag).unwrap_or(0) + 1;
    (tags >> TAG_BITS).saturating_sub(1)
}

/// Announces this member in the store, and waits for all others.
fn meet(
    store: &Store,
    rank: usize,
    size: usize,
    own: Address,
    timeout: Duration,
) -> Result<Vec<Address>, String> {
    let key = |rank: usize| format!("mpi/{rank}");
    let text = format!("{} {}", own.process, own.number);
    store.set(&key(rank), text.as_bytes()).map_err(|error| error.to_string())?;
    let end = Instant::now() + timeout;
    (0..size)
        .map(|rank| {
            let left = end.saturating_duration_since(Instant::now());
            let left = left.max(Duration::from_millis(1));
            let text = store
                .get(&key(rank), left)
                .map_err(|error| format!("rank {rank} did not come: {error}"))?;
            let unreadable = || format!("rank {rank} says {:?}", String::from_utf8_lossy(&text));
            Address::parse(&text).ok_or_else(unreadable)
        })
        .collect()
}

struct MpiTransport {
    mpi: Arc<Shared>,
    group: Arc<GroupState>,
    rank: usize,
    members: Vec<Address>,
    timeout: Duration,
}

impl MpiTransport {
    fn start(
        &self,
        direction: Direction,
        buffer: Private,
        peer: usize,
        tag: u32,
    ) -> Result<Arc<Outcome>> {
        self.group.reachable(peer)?;
        let there = *self
            .members
            .get(peer)
            .ok_or_else(|| CommError::lost(peer, "it is not in the group"))?;
        let here = self.members[self.rank];
        let outcome = Arc::new(Outcome::default());
        let start = Start {
            direction,
            buffer,
            group: self.group.clone(),
            peer,
            process: there.process,
            // The receiver's number tells the groups apart.
            tag: if direction == Direction::Send { there.tag(tag) } else { here.tag(tag) },
            outcome: outcome.clone(),
        };
        self.mpi.tell(Command::Start(start))?;
        Ok(outcome)
    }

    /// One notice to each other member.
    fn notices(&self, cause: Option<&str>) -> Vec<Notice> {
        let others = self.members.iter().enumerate().filter(|(rank, _)| *rank != self.rank);
        let notice = |(_, member): (usize, &Address)| Notice {
            process: member.process,
            number: member.number,
            from: self.rank as u32,
            cause: cause.map(str::to_string),
        };
        others.map(notice).collect()
    }
}

impl Transport for MpiTransport {
    fn send(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Box<dyn Pending>> {
        let outcome = self.start(Direction::Send, Private::copy_of(tensor)?, peer, tag)?;
        Ok(Box::new(OnItsWay { outcome, into: None, peer, timeout: self.timeout }))
    }

    fn recv(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Box<dyn Pending>> {
        let outcome = self.start(Direction::Receive, Private::like(tensor)?, peer, tag)?;
        let into = Some(tensor.shallow_clone());
        Ok(Box::new(OnItsWay { outcome, into, peer, timeout: self.timeout }))
    }

    fn reachable(&self, peer: usize) -> Result<()> {
        self.group.reachable(peer)
    }

    fn abort(&self, cause: &str) {
        self.group.abort(cause);
        // Without the thread that speaks MPI, nothing is under way either.
        let _ = self.mpi.tell(Command::Notify(self.notices(Some(cause))));
    }
}

impl Drop for MpiTransport {
    fn drop(&mut self) {
        let notices = self.notices(None);
        let _ = self.mpi.tell(Command::Close(self.group.clone(), notices));
    }
}

struct OnItsWay {
    outcome: Arc<Outcome>,
    /// Where what is received belongs.
    into: Option<Tensor>,
    peer: usize,
    timeout: Duration,
}

impl Pending for OnItsWay {
    fn wait(self: Box<Self>) -> Result<()> {
        let Some(result) = self.outcome.wait(self.timeout) else {
            return Err(CommError::late(self.peer, self.into.is_none(), self.timeout));
        };
        let buffer = result?;
        match &self.into {
            Some(tensor) => Ok(reduce::copy(tensor, &buffer.into_tensor())?),
            None => Ok(()),
        }
    }

    fn is_done(&self) -> bool {
        self.outcome.is_finished()
    }
}

impl Drop for OnItsWay {
    fn drop(&mut self) {
        self.outcome.give_up();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_of_groups_do_not_meet() {
        let last = last_number(i32::MAX);
        assert_eq!(last, (1 << 14) - 1);
        let top = (1 << TAG_BITS) - 1;
        assert_eq!(Address { process: 0, number: last }.tag(top), i32::MAX);
        assert!(
            Address { process: 0, number: 1 }.tag(top) < Address { process: 0, number: 2 }.tag(0)
        );
        assert_eq!(last_number(32_767), 0);
    }

    #[test]
    fn an_address_is_read_as_written() {
        assert_eq!(Address::parse(b"3 17"), Some(Address { process: 3, number: 17 }));
        assert_eq!(Address::parse(b"3"), None);
    }
}
