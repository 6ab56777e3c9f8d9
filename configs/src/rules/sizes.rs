//! Sizes that make no sense, refused before anyone computes with them: what a config that passes
//! these rules makes of tokens, bytes and FLOP fits in 64 bits, and its schedules in memory.
//! `trainer/crates/layout/tests/limits.rs` runs the plans at the largest values.

use super::Rules;
use crate::resolved::*;

/// Total tokens of a run, with room left in 64 bits.
const MAX_TOTAL_TOKENS: u128 = 1 << 60;

/// Tokens of one micro-batch: those of the longest sequence there may be.
const MAX_MICRO_BATCH_TOKENS: usize = 1 << 24;

/// Actions of a rank in a step, of which whole lists are made.
const MAX_ACTIONS: u128 = 1 << 20;

/// Passes through blocks of a rank in a step, which are counted one by one where state is cut.
const MAX_BLOCK_PASSES: u128 = 1 << 24;

/// Bytes that [`step_bytes`] may come to: a quarter of what 64 bits hold, for it counts what goes
/// through layers and weights and leaves out what is small beside it. At the limits of the keys
/// that is under 2^54: padding of weights (32 elements x 4096 ranks a unit), logits of 1024 tokens,
/// and small all-reduces, in which a rank sends up to 16 KiB to each other (4095 ranks x 13 calls x
/// 2^23 blocks).
const MAX_STEP_BYTES: u128 = 1 << 62;

impl Rules<'_, '_> {
    /// Micro-batches of each rank in a step; `None` while the number of ranks is not known.
    pub fn micro_batches(&self, stage: &BatchStage) -> Option<usize> {
        let data_ranks = self.config.parallelism.data_ranks(self.config.num_ranks()?).max(1);
        Some((stage.global_batch / (data_ranks * self.config.training.micro_batch)).max(1))
    }

    pub(super) fn sizes(&mut self) {
        self.total_tokens();
        let has_tokens = self.micro_batch_tokens();
        let has_actions = self.actions();
        if has_tokens && has_actions {
            self.bytes();
        }
    }

    fn total_tokens(&mut self) {
        let t = &self.config.training;
        let largest = t.batch_stages.iter().map(|s| s.sequence_length * s.global_batch).max();
        let most = u128::from(t.steps) * largest.unwrap_or(0) as u128;
        if most > MAX_TOTAL_TOKENS {
            let message = format!("{} steps may see {most} tokens", t.steps);
            let keys = ["training.steps", "training.global_batch"];
            self.conflict(&keys, message, &format!("{MAX_TOTAL_TOKENS} tokens"), "");
        }
    }

    /// Whether the tokens of a micro-batch are within their limit.
    fn micro_batch_tokens(&mut self) -> bool {
        let t = &self.config.training;
        let longest = t.batch_stages.iter().map(|s| s.sequence_length).max().unwrap_or(1);
        let tokens = t.micro_batch * longest;
        if tokens > MAX_MICRO_BATCH_TOKENS {
            let message = format!(
                "{} sequences x {longest} tokens = {tokens} tokens in a micro-batch",
                t.micro_batch
            );
            let keys = ["training.micro_batch", "data.sequence_length", "training.global_batch"];
            let hint = match MAX_MICRO_BATCH_TOKENS / longest {
                0 => String::new(),
                most => format!("training.micro_batch={most} would do"),
            };
            self.conflict(&keys, message, &format!("{MAX_MICRO_BATCH_TOKENS} tokens"), &hint);
        }
        tokens <= MAX_MICRO_BATCH_TOKENS
    }

    /// Whether the actions of a step, and the passes through blocks that they are made of, are
    /// within their limits.
    fn actions(&mut self) -> bool {
        let Some(micro_batches) = self.most_micro_batches() else { return true };
        let pipeline = &self.config.parallelism.pipeline;
        let passes = match pipeline.schedule {
            PipelineSchedule::ZeroBubble => 3,
            _ => 2,
        };
        let blocks = self.config.model.layers.div_ceil(pipeline.stages);
        let limits = [
            (pipeline.virtual_stages, "virtual stages", "actions", MAX_ACTIONS),
            (blocks, "blocks", "passes through blocks", MAX_BLOCK_PASSES),
        ];
        for (parts, of, what, most) in limits {
            let of_micro_batch = parts as u128 * passes;
            let all = micro_batches as u128 * of_micro_batch;
            if all <= most {
                continue;
            }
            let message = format!(
                "{micro_batches} micro-batches x {parts} {of} x {passes} passes = {all} {what} of \
                 a rank in a step"
            );
            let keys = [
                "training.global_batch",
                "training.micro_batch",
                "parallelism.pipeline.virtual_stages",
                "model.layers",
            ];
            let hint = format!(
                "{} micro-batches or fewer would do: a smaller global_batch, a larger micro_batch, \
                 or more data-parallel ranks",
                most / of_micro_batch
            );
            self.conflict(&keys, message, &format!("{most} {what}"), &hint);
            return false;
        }
        true
    }

    fn bytes(&mut self) {
        let (t, m) = (&self.config.training, &self.config.model);
        let bytes = |stage: &BatchStage| {
            let micro_batches = self.micro_batches(stage).unwrap_or(1);
            step_bytes(self.config, micro_batches, (t.micro_batch, stage.sequence_length))
        };
        let Some(stage) = t.batch_stages.iter().max_by_key(|stage| bytes(stage)) else { return };
        let bytes = bytes(stage);
        if bytes > MAX_STEP_BYTES {
            let message = format!(
                "a rank may hold or send {bytes} bytes in a step of {} micro-batches of {} x {} \
                 tokens: {} layers and {} parameters",
                self.micro_batches(stage).unwrap_or(1),
                t.micro_batch,
                stage.sequence_length,
                m.layers,
                num_parameters(m)
            );
            let batch = ["training.global_batch", "training.micro_batch", "data.sequence_length"];
            let model = [
                "model.dim",
                "model.layers",
                "model.heads",
                "model.kv_heads",
                "model.head_dim",
                "model.ffn_dim",
                "model.vocab_size",
            ];
            let is_model = step_bytes(self.config, 1, (1, 1)) > MAX_STEP_BYTES;
            let keys = match is_model {
                true => [&model[..], &batch[..]].concat(),
                false => [&batch[..], &model[..]].concat(),
            };
            let hint = match is_model {
                true => "a smaller model",
                false => "fewer tokens of a rank in a step, or a smaller model",
            };
            self.conflict(&keys, message, &format!("{MAX_STEP_BYTES} bytes"), hint);
        }
    }

    /// Micro-batches of each rank in the step that has the most.
    pub(super) fn most_micro_batches(&self) -> Option<usize> {
        let stages = self.config.training.batch_stages.iter();
        stages.filter_map(|stage| self.micro_batches(stage)).max()
    }
}

/// Above all that a rank holds or sends in a step: elements of 8 bytes, as many as could be without
/// any parallel form and with all of them.
///
/// - Of each token and layer: what a block keeps for the backward pass (4 dim, 3 ffn_dim, 5 heads x
///   head_dim and statistics, of up to twice the layers where chunks are uneven), the 13 tensors of
///   the stream and the 3 of keys and values that tensor and context parallelism send, up to twice
///   each, two messages to other stages, and what embedding and head add (9 dim).
/// - Of each token and the sequence: the masks of context parallelism.
/// - Of each parameter and micro-batch: 6 for gathering its weights and reducing its gradients; of
///   each step 5 for weights, master weights, gradients and the optimizer's state.
fn step_bytes(
    config: &RunConfig,
    micro_batches: usize,
    (sequences, length): (usize, usize),
) -> u128 {
    let m = &config.model;
    let tokens = sequences as u128 * length as u128;
    let queries = m.heads as u128 * m.head_dim as u128;
    let of_token = 64 * m.dim as u128 + 6 * m.ffn_dim as u128 + 16 * queries;
    let of_layers = tokens * m.layers as u128 * of_token;
    let masks = if config.parallelism.context > 1 { tokens * length as u128 } else { 0 };
    8 * micro_batches as u128 * (of_layers + masks + 8 * num_parameters(m))
}

/// Number of parameters, with the widths of norms.
fn num_parameters(m: &ModelConfig) -> u128 {
    let [dim, layers, ffn, vocab] =
        [m.dim, m.layers, m.ffn_dim, m.vocab_size].map(|size| size as u128);
    let heads = 2 * (m.heads as u128 + m.kv_heads as u128) * m.head_dim as u128;
    let tables = if m.tied_embeddings { 1 } else { 2 };
    layers * dim * (heads + 3 * ffn + 2) + tables * vocab * dim + dim
}
