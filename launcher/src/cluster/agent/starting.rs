//! The agent's part for the start of a generation: its ranks begin once those of the last one are
//! gone that do not go on, and once what they go on from is here.

use super::{Agent, Journal};
use crate::supervisor::cause::Exit;
use crate::supervisor::rank::RankHandle;
use rank_protocol::agent::FromAgent;
use rank_protocol::{FailureClass, FailureReport, FromRank, Phase, exit_code};

impl Agent {
    pub(super) fn is_next(&self, generation: u64) -> bool {
        self.next.as_ref().is_some_and(|next| next.generation == generation)
    }

    /// A generation that has ended before its ranks were started here.
    pub(super) fn drop_next(&mut self) {
        let Some(next) = self.next.take() else { return };
        self.stop_fetching();
        self.untold.clear();
        // Those that were to go on in it count as ended, and do.
        self.waiting.clear();
        self.ranks.values().for_each(RankHandle::kill);
        for assignment in next.ranks {
            let (generation, rank, exit) = (next.generation, assignment.rank, Exit::default());
            self.say_last(
                rank,
                FromAgent::Exited { generation, rank, exit, last_lines: Vec::new() },
            );
        }
    }

    /// Starts the ranks of the next generation once those of the last one are gone that do not go
    /// on in it.
    pub(super) fn start_next(&mut self) {
        let is_left = self.ranks.keys().any(|rank| !self.waiting.contains(rank));
        if is_left || self.kept.is_fetching() {
            return;
        }
        let Some(mut start) = self.next.take() else { return };
        self.begin_keeping(&mut start);
        self.generation = start.generation;
        self.journal = Journal::default();
        self.exited.clear();
        self.last_words.clear();
        self.unsaid.clear();
        let numbers: Vec<usize> = start.ranks.iter().map(|assignment| assignment.rank).collect();
        let kept = std::mem::take(&mut self.waiting);
        let (generation, count) = (start.generation, kept.len());
        tracing::info!("generation {generation}: starting ranks {numbers:?}, {count} of them kept");
        for assignment in start.ranks {
            let (generation, rank) = (assignment.generation, assignment.rank);
            if let Some(handle) = self.ranks.get(&rank) {
                handle.assign(assignment);
                let pid = handle.pid();
                self.tell(FromAgent::Started { generation, rank, pid });
                continue;
            }
            let started = match self.spares.give(&assignment) {
                Some(handle) => Ok(handle),
                None => self.outside.start(assignment),
            };
            match started {
                Ok(handle) => {
                    let pid = handle.pid();
                    self.ranks.insert(rank, handle);
                    self.tell(FromAgent::Started { generation, rank, pid });
                }
                Err(why) => self.could_not_start(rank, why),
            }
        }
        for (rank, message) in std::mem::take(&mut self.untold) {
            self.with(self.generation, rank, |handle| handle.tell(message));
        }
    }

    fn could_not_start(&mut self, rank: usize, why: String) {
        let generation = self.generation;
        let report = FailureReport {
            class: FailureClass::Node,
            phase: Phase::Init,
            step: None,
            collective: None,
            lines: vec![format!("node {} cannot start it: {why}", self.info.name)],
            roll_back: None,
        };
        let message = FromRank::Failure(Box::new(report));
        self.pass_on(rank, FromAgent::Said { generation, rank, message });
        let exit = Exit { code: Some(exit_code::NODE_UNHEALTHY), signal: None };
        self.pass_on(rank, FromAgent::Exited { generation, rank, exit, last_lines: Vec::new() });
        // Another node may be able to.
        self.end = Some((exit_code::NODE_UNHEALTHY, why));
    }
}
