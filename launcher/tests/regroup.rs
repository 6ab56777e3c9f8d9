//! The supervisor's policy for ranks whose processes outlive a generation, step by step and under
//! random events.

use launcher::supervisor::cause::Exit;
use launcher::supervisor::state::{Action, Event, Policy, RankState, State};
use proptest::prelude::*;
use rank_protocol::{FailureClass, FailureReport, Phase, Position, RollBack, exit_code};
use run_config::SampleRange;
use std::time::{Duration, Instant};

/// A run of three ranks that keep their processes.
struct Run {
    state: State,
    now: Instant,
}

fn policy() -> Policy {
    Policy { keep_processes: true, ..Policy::new(3, 3) }
}

impl Run {
    fn begin() -> Self {
        let mut run = Self { state: State::new(policy(), 0), now: Instant::now() };
        assert_eq!(run.event(Event::Begin { committed: None }), ["find"]);
        assert_eq!(run.found(None), ["spawn 1 from None, kept []"]);
        run
    }

    /// As far as the second generation, in which ranks 0 and 2 have their processes still, before
    /// its first step.
    fn regrouped() -> Self {
        let mut run = Self::begin();
        run.event(Event::Committed { step: 5 });
        run.step(6);
        run.killed(1);
        assert_eq!(run.after(0.02), ["release [0, 2]"]);
        assert!(run.released(0).is_empty());
        assert_eq!(run.released(2), ["first cause: rank 1", "find"]);
        assert_eq!(run.found(Some(5)), ["spawn 2 from Some(5), kept [0, 2]"]);
        run
    }

    fn event(&mut self, event: Event) -> Vec<String> {
        self.state.handle(event, self.now).iter().map(short).collect()
    }

    fn found(&mut self, step: Option<u64>) -> Vec<String> {
        self.event(Event::Found { step, is_committed: true })
    }

    fn step(&mut self, step: u64) {
        for rank in 0..3 {
            assert!(self.event(Event::Step { rank, step }).is_empty());
        }
    }

    fn killed(&mut self, rank: usize) -> Vec<String> {
        self.event(exited(rank, Exit { code: None, signal: Some(9) }))
    }

    fn released(&mut self, rank: usize) -> Vec<String> {
        self.event(Event::Released { rank })
    }

    /// The rank says that it fails of this, and lets go.
    fn fails(&mut self, rank: usize, class: FailureClass) -> Vec<String> {
        assert!(self.event(Event::Reported { rank, report: report(class) }).is_empty());
        self.released(rank)
    }

    fn after(&mut self, seconds: f64) -> Vec<String> {
        self.now += Duration::from_secs_f64(seconds);
        self.event(Event::Tick)
    }
}

fn exited(rank: usize, exit: Exit) -> Event {
    Event::Exited { rank, exit, last_lines: Vec::new() }
}

fn report(class: FailureClass) -> FailureReport {
    FailureReport {
        class,
        phase: Phase::Train,
        step: Some(7),
        collective: None,
        lines: vec!["what happened".to_owned()],
        roll_back: None,
    }
}

fn short(action: &Action) -> String {
    match action {
        Action::FindCheckpoint => "find".into(),
        Action::Spawn { generation, resume_step, kept } => {
            format!("spawn {generation} from {resume_step:?}, kept {kept:?}")
        }
        Action::Abort { ranks, .. } => format!("abort {ranks:?}"),
        Action::Release { ranks, .. } => format!("release {ranks:?}"),
        Action::Kill { ranks, .. } => format!("kill {ranks:?}"),
        Action::RecordFailure(cause) => format!("rank {} failed", cause.rank),
        Action::RecordFirstCause(cause) => format!("first cause: rank {}", cause.rank),
        Action::RecordRollBack(_) => "back".into(),
        Action::RecordStop { .. } => "stop".into(),
        Action::Finish { code, .. } => format!("finish {code}"),
        other => format!("{other:?}"),
    }
}

#[test]
fn ranks_that_are_well_keep_their_processes() {
    let mut run = Run::regrouped();
    let kept: Vec<RankState> = run.state.ranks().map(|(state, ..)| state).collect();
    assert_eq!(kept, [RankState::Starting; 3]);
    run.step(6);
    // And again, in the third.
    run.killed(2);
    assert_eq!(run.after(0.02), ["release [0, 1]"]);
    run.released(1);
    assert_eq!(run.released(0), ["first cause: rank 2", "find"]);
    assert_eq!(run.found(Some(5)), ["spawn 3 from Some(5), kept [0, 1]"]);
}

#[test]
fn ranks_that_lose_a_link_let_go_by_themselves() {
    let mut run = Run::begin();
    run.step(6);
    assert_eq!(run.fails(0, FailureClass::Transient), ["rank 0 failed"]);
    assert_eq!(run.killed(1), ["rank 1 failed"]);
    assert_eq!(run.after(0.02), ["release [2]"], "it may not have noticed");
    assert_eq!(run.released(2), ["first cause: rank 1", "find"]);
    assert_eq!(run.found(None), ["spawn 2 from None, kept [0, 2]"]);
}

#[test]
fn a_lost_link_alone_ends_no_process() {
    let mut run = Run::begin();
    run.step(6);
    assert_eq!(run.fails(0, FailureClass::Transient), ["rank 0 failed"]);
    assert_eq!(run.fails(1, FailureClass::Transient), ["rank 1 failed"]);
    assert_eq!(run.after(1.0), ["release [2]"]);
    assert_eq!(run.released(2), ["first cause: rank 0", "find"]);
    assert_eq!(run.found(None), ["spawn 2 from None, kept [0, 1, 2]"]);
}

#[test]
fn a_rank_that_does_not_let_go_in_time_is_killed() {
    let mut run = Run::begin();
    run.step(6);
    run.killed(1);
    run.after(0.02);
    run.released(0);
    assert!(run.after(4.9).is_empty());
    assert_eq!(run.after(0.1), ["kill [2]"]);
    // It says so too late: the signal is on its way.
    assert_eq!(run.released(2), ["first cause: rank 1", "find"]);
    assert_eq!(run.found(None), ["spawn 2 from None, kept [0]"]);
}

/// A run of which rank 1 hangs, and the others have let go.
fn of_a_hang() -> Run {
    let mut run = Run::begin();
    for rank in 0..3 {
        run.event(Event::Phase { rank, phase: Phase::Train });
    }
    run.step(1);
    run.step(2);
    assert_eq!(run.after(30.0)[1], "AskWhere");
    for rank in [0, 2] {
        let waits = vec!["data".to_owned()];
        let position = Position { phase: Phase::Train, step: Some(2), waits };
        run.event(Event::Here { rank, position });
    }
    assert_eq!(run.after(5.0), ["rank 1 failed", "abort [1]", "release [0, 2]"]);
    run.released(0);
    run.released(2);
    run
}

/// What held it once may hold it again.
#[test]
fn a_rank_that_hangs_and_lets_go_after_all_is_not_kept() {
    let mut run = of_a_hang();
    assert_eq!(run.released(1), ["first cause: rank 1", "find"]);
    assert_eq!(run.found(None), ["spawn 2 from None, kept [0, 2]"]);
}

#[test]
fn a_rank_that_hangs_is_ended_and_the_others_stay() {
    let mut run = of_a_hang();
    assert_eq!(run.after(5.0), ["kill [1]"]);
    assert_eq!(run.killed(1), ["first cause: rank 1", "find"]);
    assert_eq!(run.found(None), ["spawn 2 from None, kept [0, 2]"]);
}

#[test]
fn a_second_failure_before_a_step_starts_all_anew() {
    let mut run = Run::regrouped();
    run.killed(1);
    assert_eq!(run.after(0.02), ["abort [0, 2]"]);
    run.killed(0);
    assert_eq!(run.killed(2), ["first cause: rank 1", "find"]);
    assert_eq!(run.found(Some(5)), ["spawn 3 from Some(5), kept []"]);
    // Those that have let go by themselves are ended too.
    let mut run = Run::regrouped();
    run.fails(0, FailureClass::Transient);
    run.fails(2, FailureClass::Transient);
    let ended = run.killed(1);
    assert_eq!(ended, ["rank 1 failed", "first cause: rank 1", "abort [0, 2]"]);
    assert!(run.killed(0).is_empty());
    assert_eq!(run.killed(2), ["find"]);
    assert_eq!(run.found(Some(5)), ["spawn 3 from Some(5), kept []"]);
}

#[test]
fn a_process_that_dies_while_it_waits_is_started_anew() {
    let mut run = Run::begin();
    run.step(6);
    run.killed(1);
    run.after(0.02);
    run.released(0);
    run.released(2);
    assert_eq!(run.killed(0), ["rank 0 failed"]);
    assert_eq!(run.found(None), ["spawn 2 from None, kept [2]"]);
    // The cause of this generation's end is not that of the last one's.
    run.step(6);
    run.killed(2);
    run.after(0.02);
    run.released(0);
    assert_eq!(run.released(1), ["first cause: rank 2", "find"]);
}

#[test]
fn one_that_dies_after_it_let_go_is_a_failure_of_its_own() {
    let mut run = Run::begin();
    run.step(6);
    run.fails(0, FailureClass::Transient);
    assert_eq!(run.killed(0), ["rank 0 failed"]);
    assert_eq!(run.after(0.02), ["release [1, 2]"]);
    run.released(1);
    assert_eq!(run.released(2), ["first cause: rank 0", "find"]);
    assert_eq!(run.found(None), ["spawn 2 from None, kept [1, 2]"]);
}

#[test]
fn numeric_trouble_keeps_all_processes() {
    let mut run = Run::begin();
    run.event(Event::Committed { step: 5 });
    run.step(6);
    let samples = SampleRange { first: 56, last: 63 };
    for rank in 0..3 {
        let roll_back = Some(RollBack { step: 7, samples });
        let report = FailureReport { roll_back, ..report(FailureClass::Numeric) };
        run.event(Event::Reported { rank, report });
    }
    run.released(0);
    run.released(1);
    assert_eq!(run.released(2)[1..], ["first cause: rank 0", "back", "find"]);
    assert_eq!(run.found(Some(5)), ["spawn 2 from Some(5), kept [0, 1, 2]"]);
}

#[test]
fn who_waits_is_ended_before_the_run_is() {
    // A stop in the meantime.
    let mut run = Run::begin();
    run.event(Event::Committed { step: 5 });
    run.step(6);
    run.killed(1);
    run.after(0.02);
    run.released(0);
    run.released(2);
    assert_eq!(run.event(Event::Stop { by: "SIGTERM".into() }), ["stop", "abort [0, 2]"]);
    assert!(run.found(Some(5)).is_empty(), "nothing begins any more");
    run.killed(0);
    assert_eq!(run.killed(2), ["finish 75"]);
    // A signal to one that waits, not to one that is told to end.
    let mut run = Run::begin();
    run.event(Event::Committed { step: 5 });
    run.step(6);
    run.killed(1);
    run.after(0.02);
    run.released(0);
    let asked = Event::RankAskedToStop { rank: 0, signal: "SIGTERM".into() };
    assert!(run.event(asked.clone()).is_empty(), "it asks again in the next generation");
    run.released(2);
    assert_eq!(run.event(asked), ["stop", "abort [0, 2]"]);
    // A stop before: nobody stays.
    let mut run = Run::begin();
    run.step(6);
    run.event(Event::Stop { by: "SIGTERM".into() });
    run.killed(1);
    assert_eq!(run.after(0.02), ["abort [0, 2]"]);
    // A failure that trying again does not mend.
    let mut run = Run::begin();
    run.event(Event::Reported { rank: 1, report: report(FailureClass::Config) });
    run.event(exited(1, Exit { code: Some(exit_code::CONFIG), signal: None }));
    assert_eq!(run.after(0.02), ["release [0, 2]"]);
    run.released(0);
    assert_eq!(run.released(2), ["first cause: rank 1", "abort [0, 2]"]);
    assert_eq!(run.after(5.0), ["kill [0, 2]"]);
    run.killed(0);
    assert_eq!(run.killed(2), ["finish 64"]);
    // Nothing to go on from.
    let mut run = Run::begin();
    run.step(6);
    run.killed(1);
    run.after(0.02);
    run.released(0);
    run.released(2);
    let broken = Event::Broken { code: exit_code::FAILED, reason: "no disk".into() };
    assert_eq!(run.event(broken), ["abort [0, 2]"]);
    assert_eq!(run.event(Event::StopNow { by: "SIGINT".into() }), ["stop", "kill [0, 2]"]);
    run.killed(0);
    assert_eq!(run.killed(2), ["finish 130"]);
}

#[test]
fn places_in_another_layout_are_others() {
    let policy = Policy { has_agents: true, ..policy() };
    let mut run = Run { state: State::new(policy, 0), now: Instant::now() };
    run.event(Event::Begin { committed: None });
    run.found(None);
    run.event(Event::Gathered { step: None, num_ranks: 3 });
    run.step(6);
    run.killed(1);
    run.after(0.02);
    run.released(0);
    run.released(2);
    run.found(None);
    let begun = run.event(Event::Gathered { step: None, num_ranks: 2 });
    assert_eq!(begun, ["spawn 2 from None, kept []"]);
}

/// What becomes of the processes while a state machine decides for them.
struct Processes {
    is_alive: Vec<bool>,
    has_let_go: Vec<bool>,
    is_told: Vec<Option<&'static str>>,
    generation: u64,
    committed: Option<u64>,
    is_over: bool,
}

impl Processes {
    /// Carries out actions; what answers them comes back.
    fn obey(&mut self, actions: Vec<Action>) -> Result<Vec<Event>, TestCaseError> {
        let mut answers = Vec::new();
        for action in actions {
            prop_assert!(!self.is_over, "{action:?} after the end");
            match action {
                Action::FindCheckpoint => {
                    prop_assert!((0..3).all(|rank| !self.is_alive[rank] || self.has_let_go[rank]));
                    answers.push(Event::Found { step: self.committed, is_committed: true });
                }
                Action::Spawn { generation, resume_step, kept } => {
                    prop_assert_eq!(generation, self.generation + 1);
                    prop_assert_eq!(resume_step, self.committed);
                    self.generation = generation;
                    for rank in 0..3 {
                        let waits = self.is_alive[rank] && self.has_let_go[rank];
                        prop_assert!(!kept.contains(&rank) || waits, "{rank} is kept");
                        let is_doomed = self.is_told[rank] == Some("kill");
                        prop_assert!(!self.is_alive[rank] || kept.contains(&rank) || is_doomed);
                    }
                    self.is_alive = vec![true; 3];
                    self.has_let_go = vec![false; 3];
                    self.is_told = vec![None; 3];
                }
                Action::Abort { ranks, .. } => ranks.iter().for_each(|rank| {
                    self.is_told[*rank].get_or_insert("abort");
                }),
                Action::Release { ranks, .. } => ranks.iter().for_each(|rank| {
                    self.is_told[*rank].get_or_insert("release");
                }),
                Action::Kill { ranks, .. } => {
                    ranks.iter().for_each(|rank| self.is_told[*rank] = Some("kill"));
                }
                Action::Finish { .. } => {
                    prop_assert!(self.is_alive.iter().all(|is_alive| !is_alive));
                    self.is_over = true;
                }
                _ => {}
            }
        }
        Ok(answers)
    }

    /// Whether it can happen to a process as it is; then it does.
    fn happens(&mut self, event: &Event) -> bool {
        match event {
            Event::Exited { rank, .. } => std::mem::take(&mut self.is_alive[*rank]),
            Event::Released { rank } => {
                let works = self.is_alive[*rank] && !self.has_let_go[*rank];
                self.has_let_go[*rank] |= works;
                works
            }
            Event::Step { rank, .. } | Event::Finished { rank } => {
                self.is_alive[*rank] && !self.has_let_go[*rank]
            }
            Event::Committed { step } => {
                self.committed = self.committed.max(Some(*step));
                true
            }
            _ => true,
        }
    }

    /// What processes do that were told something.
    fn next(&self) -> Option<Event> {
        let killed = Exit { code: None, signal: Some(9) };
        (0..3).filter(|rank| self.is_alive[*rank]).find_map(|rank| match self.is_told[rank]? {
            "release" if self.has_let_go[rank] => None,
            "release" => Some(Event::Released { rank }),
            _ => Some(exited(rank, killed)),
        })
    }
}

fn any_event() -> impl Strategy<Value = Event> {
    let rank = 0_usize..3;
    let code = prop::sample::select(vec![0, 1, 64, 75]);
    prop_oneof![
        5 => (rank.clone(), 1_u64..50).prop_map(|(rank, step)| Event::Step { rank, step }),
        2 => (1_u64..50).prop_map(|step| Event::Committed { step }),
        1 => (rank.clone(), code).prop_map(|(rank, code)| {
            exited(rank, Exit { code: Some(code), signal: None })
        }),
        2 => rank.clone().prop_map(|rank| exited(rank, Exit { code: None, signal: Some(9) })),
        4 => rank.clone().prop_map(|rank| Event::Released { rank }),
        2 => rank.clone().prop_map(|rank| {
            Event::Reported { rank, report: report(FailureClass::Transient) }
        }),
        1 => rank.prop_map(|rank| Event::Finished { rank }),
        1 => Just(Event::Stop { by: "SIGINT".into() }),
        1 => Just(Event::StopNow { by: "SIGINT".into() }),
        4 => Just(Event::Tick),
    ]
}

proptest! {
    /// Whatever happens, in whatever order: a generation begins only where nobody works for
    /// another, keeps only processes that wait, and the run ends only without processes. And left
    /// alone, every run comes to work again or to its end.
    #[test]
    fn no_order_of_events_breaks_the_rules(
        events in prop::collection::vec((any_event(), 0_u64..3000), 0..150),
    ) {
        let policy = Policy { max_same_failure: u32::MAX, ..policy() };
        let mut state = State::new(Policy { max_no_progress: 1000, ..policy }, 10);
        let mut now = Instant::now();
        let (is_alive, has_let_go, is_told) = (vec![false; 3], vec![false; 3], vec![None; 3]);
        let (generation, committed, is_over) = (10, None, false);
        let mut processes =
            Processes { is_alive, has_let_go, is_told, generation, committed, is_over };
        let begin = (Event::Begin { committed: None }, 0);
        for (event, millis) in std::iter::once(begin).chain(events) {
            now += Duration::from_millis(millis);
            let mut queue = vec![event];
            while let Some(event) = queue.pop() {
                if processes.happens(&event) {
                    queue.extend(processes.obey(state.handle(event, now))?);
                }
            }
        }
        // Nothing more goes wrong.
        for _ in 0..100 {
            let event = match (processes.next(), state.next_tick()) {
                _ if processes.is_over => return Ok(()),
                (Some(event), _) => event,
                (None, Some(at)) if !state.is_working() => {
                    now = now.max(at);
                    Event::Tick
                }
                _ => break,
            };
            let mut queue = vec![event];
            while let Some(event) = queue.pop() {
                if processes.happens(&event) {
                    queue.extend(processes.obey(state.handle(event, now))?);
                }
            }
        }
        let works = |rank: usize| processes.is_alive[rank] && !processes.has_let_go[rank];
        prop_assert!(state.is_working() && (0..3).any(works), "{}", state.name());
    }
}
