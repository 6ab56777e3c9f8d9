//! A small random model that several tests run.

use model::{Dense, Llama, Stage, allocate, llama::init::initialize};
use model_spec::{LocalParameter, parameters};
use run_config::{ComputeDtype, ModelConfig, Rope, RopeFrequencies};
use std::sync::Arc;
use torch_shim::params::ParameterSet;
use torch_shim::tch::Device;

/// Positions the test models reach.
pub const POSITIONS: usize = 64;

/// Two layers, odd sizes, weights large enough for attention to matter.
pub fn small_config() -> ModelConfig {
    ModelConfig {
        preset: None,
        dim: 24,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        ffn_dim: 42,
        vocab_size: 61,
        norm_eps: 1e-5,
        tied_embeddings: false,
        init_std: 0.2,
        rope: Rope { theta: 10_000.0, frequencies: RopeFrequencies::Exact, scaling: None },
        init_from: None,
    }
}

/// The whole model with random weights.
pub fn small_model(config: &ModelConfig, compute: ComputeDtype) -> (Llama, ParameterSet) {
    torch_shim::tch::set_num_threads(1);
    let held: Vec<_> = parameters(config).iter().map(LocalParameter::whole).collect();
    let set = allocate(&held, false, compute, Device::Cpu).unwrap();
    initialize(11, &held, &set).unwrap();
    let model =
        Llama::new(config, Stage::whole(config), &set, Arc::new(Dense::default()), POSITIONS)
            .unwrap();
    (model, set)
}
