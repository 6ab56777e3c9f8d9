//! What follows from a generation that failed. Pure.

use super::{Action, Cause, State};
use rank_protocol::{FailureClass, RollBack, exit_code};
use std::time::{Duration, Instant};

/// The window of [`super::Policy::max_per_hour`].
const HOUR: Duration = Duration::from_secs(3600);

impl State {
    /// What follows from a generation that failed.
    pub(super) fn judge(&mut self, cause: &Cause, now: Instant) -> Vec<Action> {
        let has_progressed = self.committed > self.committed_before;
        // Links that worked and were lost, with no failure behind it, are none of the run's doing;
        // those that never worked are not for ever tried again.
        let counts = !(cause.is_consequence() && self.has_stepped);
        self.no_progress = match has_progressed {
            true => 0,
            false => self.no_progress + u32::from(counts),
        };
        if let Some(roll_back) = cause.roll_back {
            return self.roll_back(roll_back, &cause.summary(), now);
        }
        let signature = cause.signature();
        self.failures.retain(|earlier| *earlier == signature);
        self.failures.push(signature);
        let what = cause.summary();
        if let Some((by, _)) = &self.stop {
            let reason = format!("{what}, while stopping because of {by}");
            return self.over(exit_code::FAILED, reason, now);
        }
        match cause.class {
            FailureClass::Config => {
                let reason = format!("{what}; trying again is of no use");
                return self.over(exit_code::CONFIG, reason, now);
            }
            FailureClass::Node if self.policy.has_agents => self.failures.clear(),
            FailureClass::Node => {
                let reason = format!("{what}; use another node");
                return self.over(exit_code::NODE_UNHEALTHY, reason, now);
            }
            FailureClass::Numeric => {
                let reason = format!("{what}; the same data would give the same numbers again");
                return self.over(exit_code::FAILED, reason, now);
            }
            _ => {}
        }
        let same = u32::try_from(self.failures.len()).unwrap_or(u32::MAX);
        if same >= self.policy.max_same_failure {
            let reason = format!("{what}; the same failure at the same step, {same} times");
            return self.over(exit_code::DO_NOT_REQUEUE, reason, now);
        }
        self.try_again(&what, now)
    }

    /// The next generation, if those before got anywhere.
    fn try_again(&mut self, what: &str, now: Instant) -> Vec<Action> {
        if self.no_progress >= self.policy.max_no_progress {
            let reason = format!(
                "{what}; {} generations in a row committed no new step (restart.max_no_progress)",
                self.no_progress
            );
            return self.over(exit_code::FAILED, reason, now);
        }
        let is_over = |at: &mut Instant| now.saturating_duration_since(*at) >= HOUR;
        while self.restarts.pop_front_if(is_over).is_some() {}
        if self.restarts.len() >= self.policy.max_per_hour as usize {
            let count = self.restarts.len();
            let reason =
                format!("{what}; {count} restarts in the last hour (restart.max_per_hour)");
            return self.over(exit_code::FAILED, reason, now);
        }
        self.restarts.push_back(now);
        self.next_generation(now)
    }

    /// Numeric trouble, out of which the run comes without the samples that brought it. Of the next
    /// ones at the same step it is no repetition.
    fn roll_back(&mut self, roll_back: RollBack, what: &str, now: Instant) -> Vec<Action> {
        self.failures.clear();
        let mut actions = vec![Action::RecordRollBack(roll_back)];
        actions.extend(match self.stop.clone() {
            Some((by, _)) => self.over_between(&by, now),
            None => self.try_again(what, now),
        });
        actions
    }
}
