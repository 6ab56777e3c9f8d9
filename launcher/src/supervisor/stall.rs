//! Whether a generation still moves, and who holds it up where it does not: a pure record of its
//! steps and phases, with the time as an argument.

use rank_protocol::{Phase, Position, STORAGE_TIMEOUT};
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// A hang is a silence of so many times the longest that was seen in its phase.
const NUM_LONGEST: u32 = 5;
/// Limit of what waits for storage or other machines (every phase but the steps), of a phase that
/// has not been seen to its end, and of a generation's first step: ranks give up before.
const LEAST_OF_OTHERS: Duration = STORAGE_TIMEOUT.saturating_add(Duration::from_secs(5 * 60));
/// Longest wait for ranks to say where they are.
pub const ASKING: Duration = Duration::from_secs(5);

/// A generation in which nothing has moved for long.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stall {
    /// Time since the last step or change of phase, in seconds.
    pub seconds: f64,
    /// What the ranks were doing.
    pub phase: Phase,
    /// The last step that a rank did in this generation.
    pub step: Option<u64>,
}

impl Stall {
    /// In a sentence.
    pub fn describe(&self) -> String {
        let since = match self.step {
            Some(step) => format!("since step {step}"),
            None => "since the ranks were started".to_owned(),
        };
        let phase = self.phase.name();
        format!("stalled: no rank has moved for {:.0} s, {since} (in {phase})", self.seconds)
    }
}

/// When the ranks of a generation last moved.
#[derive(Clone, Debug)]
pub struct Progress {
    /// The least limit.
    least: Duration,
    moved: Instant,
    phase: Phase,
    phase_since: Instant,
    /// The newest step, and when the first rank had done it.
    newest: Option<(u64, Instant)>,
    longest: BTreeMap<Phase, Duration>,
}

impl Progress {
    /// Of a first generation, that starts now. No silence shorter than `least` is a hang.
    pub fn new(least: Duration, now: Instant) -> Self {
        Self {
            least,
            moved: now,
            phase: Phase::Init,
            phase_since: now,
            newest: None,
            longest: BTreeMap::new(),
        }
    }

    /// Of the next generation, that starts now; what was seen still counts.
    pub fn again(self, now: Instant) -> Self {
        Self { longest: self.longest, ..Self::new(self.least, now) }
    }

    /// This process did not run for a time, and so may have heard nothing, though ranks moved; or
    /// they did not run either.
    pub fn was_away(&mut self, time: Duration, now: Instant) {
        let newest = self.newest.as_mut().map(|(_, at)| at);
        for moment in [&mut self.moved, &mut self.phase_since].into_iter().chain(newest) {
            // What was heard first after the pause is of now.
            *moment = (*moment + time).min(now);
        }
    }

    /// A rank entered a phase.
    pub fn entered(&mut self, phase: Phase, now: Instant) {
        self.moved = now;
        if phase == self.phase {
            return;
        }
        // A step is not measured by the phase, which lasts for many.
        if self.phase != Phase::Train {
            self.saw(self.phase, now.saturating_duration_since(self.phase_since));
        }
        (self.phase, self.phase_since) = (phase, now);
        // What came between two steps is none of the next one's time.
        if let Some((_, at)) = &mut self.newest {
            *at = now;
        }
    }

    /// A rank did a step.
    pub fn stepped(&mut self, step: u64, now: Instant) {
        self.moved = now;
        match self.newest {
            Some((newest, _)) if step <= newest => return,
            Some((_, at)) => self.saw(Phase::Train, now.saturating_duration_since(at)),
            None => {}
        }
        self.newest = Some((step, now));
    }

    fn saw(&mut self, phase: Phase, time: Duration) {
        let longest = self.longest.entry(phase).or_default();
        *longest = time.max(*longest);
    }

    /// When it counts as hung.
    pub fn deadline(&self) -> Instant {
        let is_warm = self.phase != Phase::Train || self.newest.is_some();
        let longest = self.longest.get(&self.phase).filter(|_| is_warm);
        let least = match self.phase {
            Phase::Train => self.least,
            _ => self.least.max(LEAST_OF_OTHERS),
        };
        let limit = longest.map_or(LEAST_OF_OTHERS, |longest| longest.saturating_mul(NUM_LONGEST));
        self.moved + limit.max(least)
    }

    /// The stall that is to be told now.
    pub fn stall(&self, now: Instant) -> Option<Stall> {
        (now >= self.deadline()).then(|| Stall {
            seconds: now.saturating_duration_since(self.moved).as_secs_f64(),
            phase: self.phase,
            step: self.newest.map(|(step, _)| step),
        })
    }
}

/// Who holds the others up, of what the ranks say where they are (`None`: no answer in time), and
/// why each is suspected: those that do not answer; else those behind in steps; else those that
/// are in no collective while others wait in one. Nobody, where all are alike.
pub fn suspects(positions: &[Option<Position>]) -> Vec<(usize, String)> {
    let ranks = || positions.iter().enumerate();
    let silent: Vec<(usize, String)> = ranks()
        .filter(|(_, position)| position.is_none())
        .map(|(rank, _)| (rank, "its process does not answer".to_owned()))
        .collect();
    if !silent.is_empty() {
        return silent;
    }
    let known = || ranks().filter_map(|(rank, position)| Some((rank, position.as_ref()?)));
    let newest = known().filter_map(|(_, position)| position.step).max();
    let behind: Vec<(usize, String)> = known()
        .filter(|(_, position)| position.step < newest)
        .map(|(rank, position)| {
            let step = position.step.map_or("none".to_owned(), |step| step.to_string());
            let newest = newest.unwrap_or(0);
            (rank, format!("its last step is {step}, that of others {newest}"))
        })
        .collect();
    if !behind.is_empty() {
        return behind;
    }
    let Some(waits) = known().find_map(|(_, position)| position.waits.first()) else {
        return Vec::new();
    };
    known()
        .filter(|(_, position)| position.waits.is_empty())
        .map(|(rank, position)| {
            let phase = position.phase.name();
            (rank, format!("it is in {phase}, and never joined what others wait in: {waits}"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: Duration = Duration::from_secs(30);

    /// After steps that took these seconds, a silence of `expected` seconds is a hang.
    fn check(step_times_s: &[u64], expected: u64) {
        let mut now = Instant::now();
        let mut progress = Progress::new(LEAST, now);
        progress.entered(Phase::Train, now);
        for (step, seconds) in (1..).zip(step_times_s) {
            now += Duration::from_secs(*seconds);
            progress.stepped(step, now);
            progress.stepped(step, now);
        }
        assert_eq!(progress.deadline(), now + Duration::from_secs(expected));
    }

    #[test]
    fn the_limit_is_half_a_minute_or_five_times_the_longest() {
        check(&[], 2100);
        check(&[500], 2100);
        check(&[500, 1, 1], 30);
        check(&[500, 20, 30, 10], 150);
    }

    #[test]
    fn each_phase_has_its_own_limit_also_in_the_next_generation() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut progress = Progress::new(LEAST, start);
        progress.entered(Phase::Train, at(40));
        progress.stepped(1, at(41));
        progress.stepped(2, at(42));
        progress.entered(Phase::Save, at(42));
        assert_eq!(progress.deadline(), at(42 + 2100), "nobody knows how long a save takes");
        progress.entered(Phase::Save, at(43));
        progress.entered(Phase::Train, at(642));
        progress.stepped(3, at(643));
        progress.entered(Phase::Save, at(643));
        assert_eq!(progress.deadline(), at(643 + 5 * 600));
        let progress = progress.again(at(2000));
        assert_eq!(progress.deadline(), at(2000 + 2100), "the start took 40 s");
        assert_eq!(progress.stall(at(4099)), None);
        let stall = progress.stall(at(4100)).unwrap();
        assert_eq!((stall.seconds, stall.phase, stall.step), (2100.0, Phase::Init, None));
    }

    fn position(step: u64, waits: &[&str]) -> Option<Position> {
        let waits = waits.iter().map(|wait| (*wait).to_owned()).collect();
        Some(Position { phase: Phase::Train, step: Some(step), waits })
    }

    fn check_suspects(positions: &[Option<Position>], expected: &[usize], why: &str) {
        let found = suspects(positions);
        let ranks: Vec<usize> = found.iter().map(|(rank, _)| *rank).collect();
        assert_eq!(ranks, expected);
        assert!(found.iter().all(|(_, line)| line.contains(why)), "{found:?} lacks {why:?}");
    }

    #[test]
    fn suspects_are_those_that_hold_the_others_up() {
        let waiting = || position(7, &["data: all_reduce"]);
        check_suspects(&[waiting(), None, waiting()], &[1], "does not answer");
        check_suspects(&[waiting(), position(6, &["data: x"])], &[1], "6, that of others 7");
        check_suspects(&[position(7, &[]), waiting()], &[0], "never joined");
        check_suspects(&[waiting(), waiting()], &[], "");
        check_suspects(&[position(7, &[])], &[], "");
    }
}
