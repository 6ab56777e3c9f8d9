//! Meta's `params.json`, as their own Llama 3 releases carry it, to [`ModelConfig`].
//!
//! The file does not state the feed-forward's width: it follows from `ffn_dim_multiplier` and
//! `multiple_of`. It does not state `tied` either: releases that tie their embeddings simply lack
//! `output.weight`, so the caller, who sees the weights, says so.

use run_config::{ModelConfig, Rope, RopeFrequencies, RopeScaling};
use serde::Deserialize;
use thiserror::Error;

/// Why a `params.json` cannot be used.
#[derive(Debug, Error)]
pub enum MetaParamsError {
    /// Not JSON, a key missing, or a value of the wrong type.
    #[error("params.json: {0}; hint: this is the file beside Meta's consolidated.00.pth")]
    NotJson(#[from] serde_json::Error),
    /// A value out of range.
    #[error("params.json: `{key}` is {value}, expected {expected}")]
    Invalid {
        /// The key.
        key: &'static str,
        /// What stands there.
        value: i64,
        /// What may stand there.
        expected: String,
    },
}

/// The keys that matter; Meta's files carry others (`use_lora`, quantization), which are ignored.
#[derive(Deserialize)]
struct Params {
    dim: i64,
    n_layers: i64,
    n_heads: i64,
    n_kv_heads: Option<i64>,
    vocab_size: i64,
    #[serde(default = "default_multiple_of")]
    multiple_of: i64,
    ffn_dim_multiplier: Option<f64>,
    #[serde(default = "default_norm_eps")]
    norm_eps: f64,
    #[serde(default = "default_rope_theta")]
    rope_theta: f64,
    #[serde(default)]
    use_scaled_rope: bool,
    rope_scaling_factor: Option<f64>,
    rope_high_freq_factor: Option<f64>,
}

fn default_multiple_of() -> i64 {
    256
}

fn default_norm_eps() -> f64 {
    1e-5
}

fn default_rope_theta() -> f64 {
    500_000.0
}

/// Reads a `params.json`. `tied_embeddings`: whether the weights lack `output.weight`;
/// `vocab_size` of -1 (older files) takes `vocab_rows`, the rows of `tok_embeddings.weight`.
///
/// # Errors
/// Where the text is not such a file or a value is out of range.
pub fn from_json(
    text: &str,
    tied_embeddings: bool,
    vocab_rows: usize,
) -> Result<ModelConfig, MetaParamsError> {
    let params: Params = serde_json::from_str(text)?;
    let dim = size("dim", params.dim)?;
    let heads = size("n_heads", params.n_heads)?;
    let kv_heads = size("n_kv_heads", params.n_kv_heads.unwrap_or(params.n_heads))?;
    let vocab_size = match params.vocab_size {
        -1 => vocab_rows,
        stated => size("vocab_size", stated)?,
    };
    if dim % heads != 0 || (dim / heads) % 2 != 0 {
        let expected = format!("a divisor of dim ({dim}) with an even quotient");
        return Err(MetaParamsError::Invalid { key: "n_heads", value: params.n_heads, expected });
    }
    if heads % kv_heads != 0 {
        let (key, value) = ("n_kv_heads", kv_heads as i64);
        let expected = format!("a divisor of n_heads ({heads})");
        return Err(MetaParamsError::Invalid { key, value, expected });
    }
    let multiple_of = size("multiple_of", params.multiple_of)?;
    let scaling = params.use_scaled_rope.then(|| RopeScaling::Llama3 {
        factor: params.rope_scaling_factor.unwrap_or(8.0),
        low_freq_factor: 1.0,
        high_freq_factor: params.rope_high_freq_factor.unwrap_or(4.0),
        original_context: 8192,
    });
    Ok(ModelConfig {
        preset: None,
        dim,
        layers: size("n_layers", params.n_layers)?,
        heads,
        kv_heads,
        head_dim: dim / heads,
        ffn_dim: ffn_dim(dim, params.ffn_dim_multiplier, multiple_of),
        vocab_size,
        norm_eps: params.norm_eps,
        tied_embeddings,
        init_std: 0.02,
        rope: Rope { theta: params.rope_theta, frequencies: RopeFrequencies::Fp32, scaling },
        init_from: None,
    })
}

/// Meta's rule: two thirds of four times the width, times the multiplier, rounded up.
fn ffn_dim(dim: usize, multiplier: Option<f64>, multiple_of: usize) -> usize {
    let inner = 2 * (4 * dim) / 3;
    let inner = multiplier.map_or(inner, |factor| (factor * inner as f64) as usize);
    inner.div_ceil(multiple_of) * multiple_of
}

fn size(key: &'static str, value: i64) -> Result<usize, MetaParamsError> {
    match usize::try_from(value) {
        Ok(size) if (1..=u32::MAX as usize).contains(&size) => Ok(size),
        _ => {
            let expected = "a whole number from 1 to 4294967295".to_owned();
            Err(MetaParamsError::Invalid { key, value, expected })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_models::{llama3_8b, llama3_70b, llama3_405b, llama32_1b};

    fn check(text: &str, tied: bool, expected: &ModelConfig) {
        assert_eq!(&from_json(text, tied, 128_256).unwrap(), expected);
    }

    #[test]
    fn released_files() {
        check(
            r#"{"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256,
                "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05,
                "rope_theta": 500000.0}"#,
            false,
            &llama3_8b(),
        );
        check(
            r#"{"dim": 8192, "ffn_dim_multiplier": 1.3, "multiple_of": 4096, "n_heads": 64,
                "n_kv_heads": 8, "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1}"#,
            false,
            &llama3_70b(),
        );
        check(
            r#"{"dim": 16384, "ffn_dim_multiplier": 1.2, "multiple_of": 4096, "n_heads": 128,
                "n_kv_heads": 8, "n_layers": 126, "norm_eps": 1e-05, "vocab_size": 128256}"#,
            false,
            &llama3_405b(),
        );
        check(
            r#"{"dim": 2048, "ffn_dim_multiplier": 1.5, "multiple_of": 256, "n_heads": 32,
                "n_kv_heads": 8, "n_layers": 16, "norm_eps": 1e-05, "rope_theta": 500000.0,
                "use_scaled_rope": true, "rope_scaling_factor": 32.0, "vocab_size": 128256}"#,
            true,
            &llama32_1b(),
        );
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "{}",
            r#"{"dim": -1, "n_layers": 1, "n_heads": 1, "vocab_size": 8}"#,
            r#"{"dim": 6, "n_layers": 1, "n_heads": 4, "vocab_size": 8}"#,
            r#"{"dim": 8, "n_layers": 1, "n_heads": 4, "n_kv_heads": 3, "vocab_size": 8}"#,
        ] {
            assert!(from_json(text, false, 8).is_err(), "{text}");
        }
    }
}
