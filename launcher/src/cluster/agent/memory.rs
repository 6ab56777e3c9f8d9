//! The agent's part in what is kept of checkpoints in memory: between its ranks, the depot that
//! cares for it, and the coordinator.

use super::Agent;
use crate::cluster::depot::{Command, Depot, News, NotResumed, Wanted};
use crate::error::UserError;
use crate::memory;
use crate::supervisor::rank::RankHandle;
use rank_protocol::agent::{FromAgent, Start};
use rank_protocol::bundle::{BundleId, Door, Holding, NodePlace};
use rank_protocol::{Assignment, FailureClass, FailureReport, FromRank, Phase, RunDir, ToRank};
use run_config::RunConfig;
use std::collections::BTreeSet;
use std::path::PathBuf;
use tokio::sync::mpsc;

/// What it knows of that.
#[derive(Default)]
pub(super) struct Kept {
    /// What is here.
    pub(super) holding: Holding,
    /// Where its ranks' bundles are copied to.
    peer: Option<Door>,
    /// The rank that waits for a copy.
    asker: Option<(usize, BundleId)>,
    /// The generation whose ranks wait for the checkpoint that they go on from.
    fetching: Option<u64>,
    /// Where it is.
    fetched: Option<PathBuf>,
    /// Ranks that may still read it.
    readers: BTreeSet<usize>,
}

impl Kept {
    /// Whether the next generation cannot begin here yet.
    pub(super) fn is_fetching(&self) -> bool {
        self.fetching.is_some()
    }
}

/// What keeps checkpoints in this node's memory, where the config asks for it.
pub(super) fn keep_in_memory(
    run: &RunDir,
    config: &RunConfig,
) -> Result<Option<(Depot, mpsc::Receiver<News>)>, UserError> {
    memory::check(config)?;
    if config.checkpoint.memory.every_steps == 0 {
        return Ok(None);
    }
    Depot::start(run, config).map(Some).map_err(|error| {
        let folder = config.checkpoint.memory.folder.display();
        UserError::failed(format!("checkpoint.memory.folder: {folder}: {error}"))
    })
}

/// The next news of the depot; never, where there is none.
pub(super) async fn next_of_depot(news: &mut Option<mpsc::Receiver<News>>) -> Option<News> {
    match news {
        Some(news) => news.recv().await,
        None => std::future::pending().await,
    }
}

impl Agent {
    /// A generation is to begin: has the depot put together what its ranks go on from.
    pub(super) fn fetch_for(&mut self, start: Box<Start>) {
        (self.kept.fetching, self.kept.fetched) = (None, None);
        // Those of an earlier generation read nothing any more.
        self.kept.readers.clear();
        let memory = start.memory.as_ref().zip(start.ranks.first());
        let resume = memory.and_then(|(memory, first)| {
            self.order(Command::BelongTo { run: first.run_id.clone() });
            Some((memory.resume.clone()?, first.clone()))
        });
        let ranks = start.ranks.iter().map(|assignment| assignment.rank).collect();
        let generation = start.generation;
        self.next = Some(start);
        let Some((resume, first)) = resume else { return };
        let step = resume.step;
        tracing::info!("generation {generation}: fetching step {step} out of the nodes' memories");
        self.kept.fetching = Some(generation);
        self.order(Command::Resume(Box::new(Wanted {
            run: first.run_id,
            generation,
            resume,
            ranks,
            world_size: first.world_size,
            replicas: first.replicas,
        })));
    }

    /// Has the depot do something. Where it takes no order, that is told at once, and nobody waits.
    pub(super) fn order(&mut self, command: Command) {
        if let Some(news) = self.outside.order(command) {
            self.hear_depot(news);
        }
    }

    /// It is of no use any more.
    pub(super) fn stop_fetching(&mut self) {
        self.kept.fetching = None;
    }

    /// A generation begins: its ranks find what is in memory here.
    pub(super) fn begin_keeping(&mut self, start: &mut Start) {
        let Some(memory) = &start.memory else { return };
        // Those that wrote before are gone.
        self.order(Command::Sweep { before: start.generation });
        self.kept.peer = memory.peer.clone();
        self.kept.asker = None;
        let fetched = self.kept.fetched.take();
        if fetched.is_some() {
            self.kept.readers = start.ranks.iter().map(|assignment| assignment.rank).collect();
        }
        for Assignment { memory_dir, resume_dir, .. } in &mut start.ranks {
            *memory_dir = self.outside.memory_dir();
            resume_dir.clone_from(&fetched);
        }
    }

    /// What a rank of this generation says is looked at; what is for nobody else is not passed on.
    pub(super) fn is_of_memory(&mut self, rank: usize, message: &FromRank) -> bool {
        let generation = self.generation;
        match *message {
            FromRank::BundleWritten { step, place: NodePlace { place, places } } => {
                let bundle = BundleId { generation, step, place, places };
                self.kept.asker = Some((rank, bundle));
                self.order(Command::Copy { bundle, peer: self.kept.peer.clone() });
                true
            }
            FromRank::BundleKept { step } => {
                self.order(Command::Keep { generation, step });
                true
            }
            FromRank::Phase(Phase::Train) => {
                if self.kept.readers.remove(&rank) && self.kept.readers.is_empty() {
                    self.order(Command::HasResumed);
                }
                false
            }
            _ => false,
        }
    }

    /// The depot has news.
    pub(super) fn hear_depot(&mut self, news: News) {
        match news {
            News::Holds(holding) => {
                self.kept.holding = holding;
                self.tell_holds();
            }
            News::Copied { bundle, copied } => {
                let asker = self.kept.asker.take_if(|(_, asked)| *asked == bundle);
                if let Some((rank, BundleId { generation, step, .. })) = asker {
                    let message = ToRank::BundleCopied { step, copied };
                    self.with(generation, rank, |handle| handle.tell(message));
                }
            }
            News::Resumed { generation, result } if self.kept.fetching == Some(generation) => {
                self.kept.fetching = None;
                match result {
                    Ok(folder) => {
                        self.kept.fetched = Some(folder);
                        self.start_next();
                    }
                    Err(why) => self.could_not_fetch(why),
                }
            }
            News::Resumed { .. } => {}
        }
    }

    /// Tells what is here; once there is somebody again, where nobody is there.
    pub(super) fn tell_holds(&mut self) {
        if self.outbox.is_some() && self.outside.door().is_some() {
            self.tell(FromAgent::Holds(self.kept.holding.clone()));
        }
    }

    /// Nothing is wrong with this node: the run tries once more, or goes on from an older
    /// checkpoint.
    fn could_not_fetch(&mut self, NotResumed { is_damaged, why }: NotResumed) {
        tracing::error!("the ranks have nothing to go on from: {why}");
        // Only what is damaged is forgotten: a link that is lost, or a node, says nothing of it.
        let class = if is_damaged { FailureClass::Storage } else { FailureClass::Transient };
        let Some(next) = self.next.take() else { return };
        self.waiting.clear();
        self.ranks.values().for_each(RankHandle::kill);
        for Assignment { rank, generation, resume_step, .. } in next.ranks {
            let report = FailureReport {
                class,
                phase: Phase::Load,
                step: resume_step,
                collective: None,
                lines: vec![format!("node {} has no checkpoint for it: {why}", self.info.name)],
                roll_back: None,
            };
            let message = FromRank::Failure(Box::new(report));
            self.say_last(rank, FromAgent::Said { generation, rank, message });
            let (exit, last_lines) = (Default::default(), Vec::new());
            self.say_last(rank, FromAgent::Exited { generation, rank, exit, last_lines });
        }
    }
}
