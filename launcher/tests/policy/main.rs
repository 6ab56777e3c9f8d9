//! The supervisor's policy, step by step and under random events.

use launcher::supervisor::cause::{Cause, Exit};
use launcher::supervisor::state::{Action, Event, Policy, State};
use proptest::prelude::*;
use rank_protocol::{FailureClass, FailureReport, Phase, Position, RollBack, exit_code};
use run_config::SampleRange;
use std::time::{Duration, Instant};

mod budget;

/// A run under test: its state, its clock and what it was told to do.
struct Run {
    state: State,
    now: Instant,
}

impl Run {
    fn begin(world_size: usize, committed: Option<u64>) -> Self {
        Self::of(Policy::new(world_size, 3), committed)
    }

    fn of(policy: Policy, committed: Option<u64>) -> Self {
        let mut run = Self { state: State::new(policy, 0), now: Instant::now() };
        assert_eq!(run.event(Event::Begin { committed }), ["find"]);
        let started = run.event(Event::Found { step: committed, is_committed: true });
        assert_eq!(started, [format!("spawn 1 from {committed:?}")]);
        run
    }

    fn event(&mut self, event: Event) -> Vec<String> {
        self.state.handle(event, self.now).iter().map(short).collect()
    }

    fn exit(&mut self, rank: usize, code: i32) -> Vec<String> {
        self.event(exited(rank, Exit { code: Some(code), signal: None }))
    }

    fn killed(&mut self, rank: usize) -> Vec<String> {
        self.event(exited(rank, Exit { code: None, signal: Some(9) }))
    }

    fn after(&mut self, seconds: f64) -> Vec<String> {
        self.now += Duration::from_secs_f64(seconds);
        self.event(Event::Tick)
    }

    /// One generation of two ranks: `step` steps, then rank 1 is killed, and rank 0 told to end.
    fn crash_at(&mut self, step: u64) -> Vec<String> {
        self.event(Event::Step { rank: 1, step });
        assert_eq!(self.killed(1), ["rank 1 failed"]);
        assert!(self.after(1.0)[0].starts_with("abort"));
        self.killed(0)
    }

    /// One generation of two ranks, whose links are lost after this step, or before the first.
    fn lose_links(&mut self, step: Option<u64>, line: &str) -> Vec<String> {
        if let Some(step) = step {
            self.event(Event::Step { rank: 0, step });
        }
        for rank in 0..2 {
            let report = FailureReport { step, ..report(FailureClass::Transient, line) };
            self.event(Event::Reported { rank, report });
        }
        self.exit(0, 1);
        self.exit(1, 1)
    }

    fn next(&mut self, committed: Option<u64>) {
        self.event(Event::Found { step: committed, is_committed: true });
    }
}

fn exited(rank: usize, exit: Exit) -> Event {
    Event::Exited { rank, exit, last_lines: Vec::new() }
}

fn report(class: FailureClass, line: &str) -> FailureReport {
    FailureReport {
        class,
        phase: Phase::Train,
        step: Some(7),
        collective: None,
        lines: vec![line.to_owned()],
        roll_back: None,
    }
}

fn short(action: &Action) -> String {
    match action {
        Action::FindCheckpoint => "find".into(),
        Action::Gather { step, num_ranks, fewer_after } => {
            format!("gather for {step:?}: {num_ranks}, fewer after {fewer_after:?}")
        }
        Action::RecordGrowth { from, to } => format!("grow from {from} to {to}"),
        Action::Spawn { generation, resume_step, .. } => {
            format!("spawn {generation} from {resume_step:?}")
        }
        Action::AskToStop => "ask to stop".into(),
        Action::Abort { reason, .. } => format!("abort: {reason}"),
        Action::Release { reason, .. } => format!("release: {reason}"),
        Action::Kill { .. } => "kill".into(),
        Action::RecordFailure(cause) => format!("rank {} failed", cause.rank),
        Action::RecordFirstCause(cause) => format!("first cause: rank {}", cause.rank),
        Action::RecordRollBack(roll_back) => {
            let RollBack { step, samples } = roll_back;
            format!("back behind step {step}, without {} to {}", samples.first, samples.last)
        }
        Action::RecordStop { by, now: false } => format!("stop by {by}"),
        Action::RecordStop { by, now: true } => format!("stop at once by {by}"),
        Action::RecordStall(stall) => stall.describe(),
        Action::RecordLingering { ranks, time } => format!("linger {ranks:?} {time:?}"),
        Action::AskWhere => "where".into(),
        Action::Finish { code, .. } => format!("finish {code}"),
    }
}

#[test]
fn a_run_in_which_nothing_happens_is_done() {
    let mut run = Run::begin(2, None);
    for rank in 0..2 {
        assert!(run.event(Event::Finished { rank }).is_empty());
    }
    assert!(run.exit(0, exit_code::DONE).is_empty());
    assert_eq!(run.exit(1, exit_code::DONE), ["finish 0"]);
    assert!(run.event(Event::Stop { by: "SIGINT".into() }).is_empty());
}

#[test]
fn after_a_crash_all_ranks_start_again_from_the_newest_checkpoint() {
    let mut run = Run::begin(2, None);
    run.event(Event::Committed { step: 5 });
    run.event(Event::Step { rank: 1, step: 6 });
    assert_eq!(run.killed(1), ["rank 1 failed"]);
    assert!(run.after(0.019).is_empty(), "others may fail in the same moment");
    let ended = run.after(0.001);
    assert_eq!(ended.len(), 1);
    assert!(ended[0].starts_with("abort: rank 1 failed at step 7"), "{ended:?}");
    assert_eq!(run.killed(0), ["first cause: rank 1", "find"]);
    assert_eq!(
        run.event(Event::Found { step: Some(5), is_committed: true }),
        ["spawn 2 from Some(5)"]
    );
}

#[test]
fn a_killed_rank_that_does_not_go_is_told_of_again_and_again() {
    let mut run = Run::begin(2, None);
    run.killed(1);
    run.after(0.02);
    assert_eq!(run.after(5.0), ["kill"]);
    assert!(run.after(9.9).is_empty());
    assert_eq!(run.after(0.1), ["linger [0] 10s"]);
    assert_eq!(run.after(10.0), ["linger [0] 20s"]);
    assert_eq!(run.killed(0), ["first cause: rank 1", "find"]);
    assert!(run.after(60.0).is_empty());
}

/// A run of two ranks that have done two steps, and then stand still until they are asked.
fn stalled() -> Run {
    let mut run = Run::begin(2, None);
    for rank in 0..2 {
        run.event(Event::Phase { rank, phase: Phase::Train });
    }
    for step in 1..=2 {
        run.event(Event::Step { rank: 0, step });
    }
    assert!(run.after(29.9).is_empty());
    let told = run.after(0.1);
    let stall = "stalled: no rank has moved for 30 s, since step 2 (in train)";
    assert_eq!(told, [stall, "where"]);
    run
}

fn here(rank: usize, step: u64, waits: &[&str]) -> Event {
    let waits = waits.iter().map(|wait| (*wait).to_owned()).collect();
    Event::Here { rank, position: Position { phase: Phase::Train, step: Some(step), waits } }
}

#[test]
fn a_rank_that_never_joined_is_named_and_ended() {
    let mut run = stalled();
    assert!(run.event(here(1, 2, &["operation 7 of group data"])).is_empty());
    let ended = run.event(here(0, 2, &[]));
    assert_eq!(ended[0], "rank 0 failed");
    assert!(
        ended[1].starts_with("abort: rank 0 failed at step 3 (hang): rank 0 hangs"),
        "{ended:?}"
    );
    run.killed(0);
    assert_eq!(run.killed(1), ["first cause: rank 0", "find"]);
}

#[test]
fn a_hang_speaks_against_the_node_of_a_rank_that_is_singled_out() {
    let waits = ["operation 7 of group data"];
    for (of_first, expected) in [(&[][..], true), (&waits[..], false)] {
        let mut run = stalled();
        run.event(here(1, 2, &waits));
        let actions = run.state.handle(here(0, 2, of_first), run.now);
        let Some(Action::RecordFailure(cause)) = actions.first() else { panic!("{actions:?}") };
        assert_eq!((cause.rank, cause.is_of_its_node()), (0, expected));
    }
}

#[test]
fn a_rank_that_does_not_answer_is_named_and_ended() {
    let mut run = stalled();
    assert!(run.event(here(0, 2, &["operation 7 of group data"])).is_empty());
    assert!(run.after(4.9).is_empty());
    let ended = run.after(0.1);
    assert!(ended[1].contains("rank 1 hangs: its process does not answer"), "{ended:?}");
}

#[test]
fn a_run_that_goes_on_was_no_hang() {
    let mut run = stalled();
    run.event(Event::Step { rank: 0, step: 3 });
    assert!(run.after(60.0).is_empty(), "the longest step was one of 30 s");
    assert!(run.event(here(0, 3, &[])).is_empty());
    assert!(run.event(Event::Stop { by: "SIGINT".into() }).contains(&"ask to stop".into()));
}

/// Ranks that wait for a peer tell of it before they are late themselves.
#[test]
fn limits_outlast_the_wait_of_ranks_for_one_another() {
    let limits = |seconds| {
        let policy = Policy::new(2, 3).outlasting(Duration::from_secs(seconds));
        (policy.stop.as_secs(), policy.exit.as_secs())
    };
    assert_eq!(limits(1), (2400, 60));
    assert_eq!(limits(60), (2400, 65));
    assert_eq!(limits(3600), (3660, 3605));
}

#[test]
fn a_rank_that_will_not_end_is_killed() {
    let mut run = Run::begin(2, None);
    run.killed(1);
    run.after(1.0);
    assert!(run.after(4.9).is_empty());
    assert_eq!(run.after(0.1), ["kill"]);
    assert_eq!(run.killed(0), ["first cause: rank 1", "find"]);
}

#[test]
fn a_lost_link_is_never_the_first_cause_of_a_crash() {
    let mut run = Run::begin(3, None);
    let lost = report(FailureClass::Transient, "peer closed the connection");
    run.event(Event::Reported { rank: 0, report: lost });
    assert_eq!(run.exit(0, 1), ["rank 0 failed"]);
    assert_eq!(run.exit(2, 1), ["rank 2 failed"]);
    assert_eq!(run.killed(1), ["rank 1 failed", "first cause: rank 2", "find"]);
}

#[test]
fn the_cause_of_lost_links_is_waited_for() {
    let mut run = Run::begin(3, None);
    let lost = report(FailureClass::Transient, "peer closed the connection");
    run.event(Event::Reported { rank: 0, report: lost });
    assert_eq!(run.exit(0, 1), ["rank 0 failed"]);
    assert!(run.after(0.9).is_empty(), "a lost link has a cause");
    assert_eq!(run.killed(1), ["rank 1 failed"]);
    let ended = run.after(0.02);
    assert!(ended[0].starts_with("abort: rank 1 failed"), "{ended:?}");
}

/// A rank that reports this class, or exits with this code, ends the run with `expected`.
fn check_verdict(class: Option<FailureClass>, code: i32, expected: i32) {
    let mut run = Run::begin(1, None);
    if let Some(class) = class {
        run.event(Event::Reported { rank: 0, report: report(class, "what happened") });
    }
    let actions = run.exit(0, code);
    assert_eq!(actions.last(), Some(&format!("finish {expected}")), "{actions:?}");
}

#[test]
fn what_trying_again_does_not_mend_is_not_tried_again() {
    check_verdict(None, exit_code::CONFIG, exit_code::CONFIG);
    check_verdict(Some(FailureClass::Config), 1, exit_code::CONFIG);
    check_verdict(None, exit_code::NODE_UNHEALTHY, exit_code::NODE_UNHEALTHY);
    check_verdict(Some(FailureClass::Numeric), 1, exit_code::FAILED);
}

/// One generation of two ranks: both find the same trouble at a step.
fn roll_back_at(run: &mut Run, step: u64) -> Vec<String> {
    let samples = SampleRange { first: 8 * step, last: 8 * step + 7 };
    let roll_back = Some(RollBack { step, samples });
    for rank in 0..2 {
        let report = FailureReport { roll_back, ..report(FailureClass::Numeric, "loss jumped") };
        run.event(Event::Reported { rank, report });
    }
    assert_eq!(run.exit(0, 1), ["rank 0 failed"]);
    run.exit(1, 1)
}

#[test]
fn numeric_trouble_goes_back_without_the_samples_and_not_for_ever() {
    let mut run = Run::begin(2, None);
    run.event(Event::Committed { step: 5 });
    let told = roll_back_at(&mut run, 7);
    assert_eq!(told[1..], ["first cause: rank 0", "back behind step 7, without 56 to 63", "find"]);
    assert_eq!(
        run.event(Event::Found { step: Some(5), is_committed: true }),
        ["spawn 2 from Some(5)"]
    );
    // The step before a checkpoint was reached is in trouble again and again, with other samples.
    for generation in 3..=4 {
        assert_eq!(roll_back_at(&mut run, 7)[3], "find");
        let started = run.event(Event::Found { step: Some(5), is_committed: true });
        assert_eq!(started, [format!("spawn {generation} from Some(5)")]);
    }
    let told = roll_back_at(&mut run, 7);
    assert_eq!(told[2..], ["back behind step 7, without 56 to 63", "finish 1"]);
}

#[test]
fn a_run_that_is_to_stop_goes_back_and_stops() {
    let mut run = Run::begin(2, None);
    run.event(Event::Committed { step: 5 });
    run.event(Event::Stop { by: "SIGTERM".into() });
    let told = roll_back_at(&mut run, 7);
    assert_eq!(told[2..], ["back behind step 7, without 56 to 63", "finish 75"]);
}

#[test]
fn an_exit_with_0_before_the_end_is_a_failure() {
    let mut run = Run::begin(1, None);
    assert_eq!(run.exit(0, 0), ["rank 0 failed", "first cause: rank 0", "find"]);
    // And 75 is one where nobody asked to stop.
    run.event(Event::Found { step: None, is_committed: true });
    assert_eq!(run.exit(0, 75), ["rank 0 failed", "first cause: rank 0", "find"]);
}

#[test]
fn a_stop_saves_and_exits_with_75() {
    let mut run = Run::begin(2, None);
    assert_eq!(run.event(Event::Stop { by: "SIGINT".into() }), ["stop by SIGINT", "ask to stop"]);
    run.event(Event::Committed { step: 4 });
    assert!(run.exit(0, 75).is_empty());
    assert_eq!(run.exit(1, 75), ["finish 75"]);
}

#[test]
fn ranks_that_an_earlier_coordinator_told_to_stop_have_stopped() {
    let mut run = Run { state: State::new(Policy::new(2, 3), 4), now: Instant::now() };
    assert!(run.event(Event::Adopted { committed: Some(6), num_ranks: 2 }).is_empty());
    run.event(Event::Committed { step: 9 });
    assert!(run.exit(0, 75).is_empty());
    assert_eq!(run.exit(1, 75), ["finish 75"]);
}

#[test]
fn a_commit_that_nobody_told_of_counts() {
    let mut run = Run::begin(2, None);
    for step in [20, 40, 60, 80] {
        assert_eq!(run.crash_at(step + 1), ["first cause: rank 1", "find"]);
        let expected = format!("spawn {} from Some({step})", step / 20 + 1);
        assert_eq!(run.event(Event::Found { step: Some(step), is_committed: true }), [expected]);
    }
    run.killed(0);
    run.killed(1);
    let stopped = run.event(Event::Stop { by: "SIGTERM".into() });
    assert_eq!(stopped, ["stop by SIGTERM", "finish 75"]);
}

#[test]
fn time_in_which_the_launcher_was_stopped_is_no_hang() {
    let mut run = Run::begin(2, None);
    run.event(Event::Phase { rank: 0, phase: Phase::Train });
    for step in 1..4 {
        run.event(Event::Step { rank: 0, step });
        run.event(Event::Step { rank: 1, step });
        run.after(1.0);
    }
    run.now += Duration::from_secs(100);
    let time = Duration::from_secs(99);
    assert!(run.event(Event::WasAway { time }).is_empty());
    assert!(run.after(0.0).is_empty());
    assert!(!run.after(31.0).is_empty(), "from here on it is one");
}

#[test]
fn a_signal_to_one_rank_stops_all() {
    let mut run = Run::begin(2, None);
    let asked = Event::RankAskedToStop { rank: 1, signal: "SIGTERM".into() };
    assert_eq!(run.event(asked.clone()), ["stop by SIGTERM to rank 1", "ask to stop"]);
    // The launcher's own SIGTERM to ranks that must end is no wish to stop.
    let mut run = Run::begin(2, None);
    run.killed(0);
    run.after(1.0);
    assert!(run.event(asked).is_empty());
    assert_eq!(run.killed(1), ["first cause: rank 0", "find"]);
}

#[test]
fn a_second_stop_kills() {
    let mut run = Run::begin(2, None);
    run.event(Event::Stop { by: "SIGINT".into() });
    let now = run.event(Event::StopNow { by: "SIGINT".into() });
    assert_eq!(now, ["stop at once by SIGINT", "kill"]);
    run.killed(0);
    assert_eq!(run.killed(1), ["finish 130"]);
}

#[test]
fn a_stop_between_two_generations_ends_with_what_is_saved() {
    for (committed, expected) in [(Some(5), "finish 75"), (None, "finish 1")] {
        let mut run = Run::begin(1, committed);
        run.killed(0);
        let actions = run.event(Event::Stop { by: "SIGTERM".into() });
        assert_eq!(actions, ["stop by SIGTERM", expected]);
    }
}

#[test]
fn a_stop_that_takes_too_long_is_a_hang() {
    let mut run = Run::begin(2, None);
    run.event(Event::Stop { by: "SIGINT".into() });
    assert!(run.after(2000.0).is_empty());
    // It moves, and so does not hang: it does not stop.
    run.event(Event::Step { rank: 0, step: 8 });
    assert!(run.after(399.0).is_empty());
    assert_eq!(run.after(1.0), ["abort: rank 0 did not stop in time"]);
    run.killed(0);
    assert_eq!(run.killed(1), ["first cause: rank 0", "finish 1"]);
}

#[test]
fn a_rank_that_does_not_exit_after_the_last_step_is_a_hang() {
    let mut run = Run::begin(2, None);
    run.event(Event::Finished { rank: 0 });
    run.exit(0, 0);
    assert!(run.after(59.0).is_empty());
    assert_eq!(run.after(1.0), ["abort: rank 1 did not exit after the last step"]);
}

#[test]
fn a_run_whose_checkpoints_are_all_lost_does_not_start_from_zero() {
    let mut run = Run::begin(1, Some(5));
    run.killed(0);
    assert_eq!(run.event(Event::Found { step: None, is_committed: true }), ["finish 1"]);
}

#[test]
fn ranks_that_could_not_start_end_the_run() {
    let mut run = Run::begin(2, None);
    let broken = Event::Broken { code: exit_code::CONFIG, reason: "no trainer".into() };
    assert_eq!(run.event(broken), ["kill"]);
    run.event(exited(0, Exit::default()));
    assert_eq!(run.event(exited(1, Exit::default())), ["finish 64"]);
}

#[test]
fn failures_alike_but_for_numbers_are_the_same() {
    let cause = |rank, line: &str, step| {
        let report = FailureReport { step, ..report(FailureClass::Process, line) };
        let exit = Exit { code: Some(1), signal: None };
        Cause::new(rank, exit, Some(report), Phase::Train, None, Vec::new()).signature()
    };
    let one = cause(0, "CUDA error at 0x7f12 on port 4242", Some(7));
    assert_eq!(one, cause(1, "CUDA error at 0x9913 on port 1", Some(7)));
    assert_ne!(one, cause(0, "CUDA error at 0x7f12 on port 4242", Some(8)));
    assert_ne!(one, cause(0, "NCCL error at 0x7f12 on port 4242", Some(7)));
}

fn any_event() -> impl Strategy<Value = Event> {
    let rank = 0_usize..4;
    let code = prop::sample::select(vec![0, 1, 64, 75, 76, 101]);
    prop_oneof![
        4 => (rank.clone(), 1_u64..50).prop_map(|(rank, step)| Event::Step { rank, step }),
        2 => (1_u64..50).prop_map(|step| Event::Committed { step }),
        3 => (rank.clone(), code).prop_map(|(rank, code)| {
            exited(rank, Exit { code: Some(code), signal: None })
        }),
        3 => rank.clone().prop_map(|rank| exited(rank, Exit { code: None, signal: Some(9) })),
        2 => rank.clone().prop_map(|rank| Event::Finished { rank }),
        1 => rank.prop_map(|rank| {
            Event::RankAskedToStop { rank, signal: "SIGTERM".into() }
        }),
        1 => Just(Event::Stop { by: "SIGINT".into() }),
        1 => (0_usize..4).prop_map(|rank| here(rank, 3, &[])),
        1 => Just(Event::StopNow { by: "SIGINT".into() }),
        4 => Just(Event::Tick),
    ]
}

proptest! {
    /// Whatever happens, in whatever order: generations only grow, one set of ranks lives at a
    /// time, nothing follows the end, and once every rank has exited the run goes on or is over.
    #[test]
    fn no_order_of_events_breaks_the_rules(
        events in prop::collection::vec((any_event(), 0_u64..3000), 0..120),
    ) {
        let world_size = 3;
        let mut state = State::new(Policy::new(world_size, 3), 10);
        let mut now = Instant::now();
        let mut alive = vec![false; world_size];
        let (mut generation, mut committed, mut is_over) = (10, None, false);
        let mut queue: Vec<Event> = vec![Event::Begin { committed: None }];
        for (event, millis) in events {
            queue.push(event);
            now += Duration::from_millis(millis);
            while let Some(event) = queue.pop() {
                if let Event::Exited { rank, .. } = &event {
                    match alive.get_mut(*rank) {
                        Some(is_alive) if *is_alive => *is_alive = false,
                        _ => continue,
                    }
                }
                if let Event::Committed { step } = &event {
                    committed = committed.max(Some(*step));
                }
                for action in state.handle(event, now) {
                    prop_assert!(!is_over, "{action:?} after the end");
                    match action {
                        Action::FindCheckpoint => {
                            let is_committed = true;
                            queue.push(Event::Found { step: committed, is_committed });
                        }
                        Action::Spawn { generation: next, resume_step, kept } => {
                            prop_assert!(kept.is_empty());
                            prop_assert!(alive.iter().all(|is_alive| !is_alive));
                            prop_assert_eq!(next, generation + 1);
                            prop_assert_eq!(resume_step, committed);
                            generation = next;
                            alive = vec![true; world_size];
                        }
                        Action::Finish { .. } => {
                            prop_assert!(alive.iter().all(|is_alive| !is_alive));
                            is_over = true;
                        }
                        _ => {}
                    }
                }
            }
            let is_anyone_alive = alive.iter().any(|is_alive| *is_alive);
            prop_assert!(is_anyone_alive || is_over, "nobody works, and nothing ends");
        }
    }
}
