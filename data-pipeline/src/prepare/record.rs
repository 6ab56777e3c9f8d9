//! The record by which an interrupted `tokenize` goes on: what it was asked to do, and per task
//! the shards that are finished.

use super::documents::InputFile;
use super::train::write_atomically;
use crate::error::{DataError, Result};
use crate::shards::writer::ShardTotals;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Folder of the record in the output folder.
const FOLDER: &str = ".tokenize";
/// File of that folder which the process that writes shards holds a lock on, with its id.
const LOCK: &str = "lock";
/// No process id is longer.
const MAX_PID_BYTES: u64 = 20;

/// All that decides what the shards hold. An output folder belongs to one plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The program that made it.
    pub writer: String,
    /// SHA-256 of the tokenizer.
    pub tokenizer_sha256: String,
    /// Inputs in order.
    pub inputs: Vec<InputFile>,
    /// Everything else that was asked for.
    pub settings: String,
}

/// A finished shard, and where its task goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DoneShard {
    /// Its file name.
    pub name: String,
    /// What it holds.
    pub totals: ShardTotals,
    /// Input of the task that comes next, counted in the task.
    pub next_input: usize,
    /// Documents of that input that are done.
    pub next_document: u64,
}

/// What is done of one task.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskRecord {
    /// Its finished shards.
    pub shards: Vec<DoneShard>,
    /// Whether nothing is left to do.
    pub finished: bool,
}

/// The record of one output folder.
#[derive(Clone, Debug)]
pub struct Record {
    folder: PathBuf,
    /// Held as long as the record is open.
    _lock: Arc<File>,
}

impl Record {
    /// Opens the record of an output folder, or begins it. A folder with shards of another plan is
    /// refused, or cleared with `overwrite`.
    pub fn open(output: &Path, plan: &Plan, overwrite: bool) -> Result<Self> {
        let folder = output.join(FOLDER);
        let refuse = |detail: String| Err(DataError::Output { path: output.to_path_buf(), detail });
        if output.exists() && !output.is_dir() {
            return refuse("is a file; name a folder".into());
        }
        let foreign = || {
            refuse(
                "holds parquet files already; name another folder, or give --overwrite to delete \
                 them"
                    .into(),
            )
        };
        if !overwrite && !folder.exists() && shards_in(output).next().is_some() {
            return foreign();
        }
        let record = Record { _lock: Arc::new(lock(output, &folder)?), folder };
        if overwrite {
            clear(output)?;
        }
        let saved = record.read::<Plan>("plan.json");
        match saved {
            Some(saved) if saved == *plan => {}
            Some(saved) => {
                let differs = difference(&saved, plan);
                return refuse(format!(
                    "holds shards of another command ({differs}); name another folder, or give \
                     --overwrite to delete its shards"
                ));
            }
            None if shards_in(output).next().is_some() => return foreign(),
            None => record.write("plan.json", plan)?,
        }
        // What an interrupted run left half written has no name of its own yet.
        let partial =
            files_in(output).filter(|path| path.extension().is_some_and(|e| e == "partial"));
        for path in partial {
            std::fs::remove_file(&path).map_err(|error| DataError::io("delete", &path, error))?;
        }
        Ok(record)
    }

    /// What is done of a task.
    pub fn task(&self, task: usize) -> TaskRecord {
        self.read(&task_name(task)).unwrap_or_default()
    }

    /// Notes what is done of a task.
    pub fn save_task(&self, task: usize, record: &TaskRecord) -> Result<()> {
        self.write(&task_name(task), record)
    }

    fn read<T: for<'de> Deserialize<'de>>(&self, name: &str) -> Option<T> {
        serde_json::from_slice(&std::fs::read(self.folder.join(name)).ok()?).ok()
    }

    fn write<T: Serialize>(&self, name: &str, value: &T) -> Result<()> {
        let path = self.folder.join(name);
        let json = serde_json::to_vec(value)
            .map_err(|error| DataError::io("write", &path, error.into()))?;
        write_atomically(&path, &json)
    }
}

fn task_name(task: usize) -> String {
    format!("task-{task:05}.json")
}

/// Says in words in which way two plans differ.
fn difference(saved: &Plan, asked: &Plan) -> &'static str {
    if saved.tokenizer_sha256 != asked.tokenizer_sha256 {
        "another tokenizer"
    } else if saved.inputs != asked.inputs {
        "other inputs, or inputs that have changed"
    } else if saved.settings != asked.settings {
        "other options"
    } else {
        "another version of this program"
    }
}

fn files_in(folder: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    entries.filter_map(|entry| entry.ok().map(|entry| entry.path())).filter(|path| path.is_file())
}

fn shards_in(folder: &Path) -> impl Iterator<Item = PathBuf> {
    files_in(folder).filter(|path| path.extension().is_some_and(|end| end == "parquet"))
}

/// Takes the folder for this process, until the file is closed: two that wrote the same shards
/// would spoil them. Where the file system has no locks there is none.
fn lock(output: &Path, folder: &Path) -> Result<File> {
    let path = folder.join(LOCK);
    let failed = |error| DataError::io("create", &path, error);
    std::fs::create_dir_all(folder).map_err(failed)?;
    let mut options = File::options();
    let options = options.read(true).write(true).create(true).truncate(false);
    let mut file = options.open(&path).map_err(failed)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut pid = String::new();
            let _ = (&file).take(MAX_PID_BYTES).read_to_string(&mut pid);
            let owner = match pid.trim() {
                "" => "another process".to_string(),
                pid => format!("process {pid}"),
            };
            Err(DataError::Output {
                path: output.to_path_buf(),
                detail: format!(
                    "{owner} is tokenizing into it; wait until it has ended, or name another folder"
                ),
            })
        }
        Err(error) => {
            tracing::debug!(%error, "the output folder cannot be locked");
            Ok(file)
        }
        Ok(()) => {
            let noted = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
            noted.map_err(|error| DataError::io("write", &path, error))?;
            Ok(file)
        }
    }
}

/// Deletes shards and the record of an output folder, and nothing else. The lock stays.
fn clear(output: &Path) -> Result<()> {
    for path in shards_in(output) {
        std::fs::remove_file(&path).map_err(|error| DataError::io("delete", &path, error))?;
    }
    let folder = output.join(FOLDER);
    for path in files_in(&folder).filter(|path| !path.ends_with(LOCK)) {
        std::fs::remove_file(&path).map_err(|error| DataError::io("delete", &path, error))?;
    }
    Ok(())
}
