//! What checkpoints a folder holds. The scan of `COMMIT` is the truth; nothing else is trusted.

use crate::error::{FormatError, Result};
use crate::names;
use crate::read::Checkpoint;
use std::path::{Path, PathBuf};

/// A committed checkpoint whose manifest and small files are intact and whose files have their
/// sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The step.
    pub step: u64,
    /// Its folder.
    pub path: PathBuf,
    /// Generation that wrote it.
    pub generation: u64,
    /// Bytes of its files.
    pub bytes: u64,
}

/// A folder with a checkpoint's name that is not a good one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damaged {
    /// The step in its name.
    pub step: u64,
    /// Its folder.
    pub path: PathBuf,
    /// What is wrong.
    pub reason: String,
    /// Whether it is a symbolic link, which is neither followed nor removed.
    pub is_link: bool,
}

/// The result of a scan, each rising by step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// Good ones.
    pub committed: Vec<Found>,
    /// Others.
    pub damaged: Vec<Damaged>,
}

/// The newest good checkpoint, and the damaged ones that were passed over on the way to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Newest {
    /// It.
    pub found: Option<Found>,
    /// Newer ones that were not good, newest first, to be reported.
    pub passed_over: Vec<Damaged>,
}

/// Looks at every checkpoint of a folder: `COMMIT`, manifest, index, state and the sizes of all
/// files; not the tensors' bytes. A folder that does not exist holds none.
///
/// # Errors
/// [`FormatError::Io`] where the folder cannot be listed.
pub fn scan(checkpoints_dir: &Path) -> Result<Scan> {
    let mut result = Scan::default();
    for (step, path) in steps(checkpoints_dir)? {
        match look(step, &path) {
            Ok(found) => result.committed.push(found),
            Err(damaged) => result.damaged.push(damaged),
        }
    }
    Ok(result)
}

/// The newest checkpoint whose every byte has its checksum (all of the newest is read, no older one
/// unless it is damaged).
///
/// # Errors
/// [`FormatError::Io`] where the folder cannot be listed.
pub fn newest_verified(checkpoints_dir: &Path) -> Result<Newest> {
    newest(checkpoints_dir, |_, checkpoint| checkpoint.verify().map(|_| ()))
}

/// The newest checkpoint that a scan finds good, without reading its tensors.
///
/// # Errors
/// [`FormatError::Io`] where the folder cannot be listed.
pub fn newest_committed(checkpoints_dir: &Path) -> Result<Newest> {
    newest(checkpoints_dir, |_, _| Ok(()))
}

/// The checkpoint of a step of a run, or its newest good one, by the run's directory.
///
/// # Errors
/// [`FormatError::NotFound`], naming the steps there are and why others are not good.
pub fn checkpoint_of_run(run_dir: &Path, step: Option<u64>) -> Result<PathBuf> {
    let dir = run_dir.join(names::CHECKPOINTS);
    let found = scan(&dir)?;
    let wanted = match step {
        Some(step) => found.committed.iter().find(|found| found.step == step),
        None => found.committed.last(),
    };
    if let Some(found) = wanted {
        return Ok(found.path.clone());
    }
    let steps: Vec<String> = found.committed.iter().map(|found| found.step.to_string()).collect();
    let mut hint = match steps.as_slice() {
        [] => "; it has no good checkpoint".to_string(),
        steps => format!("; its good checkpoints are of steps {}", steps.join(", ")),
    };
    for damaged in &found.damaged {
        hint += &format!("; step {} is damaged: {}", damaged.step, damaged.reason);
    }
    let what =
        step.map_or("a checkpoint".to_string(), |step| format!("a checkpoint of step {step}"));
    Err(FormatError::NotFound { what, path: run_dir.to_path_buf(), hint })
}

fn newest(
    checkpoints_dir: &Path,
    check: impl Fn(&Path, &Checkpoint) -> Result<()>,
) -> Result<Newest> {
    let mut result = Newest::default();
    for (step, path) in steps(checkpoints_dir)?.into_iter().rev() {
        let opened = Checkpoint::open(&path)
            .and_then(|checkpoint| check(&path, &checkpoint).map(|()| checkpoint))
            .and_then(|checkpoint| named_for(step, &path, &checkpoint));
        match opened {
            Ok(found) => {
                result.found = Some(found);
                break;
            }
            Err(error) => result.passed_over.push(damaged(step, &path, &error)),
        }
    }
    Ok(result)
}

fn look(step: u64, path: &Path) -> std::result::Result<Found, Damaged> {
    let opened = Checkpoint::open(path).and_then(|checkpoint| named_for(step, path, &checkpoint));
    opened.map_err(|error| damaged(step, path, &error))
}

fn named_for(step: u64, path: &Path, checkpoint: &Checkpoint) -> Result<Found> {
    let manifest = checkpoint.manifest();
    if manifest.step != step {
        let reason = format!("its manifest is of step {}", manifest.step);
        return Err(FormatError::damaged(path, reason));
    }
    let bytes = manifest.files.values().map(|file| file.size).sum();
    Ok(Found { step, path: path.to_path_buf(), generation: manifest.generation, bytes })
}

fn damaged(step: u64, path: &Path, error: &FormatError) -> Damaged {
    let reason = match error {
        FormatError::Damaged { path: at, reason } | FormatError::Refused { path: at, reason } => {
            match at.strip_prefix(path) {
                Ok(inner) if !inner.as_os_str().is_empty() => {
                    format!("{}: {reason}", inner.display())
                }
                _ => reason.clone(),
            }
        }
        other => other.to_string(),
    };
    Damaged { step, path: path.to_path_buf(), reason, is_link: path.is_symlink() }
}

/// Entries with a checkpoint's name, rising by step.
fn steps(checkpoints_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let entries = match std::fs::read_dir(checkpoints_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(FormatError::io("list", checkpoints_dir, error)),
    };
    let mut steps = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| FormatError::io("list", checkpoints_dir, error))?;
        if let Some(step) = entry.file_name().to_str().and_then(names::parse_step_folder) {
            steps.push((step, entry.path()));
        }
    }
    steps.sort_unstable();
    Ok(steps)
}
