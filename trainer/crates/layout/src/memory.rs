//! Bytes of the fullest rank, by kind. Weights, master weights, gradients and optimizer state are
//! exact; activations and logits are estimates of what the backward pass keeps.

use crate::mesh::{Axis, Mesh};
use crate::schedule::Schedule;
use crate::stages::chunks;
use run_config::{BatchStage, ComputeDtype, ModelConfig, Recompute, RunConfig, ShardLevel};
use serde::Serialize;

/// Bytes of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Weights used in compute.
    pub weights: u64,
    /// FP32 master weights; 0 where the compute weights are the master weights.
    pub master: u64,
    /// Gradient accumulators.
    pub gradients: u64,
    /// AdamW's two moments.
    pub optimizer: u64,
    /// Estimate: what blocks keep for the backward pass.
    pub activations: u64,
    /// Estimate: logits of one micro-batch and their gradient.
    pub logits: u64,
}

impl Memory {
    /// Sum over the kinds.
    pub fn total(&self) -> u64 {
        let state = self.weights + self.master + self.gradients + self.optimizer;
        state + self.activations + self.logits
    }
}

/// Bytes per element of compute weights and activations, master weights (0: none), and gradients.
fn widths(compute: ComputeDtype) -> (u64, u64, u64) {
    match compute {
        ComputeDtype::Fp32 => (4, 0, 4),
        ComputeDtype::Bf16 => (2, 4, 4),
        ComputeDtype::Fp64 => (8, 0, 8),
    }
}

/// Memory of the fullest rank of `mesh`.
pub fn memory_per_rank(config: &RunConfig, mesh: &Mesh) -> Memory {
    let mut fullest = memory_of_stage(config, mesh, 0);
    for stage in 1..mesh.degree(Axis::Pipeline) {
        let memory = memory_of_stage(config, mesh, stage);
        if memory.total() > fullest.total() {
            fullest = memory;
        }
    }
    fullest
}

/// Parameters of the fullest rank of one pipeline stage, before sharding.
pub fn parameters_of_stage(config: &RunConfig, mesh: &Mesh, stage: usize) -> u64 {
    Held::new(config, mesh, stage).parameters(&config.model, mesh)
}

/// Memory of the fullest rank of one pipeline stage.
pub fn memory_of_stage(config: &RunConfig, mesh: &Mesh, stage: usize) -> Memory {
    let held = Held::new(config, mesh, stage);
    let num = held.parameters(&config.model, mesh);
    let (weight, master, grad) = widths(config.precision.compute);
    let level = config.parallelism.shard.level;
    let shard = mesh.degree(Axis::Shard) as u64;
    let split = |from: ShardLevel, bytes: u64| {
        if order(level) >= order(from) { bytes.div_ceil(shard) } else { bytes }
    };
    let longest = config.training.batch_stages.iter().max_by_key(|batch| batch.sequence_length);
    let (activations, logits) = longest.map_or((0, 0), |batch| {
        let activations = activation_bytes(config, mesh, &held, stage, batch);
        let logits = if held.head { logit_bytes(config, mesh, batch) } else { 0 };
        (activations, logits)
    });
    Memory {
        weights: split(ShardLevel::Parameters, num * weight),
        master: split(ShardLevel::Optimizer, num * master),
        gradients: split(ShardLevel::Gradients, num * grad),
        optimizer: split(ShardLevel::Optimizer, 2 * num * grad),
        activations,
        logits,
    }
}

fn order(level: ShardLevel) -> u8 {
    match level {
        ShardLevel::None => 0,
        ShardLevel::Optimizer => 1,
        ShardLevel::Gradients => 2,
        ShardLevel::Parameters => 3,
    }
}

/// What a pipeline stage holds of the model.
struct Held {
    blocks: usize,
    largest_chunk: usize,
    embedding: bool,
    head: bool,
}

impl Held {
    fn new(config: &RunConfig, mesh: &Mesh, stage: usize) -> Self {
        let (stages, virtual_stages) = (mesh.degree(Axis::Pipeline), virtual_stages(config, mesh));
        let mut held = Self { blocks: 0, largest_chunk: 0, embedding: false, head: false };
        let chunks = chunks(config.model.layers, stages, virtual_stages);
        for chunk in chunks.iter().filter(|chunk| chunk.stage == stage) {
            held.blocks += chunk.blocks.len();
            held.largest_chunk = held.largest_chunk.max(chunk.blocks.len());
            held.embedding |= chunk.embedding;
            held.head |= chunk.head;
        }
        held
    }

    /// Parameters on the fullest tensor rank, before sharding. Norms are on every tensor rank; KV
    /// heads are repeated where there are more ranks than heads. Tied embeddings are one table
    /// where embedding and head are on one stage, and else one on each.
    fn parameters(&self, model: &ModelConfig, mesh: &Mesh) -> u64 {
        let tensor = mesh.degree(Axis::Tensor);
        let part = |size: usize| size.div_ceil(tensor);
        let heads = part(model.heads) + part(model.kv_heads);
        let attention = 2 * model.dim * model.head_dim * heads;
        let block = attention + 3 * model.dim * part(model.ffn_dim) + 2 * model.dim;
        let is_shared = self.embedding && self.head && model.tied_embeddings;
        let tables = usize::from(self.embedding) + usize::from(self.head) - usize::from(is_shared);
        let norm = if self.head { model.dim } else { 0 };
        (self.blocks * block + tables * part(model.vocab_size) * model.dim + norm) as u64
    }
}

/// Chunks per stage; the key has no effect while there is one stage.
fn virtual_stages(config: &RunConfig, mesh: &Mesh) -> usize {
    if mesh.degree(Axis::Pipeline) > 1 { config.parallelism.pipeline.virtual_stages } else { 1 }
}

/// What one rank's blocks keep. Per token and block, in elements: inputs and outputs of the two
/// norms (4 dim); queries, keys and values before and after the rotation and the attention's
/// output (3 heads + 3 kv_heads, times head_dim); gate, up and their product (3 ffn_dim). Attention
/// weights are not kept (flash attention).
fn activation_bytes(
    config: &RunConfig,
    mesh: &Mesh,
    held: &Held,
    stage: usize,
    batch: &BatchStage,
) -> u64 {
    let (m, p) = (&config.model, &config.parallelism);
    let (width, _, _) = widths(config.precision.compute);
    let tensor = mesh.degree(Axis::Tensor);
    let sequence = if p.sequence { tensor } else { 1 };
    let residual = (4 * m.dim).div_ceil(sequence);
    let core = (3 * m.head_dim * (m.heads + m.kv_heads)).div_ceil(tensor);
    let ffn = (3 * m.ffn_dim).div_ceil(tensor);
    let kept = (held.largest_chunk * in_flight(config, mesh, stage, batch)) as u64;
    let whole = (residual + core + ffn) as u64;
    // What is computed again is there for one block at a time.
    let per_token = match p.recompute {
        Recompute::None => kept * whole,
        Recompute::Selective => kept * (residual + ffn) as u64 + core as u64,
        Recompute::Full => kept * m.dim.div_ceil(sequence) as u64 + whole,
    };
    tokens_per_pass(config, mesh, batch) * per_token * width
}

/// Activations of one micro-batch in one chunk that `stage` holds at once.
fn in_flight(config: &RunConfig, mesh: &Mesh, stage: usize, batch: &BatchStage) -> usize {
    let stages = mesh.degree(Axis::Pipeline);
    if stages == 1 {
        return 1;
    }
    let per_rank = batch.global_batch / mesh.data_size().max(1);
    let micro_batches = (per_rank / config.training.micro_batch.max(1)).max(1);
    let kind = config.parallelism.pipeline.schedule;
    let chunks = virtual_stages(config, mesh);
    let schedule = Schedule::new(kind, stages, micro_batches, chunks);
    // Configs with a schedule that cannot be are refused before anyone asks for their memory.
    schedule.map_or(micro_batches * chunks, |schedule| schedule.peak_activations(stage))
}

/// Logits and their gradient in the accumulation's format, and in the compute's where it differs.
fn logit_bytes(config: &RunConfig, mesh: &Mesh, batch: &BatchStage) -> u64 {
    let (weight, _, grad) = widths(config.precision.compute);
    let width = 2 * grad + if weight == grad { 0 } else { weight };
    let vocab = config.model.vocab_size.div_ceil(mesh.degree(Axis::Tensor));
    tokens_per_pass(config, mesh, batch) * vocab as u64 * width
}

/// Tokens of one micro-batch on one rank.
fn tokens_per_pass(config: &RunConfig, mesh: &Mesh, batch: &BatchStage) -> u64 {
    let length = batch.sequence_length.div_ceil(mesh.degree(Axis::Context));
    (length * config.training.micro_batch) as u64
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

    /// The published counts and the table of FLOP per token at sequence 8192.
    #[test]
    fn published_models() {
        let check = |preset: &str, parameters: u64, full: f64, half: f64| {
            let config = config(preset, &[]);
            assert_eq!(num_parameters(&config.model), parameters, "{preset}");
            let one = mesh(&config, 1);
            assert_eq!(parameters_of_stage(&config, &one, 0), parameters, "{preset}");
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
        assert_eq!(parameters_of_stage(&tied, &mesh(&tied, 1), 0), 1_235_814_400);
        assert_eq!(num_parameters(&tied.model), 1_235_814_400);
    }

    #[test]
    fn bytes_by_format() {
        let n = 8_030_261_248;
        let check = |compute: &str, expected: [u64; 4]| {
            let config = config("llama3-8b", &[&format!("precision.compute={compute}")]);
            let memory = memory_per_rank(&config, &mesh(&config, 8));
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
        let mut config = config("llama3-8b", &[]);
        config.parallelism.shard.ranks = 8;
        let n = 8_030_261_248;
        let mut check = |level: ShardLevel, expected: [u64; 3]| {
            config.parallelism.shard.level = level;
            let memory = memory_per_rank(&config, &mesh(&config, 8));
            assert_eq!([memory.weights, memory.gradients, memory.optimizer], expected, "{level:?}");
        };
        check(ShardLevel::None, [2 * n, 4 * n, 8 * n]);
        check(ShardLevel::Optimizer, [2 * n, 4 * n, n]);
        check(ShardLevel::Gradients, [2 * n, n / 2, n]);
        check(ShardLevel::Parameters, [n / 4, n / 2, n]);
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
        assert_eq!(parameters_of_stage(&config, &mesh(&config, 32), 3), expected);
    }

    /// Activations are those of the largest chunk, as often as the schedule holds them at once.
    #[test]
    fn schedules_hold_activations() {
        let mut config = config("llama3-8b", &["parallelism.recompute=none"]);
        let one = memory_per_rank(&config, &mesh(&config, 1)).activations;
        config.parallelism.pipeline.stages = 4;
        let mut check = |schedule, virtual_stages, expected: [u64; 4]| {
            config.parallelism.pipeline.schedule = schedule;
            config.parallelism.pipeline.virtual_stages = virtual_stages;
            let mesh = mesh(&config, 8);
            let of = |stage| memory_of_stage(&config, &mesh, stage).activations;
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
        let weights = |stage| memory_of_stage(&config, &mesh, stage).weights / 2;
        assert_eq!(weights(0), 7 * block + table);
        assert_eq!(weights(1), 8 * block);
        assert_eq!(weights(15), 7 * block + table + m.dim as u64);
        let all: u64 = (0..16).map(weights).sum();
        assert_eq!(all, num_parameters(m));
        assert_eq!(memory_of_stage(&config, &mesh, 0).logits, 0);
        assert!(memory_of_stage(&config, &mesh, 15).logits > 0);
    }
}
