//! The ranks that agents start, and what they do together: they meet in the rendezvous store, step,
//! save, and lose each other when one ends. The disk that they save to knows the fence.
#![cfg(test)]

use crate::supervisor::cause::Exit;
use rank_protocol::store::{StoreReply, StoreRequest};
use rank_protocol::{FailureClass, FailureReport, FromRank, Phase, StepReport};
use std::collections::BTreeMap;
use std::time::Instant;

/// Milliseconds that ranks wait for each other in the store.
const MEETING_MS: u64 = 60_000;
/// Ids of the requests of a meeting.
pub const MEETING_ID: u64 = 2;

/// A rank's process.
#[derive(Clone, Debug)]
pub struct RankProcess {
    pub agent: u64,
    /// Of which it speaks.
    pub generation: u64,
    /// The newest that it was assigned to; it may not have heard of that yet.
    pub assigned: u64,
    pub rank: usize,
    pub is_alive: bool,
    /// How it ended.
    pub exit: Option<Exit>,
    /// It holds nothing of its generation any more, and waits for the next.
    pub has_let_go: bool,
    /// When it hears the last of what it was told so far.
    pub hears_last: Instant,
    /// Whether it has met the others.
    pub is_ready: bool,
    pub step: u64,
    /// It does not run until then.
    pub frozen_until: Instant,
    /// Whether it is known to end of itself.
    pub is_ending: bool,
}

/// What the ranks of a generation have in common.
#[derive(Clone, Debug, Default)]
pub struct Generation {
    /// Processes by rank.
    pub processes: BTreeMap<usize, u64>,
    pub world_size: usize,
    pub step: u64,
    pub is_stepping: bool,
    /// It has lost a rank: no step is done any more.
    pub is_broken: bool,
}

/// Where checkpoints are.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    /// Generations below may commit nothing.
    pub fence: u64,
    /// Commits in their order: generation and step.
    pub commits: Vec<(u64, u64)>,
}

impl Disk {
    /// Newest step.
    pub fn newest(&self) -> Option<u64> {
        self.commits.last().map(|(_, step)| *step)
    }

    /// Whether the fence lets a generation commit.
    pub fn admits(&self, generation: u64) -> bool {
        generation >= self.fence
    }
}

/// What a rank says first: that it is here, and that it wants to know when all are.
pub fn meeting(rank: usize, world_size: usize) -> Vec<FromRank> {
    let key = |rank: usize| format!("here/{rank}");
    let here = StoreRequest::Set { key: key(rank), value: vec![1] };
    let keys = (0..world_size).map(key).collect();
    let all = StoreRequest::Wait { keys, timeout_ms: MEETING_MS };
    vec![
        FromRank::Hello { pid: 1, build: env!("CARGO_PKG_VERSION").into(), rank: None },
        FromRank::Phase(Phase::Init),
        FromRank::Store { id: 1, request: here },
        FromRank::Store { id: MEETING_ID, request: all },
    ]
}

/// Whether a reply says that all are here.
pub fn have_met(reply: &StoreReply) -> bool {
    matches!(reply, StoreReply::Done)
}

pub fn stepped(generation: u64, step: u64) -> FromRank {
    FromRank::Step(Box::new(StepReport { step, generation, ..StepReport::default() }))
}

pub fn failure(class: FailureClass, step: u64, line: &str) -> FromRank {
    FromRank::Failure(Box::new(FailureReport {
        class,
        phase: Phase::Train,
        step: Some(step + 1),
        collective: None,
        lines: vec![line.to_owned()],
        roll_back: None,
    }))
}
