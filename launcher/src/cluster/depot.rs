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

use super::secrets::new_token;
use crate::memory::MemoryTier;
use checkpoint_format::bundle::{self, Bundle, BundleManifest};
use checkpoint_format::{failpoint, names};
use link::Link;
use rank_protocol::RunDir;
use rank_protocol::bundle::{BundleId, Copied, Door, Resume};
use run_config::RunConfig;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, spawn_local};

/// Commands that wait; one that finds no room is dropped, and said.
const NUM_COMMANDS: usize = 256;
/// News that wait for the agent.
const NUM_NEWS: usize = 1024;
/// The most bundles, those that arrive among them: its own and another's, each the newest and the
/// one that is to be, and what is not removed yet.
const MAX_BUNDLES: usize = 8;
/// After a copy that failed, none is tried to the same node for so long.
const RETRY: Duration = Duration::from_secs(10);

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
    /// Put a checkpoint together, which is told by [`News::Resumed`].
    Resume(Box<Wanted>),
    /// The ranks have read it.
    HasResumed,
}

/// A checkpoint that ranks go on from.
#[derive(Clone, Debug)]
pub struct Wanted {
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
    Holds(Vec<BundleId>),
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
        result: Result<PathBuf, String>,
    },
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
            let shelf = Rc::new(Shelf {
                run,
                key,
                bundles: folder.join("bundles"),
                arriving: folder.join("arriving"),
                resume: folder.join("resume"),
                holds: RefCell::default(),
                on_their_way: RefCell::default(),
                failed: RefCell::default(),
                news,
            });
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
    pub fn bundles(&self) -> &std::path::Path {
        &self.bundles
    }

    /// Has something done.
    pub fn order(&self, command: Command) {
        let sent = self.commands.as_ref().map(|commands| commands.try_send(command));
        if let Some(Err(error)) = sent {
            tracing::error!("what is kept in memory is not cared for: {error}");
        }
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

/// On all addresses of this machine, of both kinds where there are both.
fn listen() -> io::Result<TcpListener> {
    TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0))
        .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)))
}

/// What is here, for all tasks of the thread.
struct Shelf {
    run: RunDir,
    /// What opens the door.
    key: String,
    /// The folder of bundles, into which ranks write theirs too.
    bundles: PathBuf,
    /// Copies on their way to it.
    arriving: PathBuf,
    /// The folder of checkpoints of which one is put together.
    resume: PathBuf,
    holds: RefCell<BTreeSet<BundleId>>,
    on_their_way: RefCell<BTreeSet<BundleId>>,
    /// Where the last copy failed to go to, and when.
    failed: RefCell<Option<(Door, Instant)>>,
    news: mpsc::Sender<News>,
}

/// The identity of a bundle.
fn id_of(manifest: &BundleManifest) -> BundleId {
    let BundleManifest { generation, step, node, .. } = manifest;
    BundleId { generation: *generation, step: *step, place: node.place, places: node.places }
}

impl Shelf {
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
        if let Err(error) = bundle::retain(&self.bundles, is_wanted) {
            tracing::warn!("what is not needed stays in memory: {error}");
        }
    }

    fn tell_holds(&self) {
        let holds = self.holds.borrow().iter().copied().collect();
        self.tell(News::Holds(holds));
    }

    fn tell(&self, news: News) {
        if let Err(error) = self.news.try_send(news) {
            tracing::error!("the agent does not hear what is in memory: {error}");
        }
    }

    /// Notes that a bundle arrives, until what is returned is dropped.
    fn expect(self: &Rc<Self>, id: BundleId) -> Result<Expected, String> {
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
        failed.as_ref().is_some_and(|(other, at)| other == door && at.elapsed() < RETRY)
    }

    /// Has another node take a copy of a bundle in.
    async fn copy(&self, id: BundleId, peer: Option<Door>) -> Copied {
        let Some(door) = peer else { return Copied::NoPeer };
        if self.has_just_failed(&door) {
            return Copied::NotTried;
        }
        let sent = async {
            failpoint::hit(failpoint::COPY_BUNDLE)?;
            let bundle = Bundle::open(&self.path(id)).map_err(io::Error::other)?;
            Link::open(&self.run, &door).await?.send(&bundle).await
        };
        match sent.await {
            Ok(()) => Copied::Done,
            Err(error) => {
                let reason = format!("to {door:?}: {error}");
                tracing::warn!("step {} is not copied {reason}", id.step);
                *self.failed.borrow_mut() = Some((door, Instant::now()));
                Copied::Failed { reason }
            }
        }
    }

    fn forget_resume(&self) {
        if let Err(error) = crate::memory::forget(&self.resume) {
            tracing::warn!("what was read stays in memory: {error}");
        }
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
