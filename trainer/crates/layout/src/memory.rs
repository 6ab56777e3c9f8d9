//! Bytes of one rank, by kind. Weights, master weights, gradients and optimizer state are exact,
//! those of sharded weights and gradients at their most within a step; activations are those that
//! the blocks keep for the backward pass, and the attention masks of context parallelism. The copy
//! of a checkpoint is exact over all ranks together.
//!
//! Not in it: what an operation needs while it runs, tensors on their way to or from other ranks,
//! and the few that lie outside of blocks (tokens, rotary factors, the head's input).
//!
//! Sums and products of what the config says saturate: what does not fit a `u64` does not fit a
//! rank either.

use crate::communication::{Dtype, LOSS_CHUNK_TOKENS, LayoutError, Step};
use crate::held::Held;
use crate::mesh::{Axis, Mesh};
use crate::saving::copy_bytes;
use crate::schedule::{Action, Schedule};
use crate::sharded::sharded_step;
use run_config::{BatchStage, Matmul, PipelineSchedule, Recompute, RunConfig};
use serde::Serialize;

/// Bytes of the FP32 scale of a row in FP8.
const SCALE_BYTES: u64 = 4;

/// Bytes of one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Weights used in compute; with shard level `parameters` the most that are gathered at once.
    pub weights: u64,
    /// Master weights; 0 where the compute weights are the master weights.
    pub master: u64,
    /// Gradient accumulators; with a shard level those of what is owned, and the most that are
    /// whole at once.
    pub gradients: u64,
    /// AdamW's two moments.
    pub optimizer: u64,
    /// What blocks keep for the backward pass, and the masks of context parallelism.
    pub activations: u64,
    /// Estimate: logits of one chunk of a micro-batch's tokens, whose gradient takes their place.
    pub logits: u64,
    /// The copy of what is written of a checkpoint while training goes on; 0 with `cluster.device:
    /// cuda`, where it is in the machine's memory.
    pub checkpoint: u64,
}

impl Memory {
    /// Sum over the kinds.
    pub fn total(&self) -> u64 {
        let state = [self.weights, self.master, self.gradients, self.optimizer];
        sum(state).saturating_add(sum([self.activations, self.logits, self.checkpoint]))
    }
}

/// Memory of the fullest rank of `mesh`.
///
/// # Errors
/// Where the layout cannot be; a checked config's can.
pub fn memory_per_rank(config: &RunConfig, mesh: &Mesh) -> Result<Memory, LayoutError> {
    let stages = 0..mesh.degree(Axis::Pipeline);
    let of_stages = stages.map(|stage| memory_of_stage(config, mesh, stage));
    let of_stages = of_stages.collect::<Result<Vec<_>, _>>()?;
    // The first of those that are equal.
    let fullest = of_stages.into_iter().rev().max_by_key(Memory::total);
    Ok(fullest.unwrap_or_default())
}

/// Memory of the fullest rank of a pipeline stage: pieces are equal, but for the masks of context
/// parallelism, of which the first rank has least.
///
/// # Errors
/// As [`memory_per_rank`].
pub fn memory_of_stage(
    config: &RunConfig,
    mesh: &Mesh,
    stage: usize,
) -> Result<Memory, LayoutError> {
    let last_chunks = mesh.degree(Axis::Tensor) * (mesh.degree(Axis::Context) - 1);
    memory_of_rank(config, mesh, mesh.first_of_stage(stage) + last_chunks)
}

/// Memory of `rank`.
///
/// # Errors
/// As [`memory_per_rank`].
pub fn memory_of_rank(config: &RunConfig, mesh: &Mesh, rank: usize) -> Result<Memory, LayoutError> {
    let place = Place::new(config, mesh, rank)?;
    let widths = (place.compute, place.state);
    let checkpoint = copy_bytes(config, mesh, &place.held, widths);
    let mut memory = Memory { checkpoint, ..place.state(0, 0) };
    for batch in &config.training.batch_stages {
        let micro_batches = Step::of(batch).micro_batches(config, mesh);
        let schedule = Schedule::of(&config.parallelism.pipeline, micro_batches)?;
        let of_batch = place.in_step(batch, &schedule);
        memory.weights = memory.weights.max(of_batch.weights);
        memory.gradients = memory.gradients.max(of_batch.gradients);
        let passes = |memory: &Memory| sum([memory.activations, memory.logits]);
        if passes(&of_batch) > passes(&memory) {
            (memory.activations, memory.logits) = (of_batch.activations, of_batch.logits);
        }
    }
    Ok(memory)
}

/// One rank and what it holds.
struct Place<'a> {
    config: &'a RunConfig,
    mesh: &'a Mesh,
    stage: usize,
    /// Its place in its context-parallel group.
    context: usize,
    held: Held,
    /// Bytes of an element in compute.
    compute: u64,
    /// Bytes of an element of master weights, gradients and optimizer state.
    state: u64,
}

impl<'a> Place<'a> {
    fn new(config: &'a RunConfig, mesh: &'a Mesh, rank: usize) -> Result<Self, LayoutError> {
        Ok(Self {
            config,
            mesh,
            stage: mesh.coordinate(rank, Axis::Pipeline),
            context: mesh.coordinate(rank, Axis::Context),
            held: Held::new(config, mesh, rank)?,
            compute: Dtype::of_compute(config.precision.compute).width(),
            state: Dtype::of_state(config.precision.compute).width(),
        })
    }

    /// Weights, gradients and optimizer state, with so many elements of `weights` and of
    /// `gradients` whole besides what is owned, where the state is cut.
    fn state(&self, weights: u64, gradients: u64) -> Memory {
        let all = self.held.num_elements();
        let ranks = self.mesh.degree(Axis::Shard) as u64;
        let owned = product([all / ranks, self.state]);
        let is_cut = ranks > 1;
        Memory {
            weights: product([if is_cut { weights } else { all }, self.compute]),
            // What is owned of cut weights lies apart from the whole, whatever its format.
            master: if is_cut || self.compute != self.state { owned } else { 0 },
            gradients: sum([owned, if is_cut { product([gradients, self.state]) } else { 0 }]),
            optimizer: product([2, owned]),
            ..Memory::default()
        }
    }

    fn in_step(&self, batch: &BatchStage, schedule: &Schedule) -> Memory {
        let peaks = sharded_step(self.config, &self.held, self.stage, schedule);
        Memory {
            activations: self.activations(batch, schedule),
            logits: self.logits(batch),
            ..self.state(peaks.peak_weights, peaks.peak_gradients)
        }
    }

    /// Tokens of one micro-batch on one rank.
    fn tokens(&self, batch: &BatchStage) -> u64 {
        let length = batch.sequence_length.div_ceil(self.mesh.degree(Axis::Context));
        product([length as u64, self.config.training.micro_batch as u64])
    }

    /// Logits, or their gradient, of one chunk of tokens in the accumulation's format, and in the
    /// compute's where it differs.
    fn logits(&self, batch: &BatchStage) -> u64 {
        if self.held.chunks.iter().all(|chunk| !chunk.head) {
            return 0;
        }
        let width = self.state + if self.compute == self.state { 0 } else { self.compute };
        let vocab = self.config.model.vocab_size.div_ceil(self.mesh.degree(Axis::Tensor));
        product([self.tokens(batch).min(LOSS_CHUNK_TOKENS as u64), vocab as u64, width])
    }

    /// What this rank keeps for the backward passes of the micro-batches that the schedule has
    /// there at once, each in the largest chunk.
    fn activations(&self, batch: &BatchStage, schedule: &Schedule) -> u64 {
        let blocks = self.held.chunks.iter().map(|chunk| chunk.blocks.len()).max().unwrap_or(0);
        let pass = self.pass(batch, blocks as u64);
        let peak = match schedule.kind() {
            PipelineSchedule::ZeroBubble => pass.peak_deferring(schedule, self.stage),
            _ => {
                let others = schedule.peak_activations(self.stage).saturating_sub(1) as u64;
                sum([product([others, pass.alive]), pass.backward])
            }
        };
        sum([peak, pass.shared])
    }

    /// What one micro-batch takes in a chunk of so many blocks.
    fn pass(&self, batch: &BatchStage, blocks: u64) -> Pass {
        if blocks == 0 {
            return Pass::default();
        }
        let block = self.block(batch);
        let masks = self.masks(batch);
        let recompute = self.config.parallelism.recompute;
        let all = sum([block.around, block.attention]);
        // What a block keeps from its forward pass on, and what it makes again for its backward.
        let (kept, again) = match recompute {
            Recompute::None => (all, 0),
            Recompute::Selective => (block.around, block.attention),
            // Its input is a stream and what the block before it adds.
            Recompute::Full => (product([2, block.stream]), all),
        };
        // A recomputed linear of a whole model's width holds its graph, and that the block's input.
        // In FP8 the weight gradients keep what they read as rounded, without a graph.
        let holds_input = recompute == Recompute::Full
            && self.held.tensor.ranks == 1
            && self.config.precision.matmul == Matmul::Same;
        let deferred = sum([block.linears, if holds_input { kept } else { 0 }]);
        // The first block's input has no addition.
        let missing = if recompute == Recompute::Full { block.stream } else { 0 };
        let first = kept.saturating_sub(missing);
        let first_deferred = deferred.saturating_sub(if holds_input { missing } else { 0 });
        let later = blocks - 1;
        // Graphs keep the masks that they read: where attention is computed again, nothing reads
        // them but the block at work. Without documents, all micro-batches read the same.
        let is_own = recompute == Recompute::None && self.config.data.document_mask;
        let (own, shared) = if is_own { (masks, 0) } else { (0, masks) };
        let alive = sum([product([later, kept]), first, own]);
        let later_deferred = product([later, deferred]);
        Pass {
            alive,
            backward: sum([alive, again]),
            deferred: sum([later_deferred, first_deferred]),
            // At the first block, where all others have left what their weight gradients read.
            deferring: sum([later_deferred, sum([first, again]).max(first_deferred), own]),
            shared,
        }
    }

    /// What a block keeps of a micro-batch. In elements of a token: the inputs of the two norms and
    /// what they make of them (4 dim), their statistics (2 numbers of the state's format); queries,
    /// keys and values after the rotation and the attention's output (2 heads + 2 kv_heads, times
    /// head_dim), with a statistic a head; gate and up and their product (3 ffn_dim). Attention
    /// weights are not kept (flash attention).
    fn block(&self, batch: &BatchStage) -> Block {
        let (m, p) = (&self.config.model, &self.config.parallelism);
        let tensor = self.held.tensor;
        let tokens = self.tokens(batch);
        // The residual stream is cut along the sequence.
        let stream_tokens = tokens / if tensor.sequence { tensor.ranks as u64 } else { 1 };
        let of_tokens = |tokens: u64| product([tokens, m.dim as u64, self.compute]);
        let stream = of_tokens(stream_tokens);
        let statistics = product([stream_tokens, 2, self.state]);
        let inner = product([3, m.ffn_dim as u64]) / p.tensor as u64;
        let ffn = product([tokens, inner, self.compute]);
        let (heads, kv_heads) =
            ((m.heads / p.tensor) as u64, (m.kv_heads / p.tensor).max(1) as u64);
        let of_heads = |heads: u64| product([tokens, heads, m.head_dim as u64, self.compute]);
        let mixed = sum([product([2, heads]), product([2, kv_heads])]);
        // With context parallelism, keys and values are those of all ranks' tokens, and the outputs
        // of the two chunks are kept by themselves and as one.
        let attended = match p.context {
            1 => mixed,
            ranks => sum([product([3, heads]), product([2, kv_heads, ranks as u64])]),
        };
        Block {
            stream,
            around: sum([product([4, stream]), statistics, ffn]),
            attention: sum([of_heads(attended), product([tokens, heads, self.state])]),
            // Inputs and output gradients of the four linears: what norms make and get (4 dim, of
            // the whole sequence also where the stream is cut), what the rotation gets and
            // attention makes (2 heads + 2 kv_heads, times head_dim), and 3 ffn_dim.
            linears: match self.config.precision.matmul {
                Matmul::Same => sum([product([4, of_tokens(tokens)]), of_heads(mixed), ffn]),
                // A byte each, and a scale for each of a token's.
                Matmul::Fp8 => {
                    let of_token = sum([
                        product([4, m.dim as u64]),
                        product([mixed, m.head_dim as u64]),
                        inner,
                    ]);
                    product([of_token, sum([tokens, SCALE_BYTES])])
                }
            },
        }
    }

    /// The masks that one micro-batch's attention reads with context parallelism, at their most:
    /// each of the rank's two chunks but the sequence's first has one, as wide as all tokens up to
    /// its end. With the document mask each row has its own, the smaller the later the chunk's
    /// first document begins.
    fn masks(&self, batch: &BatchStage) -> u64 {
        let ranks = self.mesh.degree(Axis::Context) as u64;
        if ranks == 1 {
            return 0;
        }
        let chunk = (batch.sequence_length as u64).div_ceil(product([2, ranks]));
        let rank = self.context as u64;
        // Both ends together, in chunks: those of chunks `rank` and `2 ranks - 1 - rank`.
        let ends = if rank == 0 { product([2, ranks]) } else { sum([product([2, ranks]), 1]) };
        let has_own = self.config.data.document_mask;
        let rows = if has_own { self.config.training.micro_batch as u64 } else { 1 };
        product([rows, chunk, chunk, ends, self.compute])
    }
}

/// Bytes that a block keeps of a micro-batch.
struct Block {
    /// One tensor of the residual stream.
    stream: u64,
    /// Norms and feed-forward, and the input of attention.
    around: u64,
    /// Within attention.
    attention: u64,
    /// What the weight gradients of the linears read.
    linears: u64,
}

/// Bytes that one micro-batch takes in a chunk.
#[derive(Default)]
struct Pass {
    /// Between its forward and its backward pass.
    alive: u64,
    /// The most in its backward pass: at its start.
    backward: u64,
    /// While its weight gradients wait, after the gradient of its input.
    deferred: u64,
    /// At the end of the gradient of its input, where that leaves the weight gradients.
    deferring: u64,
    /// For all micro-batches together.
    shared: u64,
}

impl Pass {
    /// The most at once on a stage whose weight gradients wait, by its order of actions.
    fn peak_deferring(&self, schedule: &Schedule, stage: usize) -> u64 {
        let most = self.backward.max(self.deferring);
        let (mut alive, mut deferred, mut peak) = (0u64, 0u64, 0);
        for action in schedule.actions(stage) {
            let mut own = 0;
            match action {
                Action::Forward { .. } => alive += 1,
                Action::Backward { .. } | Action::BackwardInput { .. } => {
                    alive = alive.saturating_sub(1);
                    own = most;
                }
                Action::BackwardWeight { .. } => deferred = deferred.saturating_sub(1),
            }
            let others = [product([alive, self.alive]), product([deferred, self.deferred])];
            peak = peak.max(sum(others).saturating_add(own));
            deferred += u64::from(matches!(action, Action::BackwardInput { .. }));
        }
        peak
    }
}

fn sum<const N: usize>(summands: [u64; N]) -> u64 {
    summands.into_iter().fold(0, u64::saturating_add)
}

fn product<const N: usize>(factors: [u64; N]) -> u64 {
    factors.into_iter().fold(1, u64::saturating_mul)
}

#[cfg(test)]
mod tests {
    use super::*;
    use model_spec::{FlopConvention, flops_per_token, num_parameters};
    use run_config::PipelineSchedule;
    use std::path::Path;

    fn config(preset: &str, sets: &[&str]) -> RunConfig {
        let text = format!(
            "name: x\nmodel: {{preset: {preset}}}\n\
             data: {{tokenizer: t, sources: [{{name: a, path: b}}]}}\n\
             training: {{steps: 10, global_batch: 64}}\n"
        );
        let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
        RunConfig::from_yaml_str(&text, Path::new("/"), &sets).unwrap().config
    }

    fn mesh(config: &RunConfig, ranks: usize) -> Mesh {
        Mesh::new(&config.parallelism, ranks).unwrap()
    }

    fn fullest(config: &RunConfig, ranks: usize) -> Memory {
        memory_per_rank(config, &mesh(config, ranks)).unwrap()
    }

    /// Elements that the ranks of a stage hold.
    fn elements(config: &RunConfig, ranks: usize, stage: usize) -> u64 {
        let mesh = mesh(config, ranks);
        Held::new(config, &mesh, mesh.first_of_stage(stage)).unwrap().num_elements()
    }

    /// The published counts and the table of FLOP per token at sequence 8192.
    #[test]
    fn published_models() {
        let check = |preset: &str, parameters: u64, full: f64, half: f64| {
            let config = config(preset, &[]);
            assert_eq!(num_parameters(&config.model), parameters, "{preset}");
            assert_eq!(elements(&config, 1, 0), parameters, "{preset}");
            for (convention, expected) in
                [(FlopConvention::FullAttention, full), (FlopConvention::CausalHalf, half)]
            {
                let flops = flops_per_token(&config.model, 8192, convention);
                let digits = 10f64.powi(expected.log10() as i32 - 3);
                assert_eq!((flops / digits).round(), (expected / digits).round(), "{preset}");
            }
        };
        check("llama3-8b", 8_030_261_248, 5.791e10, 5.147e10);
        check("llama3-70b", 70_553_706_496, 4.814e11, 4.492e11);
        check("llama3-405b", 405_853_388_800, 2.625e12, 2.524e12);
        let tied = config("llama3.2-1b", &[]);
        assert_eq!(elements(&tied, 1, 0), 1_235_814_400);
        assert_eq!(num_parameters(&tied.model), 1_235_814_400);
    }

    #[test]
    fn bytes_by_format() {
        let n = 8_030_261_248;
        let check = |compute: &str, expected: [u64; 4]| {
            let config = config("llama3-8b", &[&format!("precision.compute={compute}")]);
            let memory = fullest(&config, 8);
            let found =
                [memory.weights, memory.master, memory.gradients, memory.optimizer].map(|b| b / n);
            assert_eq!(found, expected, "{compute}");
            assert!(memory.total() > memory.weights + memory.optimizer);
        };
        check("bf16", [2, 4, 4, 8]);
        check("fp32", [4, 0, 4, 8]);
        check("fp64", [8, 0, 8, 16]);
    }

    #[test]
    fn sharding_divides_what_its_level_names() {
        let n = 8_030_261_248;
        // The largest units: embedding and head, which has a norm too, and a block.
        let (table, block) = (128_256 * 4096, 218_112_000);
        let check = |level: &str, expected: [u64; 4]| {
            let set = format!("parallelism.shard={{ranks: 8, level: {level}}}");
            let memory = fullest(&config("llama3-8b", &[&set]), 8);
            let Memory { weights, master, gradients, optimizer, .. } = memory;
            assert_eq!([weights, master, gradients, optimizer], expected, "{level}");
        };
        check("optimizer", [2 * n, n / 2, 4 * n + n / 2, n]);
        // Those of the embedding and the first block are still on their way when the head of the
        // next micro-batch makes its own.
        let most = 2 * table + 4096 + block;
        check("gradients", [2 * n, n / 2, 4 * most + n / 2, n]);
        // Without resharding after forward, all weights are there at the turn.
        check("parameters", [2 * n, n / 2, 4 * most + n / 2, n]);
        // A block is gathered ahead; embedding and head stay through a step.
        let most_weights = 2 * table + 4096 + 2 * block;
        check(
            "parameters, reshard_after_forward: true",
            [2 * most_weights, n / 2, 4 * most + n / 2, n],
        );
    }

    #[test]
    fn cut_weights_have_a_master_in_any_format() {
        let shard = "parallelism.shard={ranks: 8, level: optimizer}";
        let memory = fullest(&config("llama3-8b", &[shard, "precision.compute=fp32"]), 8);
        let n = 8_030_261_248;
        assert_eq!((memory.weights, memory.master), (4 * n, n / 2));
    }

    #[test]
    fn tensor_and_pipeline_split_the_parameters() {
        let mut config = config("llama3-8b", &[]);
        config.parallelism.tensor = 8;
        config.parallelism.pipeline.stages = 4;
        let norms = 8 * 2 * 4096 + 4096;
        // 8 blocks and one of the two tables, an eighth of each.
        let block = 4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 14336;
        let expected = (8 * block + 128_256 * 4096) / 8 + norms;
        assert_eq!(elements(&config, 32, 3), expected);
    }

    /// Activations are those of the largest chunk, as often as the schedule holds them at once.
    #[test]
    fn schedules_hold_activations() {
        let mut config = config("llama3-8b", &["parallelism.recompute=none"]);
        let one = fullest(&config, 1).activations;
        config.parallelism.pipeline.stages = 4;
        let mut check = |schedule, virtual_stages, expected: [u64; 4]| {
            config.parallelism.pipeline.schedule = schedule;
            config.parallelism.pipeline.virtual_stages = virtual_stages;
            let mesh = mesh(&config, 8);
            let of = |stage| memory_of_stage(&config, &mesh, stage).unwrap().activations;
            // In 64ths of all blocks, to the nearest: what waits for its weight gradients has no
            // statistics any more.
            let found = [0, 1, 2, 3].map(|stage| (of(stage) * 64 + one / 2) / one);
            assert_eq!(found, expected, "{schedule:?}");
            let fullest = memory_per_rank(&config, &mesh);
            assert!([0, 1, 2, 3].iter().any(|s| memory_of_stage(&config, &mesh, *s) == fullest));
        };
        // 64 sequences on 2 replicas: 32 micro-batches, and 8 of the 32 blocks a stage.
        check(PipelineSchedule::Gpipe, 1, [32 * 16; 4]);
        check(PipelineSchedule::OneForwardOneBackward, 1, [4 * 16, 3 * 16, 2 * 16, 16]);
        check(PipelineSchedule::ZeroBubble, 1, [4 * 16; 4]);
        check(PipelineSchedule::Interleaved, 2, [11 * 8, 9 * 8, 7 * 8, 5 * 8]);
    }

    /// Weight gradients that wait keep what they read, whether or not blocks are computed again.
    #[test]
    fn recomputation_saves_little_where_weight_gradients_wait() {
        let check = |schedule: &str, expected: [u64; 4]| {
            let of = |recompute: &str| {
                let pipeline = format!("parallelism.pipeline={{stages: 4, schedule: {schedule}}}");
                let recompute = format!("parallelism.recompute={recompute}");
                let config = config("llama3-8b", &[&pipeline, &recompute]);
                let mesh = mesh(&config, 4);
                [0, 1, 2, 3].map(|s| memory_of_stage(&config, &mesh, s).unwrap().activations)
            };
            let (none, full) = (of("none"), of("full"));
            let percent = [0, 1, 2, 3].map(|s| (full[s] * 100 + none[s] / 2) / none[s]);
            assert_eq!(percent, expected, "{schedule}");
        };
        check("1f1b", [14, 15, 17, 24]);
        // Stage s keeps what s + 1 micro-batches' weight gradients read, and the blocks' inputs.
        check("zero-bubble", [36, 61, 86, 111]);
    }

    /// 8192 tokens on 2 context ranks are 4 chunks of 2048: rank 0 masks its last of 4, and rank 1
    /// its chunks of 2 and 3.
    #[test]
    fn masks_of_context_parallelism() {
        let check = |sets: &[&str], expected: [u64; 2]| {
            let of = |layers: usize| {
                let layers = format!("model.layers={layers}");
                let mut all = vec!["data.sequence_length=8192", "training.micro_batch=2", &layers];
                all.extend(sets);
                let config = config("llama3-8b", &all);
                let mesh = mesh(&config, 2);
                [0, 1].map(|rank| memory_of_rank(&config, &mesh, rank).unwrap().activations)
            };
            // What would be left of no blocks.
            let (fewer, more) = (of(4), of(8));
            let found = [0, 1].map(|rank| 2 * fewer[rank] - more[rank]);
            assert_eq!(found, expected.map(|chunks| chunks * 2048 * 2048 * 2), "{sets:?}");
        };
        let two = "parallelism.context=2";
        check(&[two, "data.document_mask=false"], [4, 5]);
        // The longest documents in each of two rows.
        check(&[two, "data.document_mask=true"], [8, 10]);
        check(&["parallelism.replicate=2"], [0, 0]);
    }

    /// More than 2^64 bytes are the most that there can be, and no panic.
    #[test]
    fn what_no_number_holds_is_the_most() {
        let mut config = config("llama3-8b", &["parallelism.context=2"]);
        config.training.micro_batch = 1 << 50;
        config.training.batch_stages[0].global_batch = 1 << 60;
        config.training.batch_stages[0].sequence_length = 1 << 30;
        for recompute in [Recompute::None, Recompute::Selective, Recompute::Full] {
            config.parallelism.recompute = recompute;
            for schedule in [PipelineSchedule::Gpipe, PipelineSchedule::ZeroBubble] {
                config.parallelism.pipeline.schedule = schedule;
                config.parallelism.pipeline.stages = 4;
                assert_eq!(fullest(&config, 8).total(), u64::MAX);
            }
        }
    }

    /// The first and the last stage hold a table each and fewer blocks; the middle is fuller.
    #[test]
    fn uneven_stages() {
        let mut config = config("llama3-405b", &[]);
        config.parallelism.pipeline.stages = 16;
        let mesh = mesh(&config, 16);
        let m = &config.model;
        let block = (2 * m.dim * m.head_dim * (m.heads + m.kv_heads)
            + 3 * m.dim * m.ffn_dim
            + 2 * m.dim) as u64;
        let table = (m.vocab_size * m.dim) as u64;
        let of = |stage| memory_of_stage(&config, &mesh, stage).unwrap();
        let weights = |stage| of(stage).weights / 2;
        assert_eq!(weights(0), 7 * block + table);
        assert_eq!(weights(1), 8 * block);
        assert_eq!(weights(15), 7 * block + table + m.dim as u64);
        let all: u64 = (0..16).map(weights).sum();
        assert_eq!(all, num_parameters(m));
        assert_eq!(of(0).logits, 0);
        assert!(of(15).logits > 0);
    }
}
