//! Runs the stages' lists of actions against a clock: a stage does its actions in their order, each
//! as soon as what it receives is there. Messages take no time.

use super::{Action, Message, MessageKind, Schedule};
use serde::Serialize;
use thiserror::Error;

/// How long the actions of one chunk take, in any unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Costs {
    /// The forward pass.
    pub forward: u64,
    /// The gradient of the input.
    pub backward_input: u64,
    /// The gradients of the weights.
    pub backward_weight: u64,
}

impl Costs {
    /// One unit each: a backward pass has twice the matrix products of a forward pass.
    pub const UNIT: Self = Self { forward: 1, backward_input: 1, backward_weight: 1 };

    /// How long `action` takes.
    pub fn of(&self, action: Action) -> u64 {
        match action {
            Action::Forward { .. } => self.forward,
            Action::Backward { .. } => self.backward_input.saturating_add(self.backward_weight),
            Action::BackwardInput { .. } => self.backward_input,
            Action::BackwardWeight { .. } => self.backward_weight,
        }
    }
}

/// When an action runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Span {
    /// The action.
    pub action: Action,
    /// When it begins.
    pub start: u64,
    /// When it has ended.
    pub end: u64,
}

/// A step as the clock saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timeline {
    /// What was run.
    pub schedule: Schedule,
    /// The spans of each stage, in order.
    pub stages: Vec<Vec<Span>>,
    /// When the last action has ended; the first begins at 0.
    pub makespan: u64,
}

impl Timeline {
    /// Time in which `stage` does nothing.
    pub fn idle_time(&self, stage: usize) -> u64 {
        let spans = self.stages.get(stage).into_iter().flatten();
        self.makespan - spans.map(|span| span.end - span.start).sum::<u64>()
    }

    /// Share of all stages' time, from 0 to below 1, in which they do nothing. Narayanan et al.
    /// divide by the time of the work in place of the whole, x / (1 - x).
    pub fn bubble_fraction(&self) -> f64 {
        let idle: u64 = (0..self.stages.len()).map(|stage| self.idle_time(stage)).sum();
        let all = self.makespan.saturating_mul(self.stages.len() as u64);
        if all == 0 { 0.0 } else { idle as f64 / all as f64 }
    }

    /// Most activations that `stage` holds at once, each of one micro-batch in one chunk.
    pub fn peak_activations(&self, stage: usize) -> usize {
        let (mut held, mut peak) = (0usize, 0);
        for span in self.stages.get(stage).into_iter().flatten() {
            match span.action {
                Action::Forward { .. } => held += 1,
                action if action.frees_activations() => held = held.saturating_sub(1),
                _ => {}
            }
            peak = peak.max(held);
        }
        peak
    }
}

/// A stage that never gets on.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Stuck {
    /// It waits for what nobody sends.
    #[error("stage {stage} waits for ever at {action:?}: {message:?} never comes")]
    Message {
        /// The stage.
        stage: usize,
        /// What it cannot do.
        action: Action,
        /// What it waits for.
        message: Message,
    },
    /// It comes before what it builds on, on the same stage.
    #[error("stage {stage} comes to {action:?} too early, or twice")]
    Order {
        /// The stage.
        stage: usize,
        /// What it cannot do.
        action: Action,
    },
    /// There is no such chunk or micro-batch.
    #[error("stage {stage} has no chunk or no micro-batch for {action:?}")]
    Unknown {
        /// The stage.
        stage: usize,
        /// What it cannot do.
        action: Action,
    },
}

/// Runs `schedule` against the clock.
///
/// # Errors
/// Where a stage never gets on: no schedule of [`Schedule::new`] does that.
pub fn simulate(schedule: &Schedule, costs: Costs) -> Result<Timeline, Stuck> {
    let actions: Vec<_> = (0..schedule.stages()).map(|stage| schedule.actions(stage)).collect();
    simulate_actions(schedule, &actions, costs)
}

/// Runs other lists of actions than the schedule's own, one per stage.
///
/// # Errors
/// Where a stage never gets on.
pub fn simulate_actions(
    schedule: &Schedule,
    actions: &[Vec<Action>],
    costs: Costs,
) -> Result<Timeline, Stuck> {
    let mut clock = Clock::new(schedule, costs);
    let mut stages: Vec<Vec<Span>> = actions.iter().map(|a| Vec::with_capacity(a.len())).collect();
    // A stage runs until it has to wait; what it sends wakes its neighbours. Each message wakes
    // once, so this comes to an end.
    let mut awake: Vec<usize> = (0..stages.len()).rev().collect();
    while let Some(stage) = awake.pop() {
        let Some(spans) = stages.get_mut(stage) else { continue };
        while let Some(action) = actions[stage].get(spans.len()).copied() {
            let now = spans.last().map_or(0, |span| span.end);
            let Some((span, sent_to)) = clock.run(stage, action, now)? else { break };
            spans.push(span);
            awake.extend(sent_to);
        }
    }
    for (stage, spans) in stages.iter().enumerate() {
        let waiting = actions[stage].get(spans.len()).copied();
        let message = |action| schedule.messages(stage, action).receive.map(|m| (action, m));
        if let Some((action, message)) = waiting.and_then(message) {
            return Err(Stuck::Message { stage, action, message });
        }
    }
    let makespan = stages.iter().filter_map(|spans| spans.last()).map(|span| span.end).max();
    Ok(Timeline { schedule: *schedule, stages, makespan: makespan.unwrap_or(0) })
}

/// How far a micro-batch has come in a chunk.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    Nothing,
    Forward,
    BackwardInput,
    Done,
}

/// What has happened so far, by chunk and micro-batch.
struct Clock<'a> {
    schedule: &'a Schedule,
    costs: Costs,
    progress: Vec<Progress>,
    /// When the message of each kind came.
    arrivals: Vec<[Option<u64>; 2]>,
}

impl<'a> Clock<'a> {
    fn new(schedule: &'a Schedule, costs: Costs) -> Self {
        let num = schedule.num_chunks() * schedule.micro_batches();
        let (progress, arrivals) = (vec![Progress::Nothing; num], vec![[None; 2]; num]);
        Self { schedule, costs, progress, arrivals }
    }

    /// Runs `action` and says whom it woke; `None` where it still has to wait.
    fn run(
        &mut self,
        stage: usize,
        action: Action,
        now: u64,
    ) -> Result<Option<(Span, Option<usize>)>, Stuck> {
        let messages = self.schedule.messages(stage, action);
        let arrived = match messages.receive {
            None => Some(now),
            Some(message) => self.arrival(message).copied().flatten(),
        };
        // What is too early on its own stage stays so, however long it waits.
        self.advance(stage, action, arrived.is_some())?;
        let Some(arrived) = arrived else { return Ok(None) };
        let start = now.max(arrived);
        let end = start.saturating_add(self.costs.of(action));
        if let Some(arrival) = messages.send.and_then(|message| self.arrival(message)) {
            *arrival = Some(end);
        }
        Ok(Some((Span { action, start, end }, messages.send.map(|message| message.to))))
    }

    fn arrival(&mut self, message: Message) -> Option<&mut Option<u64>> {
        let index = message.chunk * self.schedule.micro_batches() + message.micro_batch;
        let kind = usize::from(message.kind == MessageKind::Gradient);
        self.arrivals.get_mut(index).and_then(|kinds| kinds.get_mut(kind))
    }

    /// Checks that `action` builds on what its stage has done, and notes it where it `runs`.
    fn advance(&mut self, stage: usize, action: Action, runs: bool) -> Result<(), Stuck> {
        let (before, after) = match action {
            Action::Forward { .. } => (Progress::Nothing, Progress::Forward),
            Action::Backward { .. } => (Progress::Forward, Progress::Done),
            Action::BackwardInput { .. } => (Progress::Forward, Progress::BackwardInput),
            Action::BackwardWeight { .. } => (Progress::BackwardInput, Progress::Done),
        };
        let (schedule, micro_batch) = (self.schedule, action.micro_batch());
        let is_known = stage < schedule.stages()
            && action.chunk() < schedule.virtual_stages()
            && micro_batch < schedule.micro_batches();
        let chunk = schedule.global_chunk(stage, action.chunk());
        let index = chunk * schedule.micro_batches() + micro_batch;
        let progress = self.progress.get_mut(index).filter(|_| is_known);
        let progress = progress.ok_or(Stuck::Unknown { stage, action })?;
        if *progress != before {
            return Err(Stuck::Order { stage, action });
        }
        if runs {
            *progress = after;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use run_config::PipelineSchedule::{OneForwardOneBackward, ZeroBubble};

    fn forward(micro_batch: usize) -> Action {
        Action::Forward { chunk: 0, micro_batch }
    }

    fn backward(micro_batch: usize) -> Action {
        Action::Backward { chunk: 0, micro_batch }
    }

    #[test]
    fn a_step_by_hand() {
        let schedule = Schedule::new(OneForwardOneBackward, 2, 2, 1).unwrap();
        let costs = Costs { forward: 2, backward_input: 2, backward_weight: 1 };
        let timeline = simulate(&schedule, costs).unwrap();
        let span = |action, start, end| Span { action, start, end };
        let first = [
            span(forward(0), 0, 2),
            span(forward(1), 2, 4),
            span(backward(0), 7, 10),
            span(backward(1), 12, 15),
        ];
        let second = [
            span(forward(0), 2, 4),
            span(backward(0), 4, 7),
            span(forward(1), 7, 9),
            span(backward(1), 9, 12),
        ];
        assert_eq!(timeline.stages, [first, second]);
        assert_eq!((timeline.makespan, timeline.idle_time(0), timeline.idle_time(1)), (15, 5, 5));
        assert!((timeline.bubble_fraction() - 1.0 / 3.0).abs() < 1e-15);
        assert_eq!((timeline.peak_activations(0), timeline.peak_activations(1)), (2, 1));
    }

    /// Each planted error is found, and named.
    #[test]
    fn lists_that_cannot_run() {
        let schedule = Schedule::new(OneForwardOneBackward, 2, 2, 1).unwrap();
        let good = [
            vec![forward(0), forward(1), backward(0), backward(1)],
            vec![forward(0), backward(0), forward(1), backward(1)],
        ];
        assert!(simulate_actions(&schedule, &good, Costs::UNIT).is_ok());
        let check = |stage: usize, actions: &[Action], expected: &str| {
            let mut lists = good.clone();
            lists[stage] = actions.to_vec();
            let error = simulate_actions(&schedule, &lists, Costs::UNIT).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        };
        // No warm-up on the first stage: slower behind the second one's list, and a deadlock where
        // the second does all forwards first.
        let cold = good[1].clone();
        assert!(simulate_actions(&schedule, &[cold.clone(), cold.clone()], Costs::UNIT).is_ok());
        let lists = [cold, good[0].clone()];
        let error = simulate_actions(&schedule, &lists, Costs::UNIT).unwrap_err();
        assert!(matches!(error, Stuck::Message { stage: 0, action, .. } if action == backward(0)));
        check(
            1,
            &[backward(0)],
            "stage 1 comes to Backward { chunk: 0, micro_batch: 0 } too early",
        );
        check(1, &[forward(0), forward(0)], "stage 1 comes to Forward");
        check(1, &[forward(0), forward(2)], "stage 1 has no chunk or no micro-batch");
        check(1, &[Action::Forward { chunk: 1, micro_batch: 0 }], "stage 1 has no chunk");
        check(1, &[forward(0)], "stage 0 waits for ever");
    }

    #[test]
    fn a_weight_gradient_needs_its_input_gradient() {
        let schedule = Schedule::new(ZeroBubble, 1, 1, 1).unwrap();
        let mut actions = schedule.actions(0);
        actions.swap(1, 2);
        let error = simulate_actions(&schedule, &[actions], Costs::UNIT).unwrap_err();
        let action = Action::BackwardWeight { chunk: 0, micro_batch: 0 };
        assert_eq!(error, Stuck::Order { stage: 0, action });
    }
}
