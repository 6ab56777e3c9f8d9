//! Which tokens each optimizer step sees: a pure function of the step and of the batch stages.
//!
//! Samples are counted in tokens of one global stream. A stage with a shorter sequence cuts the
//! stream finer, so every stage's `sequence_length` divides the longest one. A stage begins at the
//! first step boundary at or after its `from_tokens` at which the tokens seen are a multiple of its
//! `sequence_length`, so that no token is skipped or seen twice.

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
        if step.saturating_sub(first_step) < num_steps || num_steps == u64::MAX {
            return StepBatch {
                step,
                first_token: first_token + step.saturating_sub(first_step) * per_step,
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
    // first_token + k * per_step is a multiple of length: with g = gcd(per_step, length) there is
    // a k only where g divides first_token, and then it is unique modulo length / g.
    let (gcd, inverse) = gcd_and_inverse(per_step % length, length);
    if !first_token.is_multiple_of(gcd) {
        return u64::MAX;
    }
    let period = length / gcd;
    let target = (period - first_token / gcd % period) % period;
    let k = (u128::from(target) * u128::from(inverse) % u128::from(period)) as u64;
    least + (k + period - least % period) % period
}

/// `g = gcd(a, modulus)` and the inverse of `a / g` modulo `modulus / g`.
fn gcd_and_inverse(a: u64, modulus: u64) -> (u64, u64) {
    let (mut r, mut next_r) = (i128::from(modulus), i128::from(a));
    let (mut t, mut next_t) = (0i128, 1i128);
    while next_r != 0 {
        let quotient = r / next_r;
        (r, next_r) = (next_r, r - quotient * next_r);
        (t, next_t) = (next_t, t - quotient * next_t);
    }
    let period = i128::from(modulus) / r;
    (r as u64, t.rem_euclid(period) as u64)
}

/// The least number of steps, at least 1, after which `tokens` have been seen.
pub fn steps_for_tokens(stages: &[BatchStage], tokens: u64) -> u64 {
    let (mut first_step, mut first_token) = (1, 0u64);
    for (index, stage) in stages.iter().enumerate() {
        let per_step = stage.sequence_length as u64 * stage.global_batch as u64;
        let wanted = tokens.saturating_sub(first_token).div_ceil(per_step);
        let in_stage = stages.get(index + 1).map(|next| steps_until(first_token, per_step, next));
        match in_stage {
            Some(in_stage) if in_stage < wanted => {
                first_step += in_stage;
                first_token += in_stage * per_step;
            }
            _ => return (first_step + wanted).saturating_sub(1).max(1),
        }
    }
    1
}

/// The first step of each stage; `None` for one whose alignment never comes.
pub fn first_steps(stages: &[BatchStage]) -> Vec<Option<u64>> {
    let (mut first_step, mut first_token) = (Some(1u64), 0u64);
    let mut out = Vec::with_capacity(stages.len());
    for (index, stage) in stages.iter().enumerate() {
        out.push(first_step);
        let Some(next) = stages.get(index + 1) else { break };
        let per_step = stage.sequence_length as u64 * stage.global_batch as u64;
        let steps = steps_until(first_token, per_step, next);
        first_step = first_step.filter(|_| steps != u64::MAX).map(|first| first + steps);
        first_token += if steps == u64::MAX { 0 } else { steps * per_step };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stage(from_tokens: u64, global_batch: usize, sequence_length: usize) -> BatchStage {
        BatchStage { from_tokens, global_batch, sequence_length }
    }

    /// The definition, by search.
    fn slow_steps_until(first_token: u64, per_step: u64, next: &BatchStage) -> u64 {
        let least = next.from_tokens.saturating_sub(first_token).div_ceil(per_step);
        let length = next.sequence_length as u64;
        (least..least + length)
            .find(|steps| (first_token + steps * per_step).is_multiple_of(length))
            .unwrap_or(u64::MAX)
    }

    proptest! {
        #[test]
        fn the_closed_form_is_the_search(
            first in 0u64..5000, per in 1u64..500, from in 0u64..20_000, length in 1usize..300,
        ) {
            let next = stage(from, 1, length);
            prop_assert_eq!(
                steps_until(first, per, &next), slow_steps_until(first, per, &next)
            );
        }

        #[test]
        fn steps_follow_each_other_and_tokens_count_them(
            batches in proptest::collection::vec((1usize..9, 0u32..4, 0u64..3000), 1..5),
            tokens in 1u64..50_000,
        ) {
            let mut from = 0;
            let stages: Vec<BatchStage> = batches.iter().enumerate().map(|(i, (b, shift, gap))| {
                from += if i == 0 { 0 } else { gap + 1 };
                stage(from, *b, 8 << shift)
            }).collect();
            let steps = steps_for_tokens(&stages, tokens);
            let mut seen = 0;
            for step in 1..=steps {
                let batch = step_batch(&stages, step);
                prop_assert_eq!(batch.first_token, seen);
                prop_assert!(seen.is_multiple_of(batch.sequence_length as u64));
                prop_assert!(seen < tokens);
                seen = batch.end_token();
            }
            prop_assert!(seen >= tokens);
            for (stage, first) in stages.iter().zip(first_steps(&stages)) {
                let Some(first) = first else { break };
                prop_assert!(step_batch(&stages, first).first_token >= stage.from_tokens);
            }
        }
    }

    #[test]
    fn the_ramp_of_the_405b() {
        let stages = [
            stage(0, 1024, 4096),
            stage(252_000_000, 1024, 8192),
            stage(2_870_000_000_000, 2048, 8192),
        ];
        assert_eq!(first_steps(&stages)[1], Some(62)); // 252e6 / 4,194,304 = 60.08
        assert_eq!(step_batch(&stages, 61).num_tokens(), 4_194_304);
        assert_eq!(step_batch(&stages, 62).num_tokens(), 8_388_608);
        assert_eq!(step_batch(&stages, 10_000_000).num_tokens(), 16_777_216);
    }
}
