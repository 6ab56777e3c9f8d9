//! Communication of the forward and backward passes: tensor, context and pipeline parallelism.

use super::{Counter, Group, Operation};
use crate::mesh::Axis;
use run_config::Recompute;

/// Tokens whose logits are held at a time in the loss.
pub const LOSS_CHUNK_TOKENS: usize = 1024;

/// The forms of the stream: what a rank holds of it, and how ranks come to the whole and the sum.
impl Counter<'_> {
    pub(super) fn model(&mut self) {
        let micro_batches = self.schedule.micro_batches() as u64;
        let blocks: usize = self.held.chunks.iter().map(|chunk| chunk.blocks.len()).sum();
        let blocks = blocks as u64 * micro_batches;
        if self.held.chunks.iter().any(|chunk| chunk.embedding) {
            self.sum(micro_batches, "sum the rows that the ranks looked up in the embedding");
            self.whole(micro_batches, "gather the gradient of the embedding's rows");
        }
        self.attention(blocks);
        self.feed_forward(blocks);
        if self.held.chunks.iter().any(|chunk| chunk.head) {
            self.loss(micro_batches);
        }
    }

    fn attention(&mut self, blocks: u64) {
        let recompute = self.config.parallelism.recompute;
        self.whole(blocks, "gather the sequence before QKV");
        self.keys_and_values(blocks, "gather keys and values of the whole sequence");
        self.sum(blocks, "sum the output of attention");
        if recompute != Recompute::None {
            self.whole(blocks, "recompute: gather the sequence before QKV");
            self.keys_and_values(blocks, "recompute: gather keys and values");
        }
        // What is computed again ends before its last sum, which no gradient needs.
        if recompute == Recompute::Full {
            self.sum(blocks, "recompute: sum the output of attention");
        }
        self.whole(blocks, "gather the gradient of attention's output");
        self.key_and_value_gradients(blocks);
        self.whole(blocks, "gather the sequence for the gradient of QKV's weight");
        self.sum(blocks, "sum the gradient of QKV's input");
    }

    fn feed_forward(&mut self, blocks: u64) {
        self.whole(blocks, "gather the sequence before gate and up");
        self.sum(blocks, "sum the output of the feed-forward");
        if self.config.parallelism.recompute == Recompute::Full {
            self.whole(blocks, "recompute: gather the sequence before gate and up");
        }
        self.whole(blocks, "gather the gradient of the feed-forward's output");
        self.whole(blocks, "gather the sequence for the gradient of gate and up");
        self.sum(blocks, "sum the gradient of gate and up's input");
    }

    /// Three numbers a token in place of its logits, a chunk of tokens at a time.
    fn loss(&mut self, micro_batches: u64) {
        self.whole(micro_batches, "gather the sequence before the head");
        let tokens = self.rank_tokens();
        let wide = self.state();
        let chunk = LOSS_CHUNK_TOKENS as u64;
        let chunks = [(chunk, tokens / chunk), (tokens % chunk, 1)];
        for (size, times) in chunks {
            let times = micro_batches * times;
            let reduce = (Operation::AllReduce, Group::Tensor);
            self.add(reduce, (size, wide), times, "largest logit of each token");
            self.add(reduce, (2 * size, wide), times, "sum and target's logit of each token");
        }
        self.sum(micro_batches, "sum the gradient of the head's input");
    }

    /// With sequence parallelism, the whole sequence from the ranks' parts; every rank has it else.
    fn whole(&mut self, times: u64, why: &'static str) {
        if self.held.tensor.sequence {
            let stream = (self.stream_elements(), self.compute());
            self.add((Operation::AllGather, Group::Tensor), stream, times, why);
        }
    }

    /// The sum of the ranks' summands: its parts with sequence parallelism, all of it without.
    fn sum(&mut self, times: u64, why: &'static str) {
        let stream = (self.stream_elements(), self.compute());
        let operation = match self.held.tensor.sequence {
            true => Operation::ReduceScatter,
            false => Operation::AllReduce,
        };
        self.add((operation, Group::Tensor), stream, times, why);
    }

    fn keys_and_values(&mut self, times: u64, why: &'static str) {
        let both = (self.kv_elements(), self.compute());
        self.add((Operation::AllGather, Group::Context), both, times, why);
    }

    fn key_and_value_gradients(&mut self, times: u64) {
        let both = (self.kv_elements(), self.compute());
        let scatter = (Operation::ReduceScatter, Group::Context);
        self.add(scatter, both, times, "sum the gradients of keys and values");
    }

    /// Activations go on to the next stage, their gradients back.
    pub(super) fn pipeline(&mut self) {
        let stage = self.mesh.coordinate(self.rank, Axis::Pipeline);
        if self.schedule.stages() < 2 {
            return;
        }
        let micro_batches = self.schedule.micro_batches() as u64;
        // Each chunk but the model's last hands its activations on, each but the first their
        // gradients, and with two stages or more always to another stage.
        let chunks = (0..self.schedule.virtual_stages())
            .map(|chunk| self.schedule.global_chunk(stage, chunk));
        let last = self.schedule.num_chunks() - 1;
        let (mut activations, mut gradients) = (0, 0);
        for chunk in chunks {
            activations += if chunk < last { micro_batches } else { 0 };
            gradients += if chunk > 0 { micro_batches } else { 0 };
        }
        let parts = if self.held.tensor.sequence { self.held.tensor.ranks } else { 1 };
        let boundary = (self.stream_elements() / parts as u64, self.compute());
        let send = (Operation::Send, Group::Pipeline);
        self.add(send, boundary, activations, "activations to the next stage");
        self.add(send, boundary, gradients, "gradients to the stage before");
    }

    /// Tokens of a micro-batch that this rank's context part holds.
    fn rank_tokens(&self) -> u64 {
        let length = self.step.sequence_length / self.mesh.degree(Axis::Context);
        (self.config.training.micro_batch * length) as u64
    }

    fn stream_elements(&self) -> u64 {
        self.rank_tokens() * self.config.model.dim as u64
    }

    /// Keys and values of a micro-batch's whole sequences, of this rank's heads.
    fn kv_elements(&self) -> u64 {
        let model = &self.config.model;
        let heads = (model.kv_heads / self.held.tensor.ranks).max(1);
        let tokens = self.config.training.micro_batch * self.step.sequence_length;
        2 * (tokens * heads * model.head_dim) as u64
    }
}
