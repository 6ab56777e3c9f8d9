//! Bytes of the fullest rank, by kind. Weights, master weights, gradients and optimizer state are
//! exact; activations and logits are estimates of what the backward pass keeps.

use crate::mesh::{Axis, Mesh};
use run_config::{
    BatchStage, ComputeDtype, ModelConfig, PipelineSchedule, Recompute, RunConfig, ShardLevel,
};
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
    let num = parameters_per_rank(&config.model, mesh);
    let (weight, master, grad) = widths(config.precision.compute);
    let level = config.parallelism.shard.level;
    let shard = mesh.degree(Axis::Shard) as u64;
    let split = |from: ShardLevel, bytes: u64| {
        if order(level) >= order(from) { bytes.div_ceil(shard) } else { bytes }
    };
    let longest = config.training.batch_stages.iter().max_by_key(|stage| stage.sequence_length);
    let (activations, logits) = longest.map_or((0, 0), |stage| {
        (activation_bytes(config, mesh, stage, weight), logit_bytes(config, mesh, stage))
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

/// Parameters of the fullest tensor and pipeline rank, before sharding. Norms are on every tensor
/// rank; KV heads are repeated where there are more ranks than heads.
pub fn parameters_per_rank(model: &ModelConfig, mesh: &Mesh) -> u64 {
    let (tensor, stages) = (mesh.degree(Axis::Tensor), mesh.degree(Axis::Pipeline));
    let part = |size: usize| size.div_ceil(tensor);
    let heads = part(model.heads) + part(model.kv_heads);
    let attention = 2 * model.dim * model.head_dim * heads;
    let block = attention + 3 * model.dim * part(model.ffn_dim) + 2 * model.dim;
    let table = part(model.vocab_size) * model.dim;
    // One stage has both ends; else the fullest has the head and its norm.
    let ends = match (stages, model.tied_embeddings) {
        (1, false) => 2 * table + model.dim,
        _ => table + model.dim,
    };
    (model.layers.div_ceil(stages) * block + ends) as u64
}

/// What one rank's blocks keep. Per token and block, in elements: inputs and outputs of the two
/// norms (4 dim); queries, keys and values before and after the rotation and the attention's
/// output (3 heads + 3 kv_heads, times head_dim); gate, up and their product (3 ffn_dim). Attention
/// weights are not kept (flash attention).
fn activation_bytes(config: &RunConfig, mesh: &Mesh, stage: &BatchStage, width: u64) -> u64 {
    let (m, p) = (&config.model, &config.parallelism);
    let tensor = mesh.degree(Axis::Tensor);
    let sequence = if p.sequence { tensor } else { 1 };
    let residual = (4 * m.dim).div_ceil(sequence);
    let core = (3 * m.head_dim * (m.heads + m.kv_heads)).div_ceil(tensor);
    let ffn = (3 * m.ffn_dim).div_ceil(tensor);
    let layers = m.layers.div_ceil(mesh.degree(Axis::Pipeline)) as u64;
    let whole = (residual + core + ffn) as u64;
    let per_token = match p.recompute {
        Recompute::None => layers * whole,
        Recompute::Selective => layers * (residual + ffn) as u64 + core as u64,
        // Each block's input, and one block at a time in full.
        Recompute::Full => layers * m.dim.div_ceil(sequence) as u64 + whole,
    };
    let tokens = tokens_per_pass(config, mesh, stage);
    let per_rank = stage.global_batch / mesh.data_size().max(1);
    let micro_batches = (per_rank / config.training.micro_batch.max(1)).max(1);
    let in_flight = match p.pipeline.schedule {
        PipelineSchedule::Gpipe => micro_batches,
        _ => micro_batches.min(mesh.degree(Axis::Pipeline)),
    };
    let in_flight = if p.pipeline.stages > 1 { in_flight } else { 1 };
    tokens * per_token * width * in_flight as u64
}

/// Logits and their gradient in the accumulation's format, and in the compute's where it differs.
fn logit_bytes(config: &RunConfig, mesh: &Mesh, stage: &BatchStage) -> u64 {
    let (weight, _, grad) = widths(config.precision.compute);
    let width = 2 * grad + if weight == grad { 0 } else { weight };
    let vocab = config.model.vocab_size.div_ceil(mesh.degree(Axis::Tensor));
    tokens_per_pass(config, mesh, stage) * vocab as u64 * width
}

/// Tokens of one micro-batch on one rank.
fn tokens_per_pass(config: &RunConfig, mesh: &Mesh, stage: &BatchStage) -> u64 {
    let length = stage.sequence_length.div_ceil(mesh.degree(Axis::Context));
    (length * config.training.micro_batch) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use model_spec::{FlopConvention, flops_per_token, num_parameters};
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
            assert_eq!(parameters_per_rank(&config.model, &one), parameters, "{preset}");
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
        assert_eq!(parameters_per_rank(&tied.model, &mesh(&tied, 1)), 1_235_814_400);
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
        assert_eq!(parameters_per_rank(&config.model, &mesh(&config, 32)), expected);
    }
}
