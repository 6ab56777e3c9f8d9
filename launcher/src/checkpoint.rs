//! `phalanx checkpoint`: list, verify, compare, export and import, without torch.

use crate::error::UserError;
use crate::print::{err, out};
use crate::remote::store::Stored;
use crate::remote::{self, Place};
use crate::runs;
use crate::supervisor::restore::is_current;
use checkpoint_format::diff::diff;
use checkpoint_format::export::{ExportOptions, export_hf};
use checkpoint_format::hf::HfSource;
use checkpoint_format::meta::MetaSource;
use checkpoint_format::scan::{Damaged, Found, Scan, scan};
use checkpoint_format::source::CheckpointSource;
use checkpoint_format::{Checkpoint, Dtype, FormatError, WeightSource, import::import, names};
use clap::ValueEnum;
use rank_protocol::{RunDir, exit_code};
use run_config::RunConfig;
use serde::Serialize;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// `max_position_embeddings` where neither the run nor the imported model says it: Llama 3's.
const MAX_POSITIONS: usize = 8192;

/// What `phalanx checkpoint` can do.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum CheckpointCommand {
    /// List the checkpoints of a run, damaged ones with the reason.
    List {
        /// The run's directory or name.
        run: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Read every byte and check it; exit 1 where anything is damaged.
    Verify {
        /// RUN (all its checkpoints), RUN@STEP or a checkpoint's path.
        target: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Compare all tensors of two checkpoints bit by bit; exit 1 where they differ.
    Diff {
        /// RUN (its newest), RUN@STEP or a checkpoint's path.
        a: String,
        /// What to compare it with.
        b: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Write the weights as a folder that transformers reads.
    Export {
        /// RUN (its newest), RUN@STEP or a checkpoint's path.
        target: String,
        /// Format.
        #[arg(long, value_enum)]
        format: ExportFormat,
        /// Folder to make.
        #[arg(long)]
        out: PathBuf,
        /// Type of the weights; as stored where not given (master weights, where there are any).
        #[arg(long, value_enum)]
        dtype: Option<ExportDtype>,
        /// Largest file, such as 5GB or 500MB.
        #[arg(long, default_value = "5GB", value_parser = parse_size)]
        max_shard_size: u64,
        /// tokenizer.json to put beside; the run's where not given.
        #[arg(long)]
        tokenizer: Option<PathBuf>,
    },
    /// Make a run whose checkpoint of step 0 holds another project's weights, bit for bit.
    Import {
        /// Format of the folder.
        #[arg(long, value_enum)]
        format: ImportFormat,
        /// Folder with the weights.
        dir: PathBuf,
        /// Directory of the run to make; name it in `model.init_from: run:DIR`.
        #[arg(long)]
        out: PathBuf,
    },
}

/// Formats to export to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ExportFormat {
    /// Hugging Face.
    Hf,
}

/// Formats to import from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ImportFormat {
    /// Hugging Face: config.json and safetensors.
    Hf,
    /// Meta: params.json and consolidated.*.pth or .safetensors.
    Meta,
}

/// Types of exported weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ExportDtype {
    /// BF16.
    Bf16,
    /// FP16.
    Fp16,
    /// FP32.
    Fp32,
    /// FP64.
    Fp64,
}

type Outcome = Result<i32, UserError>;

/// Carries out a command; the process's exit code.
pub fn run(command: CheckpointCommand) -> i32 {
    let outcome = match command {
        CheckpointCommand::List { run, json } => list(&run, json),
        CheckpointCommand::Verify { target, json } => verify(&target, json),
        CheckpointCommand::Diff { a, b, json } => compare(&a, &b, json),
        CheckpointCommand::Export { target, format: _, out, dtype, max_shard_size, tokenizer } => {
            export(&target, &out, dtype, max_shard_size, tokenizer)
        }
        CheckpointCommand::Import { format, dir, out } => import_to(format, &dir, &out),
    };
    outcome.unwrap_or_else(|error| {
        err!("{error}");
        error.code
    })
}

fn list(run: &str, is_json: bool) -> Outcome {
    let run = find_run(run)?;
    let Scan { committed, damaged } = scan_run(&run)?;
    let (place, stored) = stored_of(&run);
    let in_store = |step: u64, generation: u64| {
        stored.iter().any(|s| (s.target.step, s.target.generation) == (step, generation))
    };
    let mut all: Vec<Listed> = Vec::new();
    for Found { step, generation, bytes, path } in &committed {
        let mut tiers = vec!["local"];
        tiers.extend(in_store(*step, *generation).then_some("remote"));
        let (path, bytes) = (path.display().to_string(), Some(*bytes));
        let generation = Some(*generation);
        all.push(Listed { step: *step, generation, bytes, path, damaged: None, tiers });
    }
    for Damaged { step, path, reason, .. } in &damaged {
        let (path, damaged) = (path.display().to_string(), Some(reason.clone()));
        let (generation, bytes, tiers) = (None, None, vec!["local"]);
        all.push(Listed { step: *step, generation, bytes, path, damaged, tiers });
    }
    for stored in &stored {
        let (step, generation) = (stored.target.step, stored.target.generation);
        if committed.iter().any(|found| (found.step, found.generation) == (step, generation)) {
            continue;
        }
        let folder = names::remote_folder(step, generation);
        let (path, bytes) = (format!("{place}/{folder}"), Some(stored.bytes));
        let (generation, tiers) = (Some(generation), vec!["remote"]);
        all.push(Listed { step, generation, bytes, path, damaged: None, tiers });
    }
    all.sort_by_key(|listed| (listed.step, listed.generation));
    if is_json {
        out!("{}", json!({ "run": run.root(), "checkpoints": all }));
        return Ok(exit_code::DONE);
    }
    if all.is_empty() {
        out!("no checkpoints in {}", run.root().display());
    }
    for Listed { step, generation, bytes, path, damaged, tiers } in &all {
        let size = bytes.map_or(String::new(), human_bytes);
        let generation = generation.unwrap_or(0);
        let tiers = tiers.join("+");
        match damaged {
            None => {
                out!("step {step:<8} generation {generation:<4} {size:>9}  {tiers:<12}  {path}")
            }
            Some(reason) => out!("step {step:<8} DAMAGED: {reason}  {path}"),
        }
    }
    Ok(exit_code::DONE)
}

/// A line of the list.
#[derive(Clone, Debug, Serialize)]
struct Listed {
    step: u64,
    path: String,
    generation: Option<u64>,
    bytes: Option<u64>,
    /// What is wrong with it.
    damaged: Option<String>,
    /// `local`, `remote`.
    tiers: Vec<&'static str>,
}

/// The complete checkpoints of a run in its object store, and where that is; none, where it has no
/// such store or it cannot be read, which is said.
fn stored_of(run: &RunDir) -> (String, Vec<Stored>) {
    let config = RunConfig::load(&run.config(), &[]).ok().map(|loaded| loaded.config);
    let run_id = || runs::history(run).ok().and_then(|history| history.run_id);
    let place = config.as_ref().and_then(|config| Place::of(config, run_id()));
    let Some(place) = place else { return (String::new(), Vec::new()) };
    (place.describe(), remote::list_or_say(&place))
}

fn verify(target: &str, is_json: bool) -> Outcome {
    let paths = match resolve(target)? {
        Target::Checkpoint(path) => vec![path],
        Target::Run(run) => {
            let Scan { committed, damaged } = scan_run(&run)?;
            let good = committed.into_iter().map(|found| (found.step, found.path));
            let mut all: Vec<_> =
                good.chain(damaged.into_iter().map(|bad| (bad.step, bad.path))).collect();
            all.sort();
            all.into_iter().map(|(_, path)| path).collect()
        }
    };
    if paths.is_empty() {
        return Err(UserError::usage(format!("run {target} has no checkpoint to verify")));
    }
    let mut code = exit_code::DONE;
    let mut results = Vec::new();
    for path in paths {
        match Checkpoint::open(&path).and_then(|checkpoint| checkpoint.verify()) {
            Ok(verified) => {
                let size = human_bytes(verified.bytes);
                results.push(json!({ "path": path, "good": true, "files": verified.files,
                    "tensors": verified.tensors, "bytes": verified.bytes }));
                if !is_json {
                    let (tensors, files) = (verified.tensors, verified.files);
                    out!("good     {} ({tensors} tensors, {files} files, {size})", path.display());
                }
            }
            Err(error) => {
                code = exit_code::FAILED;
                results.push(json!({ "path": path, "good": false, "reason": error.to_string() }));
                if !is_json {
                    out!("DAMAGED  {error}");
                }
            }
        }
    }
    if is_json {
        out!("{}", json!({ "checkpoints": results }));
    }
    Ok(code)
}

fn compare(a: &str, b: &str, is_json: bool) -> Outcome {
    let (a, b) = (open(a)?, open(b)?);
    let found = diff(&a, &b).map_err(failed)?;
    let code = if found.is_equal() { exit_code::DONE } else { exit_code::FAILED };
    if is_json {
        let report =
            json!({ "equal": found.is_equal(), "a": a.path(), "b": b.path(), "diff": found });
        out!("{report}");
        return Ok(code);
    }
    if found.is_equal() {
        out!("equal: {} tensors, {} elements, bit for bit", found.compared, found.elements);
        return Ok(code);
    }
    out!("{} and {} differ", a.path().display(), b.path().display());
    if let Some(first) = found.different.first() {
        out!("first: {}: {}", first.name, first.what);
        let max = found.different.iter().filter_map(|tensor| tensor.max_abs_difference);
        let most =
            max.reduce(f64::max).map_or(String::new(), |max| format!(", by at most {max:e}"));
        out!("{} of {} tensors differ{most}", found.different.len(), found.compared);
    }
    for (names, path) in [(&found.only_in_a, a.path()), (&found.only_in_b, b.path())] {
        if let Some(name) = names.first() {
            out!("{} tensors are only in {}, the first {name}", names.len(), path.display());
        }
    }
    Ok(code)
}

fn export(
    target: &str,
    out: &Path,
    dtype: Option<ExportDtype>,
    max_shard_bytes: u64,
    tokenizer: Option<PathBuf>,
) -> Outcome {
    if out.read_dir().is_ok_and(|mut entries| entries.next().is_some()) {
        let error = UserError::usage(format!("{} is not empty", out.display()));
        return Err(error.hint("name a folder that does not exist"));
    }
    let checkpoint = open(target)?;
    let run = checkpoint.path().parent().and_then(Path::parent).map(RunDir::new);
    let config = run.as_ref().map(RunDir::config).filter(|path| path.is_file());
    let config = config.and_then(|path| RunConfig::load(&path, &[]).ok()).map(|l| l.config);
    let extra = checkpoint.state().extra.clone();
    let source = CheckpointSource::new(checkpoint);
    let model = source.model().cloned().or_else(|| config.as_ref().map(|c| c.model.clone()));
    let model = model.ok_or_else(|| {
        UserError::failed(format!(
            "{} does not say which model it holds, and no readable config.yaml is beside it",
            source.path().display()
        ))
    })?;
    let longest = config.as_ref().and_then(|config| {
        config.training.batch_stages.iter().map(|stage| stage.sequence_length).max()
    });
    let imported = extra["max_positions"].as_u64().and_then(|n| usize::try_from(n).ok());
    let ids = extra["eos_token_ids"].as_array().into_iter().flatten();
    let options = ExportOptions {
        model,
        dtype: dtype.map(ExportDtype::dtype),
        max_shard_bytes,
        max_positions: imported.or(longest).unwrap_or(MAX_POSITIONS),
        bos_token_id: extra["bos_token_id"].as_u64().and_then(|id| u32::try_from(id).ok()),
        eos_token_ids: ids.filter_map(|id| u32::try_from(id.as_u64()?).ok()).collect(),
        tokenizer: tokenizer.or_else(|| tokenizer_of(run.as_ref(), config.as_ref())),
    };
    let exported = export_hf(&source, out, &options).map_err(failed)?;
    out!(
        "wrote {} tensors, {} in {} files, to {}",
        exported.tensors,
        human_bytes(exported.bytes),
        exported.files,
        out.display()
    );
    if options.tokenizer.is_none() {
        err!("note: no tokenizer.json was found beside the run; --tokenizer names one");
    }
    Ok(exit_code::DONE)
}

/// An imported run keeps its tokenizer beside; a trained one names it in its config.
fn tokenizer_of(run: Option<&RunDir>, config: Option<&RunConfig>) -> Option<PathBuf> {
    let beside = run.map(|run| run.root().join("tokenizer.json"));
    let named = config.map(|config| config.data.tokenizer.clone());
    let is_json = |path: &PathBuf| path.is_file() && path.extension().is_some_and(|e| e == "json");
    [beside, named].into_iter().flatten().find(is_json)
}

fn import_to(format: ImportFormat, dir: &Path, out: &Path) -> Outcome {
    let bad_input = |error: FormatError| UserError::usage(error.to_string());
    let (source, extra): (Box<dyn WeightSource>, Value) = match format {
        ImportFormat::Hf => {
            let source = HfSource::open(dir).map_err(bad_input)?;
            let said = source.extras();
            let extra = json!({ "max_positions": said.max_positions,
                "bos_token_id": said.bos_token_id, "eos_token_ids": said.eos_token_ids });
            (Box::new(source), extra)
        }
        ImportFormat::Meta => (Box::new(MetaSource::open(dir).map_err(bad_input)?), Value::Null),
    };
    let (path, bytes) = import(source.as_ref(), out, extra).map_err(|error| match error {
        FormatError::Refused { .. } => bad_input(error),
        other => failed(other),
    })?;
    for name in ["tokenizer.json", "tokenizer.model"] {
        let tokenizer = dir.join(name);
        if tokenizer.is_file() {
            std::fs::copy(&tokenizer, out.join(name)).map_err(|error| {
                UserError::failed(format!("cannot copy {}: {error}", tokenizer.display()))
            })?;
        }
    }
    out!("wrote {} tensors, {} to {}", source.names().len(), human_bytes(bytes), path.display());
    out!("train from it with model.init_from: run:{}", out.display());
    Ok(exit_code::DONE)
}

/// What a user named.
enum Target {
    /// One checkpoint's folder.
    Checkpoint(PathBuf),
    /// A run, and so its newest checkpoint or all of them.
    Run(RunDir),
}

/// `RUN`, `RUN@STEP` or the path of a checkpoint.
fn resolve(target: &str) -> Result<Target, UserError> {
    let path = Path::new(target);
    let name = path.canonicalize().ok();
    let name = name.as_ref().and_then(|path| path.file_name()).and_then(|name| name.to_str());
    let is_checkpoint = name.and_then(names::parse_step_folder).is_some()
        || path.join(names::COMMIT).exists()
        || path.join(names::MANIFEST).exists();
    if path.is_dir() && is_checkpoint {
        let path =
            path.canonicalize().map_err(|error| UserError::failed(format!("{target}: {error}")))?;
        return Ok(Target::Checkpoint(path));
    }
    if let Some((run, step)) = target.rsplit_once('@')
        && let Ok(step) = step.parse()
    {
        let run = find_run(run)?;
        let path = run.checkpoint(step);
        if path.symlink_metadata().is_ok() {
            return Ok(Target::Checkpoint(path));
        }
        let there: Vec<String> =
            scan_run(&run)?.committed.iter().map(|found| found.step.to_string()).collect();
        let error = format!("run {} has no checkpoint of step {step}", run.root().display());
        return Err(UserError::usage(error).hint(match there.is_empty() {
            true => "it has none at all".to_owned(),
            false => format!("there are: {}", there.join(", ")),
        }));
    }
    find_run(target).map(Target::Run)
}

/// A run's directory, or the folder of an imported model, which has checkpoints and no config.
fn find_run(run: &str) -> Result<RunDir, UserError> {
    let candidates = [PathBuf::from(run), runs::runs_dir().join(run)];
    match candidates.iter().find(|path| path.join(names::CHECKPOINTS).is_dir()) {
        Some(path) => std::path::absolute(path)
            .map(RunDir::new)
            .map_err(|error| UserError::failed(format!("{}: {error}", path.display()))),
        None => runs::find(run),
    }
}

fn scan_run(run: &RunDir) -> Result<Scan, UserError> {
    scan(&run.checkpoints()).map_err(failed)
}

/// Opens what a user named; of a run, its newest checkpoint on its present branch. A damaged newest
/// one is an error, because an older one is not what was asked for.
fn open(target: &str) -> Result<Checkpoint, UserError> {
    let run = match resolve(target)? {
        Target::Checkpoint(path) => return Checkpoint::open(&path).map_err(failed),
        Target::Run(run) => run,
    };
    let branches = runs::history(&run).map(|history| history.branches).unwrap_or_default();
    let Scan { committed, damaged } = scan_run(&run)?;
    let newest =
        committed.iter().rev().find(|found| is_current(found.step, found.generation, &branches));
    let newer = damaged.last().filter(|bad| newest.is_none_or(|good| good.step < bad.step));
    if let Some(bad) = newer {
        let error =
            format!("the newest checkpoint, of step {}, is damaged: {}", bad.step, bad.reason);
        let error = UserError::failed(error);
        return Err(match newest {
            Some(good) => error.hint(format!("{target}@{} is good", good.step)),
            None => error,
        });
    }
    let newest =
        newest.ok_or_else(|| UserError::usage(format!("run {target} has no checkpoint")))?;
    Checkpoint::open(&newest.path).map_err(failed)
}

fn failed(error: FormatError) -> UserError {
    UserError::failed(error.to_string())
}

impl ExportDtype {
    fn dtype(self) -> Dtype {
        match self {
            ExportDtype::Bf16 => Dtype::Bf16,
            ExportDtype::Fp16 => Dtype::F16,
            ExportDtype::Fp32 => Dtype::F32,
            ExportDtype::Fp64 => Dtype::F64,
        }
    }
}

/// `5GB`, `500MB`, `1GiB` or plain bytes.
fn parse_size(text: &str) -> Result<u64, String> {
    let units = [("KIB", 1 << 10), ("MIB", 1 << 20), ("GIB", 1 << 30), ("TIB", 1 << 40)];
    let decimal =
        [("KB", 1_000), ("MB", 1_000_000), ("GB", 1_000_000_000), ("TB", 1_000_000_000_000)];
    let upper = text.trim().to_ascii_uppercase();
    let unit = units.iter().chain(&decimal).find(|(unit, _)| upper.ends_with(unit));
    let (number, factor) = match unit {
        Some((unit, factor)) => (upper.trim_end_matches(unit).trim(), *factor),
        None => (upper.as_str(), 1),
    };
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
    bytes
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| format!("{text:?} is not a size such as 5GB, 500MB or 1GiB"))
}

fn human_bytes(bytes: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB", "PB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", units[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_shown() {
        assert_eq!(parse_size("5GB"), Ok(5_000_000_000));
        assert_eq!(parse_size("1 GiB"), Ok(1 << 30));
        assert_eq!(parse_size("123"), Ok(123));
        for bad in ["", "0", "GB", "-1GB", "1.5GB", "99999999TB"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(human_bytes(999), "999 B");
        assert_eq!(human_bytes(32_121_044), "32.1 MB");
        assert_eq!(human_bytes(999_999), "1.0 MB");
    }
}
