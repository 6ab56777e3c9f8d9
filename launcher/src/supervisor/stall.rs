//! Whether a generation still moves: a pure record of its steps and phases, with the time as an
//! argument.

use serde::Serialize;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// No generation counts as stalled sooner.
const LEAST: Duration = Duration::from_secs(60);
/// Median steps in which nothing may move.
const NUM_MEDIANS: u32 = 10;
/// Steps whose median counts.
const NUM_KEPT: usize = 31;

/// A generation in which nothing has moved for long.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stall {
    /// Time since the last step or change of phase, in seconds.
    pub seconds: f64,
    /// The last step that a rank did in this generation.
    pub step: Option<u64>,
    /// Ranks that have done fewer steps than others; empty where all are alike.
    pub behind: Vec<usize>,
}

impl Stall {
    /// In a sentence; ranks by their numbers.
    pub fn describe(&self) -> String {
        let since = match self.step {
            Some(step) => format!("since step {step}"),
            None => "since the ranks were started".to_owned(),
        };
        let behind: Vec<String> = self.behind.iter().map(usize::to_string).collect();
        let who = match behind.is_empty() {
            true => String::new(),
            false => format!(" (behind the others: rank {})", behind.join(", ")),
        };
        format!("stalled: no rank has moved for {:.0} s, {since}{who}", self.seconds)
    }
}

/// When the ranks of a generation last moved.
#[derive(Clone, Debug)]
pub struct Progress {
    moved: Instant,
    /// The newest step, and when the first rank had done it.
    newest: Option<(u64, Instant)>,
    step_times: VecDeque<Duration>,
    is_told: bool,
}

impl Progress {
    /// Of a generation that starts now.
    pub fn new(now: Instant) -> Self {
        Self { moved: now, newest: None, step_times: VecDeque::new(), is_told: false }
    }

    /// A rank entered a phase.
    pub fn moved(&mut self, now: Instant) {
        self.moved = now;
        self.is_told = false;
    }

    /// A rank did a step.
    pub fn stepped(&mut self, step: u64, now: Instant) {
        self.moved(now);
        match self.newest {
            Some((newest, _)) if step <= newest => return,
            Some((_, at)) => self.step_times.push_back(now.saturating_duration_since(at)),
            None => {}
        }
        self.newest = Some((step, now));
        if self.step_times.len() > NUM_KEPT {
            self.step_times.pop_front();
        }
    }

    /// When it counts as stalled; `None` where that has been told.
    pub fn deadline(&self) -> Option<Instant> {
        let mut times: Vec<Duration> = self.step_times.iter().copied().collect();
        times.sort_unstable();
        let median = times.get(times.len() / 2).copied().unwrap_or_default();
        (!self.is_told).then(|| self.moved + LEAST.max(median.saturating_mul(NUM_MEDIANS)))
    }

    /// The stall that is to be told now, once. `steps` are the last ones of all ranks.
    pub fn stall(&mut self, steps: &[Option<u64>], now: Instant) -> Option<Stall> {
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return None;
        }
        self.is_told = true;
        let newest = steps.iter().copied().max().flatten();
        let behind = steps.iter().enumerate().filter(|(_, step)| **step < newest);
        Some(Stall {
            seconds: now.saturating_duration_since(self.moved).as_secs_f64(),
            step: newest,
            behind: behind.map(|(rank, _)| rank).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// After steps that took these seconds, a stall is told after `expected` seconds.
    fn check(step_times_s: &[u64], expected: u64) {
        let mut now = Instant::now();
        let mut progress = Progress::new(now);
        for (step, seconds) in (1..).zip(step_times_s) {
            now += Duration::from_secs(*seconds);
            progress.stepped(step, now);
            progress.stepped(step, now);
        }
        assert_eq!(progress.deadline(), Some(now + Duration::from_secs(expected)));
    }

    #[test]
    fn the_limit_is_a_minute_or_ten_median_steps() {
        check(&[], 60);
        check(&[500], 60);
        check(&[500, 1, 1], 60);
        check(&[500, 20, 30, 400], 300);
    }

    #[test]
    fn a_stall_is_told_once_until_something_moves() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut progress = Progress::new(start);
        let steps = [Some(3), Some(2)];
        assert_eq!(progress.stall(&steps, after(59)), None);
        let stall = progress.stall(&steps, after(75)).unwrap();
        assert_eq!((stall.seconds, stall.step, &stall.behind[..]), (75.0, Some(3), &[1][..]));
        assert!(stall.describe().contains("75 s, since step 3 (behind the others: rank 1)"));
        assert_eq!(progress.stall(&steps, after(200)), None);
        progress.moved(after(210));
        assert_eq!(progress.stall(&steps, after(260)), None);
        assert!(progress.stall(&steps, after(270)).is_some());
    }
}
