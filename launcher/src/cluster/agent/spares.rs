//! Trainers that are started on a node before it has ranks: they load what takes long, and wait for
//! a place. A spare node is worth little if its processes begin from nothing.

use super::Agent;
use crate::supervisor::rank::{Input, News, RankHandle};
use rank_protocol::Assignment;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// So long a node must have no rank: where all nodes come at once, places are given sooner.
const IDLE: Duration = Duration::from_secs(2);
/// Longest time that killed processes may take to be gone.
const LAST_WAIT: Duration = Duration::from_secs(5);
/// After so many that ended by themselves no more are started.
const MAX_FAILURES: u32 = 8;

/// Those of a node, by their place on it.
pub(super) struct Spares {
    waiting: BTreeMap<usize, RankHandle>,
    /// Since when the node is without ranks, as far as it is known.
    idle_since: Instant,
    num_failures: u32,
}

impl Spares {
    /// None yet.
    pub(super) fn new(now: Instant) -> Self {
        Self { waiting: BTreeMap::new(), idle_since: now, num_failures: 0 }
    }

    /// Something came of a process that has no place.
    pub(super) fn take(&mut self, input: &Input, now: Instant) {
        if let News::Exited { exit, last_lines } = &input.news
            && self.waiting.remove(&input.rank).is_some()
        {
            let words = last_lines.last().map(String::as_str).unwrap_or_default();
            tracing::warn!("a trainer that waited for a place {}: {words}", exit.describe());
            self.num_failures += 1;
            self.idle_since = now;
        }
    }

    /// The process that waits for this place, which it is told.
    pub(super) fn give(&mut self, assignment: &Assignment) -> Option<RankHandle> {
        let handle = self.waiting.remove(&assignment.local_rank)?;
        handle.assign(assignment.clone());
        Some(handle)
    }
}

impl Agent {
    /// Kills what is left, and waits until it is gone.
    pub(super) async fn clear(&mut self, inputs: &mut mpsc::Receiver<Input>) {
        self.ranks.values().for_each(RankHandle::kill);
        self.spares.waiting.values().for_each(RankHandle::kill);
        let gone = async {
            while !(self.ranks.is_empty() && self.spares.waiting.is_empty()) {
                let Some(input) = inputs.recv().await else { return };
                if !matches!(input.news, News::Exited { .. }) {
                    continue;
                }
                match input.generation {
                    0 => drop(self.spares.waiting.remove(&input.rank)),
                    _ => drop(self.ranks.remove(&input.rank)),
                }
            }
        };
        let _ = tokio::time::timeout(LAST_WAIT, gone).await;
    }

    /// Starts the trainers that this node would need, where it belongs to the run and has no ranks.
    pub(super) fn warm_up(&mut self) {
        if !self.ranks.is_empty() || self.next.is_some() || self.outbox.is_none() {
            self.spares.idle_since = self.now;
            return;
        }
        let idle = self.now.saturating_duration_since(self.spares.idle_since);
        if idle < IDLE || self.spares.num_failures >= MAX_FAILURES {
            return;
        }
        for local_rank in 0..self.outside.num_spares() {
            if self.spares.waiting.contains_key(&local_rank) {
                continue;
            }
            match self.outside.warm_up(local_rank) {
                Ok(handle) => drop(self.spares.waiting.insert(local_rank, handle)),
                Err(why) => {
                    tracing::warn!("no trainer waits here for a place: {why}");
                    self.spares.num_failures += 1;
                }
            }
        }
    }
}
