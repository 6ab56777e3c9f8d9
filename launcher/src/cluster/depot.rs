//! What a node keeps of checkpoints in its memory: its own ranks' bundles, which they write, and
//! the copies of another node's.
//!
//! A thread of its own, so that gigabytes on their way make no agent look dead. It alone takes
//! copies in and removes anything; ranks write into its folder. What is here it tells its agent,
//! which tells the coordinator. [`door`] lets other agents in, [`link`] goes to theirs, [`resume`]
//! puts a checkpoint together of what is here and there, of which [`needs`] says what the ranks
//! read. The folder goes with the agent, as [`crate::memory`] says.

mod door;
mod link;
mod needs;
mod resume;

use super::secrets::{self, new_token};
use crate::memory::MemoryTier;
use checkpoint_format::bundle::{self, Bundle, BundleManifest};
use checkpoint_format::{failpoint, names, retention};
use link::{Link, Trusts};
use rank_protocol::RunDir;
use rank_protocol::bundle::{BundleId, Copied, Door, Holding, Resume};
use run_config::RunConfig;
use rustls::ServerConfig;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, spawn_blocking, spawn_local};
use tokio::time::timeout;

/// Commands that wait; one that finds no room is dropped, and said.
const NUM_COMMANDS: usize = 256;
/// News that wait for the agent.
const NUM_NEWS: usize = 1024;
/// The most bundles, those that arrive among them: its own and another's, each the newest and the
/// one that is to be, and what is not removed yet.
const MAX_BUNDLES: usize = 8;
/// After a copy that failed, none is tried to the same node for so long.
const RETRY: Duration = Duration::from_secs(10);
/// And not for so many times as long as it took: a link that is slow holds training up for a small
/// part of its time.
const PAUSES: u32 = 8;
/// Bytes a second that a link must carry; a slower one counts as failed, though something moves.
const LEAST_RATE: u64 = 64 << 20;
/// Time for a copy beside that of its bytes.
const COPY_BASE: Duration = Duration::from_secs(10);
/// Longest time for a copy, shorter than ranks wait for one.
const LONGEST_COPY: Duration = Duration::from_secs(540);

/// What the agent wants done.
#[derive(Debug)]
pub enum Command {
    /// The ranks here have written a bundle: have `peer` take a copy in, which is told by
    /// [`News::Copied`].
    Copy {
        /// It.
        bundle: BundleId,
        /// Where the copy goes.
        peer: Option<Door>,
    },
    /// What is older than this step of this generation is not needed any more.
    Keep {
        /// The generation.
        generation: u64,
        /// The step.
        step: u64,
    },
    /// Nothing is needed but this.
    Forget {
        /// (generation, step).
        but: Option<(u64, u64)>,
    },
    /// From now on all that comes is of this run, and what is of another goes.
    BelongTo {
        /// Its identity.
        run: String,
    },
    /// The ranks of generations before this one are gone: what they have not finished goes.
    Sweep {
        /// The generation.
        before: u64,
    },
    /// Put a checkpoint together, which is told by [`News::Resumed`].
    Resume(Box<Wanted>),
    /// The ranks have read it.
    HasResumed,
}

/// A checkpoint that ranks go on from.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Identity of the run.
    pub run: String,
    /// The generation that does.
    pub generation: u64,
    /// What, and where it is.
    pub resume: Resume,
    /// The ranks here.
    pub ranks: Vec<usize>,
    /// All ranks.
    pub world_size: usize,
    /// Data-parallel replicas, where they may be others than the config's.
    pub replicas: Option<usize>,
}

/// What the agent is told.
#[derive(Debug)]
pub enum News {
    /// What is here, from now on.
    Holds(Holding),
    /// What became of a copy.
    Copied {
        /// Of which bundle.
        bundle: BundleId,
        /// What.
        copied: Copied,
    },
    /// A checkpoint for a generation's ranks is in this folder of checkpoints, or why there is
    /// none.
    Resumed {
        /// The generation.
        generation: u64,
        /// The folder.
        result: Result<PathBuf, NotResumed>,
    },
}

/// Why there is no checkpoint to go on from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotResumed {
    /// Whether what there is is damaged. Otherwise another try may do better: a link was lost, or
    /// somebody was silent.
    pub is_damaged: bool,
    /// Why, in words.
    pub why: String,
}

/// The agent's handle. When it is dropped, all that is kept goes.
pub struct Depot {
    /// `None` once it is to end.
    commands: Option<mpsc::Sender<Command>>,
    door: Door,
    bundles: PathBuf,
    thread: Option<std::thread::JoinHandle<()>>,
    _tier: MemoryTier,
}

impl Depot {
    /// Makes the folder, opens the door and starts the thread; what comes of it is read from the
    /// returned end.
    ///
    /// # Errors
    /// Where one of these cannot be.
    pub fn start(run: &RunDir, config: &RunConfig) -> io::Result<(Depot, mpsc::Receiver<News>)> {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let id = format!("{:x}-{:x}", std::process::id(), since.unwrap_or_default().as_nanos());
        let tier =
            MemoryTier::begin(&config.checkpoint.memory.folder, &format!("{}-{id}", config.name))?;
        let listener = listen()?;
        listener.set_nonblocking(true)?;
        let (host, port) = (String::new(), listener.local_addr()?.port());
        let door = Door { host, port, key: new_token()? };
        let (commands, ordered) = mpsc::channel(NUM_COMMANDS);
        let (news, told) = mpsc::channel(NUM_NEWS);
        let bundles = tier.folder().join("bundles");
        std::fs::create_dir_all(&bundles)?;
        let (run, key, folder) = (run.clone(), door.key.clone(), tier.folder().to_path_buf());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let work = move || {
            let shelf = Rc::new(Shelf::new(run, key, &folder, news));
            let work = async {
                match tokio::net::TcpListener::from_std(listener) {
                    Ok(listener) => drop(spawn_local(door::serve(listener, Rc::clone(&shelf)))),
                    Err(error) => tracing::error!("no copies are taken in: {error}"),
                }
                serve(ordered, &shelf).await;
            };
            tokio::task::LocalSet::new().block_on(&runtime, work);
        };
        let thread = std::thread::Builder::new().name("depot".into()).spawn(work)?;
        let (commands, thread) = (Some(commands), Some(thread));
        Ok((Depot { commands, door, bundles, thread, _tier: tier }, told))
    }

    /// Where other agents are let in.
    pub fn door(&self) -> &Door {
        &self.door
    }

    /// The folder into which this node's ranks write their bundles.
    pub fn bundles(&self) -> &Path {
        &self.bundles
    }

    /// Has something done. Where it cannot be, what somebody waits for is returned at once.
    pub fn order(&self, command: Command) -> Option<News> {
        let Err(error) = self.commands.as_ref()?.try_send(command) else { return None };
        let why = format!("what is kept in memory is not cared for: {error}");
        tracing::error!("{why}");
        refused(error.into_inner(), why)
    }
}

impl Drop for Depot {
    fn drop(&mut self) {
        // Nothing must be written any more once the folder goes.
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What becomes of a command that nobody takes.
fn refused(command: Command, why: String) -> Option<News> {
    match command {
        Command::Copy { bundle, .. } => {
            Some(News::Copied { bundle, copied: Copied::Failed { reason: why } })
        }
        Command::Resume(wanted) => {
            let result = Err(NotResumed { is_damaged: false, why });
            Some(News::Resumed { generation: wanted.generation, result })
        }
        _ => None,
    }
}

/// On all addresses of this machine, of both kinds where there are both.
fn listen() -> io::Result<TcpListener> {
    TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0))
        .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)))
}

/// What is here, for all tasks of the thread.
struct Shelf {
    run: RunDir,
    /// Identity of the run that all of it is of; empty before one is told.
    run_id: RefCell<String>,
    /// The doors' certificate, once it was read.
    tls: RefCell<Option<Tls>>,
    /// What opens the door.
    key: String,
    /// The folder of bundles, into which ranks write theirs too.
    bundles: PathBuf,
    /// Copies on their way to it.
    arriving: PathBuf,
    /// The folder in which each generation has a folder of checkpoints, of which one is put
    /// together there.
    resume: PathBuf,
    /// What is being removed.
    leaving: PathBuf,
    num_left: Cell<u64>,
    holds: RefCell<BTreeSet<BundleId>>,
    on_their_way: RefCell<BTreeSet<BundleId>>,
    /// Where the last copy failed to go to, and until when none is tried there.
    failed: RefCell<Option<(Door, Instant)>>,
    news: mpsc::Sender<News>,
}

/// What doors show, and what is trusted at others'.
#[derive(Clone)]
struct Tls {
    server: Arc<ServerConfig>,
    client: Trusts,
}

/// The longest that a copy of so many bytes may take.
fn time_for(bytes: u64) -> Duration {
    (COPY_BASE + Duration::from_secs(bytes / LEAST_RATE)).min(LONGEST_COPY)
}

/// The identity of a bundle.
fn id_of(manifest: &BundleManifest) -> BundleId {
    let BundleManifest { generation, step, node, .. } = manifest;
    BundleId { generation: *generation, step: *step, place: node.place, places: node.places }
}

impl Shelf {
    fn new(run: RunDir, key: String, folder: &Path, news: mpsc::Sender<News>) -> Self {
        Self {
            run,
            run_id: RefCell::default(),
            tls: RefCell::default(),
            key,
            bundles: folder.join("bundles"),
            arriving: folder.join("arriving"),
            resume: folder.join("resume"),
            leaving: folder.join("leaving"),
            num_left: Cell::default(),
            holds: RefCell::default(),
            on_their_way: RefCell::default(),
            failed: RefCell::default(),
            news,
        }
    }

    /// The run is this one. Another of its name has other doors, too.
    fn belong_to(&self, run: String) {
        if *self.run_id.borrow() == run {
            return;
        }
        self.retain(|_, _| false);
        self.forget_resume();
        // Generations are counted from 1 in each run: with the fence of the one before, the ranks
        // of this one could save nothing.
        let _ = std::fs::remove_file(self.bundles.join(names::FENCE));
        (*self.tls.borrow_mut(), *self.failed.borrow_mut()) = (None, None);
        *self.run_id.borrow_mut() = run;
    }

    /// An error where a bundle is of another run.
    fn check_run(&self, manifest: &BundleManifest) -> io::Result<()> {
        let run = self.run_id.borrow();
        match manifest.run == *run {
            true => Ok(()),
            false => Err(io::Error::other(format!("it is of run {}, not {run}", manifest.run))),
        }
    }

    /// Read once: a file for each connection would be for strangers to ask for.
    fn tls(&self) -> io::Result<Tls> {
        if let Some(tls) = &*self.tls.borrow() {
            return Ok(tls.clone());
        }
        let tls = Tls { server: secrets::door(&self.run)?, client: secrets::doors(&self.run)? };
        *self.tls.borrow_mut() = Some(tls.clone());
        Ok(tls)
    }

    async fn open(&self, door: &Door) -> io::Result<Link> {
        Link::open(self.tls()?.client, door).await
    }

    fn path(&self, id: BundleId) -> PathBuf {
        self.bundles.join(names::bundle_folder(id.step, id.generation, id.place))
    }

    fn has(&self, id: BundleId) -> bool {
        self.holds.borrow().contains(&id)
    }

    fn add(&self, id: BundleId) {
        if self.holds.borrow_mut().insert(id) {
            self.tell_holds();
        }
    }

    /// Keeps those whose (generation, step) is wanted, and removes all others that lie there.
    fn retain(&self, is_wanted: impl Fn(u64, u64) -> bool) {
        let before = self.holds.borrow().len();
        self.holds.borrow_mut().retain(|id| is_wanted(id.generation, id.step));
        if self.holds.borrow().len() != before {
            // Nobody counts on what is about to go.
            self.tell_holds();
        }
        for path in bundle::unwanted(&self.bundles, is_wanted) {
            self.remove(&path);
        }
    }

    /// Removes a folder: at once for whoever looks for it, and its bytes, which may take seconds,
    /// on another thread.
    fn remove(&self, path: &Path) {
        let number = self.num_left.get();
        self.num_left.set(number + 1);
        let aside = self.leaving.join(number.to_string());
        let made = std::fs::create_dir_all(&self.leaving);
        match made.and_then(|()| std::fs::rename(path, &aside)) {
            Ok(()) => drop(spawn_blocking(move || {
                if let Err(error) = std::fs::remove_dir_all(&aside) {
                    tracing::warn!("what is not needed stays in memory: {error}");
                }
            })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!("what is not needed stays in memory: {error}"),
        }
    }

    /// Removes what ranks of earlier generations have not finished.
    fn sweep(&self, before: u64) {
        let dir = self.bundles.clone();
        drop(spawn_blocking(move || {
            let swept = retention::remove_temporaries(&dir, before.saturating_sub(1));
            if let Err(error) = swept {
                tracing::warn!("what is not finished stays in memory: {error}");
            }
        }));
    }

    fn tell_holds(&self) {
        let bundles = self.holds.borrow().iter().copied().collect();
        self.tell(News::Holds(Holding { run: self.run_id.borrow().clone(), bundles }));
    }

    fn tell(&self, news: News) {
        if let Err(error) = self.news.try_send(news) {
            tracing::error!("the agent does not hear what is in memory: {error}");
        }
    }

    /// Notes that a bundle arrives, until what is returned is dropped.
    fn expecting(self: &Rc<Self>, id: BundleId) -> Result<Expected, String> {
        let num_bundles = self.holds.borrow().len() + self.on_their_way.borrow().len();
        if num_bundles >= MAX_BUNDLES {
            return Err(format!("there are {num_bundles} bundles here"));
        }
        if !self.on_their_way.borrow_mut().insert(id) {
            return Err("it is on its way already".to_owned());
        }
        Ok(Expected { shelf: Rc::clone(self), id })
    }

    /// Whether a copy to this door has just failed.
    fn has_just_failed(&self, door: &Door) -> bool {
        let failed = self.failed.borrow();
        failed.as_ref().is_some_and(|(other, until)| other == door && Instant::now() < *until)
    }

    /// Has another node take a copy of a bundle in.
    async fn copy(&self, id: BundleId, peer: Option<Door>) -> Copied {
        let Some(door) = peer else { return Copied::NoPeer };
        if self.has_just_failed(&door) {
            return Copied::NotTried;
        }
        let began = Instant::now();
        match self.send(id, &door).await {
            Ok(()) => Copied::Done,
            Err(error) => {
                let reason = format!("to {door:?}: {error}");
                tracing::warn!("step {} is not copied {reason}", id.step);
                let pause = RETRY.max(began.elapsed() * PAUSES);
                *self.failed.borrow_mut() = Some((door, Instant::now() + pause));
                Copied::Failed { reason }
            }
        }
    }

    async fn send(&self, id: BundleId, door: &Door) -> io::Result<()> {
        failpoint::hit(failpoint::COPY_BUNDLE)?;
        let bundle = Bundle::open(&self.path(id)).map_err(io::Error::other)?;
        let limit = time_for(bundle.manifest().bytes());
        let sent = async { self.open(door).await?.send(&bundle).await };
        timeout(limit, sent).await.unwrap_or_else(|_| {
            let (bytes, seconds) = (bundle.manifest().bytes(), limit.as_secs());
            let what = format!("the link is too slow: {bytes} bytes took more than {seconds} s");
            Err(io::Error::new(io::ErrorKind::TimedOut, what))
        })
    }

    fn forget_resume(&self) {
        self.remove(&self.resume);
    }
}

/// A bundle that arrives.
struct Expected {
    shelf: Rc<Shelf>,
    id: BundleId,
}

impl Drop for Expected {
    fn drop(&mut self) {
        self.shelf.on_their_way.borrow_mut().remove(&self.id);
    }
}

/// A task of which there is one at a time: another ends it.
#[derive(Default)]
struct OnlyOne(Cell<Option<AbortHandle>>);

impl OnlyOne {
    fn end(&self) {
        if let Some(task) = self.0.take() {
            task.abort();
        }
    }

    fn begin(&self, work: impl Future<Output = ()> + 'static) {
        self.end();
        self.0.set(Some(spawn_local(work).abort_handle()));
    }
}

/// Does what it is told, until nobody is left to tell it.
async fn serve(mut commands: mpsc::Receiver<Command>, shelf: &Rc<Shelf>) {
    let (copying, resuming) = (OnlyOne::default(), OnlyOne::default());
    while let Some(command) = commands.recv().await {
        match command {
            Command::Copy { bundle, peer } => {
                shelf.add(bundle);
                let shelf = Rc::clone(shelf);
                copying.begin(async move {
                    let copied = shelf.copy(bundle, peer).await;
                    shelf.tell(News::Copied { bundle, copied });
                });
            }
            Command::BelongTo { run } => {
                // What is under way is of that run, or of one that is over.
                if *shelf.run_id.borrow() != run {
                    copying.end();
                    resuming.end();
                }
                shelf.belong_to(run);
            }
            Command::Sweep { before } => shelf.sweep(before),
            Command::Keep { generation, step } => {
                shelf.retain(|other, kept| (other, kept) >= (generation, step));
            }
            Command::Forget { but } => {
                copying.end();
                resuming.end();
                shelf.forget_resume();
                shelf.retain(|generation, step| but == Some((generation, step)));
            }
            Command::Resume(wanted) => {
                let shelf = Rc::clone(shelf);
                resuming.begin(async move {
                    let result = resume::assemble(&shelf, &wanted).await;
                    shelf.tell(News::Resumed { generation: wanted.generation, result });
                });
            }
            Command::HasResumed => shelf.forget_resume(),
        }
    }
}

#[cfg(test)]
mod tests;
