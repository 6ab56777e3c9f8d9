//! Run directories: where they are, who holds them, and what happened in them so far.

use crate::error::UserError;
use crate::supervisor::ledger::Sums;
use crate::supervisor::record::temporary;
use crate::supervisor::restore::{Branch, went_back};
use rank_protocol::{FailureClass, RollBack, RunDir, env, exit_code, jsonl};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// A look at the lock takes it for a moment; whoever wants it tries for longer than that.
const LOCK_PATIENCE: Duration = Duration::from_millis(300);

/// Names of runs that a message lists at most.
const MAX_LISTED: usize = 5;

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
            false => error.hint(format!("there are: {}", some_of(&names))),
        });
    };
    std::path::absolute(path)
        .map(RunDir::new)
        .map_err(|error| UserError::failed(format!("{}: {error}", path.display())))
}

/// The first names, and how many more there are.
fn some_of(names: &[String]) -> String {
    let shown = names[..names.len().min(MAX_LISTED)].join(", ");
    match names.len().saturating_sub(MAX_LISTED) {
        0 => shown,
        more => format!("{shown}, …and {more} more"),
    }
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

/// Makes the directory of a new run and takes its lock. A folder that a start left behind before
/// it was a run serves as well.
pub fn create(name: &str) -> Result<(RunDir, RunLock), UserError> {
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
    let run = RunDir::new(root);
    match std::fs::create_dir(run.root()) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => refuse_used(&run)?,
        Err(error) => return Err(cannot(run.root(), error)),
    }
    let lock = RunLock::take(&run)?;
    // Another launcher may have used it between the look and the lock.
    refuse_used(&run)?;
    Ok((run, lock))
}

/// Refuses a folder that is a run, or holds what no start leaves behind.
fn refuse_used(run: &RunDir) -> Result<(), UserError> {
    let left_by_a_start = [run.lock(), temporary(&run.config())];
    let entries = std::fs::read_dir(run.root())
        .map_err(|error| UserError::failed(format!("{}: {error}", run.root().display())))?;
    if entries.flatten().all(|entry| left_by_a_start.contains(&entry.path())) {
        return Ok(());
    }
    let (name, root) = (name_of(run), run.root().display());
    Err(match run.config().is_file() {
        true => UserError::usage(format!("a run named {name:?} exists: {root}"))
            .hint(format!("`phalanx resume {name}`, or --set name=… for a new one")),
        false => UserError::usage(format!("{root} exists and is no run: it has no config.yaml"))
            .hint("move it away, or --set name=… for another name"),
    })
}

/// Takes away a folder that did not become a run, so that its name stays free. The caller holds its
/// lock.
pub fn discard(run: &RunDir) {
    let _ = std::fs::remove_file(run.lock());
    // One that holds anything else stays.
    let _ = std::fs::remove_dir(run.root());
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
        let written = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| file.write_all(pid.as_bytes()));
        if let Err(error) = written {
            if !run.config().is_file() {
                discard(run);
            }
            return Err(cannot(error));
        }
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
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct History {
    /// The identity it was given.
    pub run_id: Option<String>,
    /// The highest generation so far; 0: none.
    pub last_generation: u64,
    /// Newest step that was ever committed.
    pub committed: Option<u64>,
    /// Resumes at a step that was not the newest.
    pub branches: Vec<Branch>,
    /// What each generation went on from: what earlier ones kept in memory beyond it is of a future
    /// that was given up.
    pub resumes: Vec<Branch>,
    /// Steps that the run went back behind, without their samples.
    pub roll_backs: Vec<RollBack>,
    /// Restarts after a failure.
    pub restarts: u64,
    /// Failures of what the run runs on: not of the config, and no numeric trouble.
    pub failures: u64,
    /// Whether `cluster.threads_per_rank` was `auto`, for the number of ranks it has now.
    pub has_auto_threads: bool,
    /// Whether the last launcher was the coordinator and a node too.
    pub was_first_node: bool,
    /// Steps of the whole run, as the last launcher knew them.
    pub steps: u64,
    /// When the last launcher started.
    pub started: String,
    /// Exit code and reason of the last launcher, where it came to its end.
    pub end: Option<(i32, String)>,
    /// The nodes of the last generation by place, where agents started it.
    pub nodes: Vec<String>,
    /// Nodes that get no place any more, until the run is resumed after an end in order.
    pub quarantined: BTreeSet<String>,
    /// Ranks of the last generation.
    pub num_ranks: Option<usize>,
    /// The last entry of the books.
    pub ledger: Option<LedgerEntry>,
    /// The changes of the config, but for those that were taken back.
    pub config_changes: Vec<ConfigChange>,
}

/// A resume that changed the config.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigChange {
    /// The last generation that had the config of before.
    pub generation: u64,
    /// The keys whose values changed.
    pub keys: Vec<String>,
}

/// What the run's time had been spent on by a moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LedgerEntry {
    /// The sums.
    pub sums: Sums,
    /// The moment.
    pub time: Option<SystemTime>,
    /// Generation of the last step that counts in them.
    pub generation: u64,
    /// That step.
    pub step: u64,
}

/// The highest generation that has a folder of logs.
pub fn newest_logs(run: &RunDir) -> Option<u64> {
    let entries = std::fs::read_dir(run.logs()).into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().to_str()?.strip_prefix("gen-")?.parse().ok()).max()
}

/// Reads a run's past. A generation counts that left any trace, also where events were lost: with
/// a lower number than an earlier one, ranks may not save.
pub fn history(run: &RunDir) -> Result<History, UserError> {
    let events: Vec<Value> = jsonl::read(&run.events())?;
    let fence = checkpoint_format::fence::newest_generation(&run.checkpoints())
        .map_err(|error| UserError::failed(error.to_string()))?;
    let last_generation = fence.max(newest_logs(run).unwrap_or(0));
    let mut history = History { last_generation, ..History::default() };
    for event in &events {
        history.take(event);
    }
    Ok(history)
}

impl History {
    /// Takes an event in; returns whether it is one that a later launcher must know of.
    pub fn take(&mut self, event: &Value) -> bool {
        let text = |name: &str| event.get(name).and_then(Value::as_str).map(str::to_owned);
        let number = |name: &str| event.get(name).and_then(Value::as_u64);
        self.last_generation = self.last_generation.max(number("generation").unwrap_or(0));
        self.run_id = text("run_id").or(self.run_id.take());
        let code = event.get("exit_code").and_then(Value::as_i64);
        if let Some(code) = code {
            let code = i32::try_from(code).unwrap_or(exit_code::FAILED);
            self.end = Some((code, text("reason").unwrap_or_default()));
        }
        match event.get("kind").and_then(Value::as_str) {
            Some("run_started" | "run_resumed") => {
                if self.end.take().is_some() {
                    self.quarantined.clear();
                }
                self.steps = number("steps").unwrap_or(0);
                self.started = text("time").unwrap_or_default();
                let is_true = |name: &str| event.get(name).and_then(Value::as_bool) == Some(true);
                self.has_auto_threads = is_true("has_auto_threads");
                self.was_first_node = is_true("is_first_node");
            }
            Some("checkpoint_committed") => {
                self.committed = self.committed.max(number("step"));
            }
            Some("ledger") => {
                self.ledger = Some(ledger_entry(event));
            }
            Some("nodes_placed") => {
                self.nodes = serde_json::from_value(event["nodes"].clone()).unwrap_or_default();
            }
            Some("node_unhealthy") => {
                let is_quarantined = event.get("is_quarantined").and_then(Value::as_bool);
                let node = text("node").filter(|_| is_quarantined == Some(true));
                let Some(node) = node else { return false };
                self.quarantined.insert(node);
            }
            Some("node_pardoned") => {
                let Some(node) = text("node") else { return false };
                self.quarantined.remove(&node);
            }
            Some("generation_started") => {
                self.num_ranks = number("world_size").and_then(|n| usize::try_from(n).ok());
                let is_restart = event.get("is_restart").and_then(Value::as_bool);
                self.restarts += u64::from(is_restart == Some(true));
                self.begins_at(number("resume_step").unwrap_or(0), number("generation"));
            }
            Some("first_cause") => {
                let class = event.get("class").cloned().unwrap_or_default();
                let class = serde_json::from_value::<FailureClass>(class);
                self.failures += u64::from(class.is_ok_and(FailureClass::is_of_the_machines));
            }
            Some("rolled_back") => {
                let roll_back = serde_json::from_value::<RollBack>(event.clone());
                self.roll_backs.extend(roll_back.ok());
                self.begins_at(0, number("generation").map(|rolled_back| rolled_back + 1));
            }
            Some("went_back") => {
                if let (Some(step), Some(generation)) = (number("step"), number("first_generation"))
                {
                    self.branches.push(Branch { step, generation });
                }
            }
            Some("config_changed") => {
                self.config_changes.push(config_change(event));
            }
            Some("config_restored") => drop(self.config_changes.pop()),
            _ => return code.is_some(),
        }
        true
    }

    /// A generation goes on from this step, whatever earlier ones kept.
    fn begins_at(&mut self, step: u64, generation: Option<u64>) {
        if let Some(generation) = generation {
            went_back(&mut self.resumes, Branch { step, generation });
        }
    }
}

fn config_change(event: &Value) -> ConfigChange {
    let changes = event.get("changes").and_then(Value::as_array);
    let key = |change: &Value| change.get("key")?.as_str().map(str::to_owned);
    ConfigChange {
        generation: event.get("generation").and_then(Value::as_u64).unwrap_or(0),
        keys: changes.into_iter().flatten().filter_map(key).collect(),
    }
}

fn ledger_entry(event: &Value) -> LedgerEntry {
    let number = |name: &str| event.get(name).and_then(Value::as_u64).unwrap_or(0);
    LedgerEntry {
        sums: serde_json::from_value(event.clone()).unwrap_or_default(),
        time: event.get("until").and_then(Value::as_str).and_then(crate::time::parse),
        generation: number("generation"),
        step: number("step"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(count: usize, expected: &str) {
        let names: Vec<String> = (1..=count).map(|n| n.to_string()).collect();
        assert_eq!(some_of(&names), expected);
    }

    #[test]
    fn a_change_of_the_config_that_was_taken_back_is_none() {
        let changed = |generation: u64, key: &str| {
            let changes = [json!({ "key": key, "old": 1, "new": 2 })];
            json!({ "kind": "config_changed", "generation": generation, "changes": changes })
        };
        let mut history = History::default();
        for event in [changed(1, "a"), changed(2, "b"), json!({ "kind": "config_restored" })] {
            assert!(history.take(&event), "a successor must know of {event}");
        }
        let expected = ConfigChange { generation: 1, keys: vec!["a".to_owned()] };
        assert_eq!(history.config_changes, [expected]);
    }

    #[test]
    fn a_quarantine_outlives_its_coordinator_and_no_end_in_order() {
        let mut history = History::default();
        let unwell = |node: &str, is_quarantined: bool| {
            let kind = "node_unhealthy";
            json!({ "kind": kind, "node": node, "is_quarantined": is_quarantined })
        };
        assert!(!history.take(&unwell("a", false)) && history.take(&unwell("b", true)));
        history.take(&json!({ "kind": "run_resumed" }));
        assert_eq!(history.quarantined, BTreeSet::from(["b".to_owned()]));
        assert!(history.take(&unwell("c", true)));
        assert!(history.take(&json!({ "kind": "node_pardoned", "node": "c" })));
        assert_eq!(history.quarantined, BTreeSet::from(["b".to_owned()]));
        history.take(&json!({ "kind": "preempted", "exit_code": 75 }));
        history.take(&json!({ "kind": "run_resumed" }));
        assert_eq!(history.quarantined, BTreeSet::new());
    }

    #[test]
    fn what_generations_went_on_from_is_known() {
        let mut history = History::default();
        let started = |generation: u64, step: Option<u64>| {
            let kind = "generation_started";
            json!({ "kind": kind, "generation": generation, "resume_step": step })
        };
        for event in [started(1, None), started(2, Some(30)), started(3, Some(20))] {
            assert!(history.take(&event), "a successor must know of {event}");
        }
        let branch = |generation: u64, step: u64| Branch { step, generation };
        assert_eq!(history.resumes, [branch(1, 0), branch(3, 20)]);
        history.take(&json!({ "kind": "rolled_back", "generation": 3 }));
        assert_eq!(history.resumes, [branch(4, 0)]);
    }

    #[test]
    fn numeric_trouble_is_no_failure_of_a_machine() {
        let mut history = History::default();
        for class in ["process", "numeric", "node", "config", "hang", "transient", "nonsense"] {
            history.take(&json!({ "kind": "first_cause", "class": class }));
        }
        history.take(&json!({ "kind": "rank_failed", "class": "process" }));
        assert_eq!(history.failures, 4);
    }

    #[test]
    fn few_names_are_listed() {
        check(1, "1");
        check(5, "1, 2, 3, 4, 5");
        check(6, "1, 2, 3, 4, 5, …and 1 more");
    }
}
