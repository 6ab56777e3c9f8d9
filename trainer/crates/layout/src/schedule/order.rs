//! The order of a stage's actions. One generator makes all schedules: some forwards to warm up,
//! then pairs of one forward and one backward, then the backwards that are left.
//!
//! - gpipe: the warm-up is everything (Huang et al. 2019, arXiv 1811.06965).
//! - 1f1b: one forward per stage behind this one, so that the first backward finds the pipeline
//!   full (PipeDream-Flush: Narayanan et al. 2021, arXiv 2006.09503).
//! - interleaved-1f1b: the chunks of a stage take turns, and the warm-up is longer by what the
//!   chunks before the last need (Narayanan et al. 2021, arXiv 2104.04473, section 2.2), with a
//!   number of micro-batches in a row that can be chosen (Llama team 2024, arXiv 2407.21783,
//!   section 3.3.2).
//! - zero-bubble: 1f1b with the weight gradients of stage s left for s backwards, which is ZB-H1
//!   (Qi et al. 2023, arXiv 2401.10241, section 2.1). With several chunks per stage, the same
//!   over the turns of interleaved-1f1b.

use super::{Action, Schedule};
use run_config::PipelineSchedule;
use std::ops::Range;

/// A pass through one chunk: (chunk, micro-batch).
type Pass = (usize, usize);

impl Schedule {
    /// What `stage` does in a step, in order; nothing where there is no such stage. The
    /// micro-batches of one chunk follow one another in rising order in each direction, so the
    /// sums of gradients do not depend on the schedule.
    pub fn actions(&self, stage: usize) -> Vec<Action> {
        if stage >= self.stages {
            return Vec::new();
        }
        let backwards: Vec<Pass> = self.turns(true).collect();
        let lag = self.lag(stage);
        let mut actions = Vec::with_capacity(self.num_actions());
        let mut forwards = self.forwards();
        actions.extend(forwards.by_ref().take(self.warm_up(stage)));
        for (index, (chunk, micro_batch)) in backwards.iter().copied().enumerate() {
            actions.extend(forwards.next());
            if !self.splits_backward() {
                actions.push(Action::Backward { chunk, micro_batch });
                continue;
            }
            actions.push(Action::BackwardInput { chunk, micro_batch });
            actions.extend(index.checked_sub(lag).map(|index| weight(backwards[index])));
        }
        if self.splits_backward() {
            let left = backwards.len().saturating_sub(lag);
            actions.extend(backwards[left..].iter().map(|pass| weight(*pass)));
        }
        actions
    }

    /// The forwards of every stage without the backwards: what validation does.
    pub fn forwards(&self) -> impl Iterator<Item = Action> + use<> {
        self.turns(false).map(|(chunk, micro_batch)| Action::Forward { chunk, micro_batch })
    }

    /// Forwards of `stage` before its first pair.
    pub(super) fn warm_up(&self, stage: usize) -> usize {
        let (all, last) = (self.passes(), self.stages - 1);
        let behind = last.saturating_sub(stage);
        if self.kind == PipelineSchedule::Gpipe {
            return all;
        }
        if self.virtual_stages == 1 {
            return behind.min(all);
        }
        // A stage that is one earlier starts two forwards more, as Megatron's does: one fills the
        // pipeline, and the other hides the time of messages, of which the closed forms know
        // nothing. Where weight gradients wait, they hide it.
        let per_stage = if self.splits_backward() { 1 } else { 2 };
        let (smallest, largest) = self.row_lengths();
        // With short rows the first stage must not run ahead of the last without end: it would
        // wait for a forward that the last does only after a backward that waits for the first.
        let reach = if self.num_rows() == 1 { usize::MAX } else { 2 * smallest };
        let slope = (per_stage * behind).max((per_stage * last).saturating_sub(reach));
        ((self.virtual_stages - 1) * largest + slope).min(all)
    }

    /// Backwards of `stage` for which a weight gradient waits.
    pub(super) fn lag(&self, stage: usize) -> usize {
        if self.splits_backward() { stage.min(self.passes()) } else { 0 }
    }

    /// Fewest and most micro-batches that go through a chunk before the stage turns to its next.
    pub fn row_lengths(&self) -> (usize, usize) {
        let rows = self.num_rows();
        (self.micro_batches / rows, self.micro_batches.div_ceil(rows))
    }

    /// Rows of micro-batches that a step is cut in.
    fn num_rows(&self) -> usize {
        (self.micro_batches / self.in_a_row).max(1)
    }

    /// The passes of a stage in one direction: row by row of micro-batches, in a row chunk by
    /// chunk, backwards from the last chunk.
    fn turns(&self, backward: bool) -> impl Iterator<Item = Pass> + use<> {
        let (rows, chunks) = (self.num_rows(), self.virtual_stages);
        let micro_batches = self.micro_batches;
        // The rows are as even as can be: none shorter than was asked for, so that each is as long
        // as the pipeline and no round has a bubble, whatever the number of micro-batches.
        let start = move |row: usize| row * (micro_batches / rows) + row.min(micro_batches % rows);
        let turn = move |row: usize, turn: usize| {
            let chunk = if backward { chunks - 1 - turn } else { turn };
            let members: Range<usize> = start(row)..start(row + 1);
            members.map(move |micro_batch| (chunk, micro_batch))
        };
        (0..rows).flat_map(move |row| (0..chunks).flat_map(move |index| turn(row, index)))
    }
}

fn weight((chunk, micro_batch): Pass) -> Action {
    Action::BackwardWeight { chunk, micro_batch }
}

#[cfg(test)]
mod tests {
    use super::*;
    use PipelineSchedule::{Gpipe, Interleaved, OneForwardOneBackward, ZeroBubble};

    /// A stage's list as `F0a B0b …`: the micro-batch, and the chunk where there are several.
    fn check(schedule: Schedule, stage: usize, expected: &str) {
        let name = |action: &Action| {
            let letter = match action {
                Action::Forward { .. } => 'F',
                Action::Backward { .. } | Action::BackwardInput { .. } => 'B',
                Action::BackwardWeight { .. } => 'W',
            };
            let chunk =
                if schedule.virtual_stages() > 1 { ["a", "b", "c"][action.chunk()] } else { "" };
            format!("{letter}{}{chunk}", action.micro_batch())
        };
        let actions = schedule.actions(stage);
        let found: Vec<String> = actions.iter().map(name).collect();
        assert_eq!(found.join(" "), expected, "{schedule:?}, stage {stage}");
        assert_eq!(actions.len(), schedule.num_actions());
    }

    fn schedule(kind: PipelineSchedule, sizes: [usize; 3]) -> Schedule {
        Schedule::new(kind, sizes[0], sizes[1], sizes[2]).unwrap()
    }

    #[test]
    fn gpipe_runs_all_forwards_first() {
        let gpipe = schedule(Gpipe, [2, 3, 1]);
        check(gpipe, 0, "F0 F1 F2 B0 B1 B2");
        check(gpipe, 1, "F0 F1 F2 B0 B1 B2");
        assert_eq!(gpipe.actions(2), []);
    }

    /// Figure 4 of arXiv 2104.04473, upper half: 4 stages, 8 micro-batches.
    #[test]
    fn one_forward_one_backward() {
        let paper = schedule(OneForwardOneBackward, [4, 8, 1]);
        check(paper, 0, "F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7");
        check(paper, 2, "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7");
        check(paper, 3, "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7");
        check(schedule(OneForwardOneBackward, [4, 2, 1]), 0, "F0 F1 B0 B1");
    }

    /// All but gpipe do the same on one stage with one chunk.
    #[test]
    fn one_stage() {
        check(schedule(Gpipe, [1, 2, 1]), 0, "F0 F1 B0 B1");
        check(schedule(OneForwardOneBackward, [1, 2, 1]), 0, "F0 B0 F1 B1");
        check(schedule(Interleaved, [1, 2, 1]), 0, "F0 B0 F1 B1");
        check(schedule(ZeroBubble, [1, 2, 1]), 0, "F0 B0 W0 F1 B1 W1");
    }

    /// Figure 4 of arXiv 2104.04473, lower half: its last stage, and its first.
    #[test]
    fn interleaved() {
        let paper = schedule(Interleaved, [4, 8, 2]);
        check(
            paper,
            3,
            "F0a F1a F2a F3a F0b B0b F1b B1b F2b B2b F3b B3b F4a B0a F5a B1a F6a B2a F7a B3a \
             F4b B4b F5b B5b F6b B6b F7b B7b B4a B5a B6a B7a",
        );
        check(
            paper,
            0,
            "F0a F1a F2a F3a F0b F1b F2b F3b F4a F5a F6a B0b F7a B1b F4b B2b F5b B3b F6b B0a \
             F7b B1a B2a B3a B4b B5b B6b B7b B4a B5a B6a B7a",
        );
        check(schedule(Interleaved, [1, 2, 2]), 0, "F0a F0b B0b F1a B0a F1b B1b B1a");
        check(schedule(Interleaved, [2, 1, 2]), 1, "F0a F0b B0b B0a");
        check(schedule(Interleaved, [1, 2, 2]).in_a_row(2), 0, "F0a F1a F0b B0b F1b B1b B0a B1a");
    }

    /// Micro-batches that are no multiple of the stages make longer rows, not shorter ones.
    #[test]
    fn rows_are_even_and_never_shorter_than_asked_for() {
        let lengths = |micro_batches, in_a_row| {
            schedule(Interleaved, [4, micro_batches, 2]).in_a_row(in_a_row).row_lengths()
        };
        assert_eq!(lengths(8, 4), (4, 4));
        assert_eq!(lengths(9, 4), (4, 5));
        assert_eq!(lengths(7, 4), (7, 7));
        assert_eq!(lengths(3, 4), (3, 3));
        assert_eq!(lengths(7, 2), (2, 3));
        assert_eq!(lengths(7, 0), (1, 1));
        let passes: Vec<Pass> = schedule(Interleaved, [2, 5, 2]).turns(true).collect();
        let row = |from: usize, to: usize| {
            [1, 0].into_iter().flat_map(move |chunk| (from..to).map(move |m| (chunk, m)))
        };
        assert_eq!(passes, row(0, 3).chain(row(3, 5)).collect::<Vec<_>>());
    }

    /// As in the upper half of figure 2 of arXiv 2401.10241, with fewer micro-batches.
    #[test]
    fn zero_bubble() {
        let paper = schedule(ZeroBubble, [4, 4, 1]);
        check(paper, 0, "F0 F1 F2 F3 B0 W0 B1 W1 B2 W2 B3 W3");
        check(paper, 1, "F0 F1 F2 B0 F3 B1 W0 B2 W1 B3 W2 W3");
        check(paper, 3, "F0 B0 F1 B1 F2 B2 F3 B3 W0 W1 W2 W3");
        check(schedule(ZeroBubble, [3, 1, 1]), 2, "F0 B0 W0");
        check(
            schedule(ZeroBubble, [2, 2, 2]),
            1,
            "F0a F1a F0b B0b F1b B1b W0b B0a W1b B1a W0a W1a",
        );
    }
}
