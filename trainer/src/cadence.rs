//! After which steps the run is saved: every so many, or as many as lose the least time.
//!
//! With `checkpoint.every_steps: auto` each rank measures, and at each save all agree on the
//! largest of what they measured (the slowest rank is waited for anyway) and so on the step of the
//! next. What is learned does not depend on when a save was; only which steps are saved does.

use checkpoint_format::interval::{self, Interval};
use rank_protocol::Assignment;
use run_config::RunConfig;
use std::time::{Duration, Instant};

/// With `auto`, steps of a generation before its first save: enough to know how long one takes.
const FIRST_STEPS: u64 = 5;
/// Weight of the newest of what is measured again and again.
const NEWEST: f64 = 0.3;

/// What ranks agree on: seconds of a stall, of writing and of a step, failures of the run, and the
/// seconds that it has been watched for. All that an interval follows from is here or in the
/// config: a rank that came to another interval would wait for the others' save, and they for its
/// step.
pub type Measured = [f64; 5];

/// When to save.
#[derive(Debug)]
pub enum Cadence {
    /// Every so many steps; 0: never.
    Every(u64),
    /// As many as lose the least time.
    Auto(Auto),
}

/// With `auto`: what is known of costs and failures.
#[derive(Debug)]
pub struct Auto {
    keep_every_steps: u64,
    /// Step of the next save.
    next: u64,
    interval: Option<Interval>,
    stall_s: Option<f64>,
    write_s: f64,
    step_s: Option<f64>,
    num_steps: u64,
    expected_mttf_s: f64,
    failures: u64,
    observed_s: f64,
    since: Instant,
}

impl Cadence {
    /// As the config says, after `step`.
    pub fn new(config: &RunConfig, assignment: &Assignment, step: u64) -> Self {
        let wanted = &config.checkpoint;
        if let Some(every) = wanted.every_steps {
            return Cadence::Every(every);
        }
        let (keep_every_steps, rate) = (wanted.keep_every_steps, wanted.failures_per_node_day);
        Cadence::Auto(Auto {
            keep_every_steps,
            next: interval::next_after(step, FIRST_STEPS, keep_every_steps),
            interval: None,
            stall_s: None,
            write_s: 0.0,
            step_s: None,
            num_steps: 0,
            expected_mttf_s: interval::expected_mttf_s(config.cluster.nodes, rate),
            failures: assignment.failures,
            observed_s: assignment.observed_s as f64,
            since: Instant::now(),
        })
    }

    /// Whether the run is saved after `step`.
    pub fn is_due(&self, step: u64) -> bool {
        match self {
            Cadence::Every(every) => *every > 0 && step.is_multiple_of(*every),
            Cadence::Auto(auto) => step >= auto.next,
        }
    }

    /// A step took so long.
    pub fn stepped(&mut self, seconds: f64) {
        let Cadence::Auto(auto) = self else { return };
        auto.num_steps += 1;
        // The first is slow.
        if auto.num_steps > 1 {
            auto.step_s = Some(mixed(auto.step_s, seconds));
        }
    }

    /// A save kept training for so long.
    pub fn stalled(&mut self, time: Duration) {
        if let Cadence::Auto(auto) = self {
            auto.stall_s = Some(mixed(auto.stall_s, time.as_secs_f64()));
        }
    }

    /// A checkpoint was written in so many seconds.
    pub fn written(&mut self, seconds: f64) {
        if let Cadence::Auto(auto) = self {
            auto.write_s = seconds;
        }
    }

    /// What this rank brings to the agreement; `None` where there is none to make.
    pub fn measured(&self) -> Option<Measured> {
        let Cadence::Auto(auto) = self else { return None };
        let (stall_s, step_s) = (auto.stall_s.unwrap_or(0.0), auto.step_s.unwrap_or(0.0));
        let observed_s = auto.observed_s + auto.since.elapsed().as_secs_f64();
        Some([stall_s, auto.write_s, step_s, auto.failures as f64, observed_s])
    }

    /// After the save of `step`, with what all agreed on. The interval, where its steps are others
    /// than before.
    pub fn agreed(&mut self, step: u64, measured: Measured) -> Option<Interval> {
        let Cadence::Auto(auto) = self else { return None };
        let [stall_s, write_s, step_s, failures, observed_s] = measured;
        let mttf_s = interval::mttf_s(auto.expected_mttf_s, failures as u64, observed_s);
        let before = auto.interval;
        let interval = Interval::choose([stall_s, write_s, step_s], mttf_s, before);
        auto.next = interval.next_after(step, auto.keep_every_steps);
        auto.interval = Some(interval);
        (before.map(|before| before.steps) != Some(interval.steps)).then_some(interval)
    }
}

fn mixed(before: Option<f64>, newest: f64) -> f64 {
    before.map_or(newest, |before| before + (newest - before) * NEWEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auto(next: u64, keep_every_steps: u64) -> Cadence {
        Cadence::Auto(Auto {
            keep_every_steps,
            next,
            interval: None,
            stall_s: None,
            write_s: 0.0,
            step_s: None,
            num_steps: 0,
            expected_mttf_s: 1000.0,
            failures: 0,
            observed_s: 0.0,
            since: Instant::now(),
        })
    }

    #[test]
    fn a_number_of_steps_stays_as_it_is() {
        let mut cadence = Cadence::Every(5);
        cadence.stepped(1.0);
        cadence.stalled(Duration::from_secs(9));
        assert_eq!(cadence.measured(), None);
        assert_eq!((1..=10).filter(|step| cadence.is_due(*step)).collect::<Vec<_>>(), [5, 10]);
        assert!(!(1..=10).any(|step| Cadence::Every(0).is_due(step)));
    }

    #[test]
    fn the_next_save_follows_from_what_all_measured() {
        let mut cadence = auto(5, 0);
        assert!(!cadence.is_due(4) && cadence.is_due(5));
        for seconds in [30.0, 2.0, 2.0] {
            cadence.stepped(seconds);
        }
        cadence.stalled(Duration::from_millis(50));
        let mine = cadence.measured().unwrap();
        assert_eq!(mine[..3], [0.05, 0.0, 2.0]);
        // The slowest rank stalls for 0.2 s: sqrt(2 x 0.2 x 1000) = 20 s.
        let told = cadence.agreed(5, [0.2, 1.0, 2.0, 0.0, 0.0]).unwrap();
        assert_eq!((told.steps, told.mttf_s), (10, 1000.0));
        assert!(!cadence.is_due(14) && cadence.is_due(15));
        // The same again is no news; nothing fails in 3000 s more: sqrt(2 x 0.2 x 4000) = 40 s.
        assert_eq!(cadence.agreed(15, [0.2, 1.0, 2.0, 0.0, 0.0]), None);
        assert_eq!(cadence.agreed(25, [0.2, 1.0, 2.0, 0.0, 3000.0]).unwrap().steps, 20);
        // One that failed halves it: sqrt(2 x 0.2 x 2000) = 28.3 s.
        assert_eq!(cadence.agreed(45, [0.2, 1.0, 2.0, 1.0, 3000.0]).unwrap().steps, 14);
    }

    #[test]
    fn milestones_are_saved_too() {
        let mut cadence = auto(5, 7);
        cadence.agreed(5, [0.2, 1.0, 2.0, 0.0, 0.0]);
        assert!(cadence.is_due(7));
        cadence.agreed(7, [0.2, 1.0, 2.0, 0.0, 0.0]);
        assert!(!cadence.is_due(13) && cadence.is_due(14));
    }
}
