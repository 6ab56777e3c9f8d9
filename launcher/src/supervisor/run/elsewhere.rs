//! The executor's part for ranks that agents start: gathering nodes, and taking over what an
//! earlier coordinator left running.

use super::{Event, Executor};
use crate::cluster::members::{NodeId, Seek};
use crate::cluster::nodes::{Happening, Nodes, Outcome};
use crate::cluster::sizes::Size;
use crate::cluster::store::keeper::Standing;
use crate::supervisor::cause::Cause;
use crate::supervisor::record::Layout;
use crate::supervisor::restore::Kept;
use rank_protocol::store::Requester;
use rank_protocol::{FailureClass, Phase, exit_code};
use serde_json::json;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};

/// Time in which the agents of a generation that still runs find its new coordinator.
const ADOPTION: Duration = Duration::from_secs(10);

/// The ranks' machines.
pub struct Elsewhere {
    /// The nodes.
    pub nodes: Nodes,
    /// Those of the generation, by place.
    places: Vec<NodeId>,
    size: Size,
    /// What the generation goes on from, or the next one will, where the nodes have it in memory.
    pub kept: Option<Kept>,
    /// The step from which a generation shall go on that has not all its nodes yet.
    gathering: Option<Option<u64>>,
    /// Until when the ranks of an earlier coordinator are waited for.
    adopt_until: Option<Instant>,
    /// Who asked for a stop in the meantime.
    asked_by: Option<String>,
    /// Whether the generation is one of an earlier coordinator.
    pub has_adopted: bool,
}

/// What waits until nobody else can begin the next generation.
#[derive(Clone, Copy, Debug)]
pub enum Next {
    /// The search for a checkpoint, which keeps older generations from saving.
    Search,
    /// The start of so many ranks, from this step.
    Spawn(Option<u64>, usize),
}

/// The next change of how things stand with the store; never, where there is none.
pub async fn changed(standing: &mut Option<watch::Receiver<Standing>>) {
    if let Some(standing) = standing
        && standing.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

/// What happens next on other machines; never, where there are none.
pub async fn next_of(happened: &mut Option<mpsc::Receiver<Happening>>) -> Option<Happening> {
    match happened {
        Some(happened) => happened.recv().await,
        None => std::future::pending().await,
    }
}

impl Elsewhere {
    /// No generation yet.
    pub fn new(nodes: Nodes) -> Self {
        Self {
            size: nodes.whole(),
            nodes,
            places: Vec::new(),
            kept: None,
            gathering: None,
            adopt_until: None,
            asked_by: None,
            has_adopted: false,
        }
    }

    /// A generation that shall go on from `step` needs its nodes: for so many ranks or more, and
    /// after this time for fewer.
    pub fn gather(&mut self, step: Option<u64>, num_ranks: usize, fewer_after: Option<Duration>) {
        self.gathering = Some(step);
        self.nodes.seek(num_ranks, fewer_after, Instant::now());
    }

    /// The size of the generation, or of the one about to start.
    pub fn size(&self) -> Size {
        self.size
    }

    /// When the executor must look here again.
    pub fn next_wake(&self) -> Instant {
        let next = self.nodes.next_wake(Instant::now());
        self.adopt_until.map_or(next, |until| until.min(next))
    }

    /// The address of the node at a place.
    pub fn address_of(&self, place: usize) -> Option<String> {
        self.places.get(place).map(|node| self.nodes.address_of(*node))
    }

    fn names(&self) -> Vec<String> {
        self.places.iter().map(|node| self.nodes.name(*node)).collect()
    }
}

impl Executor {
    pub(super) fn happened(&mut self, happening: Happening) {
        let now = Instant::now();
        let outcomes = self.elsewhere.as_mut().map(|e| e.nodes.take(happening, now));
        self.take_outcomes(outcomes.unwrap_or_default());
    }

    pub(super) fn wake_elsewhere(&mut self, now: Instant) {
        let outcomes = self.elsewhere.as_mut().map(|e| e.nodes.wake(now));
        self.take_outcomes(outcomes.unwrap_or_default());
    }

    /// Someone asks for a stop: at once, or once it is known what runs.
    pub(super) fn asked_to_stop(&mut self, by: String) {
        match &mut self.elsewhere {
            Some(elsewhere) if elsewhere.adopt_until.is_some() => elsewhere.asked_by = Some(by),
            _ => self.handle(Event::Stop { by }),
        }
    }

    fn take_outcomes(&mut self, outcomes: Vec<Outcome>) {
        for outcome in outcomes {
            match outcome {
                Outcome::Rank(input) => self.take(input),
                Outcome::Event(kind, fields) => self.recorder.event(kind, fields),
                Outcome::Unwell(fields) => {
                    self.recorder.unwell(&fields);
                    self.recorder.event("node_unhealthy", fields);
                }
                Outcome::Stop(by) => self.asked_to_stop(by),
                Outcome::Store(requests) => {
                    for request in requests {
                        let nobody = Requester { rank: usize::MAX, id: 0 };
                        let replies = self.store.handle(nobody, request, Instant::now());
                        self.reply(replies);
                    }
                }
            }
        }
    }

    /// After each event: starts what has waited for nodes, and sends what is to be sent.
    pub(super) fn look_elsewhere(&mut self) {
        self.adopt();
        self.gather();
        if let Some(elsewhere) = &mut self.elsewhere {
            elsewhere.nodes.flush();
        }
    }

    /// Starts a generation that waits for its nodes as soon as they are there.
    fn gather(&mut self) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        let Some(step) = elsewhere.gathering else { return };
        match elsewhere.nodes.found(Instant::now()) {
            Seek::Waiting => {}
            // Of a node that was lost meanwhile, so was what it had in memory.
            Seek::Found(_) if elsewhere.kept.is_some_and(|k| !elsewhere.nodes.has_in_memory(k)) => {
                elsewhere.gathering = None;
                tracing::warn!("the checkpoint in the nodes' memories is no longer whole");
                self.when_claimed(Next::Search);
            }
            Seek::Found(places) => {
                elsewhere.size = elsewhere.nodes.size(places.len());
                (elsewhere.gathering, elsewhere.places) = (None, places);
                let (names, num_ranks) = (elsewhere.names(), elsewhere.size.ranks);
                self.recorder.event("nodes_placed", json!({ "nodes": names }));
                self.when_claimed(Next::Spawn(step, num_ranks));
            }
            Seek::TooFew(found) => {
                elsewhere.gathering = None;
                let wanted = self.plan.config.cluster.nodes;
                let reason = format!("{found} of {wanted} nodes are there, and no more come");
                self.handle(Event::Broken { code: exit_code::FAILED, reason });
            }
        }
    }

    /// Goes on once the store has taken in that another generation follows, and nobody else holds
    /// the run; at once, where there is no store.
    pub(super) fn when_claimed(&mut self, next: Next) {
        let generation = self.state.generation() + 1;
        match &mut self.recorder.keeper {
            Some(keeper) => self.awaited = Some((keeper.claim(generation), next)),
            None => self.go_on(next),
        }
    }

    fn go_on(&mut self, next: Next) {
        match next {
            Next::Search => self.search(),
            Next::Spawn(step, num_ranks) => self.handle(Event::Gathered { step, num_ranks }),
        }
    }

    /// The store answered, or did not, or somebody else holds the run.
    pub(super) fn store_changed(&mut self) {
        let Some(keeper) = &self.recorder.keeper else { return };
        let (Standing { epoch, written, away, lost, .. }, is_sure) =
            (keeper.standing(), keeper.is_sure());
        if lost.is_some() {
            self.superseded = lost;
            return;
        }
        if let Some(elsewhere) = &mut self.elsewhere {
            elsewhere.nodes.set_epoch(epoch);
        }
        let was_away = self.recorder.status.store_alarm.is_some();
        if away.is_some() != was_away {
            match &away {
                Some(why) => {
                    tracing::warn!("the store does not answer; the ranks go on: {why}");
                    self.recorder.event("store_away", json!({ "reason": why }));
                }
                None => {
                    tracing::info!("the store answers again");
                    self.recorder.event("store_back", json!({}));
                }
            }
            self.recorder.status.store_alarm = away;
            self.update_status();
        }
        if let Some((_, next)) = self.awaited.take_if(|(claim, _)| written >= *claim && is_sure) {
            self.go_on(next);
        }
    }

    /// Somebody else is the coordinator: the run's files and agents are theirs.
    pub(super) fn give_way(&mut self, holder: &str) -> i32 {
        self.view.end();
        tracing::error!("this coordinator is none any more: {holder}");
        exit_code::FAILED
    }

    /// A node on which ranks fail again and again gives way to another; at once, where a rank found
    /// its device bad while it trained.
    pub(super) fn blame_node(&mut self, cause: &Cause) {
        let is_its_own = matches!(cause.class, FailureClass::Process | FailureClass::Node);
        let Some(elsewhere) = self.elsewhere.as_mut().filter(|_| is_its_own) else { return };
        let is_its_device = cause.class == FailureClass::Node
            && cause.phase == Phase::Train
            && cause.exit.code.is_some();
        let outcomes = elsewhere.nodes.failed(cause.rank, &cause.summary(), is_its_device);
        self.take_outcomes(outcomes);
    }

    /// The agents tell the ranks their places.
    pub(super) fn start_elsewhere(
        &mut self,
        generation: u64,
        resume_step: Option<u64>,
        kept: &[usize],
    ) {
        let assignment = |rank| self.assignment(generation, rank, resume_step);
        let assignments = (0..self.size().ranks).map(assignment).collect();
        let keeping = self.keeping();
        let keeping = keeping.as_ref();
        if let Some(Elsewhere { nodes, places, .. }) = &mut self.elsewhere {
            if let Some(why) = keeping.and_then(|_| nodes.keeps_nothing(places)) {
                tracing::warn!("nothing is kept in memory: {why}");
                self.recorder.status.memory_alarm = Some(why);
            }
            let run = &self.plan.run;
            self.ranks = nodes.start(generation, run, places, assignments, kept, keeping);
        }
    }

    /// Whether ranks of an earlier coordinator may still run; then they are waited for.
    pub(super) fn expect_ranks_elsewhere(&mut self) -> bool {
        let (Some(elsewhere), Some(_)) = (&mut self.elsewhere, &self.plan.adopt) else {
            return false;
        };
        tracing::info!("looking for the ranks of generation {}", self.plan.last_generation);
        elsewhere.nodes.await_ranks(self.plan.last_generation);
        elsewhere.adopt_until = Some(Instant::now() + ADOPTION);
        true
    }

    /// Goes on with the ranks that still run, once they are all known; without them, as after any
    /// failure.
    fn adopt(&mut self) {
        let (Some(elsewhere), Some(adopt)) = (&mut self.elsewhere, &self.plan.adopt) else {
            return;
        };
        let Some(until) = elsewhere.adopt_until else { return };
        let committed = self.plan.committed;
        if let Some((places, ranks, outcomes)) = elsewhere.nodes.adopt(adopt) {
            (elsewhere.adopt_until, elsewhere.places) = (None, places);
            elsewhere.size = elsewhere.nodes.size(elsewhere.places.len());
            elsewhere.has_adopted = true;
            let asked_by = elsewhere.asked_by.take();
            self.ranks = ranks;
            let generation = self.plan.last_generation;
            tracing::info!("generation {generation} goes on");
            self.recorder.event("generation_adopted", json!({ "nodes": adopt.nodes }));
            let num_ranks = adopt.num_ranks;
            self.recorder.status.layout =
                Some(Layout::of(&self.plan.config, elsewhere.size.replicas));
            self.handle(Event::Adopted { committed, num_ranks });
            self.take_outcomes(outcomes);
            if let Some(by) = asked_by {
                self.handle(Event::Stop { by });
            }
            return self.update_status();
        }
        let in_vain = elsewhere.nodes.is_in_vain(adopt);
        if Instant::now() < until && !in_vain {
            return;
        }
        elsewhere.adopt_until = None;
        elsewhere.nodes.abandon();
        let asked_by = elsewhere.asked_by.take();
        let found = match in_vain {
            true => {
                "all nodes of the last generation are back, without all of its ranks".to_owned()
            }
            false => {
                format!(
                    "not all ranks of the last generation were found in {} s",
                    ADOPTION.as_secs()
                )
            }
        };
        tracing::warn!("{found}");
        if committed.is_none() && !self.plan.may_begin && self.newest_kept().is_none() {
            let reason = "the ranks are gone, and nothing was saved; `--from-start` begins again \
                          from the initial weights";
            let (code, reason) = (exit_code::FAILED, reason.to_owned());
            return self.handle(Event::Broken { code, reason });
        }
        self.handle(Event::Begin { committed });
        if let Some(by) = asked_by {
            self.handle(Event::Stop { by });
        }
    }
}
