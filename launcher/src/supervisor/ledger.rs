//! What the time of a run was spent on: every second has one cause, so that the causes add up to
//! the wall time. Pure: the time is an argument.
//!
//! ETTR (effective training time ratio) is the time of first-time steps over the wall time
//! (Kokolis et al., "Revisiting Reliability in Large-Scale Machine Learning Research Clusters",
//! HPCA 2025). A step that is done again after a failure is a repeated step; so is one that a
//! failure cut short. A stop that a user asked for stops the clock until the run is resumed.

use rank_protocol::{Phase, StepReport};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// The window of the recent ratio.
const WINDOW: Duration = Duration::from_secs(3600);
/// Bookings of one cause that end within such a time are one in the window.
const GRAIN: Duration = Duration::from_secs(10);

/// What time is spent on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Spent {
    /// Steps that had not been done before.
    FirstTimeSteps,
    /// Steps that had, and those that a failure cut short.
    RepeatedSteps,
    /// Starting ranks, and taking them down at the end.
    Start,
    /// Waiting for nodes.
    Rendezvous,
    /// Reading a checkpoint.
    Load,
    /// Training that waits for a checkpoint to be saved.
    SaveStall,
    /// Training that waits for data.
    DataWait,
    /// Held-out loss.
    Validation,
    /// From the last progress until a hang was found.
    Hang,
    /// From a failure until ranks are started again.
    Down,
}

impl Spent {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Spent::FirstTimeSteps => "first-time steps",
            Spent::RepeatedSteps => "repeated steps",
            Spent::Start => "start",
            Spent::Rendezvous => "rendezvous",
            Spent::Load => "load",
            Spent::SaveStall => "save stall",
            Spent::DataWait => "data wait",
            Spent::Validation => "validation",
            Spent::Hang => "hang",
            Spent::Down => "down",
        }
    }

    fn of_phase(phase: Phase) -> Self {
        match phase {
            Phase::Init | Phase::Exit => Spent::Start,
            Phase::Load => Spent::Load,
            Phase::Data => Spent::DataWait,
            Phase::Train => Spent::FirstTimeSteps,
            Phase::Validate => Spent::Validation,
            Phase::Save => Spent::SaveStall,
        }
    }
}

/// The sums, as they are written and read back.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sums {
    /// Seconds by cause.
    pub seconds: BTreeMap<Spent, f64>,
    /// Their sum: the wall time.
    pub wall_s: f64,
    /// First-time steps over the wall time; `None` before any time has passed.
    pub ettr: Option<f64>,
    /// The same over the last hour of this launcher.
    #[serde(default)]
    pub ettr_last_hour: Option<f64>,
    /// The highest step that was ever done.
    pub best_step: u64,
}

impl Sums {
    /// The causes in a line, the largest first; without those under a tenth of a per cent.
    pub fn describe(&self) -> String {
        let percent = |seconds: f64| 100.0 * seconds / self.wall_s.max(f64::MIN_POSITIVE);
        let mut parts: Vec<(Spent, f64)> =
            self.seconds.iter().map(|(spent, seconds)| (*spent, percent(*seconds))).collect();
        parts.retain(|(_, percent)| *percent >= 0.1);
        parts.sort_by(|a, b| b.1.total_cmp(&a.1));
        let part = |(spent, percent): &(Spent, f64)| format!("{} {percent:.1} %", spent.name());
        parts.iter().map(part).collect::<Vec<_>>().join(", ")
    }
}

/// The books of a run.
#[derive(Clone, Debug)]
pub struct Ledger {
    seconds: BTreeMap<Spent, f64>,
    best_step: u64,
    /// Everything before is booked.
    since: Instant,
    current: Spent,
    recent: VecDeque<(Instant, Spent, Duration)>,
}

impl Ledger {
    /// From `now` on, with the sums of earlier launchers.
    pub fn new(before: &Sums, now: Instant) -> Self {
        Self {
            seconds: before.seconds.clone(),
            best_step: before.best_step,
            since: now,
            current: Spent::Start,
            recent: VecDeque::new(),
        }
    }

    /// Books the time since an earlier launcher's last word: it ended without another. `steps` are
    /// those that were reported since, first to last.
    pub fn fill(&mut self, gap: Duration, steps: &[StepReport]) {
        let mut left = gap.as_secs_f64();
        for step in steps {
            let time = Some(step.step_time_s).filter(|time| time.is_finite() && *time > 0.0);
            let time = time.unwrap_or(0.0).min(left);
            let wait = step.data_wait_s.clamp(0.0, time);
            left -= time;
            let spent = self.kind_of(step.step);
            *self.seconds.entry(Spent::DataWait).or_default() += wait;
            *self.seconds.entry(spent).or_default() += time - wait;
        }
        *self.seconds.entry(Spent::Down).or_default() += left;
    }

    /// What time is spent on from now on.
    pub fn enter(&mut self, spent: Spent, now: Instant) {
        // Time in steps is booked with each of them; the moments since the last belong to what
        // follows.
        let own = match (self.current, spent) {
            (Spent::FirstTimeSteps, Spent::FirstTimeSteps) => return,
            (Spent::FirstTimeSteps, next) => next,
            (current, _) => current,
        };
        self.book(own, now.saturating_duration_since(self.since), now);
        self.since = self.since.max(now);
        self.current = spent;
    }

    /// Rank 0 entered a phase.
    pub fn phase(&mut self, phase: Phase, now: Instant) {
        self.enter(Spent::of_phase(phase), now);
    }

    /// Rank 0 did a step. Where steps are `told_again`, one that was booked counts for nothing.
    pub fn stepped(&mut self, report: &StepReport, told_again: bool, now: Instant) {
        if told_again && report.step <= self.best_step {
            return;
        }
        let time = now.saturating_duration_since(self.since);
        let wait = Duration::try_from_secs_f64(report.data_wait_s).unwrap_or_default().min(time);
        let spent = self.kind_of(report.step);
        self.book(Spent::DataWait, wait, now);
        self.book(spent, time - wait, now);
        self.since = self.since.max(now);
        self.current = Spent::FirstTimeSteps;
    }

    /// A rank failed, in a hang or otherwise.
    pub fn failed(&mut self, is_hang: bool, now: Instant) {
        let lost = match self.current {
            _ if is_hang => Spent::Hang,
            Spent::FirstTimeSteps => Spent::RepeatedSteps,
            current => current,
        };
        self.book(lost, now.saturating_duration_since(self.since), now);
        self.since = self.since.max(now);
        self.current = Spent::Down;
    }

    /// The run ends: what is open is booked; a step that is not done will have to be done again.
    pub fn close(&mut self, now: Instant) {
        let open = match self.current {
            Spent::FirstTimeSteps => Spent::RepeatedSteps,
            current => current,
        };
        self.book(open, now.saturating_duration_since(self.since), now);
        self.since = self.since.max(now);
    }

    /// Up to when everything is booked.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// The sums up to now. Time in a step that is not done yet counts as what it will be if
    /// nothing fails.
    pub fn sums(&self, now: Instant) -> Sums {
        let mut open = self.clone();
        open.book(self.current, now.saturating_duration_since(self.since), now);
        let wall_s: f64 = open.seconds.values().sum();
        let first = open.seconds.get(&Spent::FirstTimeSteps).copied().unwrap_or(0.0);
        let recent = |only: Option<Spent>| {
            let spent = open.recent.iter().filter(|(_, spent, _)| only.is_none_or(|s| s == *spent));
            spent.fold(0.0, |sum, (.., time)| sum + time.as_secs_f64())
        };
        let ratio = |part: f64, whole: f64| (whole > 0.0).then(|| part / whole);
        Sums {
            wall_s,
            ettr: ratio(first, wall_s),
            ettr_last_hour: ratio(recent(Some(Spent::FirstTimeSteps)), recent(None)),
            best_step: open.best_step,
            seconds: open.seconds,
        }
    }

    fn kind_of(&mut self, step: u64) -> Spent {
        if step <= self.best_step {
            return Spent::RepeatedSteps;
        }
        self.best_step = step;
        Spent::FirstTimeSteps
    }

    fn book(&mut self, spent: Spent, time: Duration, now: Instant) {
        if time.is_zero() {
            return;
        }
        *self.seconds.entry(spent).or_default() += time.as_secs_f64();
        match self.recent.iter_mut().rev().take(4).find(|(_, kind, _)| *kind == spent) {
            Some((end, _, sum)) if now.saturating_duration_since(*end) < GRAIN => *sum += time,
            _ => self.recent.push_back((now, spent, time)),
        }
        while self
            .recent
            .front()
            .is_some_and(|(end, ..)| now.saturating_duration_since(*end) > WINDOW)
        {
            self.recent.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn report(step: u64, data_wait_s: f64) -> StepReport {
        StepReport { step, data_wait_s, step_time_s: 1.0, ..StepReport::default() }
    }

    fn seconds(sums: &Sums, spent: Spent) -> f64 {
        sums.seconds.get(&spent).copied().unwrap_or(0.0)
    }

    #[test]
    fn each_second_has_its_cause() {
        let start = Instant::now();
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let mut ledger = Ledger::new(&Sums::default(), start);
        ledger.phase(Phase::Load, at(2.0));
        ledger.phase(Phase::Train, at(3.0));
        ledger.stepped(&report(1, 0.25), false, at(5.0));
        ledger.stepped(&report(2, 0.0), false, at(6.0));
        ledger.phase(Phase::Save, at(6.0));
        ledger.phase(Phase::Train, at(6.5));
        ledger.stepped(&report(3, 0.0), false, at(7.5));
        ledger.failed(false, at(8.0));
        ledger.enter(Spent::Start, at(10.0));
        ledger.phase(Phase::Train, at(11.0));
        ledger.stepped(&report(3, 0.0), false, at(12.0));
        ledger.stepped(&report(4, 0.0), false, at(13.0));
        ledger.failed(true, at(20.0));
        let sums = ledger.sums(at(21.0));
        let expected = [
            (Spent::Start, 3.0),
            (Spent::Load, 1.0),
            (Spent::DataWait, 0.25),
            (Spent::FirstTimeSteps, 1.75 + 1.0 + 1.0 + 1.0),
            (Spent::SaveStall, 0.5),
            (Spent::RepeatedSteps, 0.5 + 1.0),
            (Spent::Down, 2.0 + 1.0),
            (Spent::Hang, 7.0),
        ];
        for (spent, expected) in expected {
            let found = seconds(&sums, spent);
            assert!((found - expected).abs() < 1e-6, "{spent:?}: {found} for {expected}");
        }
        assert!((sums.wall_s - 21.0).abs() < 1e-6);
        assert!((sums.ettr.unwrap() - 4.75 / 21.0).abs() < 1e-6);
        assert!(sums.describe().starts_with("hang 33.3 %, first-time steps 22.6 %"));
    }

    #[test]
    fn a_launcher_that_vanished_leaves_what_its_steps_took() {
        let mut ledger = Ledger::new(&Sums { best_step: 5, ..Sums::default() }, Instant::now());
        ledger.fill(Duration::from_secs(10), &[report(5, 0.0), report(6, 0.5), report(7, 0.0)]);
        let sums = ledger.sums(ledger.since);
        assert_eq!(seconds(&sums, Spent::RepeatedSteps), 1.0);
        assert_eq!(seconds(&sums, Spent::FirstTimeSteps), 1.5);
        assert_eq!(seconds(&sums, Spent::DataWait), 0.5);
        assert_eq!(seconds(&sums, Spent::Down), 7.0);
        assert_eq!((sums.wall_s, sums.best_step), (10.0, 7));
    }

    #[test]
    fn the_last_hour_forgets_what_was_before() {
        let start = Instant::now();
        let mut ledger = Ledger::new(&Sums::default(), start);
        ledger.failed(false, start + Duration::from_secs(1000));
        let mut now = start + Duration::from_secs(2000);
        ledger.phase(Phase::Train, now);
        for step in 1..=100 {
            now += Duration::from_secs(60);
            ledger.stepped(&report(step, 0.0), false, now);
        }
        let sums = ledger.sums(now);
        assert_eq!(sums.ettr_last_hour, Some(1.0));
        assert!((sums.ettr.unwrap() - 6000.0 / 8000.0).abs() < 1e-6);
        assert!(ledger.recent.len() < 100);
    }

    proptest! {
        #[test]
        fn the_causes_add_up_to_the_wall_time(
            events in prop::collection::vec((0_u8..5, 0_u64..50, 0_u64..5000), 1..200),
        ) {
            let start = Instant::now();
            let mut now = start;
            let mut ledger = Ledger::new(&Sums::default(), start);
            let phases = [Phase::Init, Phase::Load, Phase::Train, Phase::Save, Phase::Validate];
            for (kind, step, millis) in events {
                now += Duration::from_millis(millis);
                match kind {
                    0 => ledger.failed(step % 2 == 0, now),
                    1 => ledger.enter(Spent::Rendezvous, now),
                    2 => ledger.phase(phases[step as usize % 5], now),
                    _ => ledger.stepped(&report(step, step as f64 / 7.0), step % 3 == 0, now),
                }
            }
            let sums = ledger.sums(now);
            let wall = now.saturating_duration_since(start).as_secs_f64();
            prop_assert!((sums.wall_s - wall).abs() <= 1e-9 * wall.max(1.0));
        }
    }
}
