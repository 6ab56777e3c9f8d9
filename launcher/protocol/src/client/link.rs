//! The two halves of a rank's connection: the link to the agent, which is the process's, and the
//! place in a generation, of which a process that stays has one after another.

use super::{AbortCallback, ClientError, LAST_WORDS, WaitCallback, lock};
use crate::bundle::Copied;
use crate::frame;
use crate::message::{Assignment, FromRank, Phase, Position, ToRank};
use crate::store::StoreReply;
use std::collections::HashMap;
use std::io::BufReader;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex};

/// What belongs to the process.
pub(super) struct Link {
    pub(super) is_under_mpirun: bool,
    writer: Mutex<Writer>,
    pub(super) is_stopping: AtomicBool,
    /// A signal to this process that asked the run to stop.
    signal: Mutex<Option<String>>,
    pub(super) next_id: AtomicU64,
    /// The place that it has; in between two, the one that it had.
    place: Mutex<Arc<Place>>,
    /// Who waits for the next place.
    waiting: Mutex<Option<SyncSender<Arc<Place>>>>,
}

/// Who speaks is of one generation: what threads of another still want to say is dropped.
struct Writer {
    socket: UnixStream,
    generation: u64,
}

/// What belongs to a generation.
pub(super) struct Place {
    pub(super) assignment: Assignment,
    pub(super) replies: Mutex<HashMap<u64, SyncSender<StoreReply>>>,
    /// Who waits for the copy of a bundle, of this step.
    pub(super) copying: Mutex<Option<(u64, SyncSender<Copied>)>>,
    /// Why the generation is over, once the rank was told to let go of it.
    over: Mutex<Option<String>>,
    on_abort: Mutex<Vec<AbortCallback>>,
    pub(super) at: Mutex<(Phase, Option<u64>)>,
    pub(super) waits: Mutex<Vec<WaitCallback>>,
}

impl Place {
    pub(super) fn new(assignment: Assignment) -> Arc<Self> {
        Arc::new(Self {
            assignment,
            replies: Mutex::default(),
            copying: Mutex::default(),
            over: Mutex::default(),
            on_abort: Mutex::default(),
            at: Mutex::new((Phase::Init, None)),
            waits: Mutex::default(),
        })
    }

    /// An error once the rank was told to let go.
    pub(super) fn alive(&self) -> Result<(), ClientError> {
        match lock(&self.over).clone() {
            None => Ok(()),
            Some(reason) => Err(ClientError::Released { reason }),
        }
    }

    /// The generation is over: ends what waits in groups and for the store.
    fn release(&self, reason: &str) {
        {
            let mut over = lock(&self.over);
            if over.is_some() {
                return;
            }
            *over = Some(reason.to_owned());
        }
        let rank = self.assignment.rank;
        log_line("DEBUG", &format!("rank {rank} is to let go: {reason}"), None);
        // Whoever asks from now on sees that it is over.
        lock(&self.replies).clear();
        lock(&self.copying).take();
        self.abort(reason);
    }

    /// Calls back at once where it is over already.
    pub(super) fn on_abort(&self, callback: AbortCallback) {
        let over = lock(&self.over);
        match over.clone() {
            None => lock(&self.on_abort).push(callback),
            Some(reason) => {
                drop(over);
                callback(&reason);
            }
        }
    }

    pub(super) fn abort(&self, reason: &str) {
        let callbacks = std::mem::take(&mut *lock(&self.on_abort));
        callbacks.iter().for_each(|callback| callback(reason));
    }

    fn position(&self) -> Position {
        let (phase, step) = *lock(&self.at);
        let waits = lock(&self.waits).iter().filter_map(|wait| wait(phase)).collect();
        Position { phase, step, waits }
    }
}

impl Link {
    pub(super) fn new(socket: UnixStream, is_under_mpirun: bool, place: &Arc<Place>) -> Arc<Self> {
        let generation = place.assignment.generation;
        Arc::new(Self {
            is_under_mpirun,
            writer: Mutex::new(Writer { socket, generation }),
            is_stopping: AtomicBool::new(false),
            signal: Mutex::default(),
            next_id: AtomicU64::new(1),
            place: Mutex::new(Arc::clone(place)),
            waiting: Mutex::default(),
        })
    }

    /// Says something of this generation; nothing, where the process has gone on to another.
    pub(super) fn send(&self, place: &Place, message: &FromRank) -> Result<(), ClientError> {
        let frame = frame::encode(message)?;
        let mut writer = lock(&self.writer);
        if writer.generation != place.assignment.generation {
            return Ok(());
        }
        Ok(std::io::Write::write_all(&mut writer.socket, &frame)?)
    }

    /// The process got a signal that asks the run to stop.
    pub(super) fn signalled(&self, name: &str) {
        self.is_stopping.store(true, Ordering::Release);
        *lock(&self.signal) = Some(name.to_owned());
        let place = Arc::clone(&lock(&self.place));
        // A lost agent is the control thread's business.
        let _ = self.send(&place, &FromRank::StopRequested { signal: name.to_owned() });
    }

    /// The next place goes there from now on.
    pub(super) fn wait_for_place(&self, waiting: SyncSender<Arc<Place>>) {
        *lock(&self.waiting) = Some(waiting);
    }

    pub(super) fn listen(&self, reader: &mut BufReader<UnixStream>) {
        let reason = loop {
            let place = Arc::clone(&lock(&self.place));
            match frame::read(reader) {
                Ok(Some(ToRank::Stop { now: false })) => {
                    self.is_stopping.store(true, Ordering::Release);
                }
                Ok(Some(ToRank::Where)) => {
                    // An agent that is gone shows at the next read.
                    let _ = self.send(&place, &FromRank::Here(place.position()));
                }
                Ok(Some(ToRank::Stop { now: true })) => break "told to stop at once".to_owned(),
                Ok(Some(ToRank::Abort { reason })) => break reason,
                Ok(Some(ToRank::Release { generation, reason })) => {
                    if generation == place.assignment.generation {
                        place.release(&reason);
                    }
                }
                Ok(Some(ToRank::Store { id, reply })) => {
                    // The asker may have given up, which is no fault.
                    let asker = lock(&place.replies).remove(&id);
                    let _ = asker.map(|asker| asker.try_send(reply));
                }
                Ok(Some(ToRank::BundleCopied { step, copied })) => {
                    let asker = lock(&place.copying).take_if(|(asked, _)| *asked == step);
                    let _ = asker.map(|(_, asker)| asker.try_send(copied));
                }
                Ok(Some(ToRank::Assignment(assignment))) => {
                    if let Err(why) = self.join(&place, *assignment) {
                        break why;
                    }
                }
                Ok(None) => break "the agent is gone".to_owned(),
                Err(error) => break format!("the agent is gone: {error}"),
            }
        };
        self.end(&reason);
    }

    /// What is said and written from here on is of this place.
    pub(super) fn enter(&self, place: &Place) -> Result<(), ClientError> {
        let generation = place.assignment.generation;
        enter_log(&place.assignment);
        lock(&self.writer).generation = generation;
        self.send(place, &FromRank::Joined { generation })
    }

    /// Takes the next place, where one is waited for. Done by this thread, so that the message
    /// after it is taken for the new generation.
    fn join(&self, before: &Place, assignment: Assignment) -> Result<(), String> {
        let Some(waiting) = lock(&self.waiting).take() else {
            return Err("assigned twice".into());
        };
        let (last, generation) = (before.assignment.generation, assignment.generation);
        if generation <= last {
            return Err(format!("assigned to generation {generation} after {last}"));
        }
        let place = Place::new(assignment);
        self.is_stopping.store(false, Ordering::Release);
        *lock(&self.place) = Arc::clone(&place);
        self.enter(&place).map_err(|error| format!("the agent is gone: {error}"))?;
        // A stop that a signal asked for between two generations is one of the next. (One that
        // comes from here on is told by its own thread.)
        let signal = lock(&self.signal).clone();
        if let Some(signal) = signal {
            self.is_stopping.store(true, Ordering::Release);
            let _ = self.send(&place, &FromRank::StopRequested { signal });
        }
        waiting.try_send(place).map_err(|_| "nobody waits for the place".into())
    }

    /// Ends the process. SIGKILL, because exit handlers of a library whose threads still run may
    /// hang, and because nobody reads the status: the agent asked for it or is gone.
    fn end(&self, reason: &str) {
        // Should a callback hang.
        let watchdog = std::thread::Builder::new().name("last-words".into()).spawn(|| {
            std::thread::sleep(LAST_WORDS);
            kill_self();
        });
        let place = Arc::clone(&lock(&self.place));
        lock(&place.replies).clear();
        log_line("INFO", &format!("rank {} ends: {reason}", place.assignment.rank), None);
        if watchdog.is_ok() {
            place.abort(reason);
        }
        kill_self();
    }
}

fn kill_self() {
    let own = rustix::process::getpid();
    let _ = rustix::process::kill_process(own, rustix::process::Signal::KILL);
}

/// The line at which the agent turns to the log of another generation.
fn enter_log(assignment: &Assignment) {
    let Assignment { rank, generation, .. } = *assignment;
    let message = format!("rank {rank} goes on in generation {generation}");
    log_line("DEBUG", &message, Some((generation, rank)));
}

/// One line in the form of the rank's other log lines; written here because the process may be
/// about to end and its subscriber be held by a thread that hangs.
fn log_line(level: &str, message: &str, entered: Option<(u64, usize)>) {
    let mut fields = serde_json::json!({ "message": message });
    if let Some((generation, rank)) = entered {
        fields[super::ENTERED] = generation.into();
        fields[super::ENTERED_AS] = rank.into();
    }
    let line = serde_json::json!({
        "level": level,
        "target": super::LOG_TARGET,
        "fields": fields,
    });
    let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("{line}\n").as_bytes());
}
