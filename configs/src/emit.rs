//! A resolved config as YAML text and as hashes.

use crate::resolved::*;
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::fmt::{Display, Write};

impl RunConfig {
    /// The resolved config as YAML, with every key given; it loads again to an equal config.
    pub fn to_yaml(&self) -> String {
        let mut y = Yaml { text: String::new(), indent: 0 };
        y.line("# The resolved config of a run: every default filled in, every path absolute.");
        y.key("name", quote(&self.name));
        y.key("seed", self.seed);
        y.section("model", |y| model(y, &self.model));
        y.section("data", |y| data(y, self));
        y.section("parallelism", |y| parallelism(y, &self.parallelism));
        y.section("precision", |y| {
            y.key("compute", word(&self.precision.compute));
            y.key("matmul", word(&self.precision.matmul));
            y.key("attention", word(&self.precision.attention));
        });
        y.section("training", |y| training(y, &self.training));
        y.section("numeric", |y| numeric(y, &self.numeric));
        y.section("optimizer", |y| optimizer(y, &self.optimizer));
        y.section("schedule", |y| {
            y.key("kind", word(&self.schedule.kind));
            y.key("warmup_steps", self.schedule.warmup_steps);
            y.key("final_fraction", float(self.schedule.final_fraction));
            y.key("decay_fraction", float(self.schedule.decay_fraction));
        });
        y.section("validation", |y| {
            y.key("every_steps", self.validation.every_steps);
            y.key("steps", self.validation.steps);
        });
        y.section("checkpoint", |y| {
            y.key("every_steps", or_auto(self.checkpoint.every_steps));
            y.key("failures_per_node_day", float(self.checkpoint.failures_per_node_day));
            y.key("keep_last", self.checkpoint.keep_last);
            y.key("keep_every_steps", self.checkpoint.keep_every_steps);
            y.key("remote", self.checkpoint.remote.as_deref().map_or("null".to_owned(), quote));
            let memory = &self.checkpoint.memory;
            y.section("memory", |y| {
                y.key("every_steps", memory.every_steps);
                y.key("folder", quote(&memory.folder.to_string_lossy()));
            });
        });
        y.section("restart", |y| {
            y.key("max_no_progress", self.restart.max_no_progress);
            y.key("max_per_hour", self.restart.max_per_hour);
            y.key("hang_timeout_s", self.restart.hang_timeout_s);
            y.key("store", quote(&self.restart.store.to_string()));
            y.key("health_check", self.restart.health_check);
            y.key("keep_processes", self.restart.keep_processes);
            y.key("warm_spares", self.restart.warm_spares);
            let elastic = &self.restart.elastic;
            y.section("elastic", |y| {
                let least = elastic.min_replicas.map_or("null".to_owned(), |n| n.to_string());
                y.key("min_replicas", least);
                y.key("wait_s", elastic.wait_s);
                y.key("grow_pause_s", elastic.grow_pause_s);
            });
        });
        y.section("cluster", |y| {
            y.key("kind", word(&self.cluster.kind));
            y.key("nodes", self.cluster.nodes);
            y.key("ranks_per_node", or_auto(self.cluster.ranks_per_node));
            y.key("threads_per_rank", or_auto(self.cluster.threads_per_rank));
            y.key("device", word(&self.cluster.device));
            y.key("expandable_segments", self.cluster.expandable_segments);
            y.key("timeout_s", self.cluster.timeout_s);
            y.key("check_collectives", word(&self.cluster.check_collectives));
        });
        y.section("metrics", |y| y.key("tensorboard", self.metrics.tensorboard));
        y.text
    }

    /// SHA-256 in hex of the whole config's canonical form (compact JSON, keys in the order of the
    /// types).
    pub fn hash(&self) -> String {
        hash_of(self)
    }

    /// As [`ModelConfig::hash`].
    pub fn model_hash(&self) -> String {
        self.model.hash()
    }
}

impl ModelConfig {
    /// SHA-256 in hex of what defines the model's function: its dimensions, not how it starts.
    pub fn hash(&self) -> String {
        hash_of(&Self { preset: None, init_from: None, init_std: 0.0, ..self.clone() })
    }
}

/// Serializing these plain structures to memory cannot fail.
fn hash_of(value: &impl Serialize) -> String {
    let bytes = serde_json::to_vec(value).unwrap_or_default();
    Sha256::digest(bytes).iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// A growing text.
struct Yaml {
    text: String,
    indent: usize,
}

impl Yaml {
    fn line(&mut self, line: &str) {
        let _ = writeln!(self.text, "{:indent$}{line}", "", indent = self.indent);
    }

    fn key(&mut self, key: &str, value: impl Display) {
        self.line(&format!("{key}: {value}"));
    }

    fn section(&mut self, key: &str, body: impl FnOnce(&mut Self)) {
        self.line(&format!("{key}:"));
        self.indent += 2;
        body(self);
        self.indent -= 2;
    }
}

fn model(y: &mut Yaml, m: &ModelConfig) {
    y.key("preset", m.preset.as_deref().map_or("null".to_owned(), quote));
    y.key("dim", m.dim);
    y.key("layers", m.layers);
    y.key("heads", m.heads);
    y.key("kv_heads", m.kv_heads);
    y.key("head_dim", m.head_dim);
    y.key("ffn_dim", m.ffn_dim);
    y.key("vocab_size", m.vocab_size);
    y.key("norm_eps", float(m.norm_eps));
    y.key("tied_embeddings", m.tied_embeddings);
    y.key("init_std", float(m.init_std));
    y.section("rope", |y| {
        y.key("theta", float(m.rope.theta));
        y.key("frequencies", word(&m.rope.frequencies));
        match &m.rope.scaling {
            None => y.key("scaling", "null"),
            Some(RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_context,
            }) => y.section("scaling", |y| {
                y.key("kind", "llama3");
                y.key("factor", float(*factor));
                y.key("low_freq_factor", float(*low_freq_factor));
                y.key("high_freq_factor", float(*high_freq_factor));
                y.key("original_context", original_context);
            }),
        }
    });
    let init_from = m.init_from.as_ref().map(|from| match from {
        InitFrom::HuggingFace(dir) => format!("hf:{}", dir.display()),
        InitFrom::Meta(dir) => format!("meta:{}", dir.display()),
        InitFrom::Run { run, step: None } => format!("run:{run}"),
        InitFrom::Run { run, step: Some(step) } => format!("run:{run}@{step}"),
    });
    y.key("init_from", init_from.as_deref().map_or("null".to_owned(), quote));
}

fn data(y: &mut Yaml, config: &RunConfig) {
    let d = &config.data;
    y.key("tokenizer", quote(&d.tokenizer.to_string_lossy()));
    y.line("sources:");
    for source in &d.sources {
        y.line(&format!("  - name: {}", quote(&source.name)));
        y.line(&format!("    path: {}", quote(&source.path)));
        y.line(&format!("    weight: {}", float(source.weight)));
    }
    let longest = config.training.batch_stages.iter().map(|stage| stage.sequence_length).max();
    y.key("sequence_length", longest.unwrap_or(1));
    y.key("packing", word(&d.packing));
    y.key("document_mask", d.document_mask);
    y.key("shuffle", d.shuffle);
    y.key("validation_fraction", float(d.validation_fraction));
    y.key("buffer_mib", d.buffer_mib);
    if d.skip_samples.is_empty() {
        return y.key("skip_samples", "null");
    }
    y.line("skip_samples:");
    for samples in &d.skip_samples {
        y.line(&format!("  - {{first: {}, last: {}}}", samples.first, samples.last));
    }
}

fn parallelism(y: &mut Yaml, p: &Parallelism) {
    y.key("tensor", p.tensor);
    y.key("sequence", p.sequence);
    y.key("context", p.context);
    y.section("pipeline", |y| {
        y.key("stages", p.pipeline.stages);
        y.key("schedule", word(&p.pipeline.schedule));
        y.key("virtual_stages", p.pipeline.virtual_stages);
        y.key("contiguous_micro_batches", or_auto(p.pipeline.contiguous_micro_batches));
    });
    y.section("shard", |y| {
        y.key("ranks", p.shard.ranks);
        y.key("level", word(&p.shard.level));
        y.key("reshard_after_forward", p.shard.reshard_after_forward);
    });
    y.key("replicate", or_auto(p.replicate));
    y.key("recompute", word(&p.recompute));
}

fn training(y: &mut Yaml, t: &Training) {
    y.key("steps", t.steps);
    match t.batch_stages.as_slice() {
        [only] => y.key("global_batch", only.global_batch),
        stages => {
            y.line("global_batch:");
            for stage in stages {
                y.line(&format!("  - from_tokens: {}", stage.from_tokens));
                y.line(&format!("    global_batch: {}", stage.global_batch));
                y.line(&format!("    sequence_length: {}", stage.sequence_length));
            }
        }
    }
    y.key("micro_batch", t.micro_batch);
    y.key("clip_norm", t.clip_norm.map_or("null".to_owned(), float));
    y.key("max_skipped_steps", t.max_skipped_steps);
}

fn numeric(y: &mut Yaml, n: &Numeric) {
    let or_null = |limit: Option<f64>| limit.map_or("null".to_owned(), float);
    y.key("window", n.window);
    y.key("loss_zscore", or_null(n.loss_zscore));
    y.key("grad_norm_zscore", or_null(n.grad_norm_zscore));
    y.key("on_spike", word(&n.on_spike));
    y.key("on_non_finite", word(&n.on_non_finite));
    y.key("replay", n.replay);
    y.key("max_interventions", n.max_interventions);
    y.key("interventions_within_steps", n.interventions_within_steps);
}

fn optimizer(y: &mut Yaml, o: &Optimizer) {
    y.key("kind", word(&o.kind));
    y.key("learning_rate", float(o.learning_rate));
    y.key("betas", format!("[{}, {}]", float(o.betas[0]), float(o.betas[1])));
    y.key("eps", float(o.eps));
    y.key("weight_decay", float(o.weight_decay));
    y.key("decay_norms", o.decay_norms);
}

/// Reads back to the same bits.
fn float(number: f64) -> String {
    format!("{number:?}")
}

fn or_auto(number: Option<impl Display>) -> String {
    number.map_or("auto".to_owned(), |number| number.to_string())
}

/// The serde name of a unit variant.
fn word(choice: &impl Serialize) -> String {
    match serde_json::to_value(choice) {
        Ok(serde_json::Value::String(word)) => word,
        _ => String::new(),
    }
}

/// A double-quoted scalar; what an editor might not show is escaped.
fn quote(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => {
                out.push('\\');
                out.push(c);
            }
            ' '..='~' => out.push(c),
            c if c.is_alphanumeric() => out.push(c),
            c if (c as u32) > 0xffff => {
                let _ = write!(out, "\\U{:08x}", c as u32);
            }
            c => {
                let _ = write!(out, "\\u{:04x}", c as u32);
            }
        }
    }
    out.push('"');
    out
}
