//! Which tokens each optimizer step sees: a pure function of the step and of the batch stages.
//!
//! Samples are counted in tokens of one global stream. A stage with a shorter sequence cuts the stream finer, so every stage's
//! `sequence_length` divides the longest one. A stage begins at the first step boundary at or after its `from_tokens` at which
//! the tokens seen are a multiple of its `sequence_length`, so that no token is skipped or seen twice.

use crate::BatchStage;

/// What one optimizer step reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepBatch {
    /// 1-based step.
    pub step: u64,
    /// Tokens seen before this step; a multiple of `sequence_length`.
    pub first_token: u64,
    /// Tokens per sequence.
    pub sequence_length: usize,
    /// Sequences over all ranks.
    pub global_batch: usize,
}

impl StepBatch {
    /// Tokens of the step over all ranks.
    pub fn num_tokens(&self) -> u64 {
        self.sequence_length as u64 * self.global_batch as u64
    }

    /// Tokens seen after this step.
    pub fn end_token(&self) -> u64 {
        self.first_token + self.num_tokens()
    }
}

/// The batch of a 1-based `step`. `stages` are ordered by `from_tokens` and the first is from 0.
/// O(number of stages).
pub fn step_batch(stages: &[BatchStage], step: u64) -> StepBatch {
    let mut first_step = 1;
    let mut first_token = 0;
    for (index, stage) in stages.iter().enumerate() {
        let per_step = stage.sequence_length as u64 * stage.global_batch as u64;
        let num_steps = match stages.get(index + 1) {
            Some(next) => steps_until(first_token, per_step, next),
            None => u64::MAX,
        };
        if step - first_step < num_steps || num_steps == u64::MAX {
            return StepBatch {
                step,
                first_token: first_token + (step - first_step) * per_step,
                sequence_length: stage.sequence_length,
                global_batch: stage.global_batch,
            };
        }
        first_step += num_steps;
        first_token += num_steps * per_step;
    }
    StepBatch { step, first_token, sequence_length: 0, global_batch: 0 }
}

/// Steps of `per_step` tokens until `next` may begin; `u64::MAX` where its alignment never comes.
fn steps_until(first_token: u64, per_step: u64, next: &BatchStage) -> u64 {
    let least = next.from_tokens.saturating_sub(first_token).div_ceil(per_step);
    let length = next.sequence_length as u64;
    (least..least + length)
        .find(|steps| (first_token + steps * per_step).is_multiple_of(length))
        .unwrap_or(u64::MAX)
}
