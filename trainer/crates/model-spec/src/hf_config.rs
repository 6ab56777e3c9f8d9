//! Hugging Face's `config.json` of a `LlamaForCausalLM`, to and from [`ModelConfig`].
//!
//! transformers 4 spells the rotary embedding as `rope_theta` and `rope_scaling`, transformers 5
//! as one `rope_parameters` dictionary. Both are written, either is read; where a file holds both
//! they must agree. What this model family cannot express (biases, other activations, other kinds
//! of scaling) is refused, never dropped.

use run_config::{ModelConfig, Rope, RopeFrequencies, RopeScaling};
use serde_json::{Map, Value, json};
use thiserror::Error;

/// Why a `config.json` cannot be used.
#[derive(Debug, Error)]
pub enum HfConfigError {
    /// Not JSON, or not an object.
    #[error("config.json: not a JSON object: {0}")]
    NotJson(String),
    /// A key that must be there is not.
    #[error("config.json: key `{key}` is missing; hint: a Llama config.json states it")]
    Missing {
        /// The key.
        key: &'static str,
    },
    /// A value of the wrong type or out of range.
    #[error("config.json: `{key}` is {value}, expected {expected}")]
    Invalid {
        /// The key.
        key: String,
        /// What stands there.
        value: String,
        /// What may stand there.
        expected: String,
    },
    /// The two spellings of the rotary embedding differ.
    #[error(
        "config.json: `rope_parameters` says {new} but `rope_theta`/`rope_scaling` say {old}; \
         hint: delete the one that is wrong"
    )]
    RopeConflict {
        /// From `rope_parameters`.
        new: String,
        /// From `rope_theta` and `rope_scaling`.
        old: String,
    },
}

/// What a `config.json` states that a [`ModelConfig`] does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HfExtras {
    /// `max_position_embeddings`: the longest sequence the model was made for.
    pub max_positions: usize,
    /// `dtype`, as torch spells it (`float32`, `bfloat16`).
    pub dtype: String,
    /// `bos_token_id`.
    pub bos_token_id: Option<u32>,
    /// `eos_token_id`: one id or several.
    pub eos_token_ids: Vec<u32>,
}

/// The `config.json` text of `model`, readable by transformers 4 and 5.
pub fn to_json(model: &ModelConfig, extras: &HfExtras) -> String {
    let theta = model.rope.theta;
    let scaling = model.rope.scaling.as_ref().map(scaling_to_json);
    let mut rope_parameters = scaling.clone().unwrap_or_else(|| json!({"rope_type": "default"}));
    rope_parameters["rope_theta"] = json!(theta);
    let eos = match extras.eos_token_ids.as_slice() {
        [] => Value::Null,
        [one] => json!(one),
        several => json!(several),
    };
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.dim,
        "intermediate_size": model.ffn_dim,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": extras.max_positions,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": rope_parameters,
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": model.init_std,
        "hidden_act": "silu",
        "attention_bias": false,
        "mlp_bias": false,
        "attention_dropout": 0.0,
        "bos_token_id": extras.bos_token_id,
        "eos_token_id": eos,
        "dtype": extras.dtype,
        "torch_dtype": extras.dtype,
        "use_cache": true,
    });
    format!("{config:#}\n")
}

/// Reads a `config.json`. Optional keys take the defaults of transformers' `LlamaConfig`.
///
/// # Errors
/// Where the text is no JSON object, a key is missing or invalid, or the model is not a Llama.
pub fn from_json(text: &str) -> Result<(ModelConfig, HfExtras), HfConfigError> {
    let value: Value =
        serde_json::from_str(text).map_err(|error| HfConfigError::NotJson(error.to_string()))?;
    let Value::Object(config) = value else {
        return Err(HfConfigError::NotJson("the top level is not an object".to_owned()));
    };
    let reader = Reader { config: &config };
    refuse_other_models(&reader)?;
    let (dim, heads) = (reader.size("hidden_size")?, reader.size("num_attention_heads")?);
    let kv_heads = reader.size_or("num_key_value_heads", heads)?;
    let head_dim = reader.size_or("head_dim", dim / heads)?;
    if heads % kv_heads != 0 {
        let expected = format!("a divisor of num_attention_heads ({heads})");
        return Err(invalid("num_key_value_heads", &json!(kv_heads), &expected));
    }
    if head_dim == 0 || head_dim % 2 != 0 {
        return Err(invalid("head_dim", &json!(head_dim), "an even number above 0"));
    }
    let model = ModelConfig {
        preset: None,
        dim,
        layers: reader.size("num_hidden_layers")?,
        heads,
        kv_heads,
        head_dim,
        ffn_dim: reader.size("intermediate_size")?,
        vocab_size: reader.size("vocab_size")?,
        norm_eps: reader.positive_or("rms_norm_eps", 1e-6)?,
        tied_embeddings: reader.flag_or("tie_word_embeddings", false)?,
        init_std: reader.positive_or("initializer_range", 0.02)?,
        rope: rope(&reader)?,
        init_from: None,
    };
    let extras = HfExtras {
        max_positions: reader.size_or("max_position_embeddings", 2048)?,
        dtype: reader.text("dtype").or(reader.text("torch_dtype")).unwrap_or("float32").to_owned(),
        bos_token_id: token_ids(&config, "bos_token_id")?.first().copied(),
        eos_token_ids: token_ids(&config, "eos_token_id")?,
    };
    Ok((model, extras))
}

/// Refuses what would silently compute something else.
fn refuse_other_models(reader: &Reader) -> Result<(), HfConfigError> {
    for (key, only) in [("model_type", "llama"), ("hidden_act", "silu")] {
        if let Some(value) = reader.present(key)
            && value.as_str() != Some(only)
        {
            return Err(invalid(key, value, &format!("\"{only}\"")));
        }
    }
    for key in ["attention_bias", "mlp_bias"] {
        if reader.flag_or(key, false)? {
            let expected = "false (this model family has no biases)";
            return Err(invalid(key, &json!(true), expected));
        }
    }
    Ok(())
}

fn rope(reader: &Reader) -> Result<Rope, HfConfigError> {
    let theta_or = |reader: &Reader| reader.positive_or("rope_theta", 10_000.0);
    let old_present =
        reader.present("rope_theta").is_some() || reader.present("rope_scaling").is_some();
    let rope = |theta, scaling| Rope { theta, frequencies: RopeFrequencies::Fp32, scaling };
    let old = match reader.object("rope_scaling")? {
        Some(section) => rope(theta_or(reader)?, scaling_from_json("rope_scaling", section)?),
        None => rope(theta_or(reader)?, None),
    };
    let Some(section) = reader.object("rope_parameters")? else { return Ok(old) };
    let nested = Reader { config: section };
    let theta = match nested.present("rope_theta") {
        Some(_) => theta_or(&nested)?,
        None => old.theta,
    };
    let new = rope(theta, scaling_from_json("rope_parameters", section)?);
    if old_present && new != old {
        return Err(HfConfigError::RopeConflict {
            new: format!("theta {}, scaling {:?}", new.theta, new.scaling),
            old: format!("theta {}, scaling {:?}", old.theta, old.scaling),
        });
    }
    Ok(new)
}

fn scaling_to_json(scaling: &RopeScaling) -> Value {
    match scaling {
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_context,
            })
        }
    }
}

/// `rope_type` was once spelt `type`; both occur in the wild.
fn scaling_from_json(
    key: &str,
    section: &Map<String, Value>,
) -> Result<Option<RopeScaling>, HfConfigError> {
    let reader = Reader { config: section };
    let kind = reader.present("rope_type").or(reader.present("type"));
    match kind.map(|kind| kind.as_str().unwrap_or_default()) {
        None | Some("default") => Ok(None),
        Some("llama3") => Ok(Some(RopeScaling::Llama3 {
            factor: reader.positive("factor")?,
            low_freq_factor: reader.positive("low_freq_factor")?,
            high_freq_factor: reader.positive("high_freq_factor")?,
            original_context: reader.size("original_max_position_embeddings")?,
        })),
        Some(_) => {
            let value = kind.cloned().unwrap_or(Value::Null);
            Err(invalid(&format!("{key}.rope_type"), &value, "\"default\" or \"llama3\""))
        }
    }
}

fn token_ids(config: &Map<String, Value>, key: &str) -> Result<Vec<u32>, HfConfigError> {
    let one = |value: &Value| {
        value
            .as_u64()
            .and_then(|id| u32::try_from(id).ok())
            .ok_or_else(|| invalid(key, value, "a token id or a list of token ids"))
    };
    match config.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().map(one).collect(),
        Some(value) => Ok(vec![one(value)?]),
    }
}

fn invalid(key: &str, value: &Value, expected: &str) -> HfConfigError {
    HfConfigError::Invalid {
        key: key.to_owned(),
        value: value.to_string(),
        expected: expected.to_owned(),
    }
}

/// Typed look-ups that name the key in every error.
struct Reader<'a> {
    config: &'a Map<String, Value>,
}

impl<'a> Reader<'a> {
    /// The value of a key; `null` counts as absent, as in transformers.
    fn present(&self, key: &str) -> Option<&'a Value> {
        self.config.get(key).filter(|value| !value.is_null())
    }

    fn text(&self, key: &str) -> Option<&'a str> {
        self.present(key).and_then(Value::as_str)
    }

    fn size(&self, key: &'static str) -> Result<usize, HfConfigError> {
        let value = self.present(key).ok_or(HfConfigError::Missing { key })?;
        match value.as_u64().and_then(|size| usize::try_from(size).ok()) {
            Some(size) if size > 0 && size <= u32::MAX as usize => Ok(size),
            _ => Err(invalid(key, value, "a whole number from 1 to 4294967295")),
        }
    }

    fn size_or(&self, key: &'static str, default: usize) -> Result<usize, HfConfigError> {
        if self.present(key).is_some() { self.size(key) } else { Ok(default) }
    }

    fn positive(&self, key: &'static str) -> Result<f64, HfConfigError> {
        let value = self.present(key).ok_or(HfConfigError::Missing { key })?;
        match value.as_f64() {
            Some(number) if number > 0.0 && number.is_finite() => Ok(number),
            _ => Err(invalid(key, value, "a number above 0")),
        }
    }

    fn positive_or(&self, key: &'static str, default: f64) -> Result<f64, HfConfigError> {
        if self.present(key).is_some() { self.positive(key) } else { Ok(default) }
    }

    fn flag_or(&self, key: &str, default: bool) -> Result<bool, HfConfigError> {
        match self.present(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| invalid(key, value, "true or false")),
        }
    }

    fn object(&self, key: &str) -> Result<Option<&'a Map<String, Value>>, HfConfigError> {
        match self.present(key) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(object)),
            Some(value) => Err(invalid(key, value, "an object")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_models::{llama3_8b, llama32_1b, tiny};

    fn extras() -> HfExtras {
        HfExtras {
            max_positions: 8192,
            dtype: "bfloat16".to_owned(),
            bos_token_id: Some(1),
            eos_token_ids: vec![2, 3],
        }
    }

    fn without(text: &str, keys: &[&str]) -> String {
        let mut value: Value = serde_json::from_str(text).unwrap();
        for key in keys {
            value.as_object_mut().unwrap().remove(*key);
        }
        value.to_string()
    }

    fn with(key: &str, value: Value) -> String {
        let mut config: Value = serde_json::from_str(&to_json(&tiny(), &extras())).unwrap();
        config[key] = value;
        config.to_string()
    }

    #[test]
    fn both_spellings_round_trip() {
        for model in [tiny(), llama3_8b(), llama32_1b()] {
            let text = to_json(&model, &extras());
            for absent in [&[][..], &["rope_parameters"], &["rope_theta", "rope_scaling"]] {
                let (read, read_extras) = from_json(&without(&text, absent)).unwrap();
                assert_eq!(read, model, "without {absent:?}");
                assert_eq!(read_extras, extras());
            }
        }
    }

    fn check_refused(text: &str, expected: &str) {
        let message = from_json(text).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }

    #[test]
    fn other_models_are_refused_by_name() {
        check_refused("[]", "not a JSON object");
        check_refused("{", "not a JSON object");
        check_refused("{}", "`hidden_size` is missing");
        check_refused(&with("model_type", json!("mixtral")), "`model_type` is \"mixtral\"");
        check_refused(&with("hidden_act", json!("gelu")), "`hidden_act`");
        check_refused(&with("attention_bias", json!(true)), "`attention_bias`");
        check_refused(&with("num_hidden_layers", json!(-1)), "`num_hidden_layers` is -1");
        check_refused(&with("num_key_value_heads", json!(3)), "divisor of num_attention_heads (4)");
        check_refused(&with("head_dim", json!(15)), "even number");
        check_refused(&with("rope_scaling", json!({"rope_type": "yarn"})), "\"yarn\"");
        check_refused(&with("rope_theta", json!(5.0)), "delete the one that is wrong");
    }

    #[test]
    fn absent_keys_take_the_defaults_of_transformers() {
        let text = to_json(&llama3_8b(), &extras());
        let absent = ["head_dim", "rope_theta", "rope_parameters", "rms_norm_eps", "eos_token_id"];
        let (model, extras) = from_json(&without(&text, &absent)).unwrap();
        assert_eq!(model.head_dim, 128);
        assert_eq!(model.rope.theta, 10_000.0);
        assert_eq!(model.norm_eps, 1e-6);
        assert!(extras.eos_token_ids.is_empty());
    }
}
