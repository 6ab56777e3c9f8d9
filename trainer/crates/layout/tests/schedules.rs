//! All schedules, for all stages from 1 to 16 and micro-batches from 1 to 64: complete, matched,
//! free of deadlock, and as the papers' formulas say.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use layout::schedule::{
    Action, Costs, Message, MessageKind, Schedule, Timeline, simulate, simulate_actions,
};
use run_config::PipelineSchedule::{self, Gpipe, Interleaved, OneForwardOneBackward, ZeroBubble};
use std::collections::HashMap;

const MAX_STAGES: usize = 16;
const MAX_MICRO_BATCHES: usize = 64;
const MAX_VIRTUAL_STAGES: usize = 4;
/// Ratios of forward, input and weight gradients for which all closed forms hold.
const COSTS: [Costs; 3] = [costs(1, 1, 1), costs(3, 4, 2), costs(2, 5, 0)];
/// Weight gradients that take longer than one of the others, and than both.
const SLOW_WEIGHTS: [Costs; 2] = [costs(1, 2, 2), costs(3, 2, 7)];

const fn costs(forward: u64, backward_input: u64, backward_weight: u64) -> Costs {
    Costs { forward, backward_input, backward_weight }
}

fn schedule(kind: PipelineSchedule, sizes: [usize; 3]) -> Schedule {
    Schedule::new(kind, sizes[0], sizes[1], sizes[2]).unwrap()
}

/// Every schedule of one kind, with as many micro-batches in a row as there are stages.
fn all(kind: PipelineSchedule) -> impl Iterator<Item = Schedule> {
    let several = matches!(kind, Interleaved | ZeroBubble);
    let most = if several { MAX_VIRTUAL_STAGES } else { 1 };
    let sizes = (1..=MAX_STAGES).flat_map(|p| (1..=MAX_MICRO_BATCHES).map(move |m| (p, m)));
    sizes.flat_map(move |(p, m)| (1..=most).map(move |v| schedule(kind, [p, m, v])))
}

fn lists(schedule: &Schedule) -> Vec<Vec<Action>> {
    (0..schedule.stages()).map(|stage| schedule.actions(stage)).collect()
}

/// Every pass of each chunk once per micro-batch, in rising order, and each after what it needs on
/// its own stage.
fn check_complete(schedule: &Schedule, lists: &[Vec<Action>]) -> Result<(), String> {
    if lists.len() != schedule.stages() {
        return Err(format!("{} lists", lists.len()));
    }
    let is_split = schedule.kind() == ZeroBubble;
    for (stage, actions) in lists.iter().enumerate() {
        // The next micro-batch of each chunk: forward, backward, weight gradient.
        let mut next = vec![[0; 3]; schedule.virtual_stages()];
        for action in actions {
            let pass = match action {
                Action::Forward { .. } => 0,
                Action::Backward { .. } if !is_split => 1,
                Action::BackwardInput { .. } if is_split => 1,
                Action::BackwardWeight { .. } if is_split => 2,
                _ => return Err(format!("stage {stage}: {action:?} in this schedule")),
            };
            let counts = &mut next[action.chunk()];
            let is_next = action.micro_batch() == counts[pass];
            if !is_next || (pass > 0 && counts[pass - 1] <= counts[pass]) {
                return Err(format!("stage {stage}: {action:?} out of order"));
            }
            counts[pass] += 1;
        }
        let m = schedule.micro_batches();
        let expected = [m, m, if is_split { m } else { 0 }];
        if next.iter().any(|counts| *counts != expected) {
            return Err(format!("stage {stage}: {next:?} in place of {expected:?}"));
        }
    }
    Ok(())
}

/// Every message is sent and received once, and those of a kind between two stages come in the
/// order in which they are expected.
fn check_matched(schedule: &Schedule, lists: &[Vec<Action>]) -> Result<usize, String> {
    type Lane = (usize, usize, MessageKind);
    let mut lanes: HashMap<Lane, [Vec<Message>; 2]> = HashMap::new();
    for (stage, action) in
        lists.iter().enumerate().flat_map(|(stage, list)| list.iter().map(move |a| (stage, *a)))
    {
        let messages = schedule.messages(stage, action);
        for (side, message) in [messages.send, messages.receive].into_iter().enumerate() {
            let Some(message) = message else { continue };
            let own = [message.from, message.to][side];
            if own != stage || message.is_local() != (schedule.stages() == 1) {
                return Err(format!("stage {stage}: {message:?}"));
            }
            let lane = lanes.entry((message.from, message.to, message.kind)).or_default();
            lane[side].push(message);
        }
    }
    for [sent, received] in lanes.values() {
        if sent != received {
            return Err(format!("sent {sent:?}, received {received:?}"));
        }
    }
    Ok(lanes.values().map(|[sent, _]| sent.len()).sum())
}

/// No deadlock, and the bubble and the peaks that the crate's own closed forms say, which follow the
/// generator's warm-up: [`the_papers_formulas`] has the papers'.
fn check_timeline(
    schedule: &Schedule,
    lists: &[Vec<Action>],
    costs: Costs,
) -> Result<Timeline, String> {
    let timeline = simulate_actions(schedule, lists, costs).map_err(|stuck| stuck.to_string())?;
    for stage in 0..schedule.stages() {
        let (found, expected) =
            (timeline.peak_activations(stage), schedule.peak_activations(stage));
        if found != expected {
            return Err(format!("stage {stage}: a peak of {found}, by formula {expected}"));
        }
        let (found, expected) = (timeline.idle_time(stage), schedule.bubble_time(costs));
        if expected.is_some_and(|expected| expected != found) {
            return Err(format!("stage {stage}: {found} idle, by formula {expected:?}"));
        }
    }
    Ok(timeline)
}

fn check(schedule: &Schedule, lists: &[Vec<Action>]) -> Result<(), String> {
    check_complete(schedule, lists)?;
    let (m, chunks) = (schedule.micro_batches(), schedule.num_chunks());
    let num_messages = check_matched(schedule, lists)?;
    if num_messages != 2 * m * (chunks - 1) {
        return Err(format!("{num_messages} messages"));
    }
    for costs in costs_of(schedule) {
        check_timeline(schedule, lists, costs)?;
    }
    Ok(())
}

/// Where weight gradients have a time of their own, also slow ones.
fn costs_of(schedule: &Schedule) -> impl Iterator<Item = Costs> + use<> {
    let is_split = schedule.kind() == ZeroBubble;
    COSTS.into_iter().chain(SLOW_WEIGHTS.into_iter().filter(move |_| is_split))
}

fn check_all(kind: PipelineSchedule) {
    let mut num = 0;
    for schedule in all(kind) {
        let result = check(&schedule, &lists(&schedule));
        assert_eq!(result, Ok(()), "{schedule:?}");
        // The one case without a closed form.
        let is_short = schedule.micro_batches() < schedule.stages();
        let is_few = kind == ZeroBubble && schedule.virtual_stages() > 1 && is_short;
        for costs in costs_of(&schedule) {
            let is_open = is_few && costs.backward_weight > costs.backward_input;
            assert_eq!(schedule.bubble_time(costs).is_none(), is_open, "{schedule:?}");
        }
        num += 1;
    }
    assert!(num >= MAX_STAGES * MAX_MICRO_BATCHES);
}

#[test]
fn gpipe() {
    check_all(Gpipe);
}

#[test]
fn one_forward_one_backward() {
    check_all(OneForwardOneBackward);
}

#[test]
fn interleaved() {
    check_all(Interleaved);
}

#[test]
fn zero_bubble() {
    check_all(ZeroBubble);
}

/// Whatever number of micro-batches runs in a row, also fewer than there are stages.
#[test]
fn any_number_in_a_row() {
    for kind in [Interleaved, ZeroBubble] {
        for (stages, virtual_stages) in (1..=MAX_STAGES).flat_map(|p| [(p, 1), (p, 2), (p, 3)]) {
            for micro_batches in [1, 2, 3, 5, 8, 13, 16, 17, 31, 33, 64] {
                let plain = schedule(kind, [stages, micro_batches, virtual_stages]);
                for num in [1, 2, 3, 4, 5, 7, 11, 15, 16, 21, 64] {
                    let schedule = plain.in_a_row(num);
                    let lists = lists(&schedule);
                    let result = check_complete(&schedule, &lists)
                        .and_then(|()| check_matched(&schedule, &lists))
                        .and_then(|_| check_timeline(&schedule, &lists, Costs::UNIT));
                    assert!(result.is_ok(), "{schedule:?}: {result:?}");
                }
            }
        }
    }
}

/// The closed forms, put in by hand from the papers, also where the micro-batches are fewer than
/// the stages or do not divide by them.
#[test]
fn the_papers_formulas() {
    let costs = costs(3, 4, 2);
    for schedule in
        [Gpipe, OneForwardOneBackward, Interleaved, ZeroBubble].into_iter().flat_map(all)
    {
        let (p, m) = (schedule.stages(), schedule.micro_batches());
        let v = schedule.virtual_stages();
        // The micro-batches in a row: as many as stages, where these divide all, else a few more.
        let row = m.div_ceil((m / p).max(1));
        // In one row that is shorter than the pipeline each further turn waits for what is not there.
        let waits = (v - 1) * p.saturating_sub(m);
        let timeline = simulate(&schedule, costs).unwrap();
        let (bubble, peak): (Option<usize>, Box<dyn Fn(usize) -> usize>) = match schedule.kind() {
            Gpipe => (Some((p - 1) * 9), Box::new(|_| m)),
            OneForwardOneBackward => (Some((p - 1) * 9), Box::new(|s| (p - s).min(m))),
            Interleaved if v == 1 => (Some((p - 1) * 9), Box::new(|s| (p - s).min(m))),
            Interleaved => (
                Some((p - 1 + waits) * 9),
                Box::new(|s| ((v - 1) * row + 2 * (p - 1 - s) + 1).min(m * v)),
            ),
            // The paper has no bubble of fewer micro-batches than stages.
            ZeroBubble => (
                (m >= p).then_some((p - 1) * (3 + 4 - 2)),
                Box::new(|_| ((v - 1) * row + p).min(m * v)),
            ),
        };
        for stage in 0..p {
            let idle = timeline.idle_time(stage);
            assert!(bubble.is_none_or(|bubble| idle == bubble as u64), "{schedule:?}: {idle}");
            assert_eq!(timeline.peak_activations(stage), peak(stage), "{schedule:?}, {stage}");
        }
        if let Some(bubble) = bubble {
            let ideal = (m * v * 9) as f64;
            let fraction = bubble as f64 / (ideal + bubble as f64);
            assert!((timeline.bubble_fraction() - fraction).abs() < 1e-12, "{schedule:?}");
        }
    }
}

/// Validation: the forwards alone, in the same order on every stage, cannot deadlock either.
#[test]
fn forwards_alone_run_through() {
    let kinds = [Gpipe, OneForwardOneBackward, Interleaved, ZeroBubble];
    for schedule in kinds.into_iter().flat_map(all) {
        let forwards: Vec<Action> = schedule.forwards().collect();
        assert_eq!(forwards.len(), schedule.micro_batches() * schedule.virtual_stages());
        let lists = vec![forwards; schedule.stages()];
        assert!(simulate_actions(&schedule, &lists, Costs::UNIT).is_ok(), "{schedule:?}");
    }
}

/// The checks above find planted errors.
#[test]
fn planted_errors_are_found() {
    let found = |schedule: Schedule, plant: &dyn Fn(&mut Vec<Vec<Action>>), expected: &str| {
        let mut lists = lists(&schedule);
        assert_eq!(check(&schedule, &lists), Ok(()));
        plant(&mut lists);
        let error = check(&schedule, &lists).unwrap_err();
        assert!(error.contains(expected), "{error}");
    };
    let one = schedule(OneForwardOneBackward, [4, 8, 1]);
    let interleaved = schedule(Interleaved, [4, 8, 2]);
    let zero = schedule(ZeroBubble, [4, 8, 1]);
    // A warm-up that is one too short, or one too long.
    found(one, &|lists| lists[0].swap(3, 4), "idle, by formula");
    found(one, &|lists| lists[0].swap(4, 5), "a peak of 5, by formula 4");
    // Chunks in the wrong order, one micro-batch twice, another never.
    found(interleaved, &|lists| lists[1].swap(3, 4), "received [");
    found(interleaved, &|lists| lists[1].swap(0, 1), "out of order");
    found(one, &|lists| lists[2][0] = lists[2][1], "out of order");
    found(one, &|lists| lists[2].truncate(15), "in place of");
    // A weight gradient before its input gradient, and one that is put off too long.
    found(zero, &|lists| lists[0].swap(4, 5), "out of order");
    found(zero, &|lists| lists[0].swap(5, 6), "a peak of 5");
    // A stage that follows another schedule.
    found(one, &|lists| lists[3] = schedule(Gpipe, [4, 8, 1]).actions(3), "waits for ever");
}
