//! From a file, a text and `--set` overrides to a resolved config.

use crate::problem::{ConfigErrors, Note, Place, Problem, ProblemKind};
use crate::resolved::RunConfig;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// A resolved config and what is worth saying about it.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The config.
    pub config: RunConfig,
    /// Warnings and remarks.
    pub notes: Vec<Note>,
}

impl RunConfig {
    /// Reads and resolves the YAML file at `path`, with `overrides` (`a.b=c`, `c` being YAML) laid over it.
    ///
    /// # Errors
    /// Every problem of the file and of the overrides at once.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Loaded, ConfigErrors> {
        let text = std::fs::read_to_string(path).map_err(|e| fail(e.to_string()))?;
        let base = std::path::absolute(path).map_err(|e| fail(e.to_string()))?;
        Self::from_yaml_str(&text, base.parent().unwrap_or(Path::new("/")), overrides)
    }

    /// Resolves a YAML text; relative paths in it are relative to `base_dir`, an absolute path.
    ///
    /// # Errors
    /// Every problem of the text and of the overrides at once.
    pub fn from_yaml_str(
        text: &str,
        base_dir: &Path,
        overrides: &[String],
    ) -> Result<Loaded, ConfigErrors> {
        let yaml = |t: &str| serde_yaml::from_str::<Value>(t).map_err(|e| fail(e.to_string()));
        let mut user = yaml(text)?;
        for set in overrides {
            let (key, value) = set.split_once('=').ok_or_else(|| fail(format!("--set {set}")))?;
            let nested = key.rsplit('.').fold(yaml(value)?, |v, k| json!({ k: v }));
            merge(&mut user, &nested);
        }
        let mut all = yaml(include_str!("../defaults.yaml"))?;
        if let Some(name) = user["model"]["preset"].as_str() {
            let presets = yaml(include_str!("../presets.yaml"))?;
            merge(&mut all["model"], &presets[name]);
        }
        merge(&mut all, &user);
        let config = thin_resolve(all, base_dir).map_err(fail)?;
        Ok(Loaded { config, notes: Vec::new() })
    }
}

fn fail(message: String) -> ConfigErrors {
    ConfigErrors {
        problems: vec![Problem {
            kind: ProblemKind::Syntax,
            place: Place::WholeFile(None),
            key: String::new(),
            message,
            limit: None,
            hint: None,
        }],
    }
}

fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(a), Value::Object(b)) => {
            for (k, v) in b {
                merge(a.entry(k.clone()).or_insert(Value::Null), v);
            }
        }
        (a, b) => *a = b.clone(),
    }
}

fn thin_resolve(mut all: Value, base: &Path) -> Result<RunConfig, String> {
    let path = |v: &Value| -> Value {
        json!(base.join(PathBuf::from(v.as_str().unwrap_or_default())))
    };
    let model = &mut all["model"];
    if model["kv_heads"].is_null() {
        model["kv_heads"] = model["heads"].clone();
    }
    if model["head_dim"].is_null() {
        model["head_dim"] =
            json!(model["dim"].as_u64().unwrap_or(0) / model["heads"].as_u64().unwrap_or(1).max(1));
    }
    all["data"]["tokenizer"] = path(&all["data"]["tokenizer"]);
    for source in all["data"]["sources"].as_array_mut().into_iter().flatten() {
        source["path"] = path(&source["path"]);
        if source["weight"].is_null() {
            source["weight"] = json!(1.0);
        }
    }
    for key in ["/parallelism/replicate", "/cluster/ranks_per_node", "/cluster/threads_per_rank"] {
        if let Some(v) = all.pointer_mut(key).filter(|v| v.as_str() == Some("auto")) {
            *v = Value::Null;
        }
    }
    let longest = all["data"]["sequence_length"].clone();
    let batch = all["training"]["global_batch"].clone();
    let mut stages = match batch {
        Value::Array(stages) => stages,
        one => vec![json!({"from_tokens": 0, "global_batch": one})],
    };
    for stage in &mut stages {
        if stage["sequence_length"].is_null() {
            stage["sequence_length"] = longest.clone();
        }
    }
    let training = all["training"].as_object_mut().unwrap_or(&mut Map::new()).clone();
    all["training"] = Value::Object(training);
    all["training"]["batch_stages"] = Value::Array(stages);
    serde_json::from_value(all).map_err(|e| e.to_string())
}
