//! Bytes of one rank, by kind. Weights, master weights, gradients and optimizer state are exact,
//! those of sharded weights and gradients at their most within a step; activations are those that
//! the blocks keep for the backward pass.
//!
//! Not in it: what an operation needs while it runs, tensors on their way to or from other ranks,
//! and the few that lie outside of blocks (tokens, rotary factors, the head's input).

use crate::communication::{Dtype, LOSS_CHUNK_TOKENS, LayoutError, Step};
use crate::held::Held;
use crate::mesh::{Axis, Mesh};
use crate::schedule::Schedule;
use crate::sharded::sharded_step;
use run_config::{BatchStage, Recompute, RunConfig};
use serde::Serialize;

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
    /// What blocks keep for the backward pass.
    pub activations: u64,
    /// Estimate: logits of one chunk of a micro-batch's tokens, whose gradient takes their place.
    pub logits: u64,
}

impl Memory {
    /// Sum over the kinds.
    pub fn total(&self) -> u64 {
        let state = self.weights + self.master + self.gradients + self.optimizer;
        state + self.activations + self.logits
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

/// Memory of each rank of a pipeline stage: pieces are equal.
///
/// # Errors
/// As [`memory_per_rank`].
pub fn memory_of_stage(
    config: &RunConfig,
    mesh: &Mesh,
    stage: usize,
) -> Result<Memory, LayoutError> {
    memory_of_rank(config, mesh, mesh.first_of_stage(stage))
}

/// Memory of `rank`.
///
/// # Errors
/// As [`memory_per_rank`].
pub fn memory_of_rank(config: &RunConfig, mesh: &Mesh, rank: usize) -> Result<Memory, LayoutError> {
    let place = Place::new(config, mesh, rank)?;
    let mut memory = place.state(0, 0);
    for batch in &config.training.batch_stages {
        let micro_batches = Step::of(batch).micro_batches(config, mesh);
        let schedule = Schedule::of(&config.parallelism.pipeline, micro_batches)?;
        let of_batch = place.in_step(batch, &schedule);
        memory.weights = memory.weights.max(of_batch.weights);
        memory.gradients = memory.gradients.max(of_batch.gradients);
        if of_batch.activations + of_batch.logits > memory.activations + memory.logits {
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
        let owned = all / ranks * self.state;
        let is_cut = ranks > 1;
        Memory {
            weights: if is_cut { weights } else { all } * self.compute,
            // What is owned of cut weights lies apart from the whole, whatever its format.
            master: if is_cut || self.compute != self.state { owned } else { 0 },
            gradients: owned + if is_cut { gradients * self.state } else { 0 },
            optimizer: 2 * owned,
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
        (length * self.config.training.micro_batch) as u64
    }

    /// Logits, or their gradient, of one chunk of tokens in the accumulation's format, and in the
    /// compute's where it differs.
    fn logits(&self, batch: &BatchStage) -> u64 {
        if self.held.chunks.iter().all(|chunk| !chunk.head) {
            return 0;
        }
        let width = self.state + if self.compute == self.state { 0 } else { self.compute };
        let vocab = self.config.model.vocab_size.div_ceil(self.mesh.degree(Axis::Tensor));
        self.tokens(batch).min(LOSS_CHUNK_TOKENS as u64) * vocab as u64 * width
    }

    /// What this rank's blocks keep for the backward pass, of as many micro-batches as the schedule
    /// holds at once in the largest chunk.
    fn activations(&self, batch: &BatchStage, schedule: &Schedule) -> u64 {
        let blocks = self.held.chunks.iter().map(|chunk| chunk.blocks.len()).max().unwrap_or(0);
        let in_flight = schedule.peak_activations(self.stage) as u64;
        let (kept, blocks) = (self.kept(batch), blocks as u64);
        match self.config.parallelism.recompute {
            Recompute::None => in_flight * blocks * (kept.around + kept.attention),
            // What is computed again is there for one block at a time.
            Recompute::Selective => in_flight * blocks * kept.around + kept.attention,
            // A block's input is a stream and what the block before it adds; the first has no other
            // before it.
            Recompute::Full => {
                let inputs = (2 * blocks).saturating_sub(1);
                in_flight * inputs * kept.stream + kept.around + kept.attention
            }
        }
    }

    /// What a block keeps of a micro-batch. In elements of a token: the inputs of the two norms and
    /// what they make of them (4 dim), their statistics (2 numbers of the state's format); queries,
    /// keys and values after the rotation and the attention's output (2 heads + 2 kv_heads, times
    /// head_dim), with a statistic a head; gate and up and their product (3 ffn_dim). Attention
    /// weights are not kept (flash attention); the masks of context parallelism are shared by all
    /// blocks.
    fn kept(&self, batch: &BatchStage) -> Kept {
        let (m, p) = (&self.config.model, &self.config.parallelism);
        let tensor = self.held.tensor;
        let tokens = self.tokens(batch);
        // The residual stream is cut along the sequence.
        let stream_tokens = tokens / if tensor.sequence { tensor.ranks as u64 } else { 1 };
        let stream = stream_tokens * m.dim as u64 * self.compute;
        let statistics = stream_tokens * 2 * self.state;
        let ffn = tokens * (3 * m.ffn_dim / p.tensor) as u64 * self.compute;
        let (heads, kv_heads) = (m.heads / p.tensor, (m.kv_heads / p.tensor).max(1));
        // With context parallelism, keys and values are those of all ranks' tokens, and the outputs
        // of the two chunks are kept by themselves and as one.
        let (queries, ranks) = if p.context > 1 { (3 * heads, p.context) } else { (2 * heads, 1) };
        let mixed = (m.head_dim * (queries + 2 * kv_heads * ranks)) as u64 * self.compute;
        Kept {
            stream,
            around: 4 * stream + statistics + ffn,
            attention: tokens * (mixed + heads as u64 * self.state),
        }
    }
}

/// Bytes that a block keeps of a micro-batch.
struct Kept {
    /// One tensor of the residual stream.
    stream: u64,
    /// Norms and feed-forward, and the input of attention.
    around: u64,
    /// Within attention.
    attention: u64,
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
            // In 64ths of all blocks.
            assert_eq!([0, 1, 2, 3].map(|stage| of(stage) * 64 / one), expected, "{schedule:?}");
            let fullest = memory_per_rank(&config, &mesh);
            assert!([0, 1, 2, 3].iter().any(|s| memory_of_stage(&config, &mesh, *s) == fullest));
        };
        // 64 sequences on 2 replicas: 32 micro-batches, and 8 of the 32 blocks a stage.
        check(PipelineSchedule::Gpipe, 1, [32 * 16; 4]);
        check(PipelineSchedule::OneForwardOneBackward, 1, [4 * 16, 3 * 16, 2 * 16, 16]);
        check(PipelineSchedule::ZeroBubble, 1, [4 * 16; 4]);
        check(PipelineSchedule::Interleaved, 2, [11 * 8, 9 * 8, 7 * 8, 5 * 8]);
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
