//! The one thread that speaks MPI. Others hand it messages and wait for their outcome, so that no
//! wait is inside MPI, and none without an end.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender};
use std::time::{Duration, Instant};

use torch_shim::tch::Tensor;

use super::group::{GroupState, Outcome};
use super::raw::{ANY_PROCESS, Direction, InFlight, Private, World};
use crate::error::{CommError, Result};

/// Bytes of a notice: its head, and a cause that may be cut.
const NOTICE_BYTES: usize = 512;
/// The tag of notices; those of groups are larger.
const NOTICE_TAG: i32 = 0;
/// Looks at MPI without a pause after something happened.
const EAGER_ROUNDS: u32 = 50;
/// The longest pause while a message is under way.
const BUSY_PAUSE: Duration = Duration::from_micros(200);
/// The longest pause while none is: notices arrive, and MPI may have work of its own.
const IDLE_PAUSE: Duration = Duration::from_millis(5);
/// The longest wait for what is still to be sent when all is over.
const FAREWELL: Duration = Duration::from_millis(500);

/// What other threads ask for.
pub(super) enum Command {
    /// Messages to a group of this process may come.
    Open(Arc<GroupState>),
    /// Send or receive.
    Start(Start),
    /// Tell these that a group is over.
    Notify(Vec<Notice>),
    /// The group is dropped: tell these when all that it sends is sent.
    Close(Arc<GroupState>, Vec<Notice>),
    /// End MPI together with all other processes.
    Leave(SyncSender<Result<()>>),
}

/// A message to start.
pub(super) struct Start {
    pub(super) direction: Direction,
    pub(super) buffer: Private,
    pub(super) group: Arc<GroupState>,
    /// The peer's number in the group.
    pub(super) peer: usize,
    /// The peer's process.
    pub(super) process: i32,
    pub(super) tag: i32,
    pub(super) outcome: Arc<Outcome>,
}

/// What one member of a group tells another, beside the messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Notice {
    /// The process it goes to.
    pub(super) process: i32,
    /// The group's number there.
    pub(super) number: u32,
    /// The sender's number in the group.
    pub(super) from: u32,
    /// Why the group is over; `None`: the sender has left, with all done.
    pub(super) cause: Option<String>,
}

impl Notice {
    fn encode(&self) -> Result<Private> {
        let mut bytes = Vec::with_capacity(NOTICE_BYTES);
        bytes.extend(self.number.to_be_bytes());
        bytes.extend(self.from.to_be_bytes());
        bytes.push(u8::from(self.cause.is_some()));
        bytes.extend(self.cause.as_deref().unwrap_or_default().bytes());
        bytes.resize(NOTICE_BYTES, 0);
        Private::copy_of(&Tensor::f_from_slice(&bytes)?)
    }

    /// What came to this process.
    fn decode(tensor: &Tensor, process: i32) -> Option<Notice> {
        let bytes = Vec::<u8>::try_from(tensor).ok()?;
        let number = u32::from_be_bytes(*bytes.first_chunk()?);
        let from = u32::from_be_bytes(*bytes.get(4..)?.first_chunk()?);
        let text = bytes.get(9..)?.split(|&byte| byte == 0).next()?;
        let cause =
            (*bytes.get(8)? != 0).then(|| String::from_utf8_lossy(text).trim_end().to_string());
        Some(Notice { process, number, from, cause })
    }
}

struct Active {
    flight: InFlight,
    group: Arc<GroupState>,
    peer: usize,
    outcome: Arc<Outcome>,
}

/// Who this process is, or why it is none.
pub(super) type Started = Result<(i32, i32, i32)>;

/// The thread's body. Says who it is first.
pub(super) fn run(commands: &Receiver<Command>, started: &SyncSender<Started>) {
    let made = World::start().and_then(Engine::new);
    let mut engine = match made {
        Ok(engine) => engine,
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    let world = &engine.world;
    let _ = started.send(Ok((world.process, world.size, world.largest_tag)));
    if let Some(answer) = engine.serve(commands) {
        let _ = answer.send(engine.leave());
    }
}

struct Engine {
    world: World,
    groups: HashMap<u32, Arc<GroupState>>,
    active: Vec<Active>,
    /// Messages that nobody waits for, but MPI may still be at.
    detached: Vec<InFlight>,
    closing: Vec<(Arc<GroupState>, Vec<Notice>)>,
    inbox: Option<InFlight>,
}

impl Engine {
    fn new(world: World) -> Result<Engine> {
        let mut engine = Engine {
            world,
            groups: HashMap::new(),
            active: Vec::new(),
            detached: Vec::new(),
            closing: Vec::new(),
            inbox: None,
        };
        engine.listen()?;
        Ok(engine)
    }

    /// Works until nobody can ask for anything any more, or someone asks to leave.
    fn serve(&mut self, commands: &Receiver<Command>) -> Option<SyncSender<Result<()>>> {
        let mut quiet_rounds = 0u32;
        loop {
            let next = match quiet_rounds {
                0..EAGER_ROUNDS => commands.try_recv().map_err(|error| match error {
                    std::sync::mpsc::TryRecvError::Empty => RecvTimeoutError::Timeout,
                    std::sync::mpsc::TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
                }),
                _ => commands.recv_timeout(self.pause(quiet_rounds - EAGER_ROUNDS)),
            };
            let mut is_quiet = true;
            match next {
                Ok(Command::Leave(answer)) => return Some(answer),
                Ok(command) => {
                    self.take(command);
                    is_quiet = false;
                }
                Err(RecvTimeoutError::Timeout) => std::thread::yield_now(),
                Err(RecvTimeoutError::Disconnected) => {
                    self.flush();
                    return None;
                }
            }
            is_quiet &= !self.progress();
            quiet_rounds = if is_quiet { quiet_rounds.saturating_add(1) } else { 0 };
        }
    }

    /// Doubles from round to round, up to what suits.
    fn pause(&self, round: u32) -> Duration {
        let is_idle = self.active.is_empty() && self.detached.is_empty();
        let longest = if is_idle { IDLE_PAUSE } else { BUSY_PAUSE };
        longest.min(Duration::from_micros(10 << round.min(10)))
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Open(group) => {
                self.groups.insert(group.number, group);
            }
            Command::Start(start) => self.start(start),
            Command::Notify(notices) => self.notify(&notices),
            Command::Close(group, notices) => self.closing.push((group, notices)),
            Command::Leave(_) => {}
        }
    }

    fn start(&mut self, start: Start) {
        let Start { direction, buffer, group, peer, process, tag, outcome } = start;
        let flight = InFlight::start(&self.world, direction, buffer, process, tag);
        match flight {
            Ok(flight) => self.active.push(Active { flight, group, peer, outcome }),
            Err(error) => outcome.finish(Err(CommError::lost(peer, error.to_string()))),
        }
    }

    fn notify(&mut self, notices: &[Notice]) {
        for notice in notices {
            let sent = notice.encode().and_then(|buffer| {
                let (process, tag) = (notice.process, NOTICE_TAG);
                InFlight::start(&self.world, Direction::Send, buffer, process, tag)
            });
            match sent {
                Ok(flight) => self.detached.push(flight),
                Err(error) => tracing::warn!("MPI process {}: {error}", notice.process),
            }
        }
    }

    /// Waits for the next notice.
    fn listen(&mut self) -> Result<()> {
        let buffer = Notice { process: 0, number: 0, from: 0, cause: None }.encode()?;
        let (direction, tag) = (Direction::Receive, NOTICE_TAG);
        self.inbox = Some(InFlight::start(&self.world, direction, buffer, ANY_PROCESS, tag)?);
        Ok(())
    }

    /// One look at everything; whether anything happened.
    fn progress(&mut self) -> bool {
        let mut has_moved = self.read_notices();
        let mut index = 0;
        while index < self.active.len() {
            let Some(result) = self.look(index) else {
                index += 1;
                continue;
            };
            has_moved = true;
            // The order of the rest does not matter: MPI keeps that of the messages.
            let Active { mut flight, outcome, .. } = self.active.swap_remove(index);
            match result {
                Err(error) => {
                    outcome.finish(Err(error));
                    flight.give_up();
                    self.detached.push(flight);
                }
                Ok(peer) => {
                    let lost = || CommError::lost(peer, "MPI kept the memory of the message");
                    outcome.finish(flight.into_buffer().ok_or_else(lost));
                }
            }
        }
        // What fails here is over: its memory goes, or is lost where MPI still has it.
        self.detached.retain_mut(|flight| matches!(flight.test(), Ok(false)));
        has_moved | self.close()
    }

    /// What became of a message, where it is over; the peer where it is well.
    fn look(&mut self, index: usize) -> Option<Result<usize>> {
        let active = &mut self.active[index];
        match active.flight.test() {
            Ok(true) => Some(Ok(active.peer)),
            Err(error) => Some(Err(CommError::lost(active.peer, error.to_string()))),
            Ok(false) => match active.group.reachable(active.peer) {
                Err(error) => Some(Err(error)),
                Ok(()) if active.outcome.is_unwanted() => {
                    Some(Err(CommError::lost(active.peer, "too late")))
                }
                Ok(()) => None,
            },
        }
    }

    fn read_notices(&mut self) -> bool {
        let Some(inbox) = &mut self.inbox else { return false };
        let outcome = inbox.test();
        if matches!(outcome, Ok(false)) {
            return false;
        }
        let buffer = self.inbox.take().and_then(InFlight::into_buffer);
        let notice = buffer.and_then(|buffer| Notice::decode(&buffer.into_tensor(), 0));
        if let (Ok(true), Some(notice)) = (outcome, notice) {
            self.hear(&notice);
        }
        if let Err(error) = self.listen() {
            tracing::warn!("no more notices from other MPI processes: {error}");
        }
        true
    }

    fn hear(&self, notice: &Notice) {
        // It may be about a group that this process has dropped.
        let Some(group) = self.groups.get(&notice.number) else { return };
        match &notice.cause {
            Some(cause) => group.aborted_by(notice.from as usize, cause),
            None => group.left_by(notice.from as usize),
        }
    }

    /// Tells the peers of dropped groups, where all that they send is sent.
    fn close(&mut self) -> bool {
        let sends = |group: &Arc<GroupState>, active: &Active| Arc::ptr_eq(group, &active.group);
        let active = &self.active;
        let (closed, closing): (Vec<_>, Vec<_>) = std::mem::take(&mut self.closing)
            .into_iter()
            .partition(|(group, _)| !active.iter().any(|active| sends(group, active)));
        self.closing = closing;
        for (group, notices) in &closed {
            self.groups.remove(&group.number);
            self.notify(notices);
        }
        !closed.is_empty()
    }

    /// Lets go out what is still to be sent.
    fn flush(&mut self) {
        let end = Instant::now() + FAREWELL;
        while !(self.closing.is_empty() && self.detached.is_empty()) && Instant::now() < end {
            self.progress();
            std::thread::yield_now();
        }
    }

    /// Ends MPI.
    fn leave(mut self) -> Result<()> {
        self.flush();
        if !self.active.is_empty() {
            let text = format!("{} messages are still under way", self.active.len());
            return Err(CommError::Backend(text));
        }
        if let Some(mut inbox) = self.inbox.take() {
            inbox.give_up();
            self.detached.push(inbox);
        }
        self.flush();
        self.world.leave();
        Ok(())
    }
}

/// Hands a command over.
pub(super) fn tell(commands: &Sender<Command>, command: Command) -> Result<()> {
    let gone = |_| CommError::Backend("the thread that speaks MPI is gone".to_string());
    commands.send(command).map_err(gone)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notice_comes_as_it_was() {
        for cause in [None, Some("rank 3 died".to_string()), Some(String::new())] {
            let notice = Notice { process: 2, number: 70_000, from: 3, cause };
            let sent = notice.encode().unwrap().into_tensor();
            assert_eq!(Notice::decode(&sent, 2), Some(notice));
        }
        let long = Notice { process: 0, number: 1, from: 0, cause: Some("x".repeat(900)) };
        let read = Notice::decode(&long.encode().unwrap().into_tensor(), 0).unwrap();
        assert_eq!(read.cause.map(|cause| cause.len()), Some(NOTICE_BYTES - 9));
    }
}
