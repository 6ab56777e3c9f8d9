//! Run directories: where they are, who holds them, and what happened in them so far.

use crate::error::UserError;
use crate::supervisor::restore::Branch;
use rank_protocol::{RunDir, env, jsonl};
use rustix::fs::{FlockOperation, flock};
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

/// A look at the lock takes it for a moment; whoever wants it tries for longer than that.
const LOCK_PATIENCE: Duration = Duration::from_millis(300);

/// The folder that holds runs by name.
pub fn runs_dir() -> PathBuf {
    std::env::var_os(env::RUNS).map_or_else(|| PathBuf::from("runs"), PathBuf::from)
}

/// The run that a user means: a directory, or a name in [`runs_dir`].
pub fn find(run: &str) -> Result<RunDir, UserError> {
    let candidates = [PathBuf::from(run), runs_dir().join(run)];
    let found = candidates.iter().find(|path| path.join("config.yaml").is_file());
    let Some(path) = found else {
        let error = UserError::usage(format!(
            "there is no run {run:?}: neither {} nor {} holds a config.yaml",
            candidates[0].display(),
            candidates[1].display()
        ));
        let names: Vec<String> = list().iter().map(name_of).collect();
        return Err(match names.is_empty() {
            true => error.hint(format!("set {} if your runs are elsewhere", env::RUNS)),
            false => error.hint(format!("there are: {}", names.join(", "))),
        });
    };
    std::path::absolute(path)
        .map(RunDir::new)
        .map_err(|error| UserError::failed(format!("{}: {error}", path.display())))
}

/// All runs in [`runs_dir`], by name.
pub fn list() -> Vec<RunDir> {
    let entries = std::fs::read_dir(runs_dir()).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| path.join("config.yaml").is_file())
        .collect();
    paths.sort();
    paths.into_iter().map(RunDir::new).collect()
}

/// A run's name: that of its directory.
pub fn name_of(run: &RunDir) -> String {
    let name = run.root().file_name().unwrap_or(run.root().as_os_str());
    name.to_string_lossy().into_owned()
}

/// Makes the directory of a new run.
pub fn create(name: &str) -> Result<RunDir, UserError> {
    let mut components = Path::new(name).components();
    if !matches!((components.next(), components.next()), (Some(Component::Normal(_)), None)) {
        return Err(UserError::usage(format!("name: {name:?} is no plain folder name")));
    }
    let cannot = |path: &Path, error: std::io::Error| {
        UserError::usage(format!("cannot make {}: {error}", path.display()))
    };
    let parent = runs_dir();
    let root = parent.join(name);
    let root = std::path::absolute(&root).map_err(|error| cannot(&root, error))?;
    std::fs::create_dir_all(&parent).map_err(|error| cannot(&parent, error))?;
    match std::fs::create_dir(&root) {
        Ok(()) => Ok(RunDir::new(root)),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            let error =
                UserError::usage(format!("a run named {name:?} exists: {}", root.display()));
            Err(error.hint(format!("`phalanx resume {name}`, or --set name=… for a new one")))
        }
        Err(error) => Err(cannot(&root, error)),
    }
}

/// The sole right to work on a run; given up when dropped or when the process ends.
#[derive(Debug)]
pub struct RunLock {
    _file: File,
}

impl RunLock {
    /// Takes the lock and writes this process's id into it.
    pub fn take(run: &RunDir) -> Result<Self, UserError> {
        let path = run.lock();
        let cannot = |error: std::io::Error| {
            UserError::failed(format!("cannot lock {}: {error}", path.display()))
        };
        let mut file = open_lock(&path).map_err(cannot)?;
        let patience = Instant::now() + LOCK_PATIENCE;
        while flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            if Instant::now() >= patience {
                let pid = read_pid(&mut file).map_or("unknown".to_owned(), |pid| pid.to_string());
                let what = run.root().display();
                let error = UserError::usage(format!("{what} is in use by process {pid}"));
                return Err(error.hint(format!("`phalanx cancel {}` ends it", name_of(run))));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let pid = std::process::id().to_string();
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| file.write_all(pid.as_bytes()))
            .map_err(cannot)?;
        Ok(Self { _file: file })
    }
}

/// The process that works on a run, if one does.
pub fn holder(run: &RunDir) -> Option<u32> {
    let mut file = File::open(run.lock()).ok()?;
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => None,
        Err(_) => read_pid(&mut file),
    }
}

fn open_lock(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)
}

fn read_pid(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.rewind().ok()?;
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// What the events of a run say about its past.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// The identity it was given.
    pub run_id: Option<String>,
    /// The highest generation so far; 0: none.
    pub last_generation: u64,
    /// Newest step that was ever committed.
    pub committed: Option<u64>,
    /// Resumes at a step that was not the newest.
    pub branches: Vec<Branch>,
    /// Restarts after a failure.
    pub restarts: u64,
}

/// Reads a run's past.
pub fn history(run: &RunDir) -> Result<History, UserError> {
    let events: Vec<Value> = jsonl::read(&run.events())?;
    let mut history = History::default();
    for event in &events {
        let number = |name: &str| event.get(name).and_then(Value::as_u64);
        history.last_generation = history.last_generation.max(number("generation").unwrap_or(0));
        if let Some(run_id) = event.get("run_id").and_then(Value::as_str) {
            history.run_id = Some(run_id.to_owned());
        }
        match event.get("kind").and_then(Value::as_str) {
            Some("checkpoint_committed") => {
                history.committed = history.committed.max(number("step"));
            }
            Some("generation_started") => {
                let is_restart = event.get("is_restart").and_then(Value::as_bool);
                history.restarts += u64::from(is_restart == Some(true));
            }
            Some("went_back") => {
                if let (Some(step), Some(generation)) = (number("step"), number("first_generation"))
                {
                    history.branches.push(Branch { step, generation });
                }
            }
            _ => {}
        }
    }
    Ok(history)
}
