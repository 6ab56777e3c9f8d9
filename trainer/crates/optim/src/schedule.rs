//! The learning rate as a pure function of the step.
//!
//! Steps are 1-based, as everywhere: the warm-up is a straight line through 0 at step 0 that
//! reaches the peak at step `warmup_steps`; every decay reaches `final_fraction` of the peak at the
//! last step. Nothing is carried from step to step, so a resumed run cannot drift.

use run_config::{Schedule, ScheduleKind};
use std::f64::consts::PI;

/// Learning rate of a 1-based `step` out of `total_steps`, for a given `peak`.
///
/// Past `total_steps` the final value holds. A warm-up longer than the run never ends.
pub fn learning_rate(schedule: &Schedule, peak: f64, step: u64, total_steps: u64) -> f64 {
    if step < schedule.warmup_steps {
        return peak * step as f64 / schedule.warmup_steps as f64;
    }
    let fraction = match schedule.kind {
        ScheduleKind::Constant => 1.0,
        ScheduleKind::Cosine => {
            let progress = progress(step, schedule.warmup_steps, total_steps);
            let falling = 0.5 * (1.0 + (PI * progress).cos());
            schedule.final_fraction + (1.0 - schedule.final_fraction) * falling
        }
        ScheduleKind::Linear => line(schedule, progress(step, schedule.warmup_steps, total_steps)),
        ScheduleKind::Wsd => {
            let decay_steps = (schedule.decay_fraction * total_steps as f64).round() as u64;
            let stable_until = total_steps.saturating_sub(decay_steps).max(schedule.warmup_steps);
            line(schedule, progress(step, stable_until, total_steps))
        }
    };
    peak * fraction
}

/// 1 at progress 0, `final_fraction` at progress 1.
fn line(schedule: &Schedule, progress: f64) -> f64 {
    1.0 - (1.0 - schedule.final_fraction) * progress
}

/// How far `step` is from `from` (0) to `to` (1).
fn progress(step: u64, from: u64, to: u64) -> f64 {
    if step <= from {
        0.0
    } else if step >= to {
        1.0
    } else {
        (step - from) as f64 / (to - from) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: ScheduleKind, warmup_steps: u64, final_fraction: f64) -> Schedule {
        Schedule { kind, warmup_steps, final_fraction, decay_fraction: 0.2 }
    }

    /// `expected`: (step, rate), worked out by hand or with bc from the formulas of the papers.
    fn check(schedule: &Schedule, peak: f64, total_steps: u64, expected: &[(u64, f64)]) {
        for &(step, rate) in expected {
            let got = learning_rate(schedule, peak, step, total_steps);
            let tolerance = 1e-12 * peak;
            assert!((got - rate).abs() <= tolerance, "{schedule:?} step {step}: {got} {rate}");
        }
    }

    #[test]
    fn warm_up_starts_from_zero() {
        let cosine = schedule(ScheduleKind::Cosine, 4, 0.1);
        check(&cosine, 2.0, 100, &[(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]);
    }

    #[test]
    fn cosine() {
        // cos(pi / 4) = 0.70710678118654752, cos(pi / 3) = 0.5.
        let cosine = schedule(ScheduleKind::Cosine, 10, 0.1);
        let quarter = 0.1 + 0.9 * 0.853_553_390_593_273_8;
        check(&cosine, 1.0, 130, &[(40, quarter), (50, 0.775), (70, 0.55), (130, 0.1)]);
        check(&cosine, 1.0, 130, &[(131, 0.1), (10_000, 0.1)]);
    }

    #[test]
    fn llama3_405b_pre_training() {
        // 8e-5 down to 8e-7 over 1.2M steps after 8,000 of warm-up; half-way at 604,000.
        let cosine = schedule(ScheduleKind::Cosine, 8000, 0.01);
        let expected = [(4000, 4e-5), (8000, 8e-5), (604_000, 4.04e-5), (1_200_000, 8e-7)];
        check(&cosine, 8e-5, 1_200_000, &expected);
    }

    #[test]
    fn linear() {
        let linear = schedule(ScheduleKind::Linear, 0, 0.0);
        check(&linear, 1.0, 8, &[(1, 0.875), (4, 0.5), (8, 0.0), (9, 0.0)]);
        let linear = schedule(ScheduleKind::Linear, 2, 0.5);
        check(&linear, 4.0, 10, &[(1, 2.0), (2, 4.0), (6, 3.0), (10, 2.0)]);
    }

    #[test]
    fn wsd_is_stable_then_falls_in_the_last_fifth() {
        let wsd = schedule(ScheduleKind::Wsd, 5, 0.0);
        let expected = [(5, 3.0), (50, 3.0), (80, 3.0), (85, 2.25), (90, 1.5), (100, 0.0)];
        check(&wsd, 3.0, 100, &expected);
    }

    #[test]
    fn constant_and_a_warm_up_longer_than_the_run() {
        let constant = schedule(ScheduleKind::Constant, 2, 0.3);
        check(&constant, 1.0, 10, &[(1, 0.5), (2, 1.0), (10, 1.0), (99, 1.0)]);
        let long = schedule(ScheduleKind::Wsd, 100, 0.3);
        check(&long, 1.0, 10, &[(1, 0.01), (10, 0.1)]);
    }

    #[test]
    fn no_schedule_jumps() {
        use ScheduleKind::{Constant, Cosine, Linear, Wsd};
        for kind in [Constant, Cosine, Linear, Wsd] {
            let schedule = schedule(kind, 20, 0.05);
            for step in 1..200 {
                let before = learning_rate(&schedule, 1.0, step - 1, 200);
                let after = learning_rate(&schedule, 1.0, step, 200);
                assert!((after - before).abs() < 0.051, "{kind:?} at step {step}");
                assert!((0.0..=1.0).contains(&after));
            }
        }
    }
}
