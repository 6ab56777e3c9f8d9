//! How a generation ends: ranks exit, or let go of it and keep their processes; what follows once
//! none is left, and what becomes of the processes that wait. Pure.

use super::{Action, Cause, RankState, Stage, State, killed};
use crate::supervisor::cause::Exit;
use rank_protocol::{FailureClass, FailureReport, exit_code};
use std::time::Instant;

/// What follows once the processes that waited for another generation are gone.
#[derive(Clone, Debug)]
pub(super) enum Then {
    /// The next generation, of new processes alone.
    Next,
    /// The end of the run: exit code and reason.
    Over(i32, String),
}

impl State {
    /// A rank's process ended.
    pub(super) fn exited(
        &mut self,
        index: usize,
        exit: Exit,
        last_lines: Vec<String>,
        now: Instant,
    ) -> Vec<Action> {
        let is_stopping = self.stop.is_some() || self.policy.has_last_step || self.has_adopted;
        let Some(rank) = self.ranks.get_mut(index) else { return Vec::new() };
        if rank.state.has_exited() {
            return Vec::new();
        }
        let had_let_go = rank.state == RankState::Released;
        rank.state = match exit.code {
            Some(exit_code::DONE) if rank.state == RankState::Finished => RankState::Done,
            Some(exit_code::PREEMPTED) if is_stopping && !had_let_go => RankState::Stopped,
            _ => RankState::Failed,
        };
        self.num_exited += 1;
        self.num_out += usize::from(!had_let_go);
        let mut actions = Vec::new();
        let was_told_to_end = matches!(self.stage, Stage::Ending { .. } | Stage::Killed { .. });
        let is_over = self.then.is_some();
        // A node's death is found long after its peers have lost their links to it.
        let is_lost = rank.report.as_ref().is_some_and(|report| report.class == FailureClass::Node);
        if rank.state == RankState::Failed && !is_over && (!was_told_to_end || is_lost) {
            let report = rank.report.clone();
            let cause = Cause::new(index, exit, report, rank.phase, rank.step, last_lines);
            actions.extend(self.has_failed(cause, now));
        }
        actions.extend(self.if_all_gone(now));
        actions
    }

    /// A rank has let go of the generation, because it was told to or by a failure that its process
    /// outlives.
    pub(super) fn released(&mut self, index: usize, now: Instant) -> Vec<Action> {
        let Some(rank) = self.ranks.get_mut(index) else { return Vec::new() };
        if rank.state.is_out() || self.stage == Stage::Between {
            return Vec::new();
        }
        rank.state = RankState::Released;
        self.num_out += 1;
        // What it failed of is no reason for its process's end, should that come.
        let report = rank.report.take();
        let mut actions = Vec::new();
        if !matches!(self.stage, Stage::Ending { .. } | Stage::Killed { .. }) {
            let report = report.unwrap_or_else(|| FailureReport {
                class: FailureClass::Process,
                phase: rank.phase,
                step: None,
                collective: None,
                lines: vec!["let go of its generation without a word".into()],
                roll_back: None,
            });
            let (phase, step) = (rank.phase, rank.step);
            let exit = Exit::default();
            let cause = Cause::new(index, exit, Some(report), phase, step, Vec::new());
            actions.extend(self.has_failed(cause, now));
        }
        actions.extend(self.if_all_gone(now));
        actions
    }

    /// Others may fail of the same cause, for which there is some time; not where this is the end
    /// of a process that belongs to no generation.
    fn has_failed(&mut self, cause: Cause, now: Instant) -> Option<Action> {
        let recorded = Action::RecordFailure(cause.clone());
        if self.stage == Stage::Between {
            return Some(recorded);
        }
        let wait = match cause.is_consequence() {
            true => self.policy.concurrent_faults,
            false => self.policy.same_moment,
        };
        self.causes.push(cause);
        self.stage = match self.stage {
            Stage::Ending { .. } | Stage::Killed { .. } => self.stage.clone(),
            Stage::Settling { until } => Stage::Settling { until: until.min(now + wait) },
            _ => Stage::Settling { until: now + wait },
        };
        Some(recorded)
    }

    /// Whether processes may go on in the next generation. Not after one with processes of an
    /// earlier one that did no step: what they carry may be why.
    fn may_keep(&self) -> bool {
        let are_trusted = !self.has_kept || self.has_stepped;
        self.policy.keep_processes && are_trusted && self.stop.is_none() && self.verdict.is_none()
    }

    /// Those that go on in the next generation, of so many ranks: places in another layout are
    /// others.
    pub(super) fn kept(&self, num_ranks: usize) -> Vec<usize> {
        let is_kept = |rank: &usize| !self.ranks[*rank].is_suspect;
        match num_ranks == self.ranks.len() {
            true => self.those(|s| s == RankState::Released).into_iter().filter(is_kept).collect(),
            false => Vec::new(),
        }
    }

    fn those(&self, are_meant: impl Fn(RankState) -> bool) -> Vec<usize> {
        (0..self.ranks.len()).filter(|rank| are_meant(self.ranks[*rank].state)).collect()
    }

    /// Those for which the end of the generation, or of all processes, waits.
    pub(super) fn awaited(&self) -> Vec<usize> {
        match self.then.is_some() || self.verdict.is_some() {
            true => self.those(|state| !state.has_exited()),
            false => self.those(|state| !state.is_out()),
        }
    }

    /// Kills those for which something waits.
    pub(super) fn kill(&mut self, reason: String, now: Instant) -> Vec<Action> {
        self.stage = killed(now);
        let ranks = self.awaited();
        for rank in &ranks {
            // It may say that it lets go before the signal reaches it.
            self.ranks[*rank].is_suspect = true;
        }
        vec![Action::Kill { reason, ranks }]
    }

    /// Ends the generation. Ranks that are well let go of it, where they may.
    pub(super) fn end(&mut self, reason: String, now: Instant) -> Vec<Action> {
        if !self.may_keep() {
            return self.end_all(reason, now);
        }
        self.stage = Stage::Ending { kill_at: now + self.policy.grace };
        let there = self.those(|state| !state.is_out());
        let (suspects, well): (Vec<usize>, Vec<usize>) =
            there.into_iter().partition(|rank| self.ranks[*rank].is_suspect);
        let mut actions = Vec::new();
        if !suspects.is_empty() {
            actions.push(Action::Abort { reason: reason.clone(), ranks: suspects });
        }
        if !well.is_empty() {
            actions.push(Action::Release { reason, ranks: well });
        }
        actions.extend(self.if_all_gone(now));
        actions
    }

    /// Ends the generation with all its processes.
    pub(super) fn end_all(&mut self, reason: String, now: Instant) -> Vec<Action> {
        self.stage = Stage::Ending { kill_at: now + self.policy.grace };
        vec![Action::Abort { reason, ranks: self.those(|state| !state.has_exited()) }]
    }

    /// Ends the processes that wait for another generation; then comes what is given.
    fn dismiss(&mut self, then: Then, reason: String, now: Instant) -> Vec<Action> {
        self.causes.clear();
        self.then = Some(then);
        self.end_all(reason, now)
    }

    pub(super) fn if_all_gone(&mut self, now: Instant) -> Vec<Action> {
        let is_over = self.then.is_some() || self.verdict.is_some();
        let num_gone = if is_over { self.num_exited } else { self.num_out };
        if self.stage == Stage::Between || num_gone < self.ranks.len() {
            return Vec::new();
        }
        let mut actions = Vec::new();
        let is_growing = std::mem::take(&mut self.is_growing);
        let first = Cause::first(&self.causes).cloned();
        if let Some(cause) = &first {
            actions.push(Action::RecordFirstCause(cause.clone()));
        }
        actions.extend(match (self.verdict.clone(), self.then.take(), first) {
            (Some((code, reason)), _, _) | (None, Some(Then::Over(code, reason)), _) => {
                self.over(code, reason, now)
            }
            (None, Some(Then::Next), _) => self.next_generation(now),
            (None, None, Some(cause)) => self.judge(&cause, now),
            // No failure: it counts for nothing.
            (None, None, None) if is_growing => {
                self.no_progress = 0;
                self.next_generation(now)
            }
            (None, None, None) => self.ended_well(now),
        });
        actions
    }

    /// Every rank exited with 0 after the last step, or with 75 after a stop.
    fn ended_well(&mut self, now: Instant) -> Vec<Action> {
        if self.ranks.iter().all(|rank| rank.state == RankState::Done) {
            return self.over(exit_code::DONE, "the last step is done and saved".into(), now);
        }
        let by = match &self.stop {
            Some((by, _)) => by.as_str(),
            None if self.policy.has_last_step => "the step it was to stop after",
            None => "what an earlier coordinator was told",
        };
        let reason = match self.committed {
            Some(step) => format!("stopped by {by}, saved at step {step}"),
            None => format!("stopped by {by} before the first step; nothing to save"),
        };
        self.over(exit_code::PREEMPTED, reason, now)
    }

    pub(super) fn next_generation(&mut self, now: Instant) -> Vec<Action> {
        if self.num_exited < self.ranks.len() && !self.may_keep() {
            let reason = "the next generation is one of new processes".to_owned();
            return self.dismiss(Then::Next, reason, now);
        }
        self.stage = Stage::Between;
        vec![Action::FindCheckpoint]
    }

    /// A stop while no rank works: the newest checkpoint is all there is to save.
    pub(super) fn over_between(&mut self, by: &str, now: Instant) -> Vec<Action> {
        let (code, reason) = match self.committed {
            Some(step) => (exit_code::PREEMPTED, format!("stopped by {by}, saved at step {step}")),
            None => (exit_code::FAILED, format!("stopped by {by}, nothing saved yet")),
        };
        self.over(code, reason, now)
    }

    /// The run is over, once no process is left.
    pub(super) fn over(&mut self, code: i32, reason: String, now: Instant) -> Vec<Action> {
        if self.num_exited < self.ranks.len() {
            return self.dismiss(Then::Over(code, reason.clone()), reason, now);
        }
        self.stage = Stage::Over;
        vec![Action::Finish { code, reason }]
    }
}
