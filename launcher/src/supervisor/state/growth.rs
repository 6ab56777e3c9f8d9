//! When a run that lacks nodes may be restarted to use those that are there again. Pure.
//!
//! A restart costs time, and a node that comes and goes would bring one about each time. So there
//! is a least time between two, and twice as much after one that was undone within it.

use super::{Action, Rank, RankState, Stage, State};
use std::time::{Duration, Instant};

/// The wait is at most so many times the usual one.
const MAX_FACTOR: u32 = 32;

/// Returns to more ranks so far, and what follows for the next one.
#[derive(Clone, Debug)]
pub struct Growth {
    pause: Duration,
    wait: Duration,
    last: Option<Instant>,
}

impl Growth {
    /// None yet; `pause` is the usual least time between two.
    pub fn new(pause: Duration) -> Self {
        Self { pause, wait: pause, last: None }
    }

    /// Whether the run may return to more ranks now.
    pub fn is_due(&self, now: Instant) -> bool {
        self.last.is_none_or(|last| now >= last + self.wait)
    }

    /// It does.
    pub fn grown(&mut self, now: Instant) {
        self.last = Some(now);
    }

    /// It goes on with fewer ranks again.
    pub fn shrunk(&mut self, now: Instant) {
        self.wait = match self.is_due(now) {
            true => self.pause,
            false => (self.wait * 2).min(self.pause * MAX_FACTOR),
        };
    }
}

impl State {
    /// A checkpoint: the moment to end a generation that lacks nodes, where they are there again.
    pub(super) fn has_committed(&mut self, step: u64, now: Instant) -> Vec<Action> {
        self.committed = self.committed.max(Some(step));
        let (Some(elastic), Some(growth)) = (&self.policy.elastic, &mut self.growth) else {
            return Vec::new();
        };
        let is_undisturbed = self.stage == Stage::Working && self.stop.is_none();
        let is_at_work =
            |rank: &Rank| matches!(rank.state, RankState::Starting | RankState::Running);
        let (from, to) = (self.num_ranks, self.room);
        if to <= from
            || step >= elastic.last_step
            || !growth.is_due(now)
            || !is_undisturbed
            || !self.ranks.iter().all(is_at_work)
        {
            return Vec::new();
        }
        growth.grown(now);
        self.is_growing = true;
        let mut actions = vec![Action::RecordGrowth { from, to }];
        actions.extend(self.end_all(format!("nodes are there again: {to} ranks, not {from}"), now));
        actions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_doubles_while_growth_is_undone() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut growth = Growth::new(Duration::from_secs(10));
        assert!(growth.is_due(start));
        growth.grown(start);
        assert!(!growth.is_due(at(9)) && growth.is_due(at(10)));
        growth.shrunk(at(5));
        assert!(!growth.is_due(at(19)) && growth.is_due(at(20)));
        growth.grown(at(20));
        growth.shrunk(at(21));
        assert!(!growth.is_due(at(59)) && growth.is_due(at(60)));
        for time in 60..80 {
            growth.grown(at(time));
            growth.shrunk(at(time));
        }
        assert!(!growth.is_due(at(79 + 319)) && growth.is_due(at(79 + 320)));
        growth.shrunk(at(500));
        growth.grown(at(500));
        assert!(growth.is_due(at(510)), "one that lasted is forgiven");
    }
}
