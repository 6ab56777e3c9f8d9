//! What the papers say a schedule costs, in closed form. The tests hold the simulation to it.

use super::{Costs, Schedule};
use run_config::PipelineSchedule;

impl Schedule {
    /// Time in which each stage has nothing to do between the first action of a step and its last,
    /// messages taking none; `costs` are those of one chunk. With P stages, M micro-batches and V
    /// chunks per stage, and F, B and W the costs of the forward pass and of the gradients of
    /// input and weights:
    ///
    /// - gpipe (Huang et al. 2019, arXiv 1811.06965, section 2.3) and 1f1b (Narayanan et al. 2021,
    ///   arXiv 2104.04473, section 2.2.1): (P - 1)(F + B + W);
    /// - interleaved-1f1b (the same, section 2.2.2): (P - 1)(F + B + W), where each of F, B and W
    ///   is a V-th of the stage's. It needs rows of P micro-batches or more. One row of fewer
    ///   makes each of the V - 1 further turns wait for P - M micro-batches that are not there;
    /// - zero-bubble (Qi et al. 2023, arXiv 2401.10241, table 2, ZB-H1): (P - 1)(F + B - W), where
    ///   a weight gradient takes no longer than either of the other two. The rest is ours, and the
    ///   tests hold it to the clock: a longer one fills no more than the shorter of the other two,
    ///   (P - 1)(F + B - min(F, B, W)); and of M < P micro-batches there are M - 1 in place of
    ///   P - 1 to fill the end with, while each further turn of V waits for P - M that are not
    ///   there, in the backward direction behind M weight gradients that wait: (F + B)(P - 1 +
    ///   (V - 1)(P - M)) - (M - 1) min(F, B, W) - (V - 1) min(M W, (P - M) B).
    ///
    /// `None` where there is no such formula, and [`simulate`](super::simulate()) has the answer:
    /// several chunks per stage in rows of fewer than P micro-batches, of a step that has more; and
    /// zero-bubble with several chunks, M < P and W > B, where weight gradients hold others up.
    pub fn bubble_time(&self, costs: Costs) -> Option<u64> {
        let Costs { forward, backward_input, backward_weight } = costs;
        let missing = self.stages.saturating_sub(self.micro_batches);
        let (shortest, _) = self.row_lengths();
        if self.virtual_stages > 1 && shortest < self.stages.min(self.micro_batches) {
            return None;
        }
        let slots = (self.stages - 1 + (self.virtual_stages - 1) * missing) as u64;
        if self.kind != PipelineSchedule::ZeroBubble {
            return Some(slots * (forward + backward_input + backward_weight));
        }
        if self.virtual_stages > 1 && missing > 0 && backward_weight > backward_input {
            return None;
        }
        let at_the_end = (self.stages.min(self.micro_batches) - 1) as u64;
        let waiting = self.micro_batches.min(self.stages) as u64 * backward_weight;
        let in_a_turn = waiting.min(missing as u64 * backward_input);
        let filled = at_the_end * backward_weight.min(forward).min(backward_input)
            + (self.virtual_stages - 1) as u64 * in_a_turn;
        Some(slots * (forward + backward_input) - filled)
    }

    /// Share of a step's time, from 0 to below 1, that [`Schedule::bubble_time`] is.
    pub fn bubble_fraction(&self, costs: Costs) -> Option<f64> {
        let bubble = self.bubble_time(costs)? as f64;
        let pass = costs.forward + costs.backward_input + costs.backward_weight;
        let all = bubble + self.passes() as f64 * pass as f64;
        Some(if all == 0.0 { 0.0 } else { bubble / all })
    }

    /// Most activations that `stage` holds at once, each of one micro-batch in one chunk: from the
    /// forward pass to the last part of the backward pass that needs them.
    ///
    /// With the letters of [`Schedule::bubble_time`], s the stage, and never more than the M V
    /// that there are: gpipe M; 1f1b P - s; interleaved-1f1b with M a multiple of P
    /// (V - 1) P + 2 (P - 1 - s) + 1; zero-bubble P on every stage, which is what the first stage
    /// of 1f1b holds.
    pub fn peak_activations(&self, stage: usize) -> usize {
        // At its peak a stage has done its warm-up and one forward more, and still keeps what
        // waits for its weight gradient.
        (self.warm_up(stage) + 1 + self.lag(stage)).min(self.passes())
    }
}

#[cfg(test)]
mod tests {
    use super::super::simulate;
    use super::*;
    use PipelineSchedule::{Gpipe, Interleaved, OneForwardOneBackward, ZeroBubble};

    fn check(kind: PipelineSchedule, sizes: [usize; 3], bubble: Option<u64>, peaks: &[usize]) {
        let schedule = Schedule::new(kind, sizes[0], sizes[1], sizes[2]).unwrap();
        let costs = Costs { forward: 3, backward_input: 4, backward_weight: 2 };
        assert_eq!(schedule.bubble_time(costs), bubble, "{schedule:?}");
        let simulated = simulate(&schedule, costs).unwrap().bubble_fraction();
        assert_eq!(schedule.bubble_fraction(costs), Some(simulated), "{schedule:?}");
        let found: Vec<usize> = (0..sizes[0]).map(|s| schedule.peak_activations(s)).collect();
        assert_eq!(found, peaks, "{schedule:?}");
    }

    /// The papers' own numbers, put in by hand.
    #[test]
    fn published_formulas() {
        check(Gpipe, [4, 8, 1], Some(27), &[8, 8, 8, 8]);
        check(OneForwardOneBackward, [4, 8, 1], Some(27), &[4, 3, 2, 1]);
        check(OneForwardOneBackward, [4, 2, 1], Some(27), &[2, 2, 2, 1]);
        check(Interleaved, [4, 8, 2], Some(27), &[11, 9, 7, 5]);
        check(Interleaved, [4, 4, 3], Some(27), &[12, 12, 11, 9]);
        check(Interleaved, [4, 3, 2], Some(36), &[6, 6, 6, 4]);
        check(ZeroBubble, [4, 8, 1], Some(15), &[4, 4, 4, 4]);
        check(ZeroBubble, [4, 2, 1], Some(19), &[2, 2, 2, 2]);
        // Not a paper's: 4 slots of 3 + 4, less 2 of 2 at the end, and the 4 of one slot between.
        check(ZeroBubble, [4, 3, 2], Some(20), &[6, 6, 6, 6]);
        check(OneForwardOneBackward, [1, 8, 1], Some(0), &[1]);
        check(ZeroBubble, [1, 8, 1], Some(0), &[1]);
    }

    #[test]
    fn no_formula_outside_its_conditions() {
        let schedule = |kind, chunks| Schedule::new(kind, 4, 8, chunks).unwrap();
        let slow_weights = Costs { forward: 1, backward_input: 2, backward_weight: 2 };
        assert_eq!(schedule(ZeroBubble, 1).bubble_time(slow_weights), Some(6));
        assert_eq!(schedule(ZeroBubble, 2).bubble_time(slow_weights), Some(6));
        assert_eq!(schedule(ZeroBubble, 2).in_a_row(2).bubble_time(slow_weights), None);
        assert_eq!(schedule(Interleaved, 2).in_a_row(2).bubble_time(slow_weights), None);
        assert_eq!(schedule(Interleaved, 1).in_a_row(2).bubble_time(slow_weights), Some(15));
        assert_eq!(schedule(Interleaved, 2).in_a_row(8).bubble_time(slow_weights), Some(15));
        let few = Schedule::new(ZeroBubble, 4, 3, 2).unwrap();
        assert_eq!(few.bubble_time(Costs::UNIT), Some(5));
        let slower = Costs { backward_weight: 3, ..slow_weights };
        assert_eq!(few.bubble_time(slower), None);
        let one_chunk = Schedule::new(ZeroBubble, 4, 3, 1).unwrap();
        assert_eq!(one_chunk.bubble_time(slower), Some(7));
        let few = Schedule::new(Interleaved, 4, 3, 2).unwrap();
        assert_eq!(few.in_a_row(2).bubble_time(slow_weights), Some(20));
        assert_eq!(few.in_a_row(1).bubble_time(slow_weights), None);
    }
}
