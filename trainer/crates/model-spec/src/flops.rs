//! Model FLOP per token, in the two conventions that reports use.
//!
//! A multiply-add is two operations and the backward pass costs twice the forward, so every weight
//! that takes part in a matrix product costs 6 per token. Attention adds, per layer, the products
//! Q K^T and A V of `heads * head_dim` by the sequence: 12 S in full, half of it where only the
//! causal half is counted. Recomputation is never counted: these are the model's FLOP, not the
//! hardware's.

use crate::num_parameters;
use run_config::ModelConfig;
use serde::{Deserialize, Serialize};

/// How attention is counted. Always print which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FlopConvention {
    /// The whole S by S product: `6 (N - N_emb) + 12 L H d S` (torchtitan, PaLM's appendix B).
    FullAttention,
    /// The half that a causal mask keeps: `6 (N - N_emb) + 6 L H d S` (Megatron-Bridge).
    CausalHalf,
}

/// Model FLOP of one training step per token, forward and backward, at `sequence` tokens.
///
/// `N_emb` is the embedding table, whose look-up multiplies nothing. A tied table stays in,
/// because the output head does multiply by it.
pub fn flops_per_token(model: &ModelConfig, sequence: usize, convention: FlopConvention) -> f64 {
    let looked_up = if model.tied_embeddings { 0 } else { (model.vocab_size * model.dim) as u64 };
    let multiplied = num_parameters(model) - looked_up;
    let per_position = match convention {
        FlopConvention::FullAttention => 12,
        FlopConvention::CausalHalf => 6,
    };
    let attention = per_position
        * (model.layers as u64)
        * (model.heads * model.head_dim) as u64
        * (sequence as u64);
    (6 * multiplied + attention) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_models::{llama3_8b, llama3_70b, llama3_405b, llama32_1b};

    fn check(model: &ModelConfig, convention: FlopConvention, expected: f64) {
        let flops = flops_per_token(model, 8192, convention);
        assert!((flops / expected - 1.0).abs() < 5e-4, "{convention:?}: {flops:e}, {expected:e}");
    }

    #[test]
    fn published_models_at_sequence_8192() {
        use FlopConvention::{CausalHalf, FullAttention};
        check(&llama3_8b(), FullAttention, 5.791e10);
        check(&llama3_8b(), CausalHalf, 5.147e10);
        check(&llama3_70b(), FullAttention, 4.814e11);
        check(&llama3_70b(), CausalHalf, 4.492e11);
        check(&llama3_405b(), FullAttention, 2.625e12);
        check(&llama3_405b(), CausalHalf, 2.524e12);
    }

    #[test]
    fn a_tied_head_still_multiplies() {
        let tied = llama32_1b();
        let untied = ModelConfig { tied_embeddings: false, ..tied.clone() };
        let convention = FlopConvention::FullAttention;
        let (tied, untied) =
            (flops_per_token(&tied, 64, convention), flops_per_token(&untied, 64, convention));
        assert_eq!(tied, untied);
    }
}
