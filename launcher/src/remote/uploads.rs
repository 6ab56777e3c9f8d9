//! What is copied to the object store, and when: a pure function of (state, event, now) to actions.
//!
//! The newest checkpoint counts; those that came while another was being copied are passed over,
//! but for milestones. What fails is tried again, later each time, and whatever happens, training
//! does not wait.

use checkpoint_format::retention::is_milestone;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Pause after the first failure; doubled after each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// A checkpoint of a run; a later commit is greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    /// The generation that wrote it.
    pub generation: u64,
    /// Its step.
    pub step: u64,
}

/// What is to be done in the object store, one at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// Make sure that the folder is this run's.
    Own,
    /// Copy a checkpoint.
    Upload(Target),
    /// Remove old ones.
    Tidy,
}

/// What the policy is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A checkpoint is committed on disk.
    Committed(Target),
    /// A job is done.
    Done(Job),
    /// What was to be copied is there already: an earlier launcher came to it.
    There(Target),
    /// What was to be copied is here no more: a later one takes its place.
    Gone(Job),
    /// A job failed.
    Failed {
        /// Which.
        job: Job,
        /// Why.
        reason: String,
        /// Whether trying again is of no use.
        is_final: bool,
    },
    /// The job under way has brought no answer for so long.
    Silent(Duration),
    /// Time has passed.
    Tick,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Begin a job; none other is under way.
    Start(Job),
    /// Tell people.
    Tell(News),
}

/// What people are told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// A checkpoint is complete in the object store.
    Uploaded(Target),
    /// A checkpoint was so before.
    There(Target),
    /// Something fails, and is tried again where that may be of use.
    Failing {
        /// The checkpoint, where it is about one.
        target: Option<Target>,
        /// Why.
        reason: String,
        /// How many times in a row.
        failures: u32,
    },
    /// What failed no longer does.
    Recovered,
}

/// The state.
#[derive(Clone, Debug)]
pub struct Uploads {
    keep_every_steps: u64,
    is_owned: bool,
    /// Whether the folder is not to be had; the next checkpoint is another chance.
    is_refused: bool,
    waiting: BTreeSet<Target>,
    must_tidy: bool,
    running: Option<Job>,
    failures: u32,
    retry_at: Option<Instant>,
}

impl Uploads {
    /// Nothing is known yet. Checkpoints of the multiples of `keep_every_steps` (0: none) are never
    /// passed over.
    pub fn new(keep_every_steps: u64) -> Self {
        Self {
            keep_every_steps,
            is_owned: false,
            is_refused: false,
            waiting: BTreeSet::new(),
            must_tidy: false,
            running: None,
            failures: 0,
            retry_at: None,
        }
    }

    /// When [`Event::Tick`] is next of use.
    pub fn next_tick(&self) -> Option<Instant> {
        self.retry_at.filter(|_| self.running.is_none() && self.next_job().is_some())
    }

    /// Whether nothing is left to copy or to remove.
    pub fn is_idle(&self) -> bool {
        let is_at_work = self.running.is_some_and(|job| job != Job::Own);
        !is_at_work && self.waiting.is_empty() && !self.must_tidy
    }

    /// Failures since something last went well.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Takes an event in; returns what is to be done.
    pub fn handle(&mut self, event: Event, now: Instant) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Committed(target) => {
                self.is_refused = false;
                self.await_its_turn(target);
            }
            Event::Gone(job) => self.ended(job),
            Event::There(target) => {
                actions.push(Action::Tell(News::There(target)));
                actions.extend(self.done(Job::Upload(target)));
            }
            Event::Done(job) => {
                if let Job::Upload(target) = job {
                    actions.push(Action::Tell(News::Uploaded(target)));
                }
                actions.extend(self.done(job));
            }
            Event::Failed { job, reason, is_final } => {
                actions.extend(self.failed(job, reason, is_final, now));
            }
            Event::Silent(time) => actions.extend(self.silent(time)),
            Event::Tick => {}
        }
        actions.extend(self.start(now));
        actions
    }

    fn done(&mut self, job: Job) -> Option<Action> {
        self.ended(job);
        match job {
            Job::Own => self.is_owned = true,
            Job::Tidy => self.must_tidy = false,
            Job::Upload(_) => self.must_tidy = true,
        }
        self.retry_at = None;
        let failures = std::mem::take(&mut self.failures);
        (failures > 0).then_some(Action::Tell(News::Recovered))
    }

    fn failed(&mut self, job: Job, reason: String, is_final: bool, now: Instant) -> Option<Action> {
        self.ended(job);
        self.failures += 1;
        self.retry_at = Some(now + pause(self.failures));
        let target = match job {
            Job::Upload(target) => Some(target),
            Job::Own | Job::Tidy => None,
        };
        match (job, is_final) {
            (Job::Upload(target), false) => self.await_its_turn(target),
            (Job::Own, true) => {
                self.is_refused = true;
                self.waiting.clear();
            }
            (Job::Tidy, true) => self.must_tidy = false,
            _ => {}
        }
        // Not every one of a thousand.
        let failures = self.failures;
        let is_told = is_final || failures.is_power_of_two();
        is_told.then_some(Action::Tell(News::Failing { target, reason, failures }))
    }

    /// It may go on yet: it is told of, and not ended.
    fn silent(&mut self, time: Duration) -> Option<Action> {
        let job = self.running?;
        self.failures += 1;
        let target = match job {
            Job::Upload(target) => Some(target),
            Job::Own | Job::Tidy => None,
        };
        let reason = format!("no answer for {} s", time.as_secs());
        Some(Action::Tell(News::Failing { target, reason, failures: self.failures }))
    }

    /// Only the newest that waits, and milestones, are worth it.
    fn await_its_turn(&mut self, target: Target) {
        self.waiting.insert(target);
        let newest = self.waiting.last().copied();
        let every = self.keep_every_steps;
        self.waiting
            .retain(|waiting| Some(*waiting) == newest || is_milestone(waiting.step, every));
    }

    /// The folder is looked at before there is anything to copy, so that what is wrong is known.
    fn next_job(&self) -> Option<Job> {
        match self.waiting.last() {
            _ if !self.is_owned => (!self.is_refused).then_some(Job::Own),
            Some(newest) => Some(Job::Upload(*newest)),
            None if self.must_tidy => Some(Job::Tidy),
            None => None,
        }
    }

    fn ended(&mut self, job: Job) {
        if self.running == Some(job) {
            self.running = None;
        }
    }

    fn start(&mut self, now: Instant) -> Option<Action> {
        if self.running.is_some() || self.retry_at.is_some_and(|at| now < at) {
            return None;
        }
        let job = self.next_job()?;
        if let Job::Upload(target) = job {
            self.waiting.remove(&target);
        }
        (self.running, self.retry_at) = (Some(job), None);
        Some(Action::Start(job))
    }
}

/// Time from so many failures in a row to the next attempt.
pub(super) fn pause(failures: u32) -> Duration {
    let doubled = FIRST_PAUSE * (1_u32 << (failures - 1).min(10));
    doubled.min(LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn target(step: u64) -> Target {
        Target { generation: 1, step }
    }

    fn failed(job: Job) -> Event {
        Event::Failed { job, reason: "503".into(), is_final: false }
    }

    fn owned() -> (Uploads, Instant) {
        let (mut uploads, now) = (Uploads::new(10), Instant::now());
        let committed = uploads.handle(Event::Committed(target(5)), now);
        assert_eq!(committed, [Action::Start(Job::Own)]);
        let begun = uploads.handle(Event::Done(Job::Own), now);
        assert_eq!(begun, [Action::Start(Job::Upload(target(5)))]);
        (uploads, now)
    }

    #[test]
    fn the_newest_and_the_milestones_are_copied_then_old_ones_removed() {
        let (mut uploads, now) = owned();
        for step in [10, 15, 20, 25] {
            assert_eq!(uploads.handle(Event::Committed(target(step)), now), []);
        }
        let mut order = Vec::new();
        let mut job = Job::Upload(target(5));
        loop {
            let actions = uploads.handle(Event::Done(job), now);
            let Some(Action::Start(next)) = actions.last() else { break };
            job = *next;
            order.push(job);
        }
        let upload = |step| Job::Upload(target(step));
        assert_eq!(order, [upload(25), upload(20), upload(10), Job::Tidy]);
        assert!(uploads.is_idle());
    }

    #[test]
    fn a_failure_is_told_and_tried_again_later_with_the_newest() {
        let (mut uploads, now) = owned();
        let actions = uploads.handle(failed(Job::Upload(target(5))), now);
        let told = News::Failing { target: Some(target(5)), reason: "503".into(), failures: 1 };
        assert_eq!(actions, [Action::Tell(told)]);
        assert_eq!(uploads.next_tick(), Some(now + FIRST_PAUSE));
        assert_eq!(uploads.handle(Event::Committed(target(6)), now), []);
        let later = now + FIRST_PAUSE;
        let actions = uploads.handle(Event::Tick, later);
        assert_eq!(actions, [Action::Start(Job::Upload(target(6)))]);
        let actions = uploads.handle(Event::Done(Job::Upload(target(6))), later);
        let uploaded = Action::Tell(News::Uploaded(target(6)));
        let recovered = Action::Tell(News::Recovered);
        assert_eq!(actions, [uploaded, recovered, Action::Start(Job::Tidy)]);
    }

    #[test]
    fn the_folder_is_looked_at_before_there_is_anything_to_copy() {
        let (mut uploads, now) = (Uploads::new(0), Instant::now());
        assert_eq!(uploads.handle(Event::Tick, now), [Action::Start(Job::Own)]);
        // A run that ends now waits for nothing.
        assert!(uploads.is_idle());
        let actions = uploads.handle(failed(Job::Own), now);
        let told = News::Failing { target: None, reason: "503".into(), failures: 1 };
        assert_eq!(actions, [Action::Tell(told)]);
        assert!(uploads.is_idle());
        let later = uploads.next_tick().unwrap();
        assert_eq!(uploads.handle(Event::Tick, later), [Action::Start(Job::Own)]);
        let actions = uploads.handle(Event::Done(Job::Own), later);
        assert_eq!(actions, [Action::Tell(News::Recovered)]);
        let actions = uploads.handle(Event::Committed(target(5)), later);
        assert_eq!(actions, [Action::Start(Job::Upload(target(5)))]);
    }

    #[test]
    fn silence_is_told_and_ends_with_an_answer() {
        let (mut uploads, now) = owned();
        let actions = uploads.handle(Event::Silent(Duration::from_secs(25)), now);
        let reason = "no answer for 25 s".to_owned();
        let told = News::Failing { target: Some(target(5)), reason, failures: 1 };
        assert_eq!(actions, [Action::Tell(told)]);
        let actions = uploads.handle(Event::Done(Job::Upload(target(5))), now);
        let uploaded = Action::Tell(News::Uploaded(target(5)));
        let recovered = Action::Tell(News::Recovered);
        assert_eq!(actions, [uploaded, recovered, Action::Start(Job::Tidy)]);
        uploads.handle(Event::Done(Job::Tidy), now);
        assert_eq!(uploads.handle(Event::Silent(Duration::from_secs(25)), now), []);
    }

    #[test]
    fn what_is_there_already_is_not_told_as_new() {
        let (mut uploads, now) = owned();
        let actions = uploads.handle(Event::There(target(5)), now);
        assert_eq!(actions, [Action::Tell(News::There(target(5))), Action::Start(Job::Tidy)]);
        uploads.handle(Event::Done(Job::Tidy), now);
        assert!(uploads.is_idle());
    }

    #[test]
    fn what_is_gone_is_no_failure() {
        let (mut uploads, now) = owned();
        assert_eq!(uploads.handle(Event::Committed(target(6)), now), []);
        let actions = uploads.handle(Event::Gone(Job::Upload(target(5))), now);
        assert_eq!(actions, [Action::Start(Job::Upload(target(6)))]);
        assert_eq!(uploads.handle(Event::Gone(Job::Upload(target(6))), now), []);
        assert!(uploads.is_idle() && uploads.failures() == 0);
    }

    #[test]
    fn pauses_grow_up_to_half_a_minute() {
        let seconds: Vec<f64> = (1..=9).map(|n| pause(n).as_secs_f64()).collect();
        assert_eq!(seconds, [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]);
        assert_eq!(pause(u32::MAX), LONGEST_PAUSE);
    }

    #[test]
    fn what_trying_again_does_not_mend_is_told_and_left() {
        let failed = |job| Event::Failed { job, reason: "damaged".into(), is_final: true };
        let (mut uploads, now) = owned();
        let actions = uploads.handle(failed(Job::Upload(target(5))), now);
        assert!(uploads.is_idle() && matches!(actions[..], [Action::Tell(News::Failing { .. })]));
        let mut uploads = Uploads::new(10);
        uploads.handle(Event::Committed(target(5)), now);
        uploads.handle(failed(Job::Own), now);
        assert!(uploads.is_idle() && uploads.next_tick().is_none());
        // The next checkpoint is another chance.
        assert_eq!(uploads.handle(Event::Committed(target(6)), now), []);
        let actions = uploads.handle(Event::Tick, now + LONGEST_PAUSE);
        assert_eq!(actions, [Action::Start(Job::Own)]);
    }

    proptest! {
        /// Whatever fails: one job at a time, and in the end the newest is there.
        #[test]
        fn the_newest_gets_there(
            outcomes in prop::collection::vec((any::<bool>(), 0_u64..3), 1..60),
        ) {
            let (mut uploads, mut now) = owned();
            let mut running = Some(Job::Upload(target(5)));
            let (mut step, mut uploaded) = (5, None);
            let mut take = |actions: Vec<Action>, running: &mut Option<Job>| {
                for action in actions {
                    match action {
                        Action::Start(job) => {
                            assert_eq!(*running, None, "one at a time");
                            *running = Some(job);
                        }
                        Action::Tell(News::Uploaded(target)) => {
                            uploaded = uploaded.max(Some(target));
                        }
                        Action::Tell(_) => {}
                    }
                }
            };
            for (goes_well, commits) in outcomes.into_iter().chain((0..500).map(|_| (true, 0))) {
                for _ in 0..commits {
                    step += 1;
                    take(uploads.handle(Event::Committed(target(step)), now), &mut running);
                }
                now = uploads.next_tick().unwrap_or(now).max(now);
                let event = match running.take() {
                    Some(job) if goes_well => Event::Done(job),
                    Some(job) => failed(job),
                    None => Event::Tick,
                };
                take(uploads.handle(event, now), &mut running);
            }
            prop_assert!(uploads.is_idle());
            prop_assert_eq!(uploaded, Some(target(step)));
        }
    }
}
