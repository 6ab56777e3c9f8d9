//! `phalanx check`: validates a config and prints the resolved plan, as a table or as JSON.

use crate::error::UserError;
use crate::pipeline::PipelinePlan;
use crate::plan::LayoutPlan;
use crate::print::err;
use crate::room;
use checkpoint_format::interval::{MAX_S, expected_mttf_s, lost_fraction, optimum_s};
use layout::{Axis, Memory, Mesh, memory_per_rank};
use model_spec::{FlopConvention, flops_per_token, num_parameters};
use rank_protocol::exit_code;
use run_config::batch_plan::{first_steps, step_batch};
use run_config::{ConfigErrors, DeviceKind, Loaded, Matmul, Note, NoteLevel, Place, RunConfig};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What a save is expected to keep training for, in seconds, until it is measured.
const EXPECTED_STALL_S: f64 = 0.2;

/// Validates `config` with `overrides` and prints the plan on standard output; problems go to
/// standard error, and with `json` to standard output too. With `schedule_svg` the pipeline's
/// schedule is drawn into that file. Returns the exit code: 0; 64 where the config is refused or
/// has no pipeline to draw; 1 where the file cannot be written.
pub fn check(config: &Path, overrides: &[String], json: bool, schedule_svg: Option<&Path>) -> i32 {
    let planned = RunConfig::load(config, overrides).and_then(plan);
    let (text, code) = match &planned {
        Ok(plan) if json => (format!("{:#}\n", plan.json()), exit_code::DONE),
        Ok(plan) => (plan.table(), exit_code::DONE),
        Err(errors) => {
            err!("error: {errors}");
            let text = if json { format!("{:#}\n", problems(errors)) } else { String::new() };
            (text, exit_code::CONFIG)
        }
    };
    // A reader that has gone away is no failure of the check.
    let _ = std::io::stdout().write_all(text.as_bytes());
    let drawn = match (&planned, schedule_svg) {
        (Ok(plan), Some(path)) => plan.write_svg(path),
        _ => Ok(()),
    };
    drawn.map_or_else(
        |error| {
            err!("{error}");
            error.code
        },
        |()| code,
    )
}

/// A valid config with what follows from it.
struct Plan {
    config: RunConfig,
    notes: Vec<Note>,
    mesh: Mesh,
    memory: Memory,
    /// `None` where there is one stage.
    pipeline: Option<PipelinePlan>,
    layout: LayoutPlan,
    parameters: u64,
    /// Tokens per sequence, and FLOP per token with full attention and with its causal half.
    flops: (usize, f64, f64),
    /// First step of each batch stage.
    first_steps: Vec<u64>,
    tokens: u64,
    /// Whether `cluster.ranks_per_node` was `auto` and read off this machine.
    is_auto: bool,
}

/// Fills in the ranks where the config leaves them to the machine, and does the sums.
fn plan(loaded: Loaded) -> Result<Plan, ConfigErrors> {
    let is_auto = loaded.config.cluster.ranks_per_node.is_none();
    let (config, mut notes) = if is_auto {
        let gpus = match loaded.config.cluster.device {
            DeviceKind::Cpu => 0,
            DeviceKind::Auto | DeviceKind::Cuda => crate::machine::num_gpus(),
        };
        let set = [format!("cluster.ranks_per_node={}", gpus.max(1))];
        let text = loaded.config.to_yaml();
        let filled = RunConfig::from_yaml_str(&text, Path::new("/"), &set)?;
        (filled.config, loaded.notes)
    } else {
        (loaded.config, loaded.notes)
    };
    let ranks = config.num_ranks().unwrap_or(1);
    let mesh = Mesh::new(&config.parallelism, ranks)
        .map_err(|error| conflict("parallelism", error.to_string()))?;
    notes.extend(missing_data(&config));
    let room = room::notes(&config, &mesh);
    notes.extend(room.map_err(|error| conflict("parallelism", error.to_string()))?);
    let stages = &config.training.batch_stages;
    let first_steps: Vec<u64> = first_steps(stages).into_iter().flatten().collect();
    let pipeline = PipelinePlan::new(&config, &mesh, &first_steps)
        .map_err(|error| conflict("parallelism.pipeline", error.to_string()))?;
    let layout = LayoutPlan::new(&config, &mesh, &first_steps)
        .map_err(|error| conflict("parallelism", error.to_string()))?;
    let longest = stages.iter().map(|stage| stage.sequence_length).max().unwrap_or(1);
    let flops = |convention| flops_per_token(&config.model, longest, convention);
    Ok(Plan {
        memory: memory_per_rank(&config, &mesh)
            .map_err(|error| conflict("parallelism", error.to_string()))?,
        pipeline,
        layout,
        parameters: num_parameters(&config.model),
        flops: (longest, flops(FlopConvention::FullAttention), flops(FlopConvention::CausalHalf)),
        first_steps,
        tokens: step_batch(stages, config.training.steps).end_token(),
        config,
        notes,
        mesh,
        is_auto,
    })
}

/// A layout that cannot be.
fn conflict(key: &str, message: String) -> ConfigErrors {
    ConfigErrors {
        problems: vec![run_config::Problem {
            kind: run_config::ProblemKind::Conflict,
            place: Place::Default,
            key: key.to_owned(),
            message,
            limit: None,
            hint: None,
        }],
    }
}

/// Warnings for a tokenizer or a source that is not there (yet).
fn missing_data(config: &RunConfig) -> Vec<Note> {
    let note = |key: String, path: &Path| Note {
        level: NoteLevel::Warning,
        place: Place::Default,
        key,
        message: format!("{} does not exist", path.display()),
    };
    let mut notes = Vec::new();
    if !config.data.tokenizer.exists() {
        notes.push(note("data.tokenizer".to_owned(), &config.data.tokenizer));
    }
    for (index, source) in config.data.sources.iter().enumerate() {
        let fixed = before_wildcard(&source.path);
        if !fixed.exists() {
            notes.push(note(format!("data.sources[{index}].path"), &fixed));
        }
    }
    notes
}

/// The leading folders of a glob that hold no wildcard.
fn before_wildcard(path: &str) -> PathBuf {
    let plain = |part: &std::ffi::OsStr| !part.to_string_lossy().contains(['*', '?', '[', '{']);
    Path::new(path).iter().take_while(|part| plain(part)).collect()
}

impl Plan {
    fn json(&self) -> Value {
        let (c, t) = (&self.config, &self.config.training);
        let stages: Vec<Value> = t
            .batch_stages
            .iter()
            .zip(&self.first_steps)
            .map(|(stage, first_step)| {
                json!({
                    "from_tokens": stage.from_tokens,
                    "first_step": first_step,
                    "global_batch": stage.global_batch,
                    "sequence_length": stage.sequence_length,
                    "tokens_per_step": stage.global_batch * stage.sequence_length,
                })
            })
            .collect();
        let mut memory = json!(self.memory);
        memory["total"] = json!(self.memory.total());
        json!({
            "valid": true,
            "name": c.name,
            "config_hash": c.hash(),
            "model_hash": c.model_hash(),
            "model": c.model,
            "parameters": self.parameters,
            "layout": {
                "ranks": self.mesh.size(),
                "ranks_from_this_machine": self.is_auto,
                "nodes": c.cluster.nodes,
                "tensor": self.mesh.degree(Axis::Tensor),
                "context": self.mesh.degree(Axis::Context),
                "pipeline": self.mesh.degree(Axis::Pipeline),
                "shard": self.mesh.degree(Axis::Shard),
                "replicate": self.mesh.degree(Axis::Replicate),
                "data_parallel": self.mesh.data_size(),
            },
            "precision": c.precision,
            "memory_per_rank": memory,
            "pipeline": self.pipeline.as_ref().map(PipelinePlan::json),
            "plan": self.layout.parameters_json(),
            "communication": self.layout.communication_json(),
            "flops_per_token": {
                "sequence_length": self.flops.0,
                "full_attention": self.flops.1,
                "causal_half": self.flops.2,
            },
            "steps": t.steps,
            "tokens": self.tokens,
            "batch_stages": stages,
            "checkpoints": self.num_checkpoints(),
            "checkpoint_interval_s": self.expected_interval_s().map(|(seconds, _)| seconds),
            "notes": self.notes.iter().map(|note| json!({
                "level": match note.level {
                    NoteLevel::Warning => "warning",
                    NoteLevel::Info => "note",
                },
                "key": note.key,
                "message": note.message,
            })).collect::<Vec<_>>(),
        })
    }

    /// Checkpoints written over the run, where that is known; the last step is always saved.
    fn num_checkpoints(&self) -> Option<u64> {
        let (steps, every) = (self.config.training.steps, self.config.checkpoint.every_steps?);
        Some(match every {
            0 => 1,
            every => steps / every + u64::from(!steps.is_multiple_of(every)),
        })
    }

    fn checkpoint_rows(&self, row: &mut impl FnMut(&str, String)) {
        let c = &self.config.checkpoint;
        let kept = format!("the newest {} kept", c.keep_last);
        match (c.every_steps, self.num_checkpoints()) {
            (Some(0), _) => row("checkpoints", format!("at the end, 1 in all, {kept}")),
            (Some(every), Some(written)) => {
                row("checkpoints", format!("every {every} steps, {written} in all, {kept}"));
            }
            _ => row("checkpoints", format!("as often as loses the least time, {kept}")),
        }
        if let Some(expected) = self.expected_interval_s() {
            row("", self.expected_interval(expected));
        }
        if c.memory.every_steps > 0 {
            let (every, folder) = (c.memory.every_steps, c.memory.folder.display());
            row("", format!("kept in memory every {every} steps, in {folder}"));
        }
        if let Some(remote) = &c.remote {
            row("", format!("copied to {remote}/{}", self.config.name));
        }
    }

    /// What `checkpoint.every_steps: auto` comes to before anything is measured, and the mean time
    /// to failure that it follows from, in seconds; `None`: the config says how many steps.
    fn expected_interval_s(&self) -> Option<(f64, f64)> {
        let c = &self.config.checkpoint;
        let mttf_s = expected_mttf_s(self.config.cluster.nodes, c.failures_per_node_day);
        let interval_s = optimum_s(EXPECTED_STALL_S, mttf_s).min(MAX_S);
        c.every_steps.is_none().then_some((interval_s, mttf_s))
    }

    fn expected_interval(&self, (interval_s, mttf_s): (f64, f64)) -> String {
        let nodes = self.config.cluster.nodes;
        let short = |s: f64| crate::time::short(Duration::try_from_secs_f64(s).unwrap_or_default());
        let lost = 100.0 * lost_fraction(interval_s, EXPECTED_STALL_S, mttf_s);
        format!(
            "a failure every {} on {nodes} node(s) and a stall of {EXPECTED_STALL_S} s: every {}, \
             which loses {lost:.2} %",
            short(mttf_s),
            short(interval_s)
        )
    }

    fn table(&self) -> String {
        let mut out = String::new();
        let mut row = |name: &str, value: String| {
            let _ = writeln!(out, "{name:<18}{value}");
        };
        row("run", format!("{}  (config {})", self.config.name, &self.config.hash()[..12]));
        self.model_rows(&mut row);
        self.layout_rows(&mut row);
        if let Some(pipeline) = &self.pipeline {
            pipeline.rows(&mut row);
        }
        self.memory_rows(&mut row);
        self.training_rows(&mut row);
        if let Some(pipeline) = &self.pipeline {
            out.push_str(&pipeline.drawing());
        }
        out.push_str(&self.layout.tables());
        for note in &self.notes {
            let _ = writeln!(out, "{note}");
        }
        out
    }

    /// Draws the pipeline's schedule into the file `path`.
    fn write_svg(&self, path: &Path) -> Result<(), UserError> {
        let pipeline = self.pipeline.as_ref().ok_or_else(|| {
            UserError::usage("--schedule-svg: there is no pipeline to draw, the model is one stage")
                .hint("set parallelism.pipeline.stages to 2 or more")
        })?;
        pipeline.write_svg(path)
    }

    fn model_rows(&self, row: &mut impl FnMut(&str, String)) {
        let m = &self.config.model;
        let preset = m.preset.as_deref().unwrap_or("custom");
        let (layers, dim, ffn) = (m.layers, m.dim, m.ffn_dim);
        row("model", format!("{preset}: {layers} layers, dim {dim}, ffn {ffn}"));
        let heads = format!("{} heads, {} kv heads of {}", m.heads, m.kv_heads, m.head_dim);
        let tied = if m.tied_embeddings { "tied" } else { "untied" };
        row("", format!("{heads}; vocabulary {}, {tied}", grouped(m.vocab_size as u64)));
        row("parameters", grouped(self.parameters));
    }

    fn layout_rows(&self, row: &mut impl FnMut(&str, String)) {
        let c = &self.config;
        let source = if self.is_auto { ", as this machine has them" } else { "" };
        let ranks = self.mesh.size();
        row("ranks", format!("{ranks} on {} node(s){source}", c.cluster.nodes));
        let degree = |axis| self.mesh.degree(axis);
        row(
            "layout",
            format!(
                "tensor {} x context {} x pipeline {} x shard {} x replicate {}",
                degree(Axis::Tensor),
                degree(Axis::Context),
                degree(Axis::Pipeline),
                degree(Axis::Shard),
                degree(Axis::Replicate)
            ),
        );
        let mut precision = format!("{:?}", c.precision.compute).to_lowercase();
        if c.precision.matmul == Matmul::Fp8 {
            precision.push_str("; products of blocks in FP8 (e4m3, a scale a row)");
        }
        row("precision", precision);
    }

    fn memory_rows(&self, row: &mut impl FnMut(&str, String)) {
        let m = &self.memory;
        let kinds = [
            ("weights", m.weights),
            ("master", m.master),
            ("gradients", m.gradients),
            ("optimizer", m.optimizer),
            ("activations ~", m.activations),
            ("logits ~", m.logits),
            ("checkpoint", m.checkpoint),
            ("total ~", m.total()),
        ];
        for (index, (kind, bytes)) in kinds.into_iter().enumerate() {
            let name = if index == 0 { "memory per rank" } else { "" };
            row(name, format!("{kind:<14}{:>14}", gibibytes(bytes)));
        }
        let (length, full, half) = self.flops;
        row("FLOP per token", format!("{full:>9.3e}  full attention, at {length} tokens"));
        row("", format!("{half:>9.3e}  causal half, at {length} tokens"));
    }

    fn training_rows(&self, row: &mut impl FnMut(&str, String)) {
        let (c, t) = (&self.config, &self.config.training);
        row("tokens", grouped(self.tokens));
        row("steps", grouped(t.steps));
        let data = self.mesh.data_size().max(1);
        for (index, (stage, first)) in t.batch_stages.iter().zip(&self.first_steps).enumerate() {
            let tokens = grouped((stage.global_batch * stage.sequence_length) as u64);
            let micro = stage.global_batch / data / t.micro_batch.max(1);
            let (batch, length) = (stage.global_batch, stage.sequence_length);
            row(
                if index == 0 { "batch" } else { "" },
                format!(
                    "from step {}: {batch} x {length} = {tokens} tokens, {micro} micro-batch(es)",
                    grouped(*first)
                ),
            );
        }
        self.checkpoint_rows(row);
        let validation = match c.validation.every_steps {
            0 => "never".to_owned(),
            every => format!("every {every} steps, {} batches", c.validation.steps),
        };
        row("validation", validation);
    }
}

/// The problems, for programs.
fn problems(errors: &ConfigErrors) -> Value {
    let one = |problem: &run_config::Problem| {
        let (file, line, column) = match &problem.place {
            Place::File { path, line, column } => (path.clone(), Some(*line), Some(*column)),
            Place::WholeFile(path) => (path.clone(), None, None),
            Place::Set(_) | Place::Default => (None, None, None),
        };
        json!({
            "place": problem.place.to_string(),
            "file": file,
            "line": line,
            "column": column,
            "key": problem.key,
            "message": problem.message,
            "limit": problem.limit,
            "hint": problem.hint,
        })
    };
    json!({"valid": false, "problems": errors.problems.iter().map(one).collect::<Vec<_>>()})
}

/// `8030261248` as `8,030,261,248`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Bytes in GiB, or in MiB below one.
pub(crate) fn gibibytes(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    if mib >= 1024.0 { format!("{:.2} GiB", mib / 1024.0) } else { format!("{mib:.2} MiB") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(sets: &[&str]) -> Plan {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/runs/llama3-8b.yaml");
        let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
        plan(RunConfig::load(&path, &sets).unwrap()).unwrap()
    }

    #[test]
    fn the_table_says_what_follows_from_the_config() {
        let text = planned(&["training.steps=1000", "training.tokens=null"]).table();
        for part in [
            "8,030,261,248",
            "tensor 1 x context 1 x pipeline 1 x shard 1 x replicate 8",
            "14.96 GiB", // 2 bytes a weight
            "59.83 GiB", // 8 bytes of optimizer state
            "5.791e10  full attention, at 8192 tokens",
            "5.147e10  causal half",
            "4,194,304,000",
            "from step 1: 512 x 8192 = 4,194,304 tokens, 64 micro-batch(es)",
            "every 500 steps, 2 in all, the newest 3 kept",
            "the warm-up of 2000 steps is longer than the 1000 steps",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }

    #[test]
    fn the_json_holds_the_same() {
        let json = planned(&[]).json();
        assert_eq!(json["valid"], true);
        assert_eq!(json["parameters"], 8_030_261_248_u64);
        assert_eq!(json["layout"]["data_parallel"], 8);
        assert_eq!(json["memory_per_rank"]["weights"], 2 * 8_030_261_248_u64);
        assert_eq!(json["batch_stages"][0]["tokens_per_step"], 4_194_304);
        assert_eq!(json["notes"][0]["key"], "data.tokenizer");
    }

    #[test]
    fn a_pipeline_is_part_of_the_plan() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/runs/llama3-8b.yaml");
        let mut loaded = RunConfig::load(&path, &[]).unwrap();
        loaded.config.parallelism.pipeline.stages = 4;
        let plan = plan(loaded).unwrap();
        let table = plan.table();
        assert!(table.contains("\npipeline          1f1b, 4 stages\n"), "{table}");
        assert!(table.contains("\nblocks per chunk  4 times 8;"), "{table}");
        assert!(table.contains("\nstage 3  "), "{table}");
        assert_eq!(plan.json()["pipeline"]["memory_per_stage"][0], plan.memory.total());
        // 512 sequences on 2 replicas.
        assert_eq!(plan.json()["pipeline"]["steps"][0]["micro_batches"], 256);
    }

    #[test]
    fn without_a_pipeline_there_is_nothing_to_draw() {
        let plan = planned(&[]);
        assert!(plan.json()["pipeline"].is_null());
        let error = plan.write_svg(Path::new("/nonexistent/a.svg")).unwrap_err();
        assert_eq!(error.code, 64);
        assert!(error.to_string().contains("the model is one stage"), "{error}");
    }

    /// A machine of thousands of GiB would have room.
    #[test]
    fn ranks_that_do_not_fit_this_machine_are_told_of() {
        let preset = "model={preset: llama3-405b}";
        let cluster = "cluster={ranks_per_node: 2, device: cpu}";
        let table = planned(&[preset, cluster]).table();
        let warning = "\nwarning: cluster.ranks_per_node: 2 ranks x ";
        assert!(table.contains(warning) && table.contains(" and this "), "{table}");
        let gpus = planned(&[preset, "cluster={ranks_per_node: 2, device: cuda}"]).table();
        assert!(!gpus.contains(warning), "no GPU is here: {gpus}");
    }

    #[test]
    fn a_refused_config_exits_64() {
        assert_eq!(check(Path::new("/nonexistent.yaml"), &[], true, None), 64);
    }

    #[test]
    fn auto_ranks_are_those_of_the_machine() {
        let plan = planned(&["cluster={ranks_per_node: auto, device: cpu}"]);
        assert!(plan.is_auto);
        assert_eq!(plan.mesh.size(), 1);
    }

    #[test]
    fn numbers_are_grouped() {
        let check = |number, expected| assert_eq!(grouped(number), expected);
        check(0, "0");
        check(999, "999");
        check(1000, "1,000");
        check(8_030_261_248, "8,030,261,248");
    }
}
