//! Models that several tests of this crate look at.

use run_config::{ModelConfig, Rope, RopeFrequencies, RopeScaling};

fn llama3(dim: usize, layers: usize, heads: usize, ffn_dim: usize) -> ModelConfig {
    ModelConfig {
        preset: None,
        dim,
        layers,
        heads,
        kv_heads: 8,
        head_dim: dim / heads,
        ffn_dim,
        vocab_size: 128_256,
        norm_eps: 1e-5,
        tied_embeddings: false,
        init_std: 0.02,
        rope: Rope { theta: 500_000.0, frequencies: RopeFrequencies::Fp32, scaling: None },
        init_from: None,
    }
}

/// Llama 3 8B.
pub fn llama3_8b() -> ModelConfig {
    llama3(4096, 32, 32, 14_336)
}

/// Llama 3 70B.
pub fn llama3_70b() -> ModelConfig {
    llama3(8192, 80, 64, 28_672)
}

/// Llama 3 405B.
pub fn llama3_405b() -> ModelConfig {
    llama3(16_384, 126, 128, 53_248)
}

/// Llama 3.2 1B: tied, long context.
pub fn llama32_1b() -> ModelConfig {
    let mut model = llama3(2048, 16, 32, 8192);
    model.tied_embeddings = true;
    model.rope.scaling = Some(RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 8192,
    });
    model
}

/// A model of odd sizes whose `head_dim` is not `dim / heads`.
pub fn tiny() -> ModelConfig {
    ModelConfig {
        dim: 96,
        layers: 3,
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        ffn_dim: 200,
        vocab_size: 263,
        ..llama3(96, 3, 4, 200)
    }
}
