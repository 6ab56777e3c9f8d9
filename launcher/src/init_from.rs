//! Looks at what `model.init_from` names before a run is made, so that a mistake costs nothing.

use crate::error::UserError;
use crate::print::err;
use crate::supervisor::restore::{self, Search};
use checkpoint_format::hf::HfSource;
use checkpoint_format::meta::MetaSource;
use checkpoint_format::source::CheckpointSource;
use checkpoint_format::{Checkpoint, WeightSource, scan};
use rank_protocol::RunDir;
use run_config::{InitFrom, ModelConfig};
use std::path::{Path, PathBuf};

/// Refuses initial weights that cannot be read, or are of a model with other tensors. `runs` is the
/// folder that holds runs by name. Returns what is named, of a run's checkpoints the newest good
/// one by its step, so that all ranks take the same.
///
/// # Errors
/// What is wrong, with the file or the first tensor that does not fit.
pub fn check(model: &ModelConfig, runs: &Path) -> Result<Option<InitFrom>, UserError> {
    let refused = |text: String| UserError::usage(format!("model.init_from: {text}"));
    let Some(init_from) = &model.init_from else { return Ok(None) };
    let init_from = choose(init_from, runs).map_err(refused)?;
    let source = open(&init_from, runs).map_err(refused)?;
    for spec in model_spec::parameters(model) {
        for part in &spec.parts {
            let mut expected: Vec<u64> = spec.shape.iter().map(|&size| size as u64).collect();
            if let Some(rows) = expected.first_mut() {
                *rows = part.row_count as u64;
            }
            let found = match source.info(&part.hf_name) {
                Ok((shape, _)) if shape == expected => continue,
                Ok((shape, _)) => format!("has shape {shape:?}"),
                Err(_) => "is missing".to_owned(),
            };
            let error = refused(format!(
                "{} is of another model: tensor {} {found}, its shape is {expected:?} in this \
                 model",
                source.path().display(),
                part.hf_name
            ));
            return Err(error.hint("give the config's `model` the dimensions of these weights"));
        }
    }
    Ok(Some(init_from))
}

/// Of a run's checkpoints, without a step, the newest whose every byte is good.
fn choose(init_from: &InitFrom, runs: &Path) -> Result<InitFrom, String> {
    let InitFrom::Run { run, step: None } = init_from else { return Ok(init_from.clone()) };
    let dir = folder_of(run, runs)?;
    let newest =
        restore::newest(&Search { dir: RunDir::new(&dir).checkpoints(), ..Search::default() })?;
    for damaged in &newest.damaged {
        let (step, reason) = (damaged.step, &damaged.reason);
        err!("model.init_from: the checkpoint of step {step} is damaged, passed over: {reason}");
    }
    // Where there is none, the reason is told as for any step.
    Ok(InitFrom::Run { run: run.clone(), step: newest.found.map(|found| found.step) })
}

fn folder_of(run: &str, runs: &Path) -> Result<PathBuf, String> {
    let (given, named) = (PathBuf::from(run), runs.join(run));
    let dir = if given.is_dir() { given } else { named };
    match dir.is_dir() {
        true => Ok(dir),
        false => Err(format!("there is no run {run:?}: {} is no folder", dir.display())),
    }
}

fn open(init_from: &InitFrom, runs: &Path) -> Result<Box<dyn WeightSource>, String> {
    let told = |error: checkpoint_format::FormatError| error.to_string();
    Ok(match init_from {
        InitFrom::HuggingFace(dir) => Box::new(HfSource::open(dir).map_err(told)?),
        InitFrom::Meta(dir) => Box::new(MetaSource::open(dir).map_err(told)?),
        InitFrom::Run { run, step } => {
            let dir = folder_of(run, runs)?;
            let step_dir = scan::checkpoint_of_run(&dir, *step).map_err(told)?;
            Box::new(CheckpointSource::new(Checkpoint::open(&step_dir).map_err(told)?))
        }
    })
}
