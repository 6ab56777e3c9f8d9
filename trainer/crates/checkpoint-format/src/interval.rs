//! How many steps lie between two checkpoints where that is left to the run. Pure.
//!
//! A save keeps training for `w` seconds, and a failure loses half an interval on average. So of
//! the time the part `w / dt + dt / (2 MTTF)` is lost, which is least at `dt = sqrt(2 w MTTF)`
//! (Young 1974; Daly 2006, the first-order rule, which holds where `w` is small beside the MTTF).

use serde::{Deserialize, Serialize};

/// Seconds in a day.
const DAY_S: f64 = 86_400.0;
/// The longest interval. What is expected of failures may be wrong, and an hour is all one likes to
/// lose.
pub const MAX_S: f64 = 3600.0;
/// Changes up to this fraction of the interval in force are not worth one.
const TOLERANCE: f64 = 0.2;

/// The mean time to failure, in seconds, of `nodes` nodes with so many failures each a day.
pub fn expected_mttf_s(nodes: usize, failures_per_node_day: f64) -> f64 {
    DAY_S / (nodes.max(1) as f64 * failures_per_node_day)
}

/// The mean time to failure, in seconds, of a run that had `failures` failures in `observed_s`
/// seconds. What was expected before counts as one failure in the expected time: the mean of a
/// gamma distribution of the rate, of shape 1, updated by a Poisson count.
pub fn mttf_s(expected_s: f64, failures: u64, observed_s: f64) -> f64 {
    (expected_s + observed_s.max(0.0)) / (1.0 + failures as f64)
}

/// The interval that loses the least time, in seconds.
pub fn optimum_s(stall_s: f64, mttf_s: f64) -> f64 {
    (2.0 * stall_s * mttf_s).sqrt()
}

/// The part of the time that is lost to saves, and to work done again after failures.
pub fn lost_fraction(interval_s: f64, stall_s: f64, mttf_s: f64) -> f64 {
    stall_s / interval_s + interval_s / (2.0 * mttf_s)
}

/// What the interval follows from, and the interval: all that is told about it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Steps from one checkpoint to the next.
    pub steps: u64,
    /// As many seconds.
    pub seconds: f64,
    /// Seconds for which a save keeps training.
    pub stall_s: f64,
    /// Seconds in which one is written; no other can begin meanwhile without waiting.
    pub write_s: f64,
    /// Seconds of a step.
    pub step_s: f64,
    /// Mean time to failure of the run, in seconds.
    pub mttf_s: f64,
}

impl Interval {
    /// By Young's and Daly's rule, but no shorter than a step and than the writing of a checkpoint,
    /// and no longer than [`MAX_S`]. `current`, the interval in force, stays where the new one
    /// differs little. What is not finite or not positive counts as the least possible.
    pub fn choose(
        [stall_s, write_s, step_s]: [f64; 3],
        mttf_s: f64,
        current: Option<Interval>,
    ) -> Interval {
        let sane = |seconds: f64, least: f64| {
            if seconds.is_finite() { seconds.max(least) } else { least }
        };
        let (stall_s, write_s) = (sane(stall_s, 0.0), sane(write_s, 0.0));
        let (step_s, mttf_s) = (sane(step_s, 1e-6), sane(mttf_s, 1e-3));
        let wanted_s = optimum_s(stall_s, mttf_s).max(write_s).min(MAX_S);
        let steps = (wanted_s / step_s).round().max(1.0);
        let is_near = |current: &Interval| {
            let current = current.steps as f64;
            (steps - current).abs() <= TOLERANCE * current
        };
        let steps = current.filter(is_near).map_or(steps as u64, |current| current.steps);
        let seconds = steps as f64 * step_s;
        Interval { steps, seconds, stall_s, write_s, step_s, mttf_s }
    }

    /// The step of the next checkpoint after `step`: milestones, at the multiples of
    /// `keep_every_steps` (0: there are none), are not passed over.
    pub fn next_after(&self, step: u64, keep_every_steps: u64) -> u64 {
        next_after(step, self.steps, keep_every_steps)
    }
}

/// As [`Interval::next_after`], for so many steps.
pub fn next_after(step: u64, steps: u64, keep_every_steps: u64) -> u64 {
    let next = step.saturating_add(steps.max(1));
    match keep_every_steps {
        0 => next,
        every => next.min((step / every + 1).saturating_mul(every)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn near(found: f64, expected: f64) {
        assert!((found / expected - 1.0).abs() < 5e-4, "{found} for {expected}");
    }

    #[test]
    fn the_published_cluster() {
        // 3,000 nodes with 6.5 failures per 1,000 node-days: 19.5 a day, one in 1.23 h.
        let mttf_s = expected_mttf_s(3000, 0.0065);
        near(mttf_s, 4430.77);
        // sqrt(2 x 0.2 x 4430.77).
        near(optimum_s(0.2, mttf_s), 42.099);
        // sqrt(2 x 148.8 x 4430.77): PyTorch's blocking save of a 7B model.
        near(optimum_s(148.8, mttf_s), 1148.3);
        // One node: 154 days; an hour is the longest interval.
        near(expected_mttf_s(1, 0.0065), 13_292_308.0);
        assert_eq!(Interval::choose([1.0, 0.0, 1.0], 13_292_308.0, None).steps, 3600);
    }

    /// Kokolis et al.: `E[ETTR] = (1 - N r (u0 + dt/2)) / (1 + w/dt)`.
    #[test]
    fn the_optimum_loses_the_least() {
        let mttf_s = expected_mttf_s(3000, 0.0065);
        let ettr = |restart_s: f64, interval_s: f64, stall_s: f64| {
            (1.0 - (restart_s + interval_s / 2.0) / mttf_s) / (1.0 + stall_s / interval_s)
        };
        near(ettr(120.0, 60.0, 0.2), 0.963);
        near(ettr(80.0, 60.0, 0.2), 0.972);
        let best = optimum_s(0.2, mttf_s);
        // w / dt = dt / (2 MTTF) there.
        near(lost_fraction(best, 0.2, mttf_s), 2.0 * 0.2 / best);
        for factor in [0.5, 0.8, 0.95, 1.05, 1.2, 2.0] {
            let other = best * factor;
            assert!(lost_fraction(other, 0.2, mttf_s) > lost_fraction(best, 0.2, mttf_s));
            assert!(ettr(80.0, other, 0.2) < ettr(80.0, best, 0.2) + 1e-6);
        }
    }

    #[test]
    fn what_happened_outweighs_what_was_expected() {
        near(mttf_s(1000.0, 0, 0.0), 1000.0);
        // Nothing has failed in as long again.
        near(mttf_s(1000.0, 0, 1000.0), 2000.0);
        // One failure each 100 s, for long.
        near(mttf_s(1000.0, 1_000_000, 100_000_000.0), 100.0);
        near(mttf_s(1000.0, 3, 1000.0), 500.0);
    }

    #[test]
    fn the_bounds_hold() {
        let choose = |measured| Interval::choose(measured, 4430.77, None).steps;
        // 42.1 s, in steps of 2 s.
        assert_eq!(choose([0.2, 1.0, 2.0]), 21);
        assert_eq!(choose([0.2, 100.0, 2.0]), 50);
        assert_eq!(choose([0.2, 0.0, 60.0]), 1);
        assert_eq!(choose([0.0, 0.0, 2.0]), 1);
        assert_eq!(choose([1e9, 0.0, 2.0]), 1800);
        for odd in [f64::NAN, f64::INFINITY, -1.0] {
            for at in 0..3 {
                let mut measured = [0.2, 1.0, 2.0];
                measured[at] = odd;
                let chosen = Interval::choose(measured, odd, None);
                assert!(chosen.steps >= 1 && chosen.seconds.is_finite(), "{chosen:?}");
            }
        }
    }

    #[test]
    fn small_changes_are_none() {
        let first = Interval::choose([0.2, 1.0, 2.0], 4430.77, None);
        let next = |stall| Interval::choose([stall, 1.0, 2.0], 4430.77, Some(first)).steps;
        // sqrt(1.3) = 1.14; sqrt(1.6) = 1.26.
        assert_eq!((next(0.26), next(0.32), next(0.05)), (21, 27, 11));
    }

    #[test]
    fn milestones_are_not_passed_over() {
        assert_eq!(next_after(100, 30, 0), 130);
        assert_eq!(next_after(100, 30, 50), 130);
        assert_eq!(next_after(130, 30, 50), 150);
        assert_eq!(next_after(150, 100, 50), 200);
        assert_eq!(next_after(u64::MAX - 1, 30, 0), u64::MAX);
    }
}
