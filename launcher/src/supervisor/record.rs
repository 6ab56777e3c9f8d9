//! The files that the launcher keeps about a run: events, status, error files.
//!
//! A file that cannot be written does not end a run: training goes on, and the screen says so.

use super::cause::Cause;
use super::ledger::{Ledger, Sums};
use super::pace::{Pace, Slow};
use super::restore::Tier;
use crate::cluster::store::keeper::Keeper;
use checkpoint_format::interval::Interval;
use rank_protocol::jsonl::{Appender, read_metrics};
use rank_protocol::{RunDir, StepReport, exit_code};
use run_config::RunConfig;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// Time between two entries of the books in `events.jsonl`.
const LEDGER_EVERY: Duration = Duration::from_secs(60);
/// Time between two writes of the status while nothing but steps happens, at least.
const STATUS_EVERY: Duration = Duration::from_millis(500);
/// And at least so many times what the last write took: with many ranks it is long.
const STATUS_SHARE: u32 = 20;
/// But no longer than this.
const STATUS_LATEST: Duration = Duration::from_secs(10);

/// The most nodes that are not well in the status.
const MAX_UNHEALTHY: usize = 100;

/// `status.json`: the launcher's last word on the state of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Name of the run.
    pub name: String,
    /// Identity of the run.
    pub run_id: String,
    /// Process id of its launcher.
    pub pid: u32,
    /// `starting`, `running`, `restarting`, `stopping`; `copying` where all is done but the copy of
    /// the last checkpoint in the object store; at the end `finished`, `preempted`, `interrupted`
    /// or `failed`; `lost` for readers, where the launcher is gone without a word.
    pub state: String,
    /// Generation.
    pub generation: u64,
    /// Last step done.
    pub step: u64,
    /// When it was done; `None`: this launcher has done none yet.
    #[serde(default)]
    pub last_step_at: Option<String>,
    /// Steps whose update was skipped: the loss or a gradient was not finite, or jumped.
    #[serde(default)]
    pub skipped: usize,
    /// Steps of the whole run.
    pub steps: u64,
    /// Loss of the last step.
    pub loss: Option<f64>,
    /// The last loss on held-out documents.
    pub validation_loss: Option<f64>,
    /// Tokens seen.
    pub tokens: u64,
    /// Tokens per second, over the last steps.
    pub tokens_per_second: Option<f64>,
    /// Time left, in seconds.
    pub eta_s: Option<f64>,
    /// Newest committed step.
    pub last_checkpoint: Option<u64>,
    /// Why the last checkpoint could not be written, while none has been since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alarm: Option<String>,
    /// Why the store that holds the run's state does not answer, while it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store_alarm: Option<String>,
    /// Nodes that are not well, and why, the newest last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unhealthy: Vec<String>,
    /// What the current generation goes on from; `None`: it began with the initial weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed: Option<Resumed>,
    /// With `checkpoint.every_steps: auto`: the steps between checkpoints, and what they follow
    /// from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_interval: Option<Interval>,
    /// Step of the newest checkpoint in memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_checkpoint: Option<u64>,
    /// The same, where other nodes have copies of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_copied: Option<u64>,
    /// Why copies fail, while they do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_copy_alarm: Option<String>,
    /// Why none is kept there, while that is so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_alarm: Option<String>,
    /// The folder of the object store that checkpoints are copied to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote: Option<String>,
    /// Step of the last checkpoint that this launcher copied there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote_checkpoint: Option<u64>,
    /// Why copying fails, while it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote_alarm: Option<String>,
    /// Generations that were started because the one before had failed.
    pub restarts: u64,
    /// When the launcher started.
    pub started: String,
    /// When this was written.
    pub updated: String,
    /// Exit code, at the end.
    pub exit_code: Option<i32>,
    /// Why it ended.
    pub reason: Option<String>,
    /// What the run's time was spent on.
    #[serde(default)]
    pub ledger: Option<Sums>,
    /// The degrees of parallelism of the current generation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<Layout>,
    /// The ranks of the current generation.
    pub ranks: Vec<RankStatus>,
}

/// The checkpoint that a generation goes on from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resumed {
    /// Its step.
    pub step: u64,
    /// Where it was found.
    pub tier: Tier,
}

/// The degrees of parallelism of a generation, in `status.json` and `events.jsonl`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Tensor-parallel degree.
    pub tensor: usize,
    /// Context-parallel degree.
    pub context: usize,
    /// Pipeline stages.
    pub pipeline: usize,
    /// Ranks that share one copy.
    pub shard: usize,
    /// Data-parallel replicas.
    pub replicate: usize,
    /// Replicas where no node is missing: the config's.
    pub whole_replicate: usize,
}

impl Layout {
    /// A config's layout with so many replicas.
    pub fn of(config: &RunConfig, replicate: usize) -> Self {
        let p = &config.parallelism;
        Self {
            tensor: p.tensor,
            context: p.context,
            pipeline: p.pipeline.stages,
            shard: p.shard.ranks,
            replicate,
            whole_replicate: config.replicas().unwrap_or(replicate),
        }
    }

    /// What is missing of the config's layout, in words.
    pub fn missing(&self) -> Option<String> {
        let Self { replicate, whole_replicate, .. } = self;
        (replicate < whole_replicate).then(|| {
            format!(
                "{replicate} of {whole_replicate} data-parallel replicas, on which the whole \
                 global batch is: nodes are missing"
            )
        })
    }
}

/// One rank in `status.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RankStatus {
    /// Rank.
    pub rank: usize,
    /// The node that it runs on, where there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Process id.
    pub pid: u32,
    /// `starting`, `running`, `finished`, `stopped`, `done` or `failed`.
    pub state: String,
    /// What it does.
    pub phase: String,
    /// Last step it did in this generation.
    pub step: Option<u64>,
}

/// The state and the kind of the last event of a launcher that ended with this exit code.
pub fn ended(code: i32) -> (&'static str, &'static str) {
    match code {
        exit_code::DONE => ("finished", "run_finished"),
        exit_code::PREEMPTED => ("preempted", "preempted"),
        exit_code::INTERRUPTED => ("interrupted", "interrupted"),
        _ => ("failed", "run_failed"),
    }
}

/// Writes the files.
pub struct Recorder {
    run: RunDir,
    events: Option<Appender>,
    /// The status as it will next be written.
    pub status: Status,
    /// What time is spent on.
    pub ledger: Ledger,
    /// Holds the run, where its state is in a store, and keeps there what follows from events.
    pub keeper: Option<Keeper>,
    ledger_told: Instant,
    written: Option<Instant>,
    write_time: Duration,
    /// Whether something has happened since that readers wait for.
    pub is_stale: bool,
    has_told_error: bool,
    mean_step_s: Option<f64>,
    pace: Pace,
    skipped: BTreeSet<u64>,
}

#[derive(Serialize)]
struct EventLine<'a> {
    time: String,
    kind: &'a str,
    generation: u64,
    #[serde(flatten)]
    fields: Map<String, Value>,
}

#[derive(Serialize, Deserialize)]
struct ErrorFile {
    time: String,
    generation: u64,
    is_first_cause: bool,
    #[serde(flatten)]
    cause: Cause,
    log: String,
}

impl Recorder {
    /// For a run whose directory is there, of ranks whose times are kept by `pace`.
    pub fn open(run: RunDir, status: Status, ledger: Ledger, pace: Pace) -> Self {
        let events = Appender::open(&run.events());
        if let Err(error) = &events {
            tracing::error!("no events are written: {error}");
        }
        // Metrics that cannot be read are another's business.
        let before = read_metrics(&run.metrics()).unwrap_or_default();
        let skipped = before.iter().filter(|report| report.skipped).map(|report| report.step);
        let skipped: BTreeSet<u64> = skipped.collect();
        let status = Status { skipped: skipped.len(), ..status };
        Self {
            run,
            events: events.ok(),
            status,
            ledger,
            keeper: None,
            ledger_told: Instant::now(),
            written: None,
            write_time: Duration::ZERO,
            is_stale: false,
            has_told_error: false,
            mean_step_s: None,
            pace,
            skipped,
        }
    }

    /// Writes an event; `fields` is an object.
    pub fn event(&mut self, kind: &str, fields: Value) {
        let fields = match fields {
            Value::Object(fields) => fields,
            _ => Map::new(),
        };
        let generation = self.status.generation;
        let line = EventLine { time: crate::time::now(), kind, generation, fields };
        if let Some(keeper) = &mut self.keeper {
            keeper.note(&json!(line));
        }
        let result = self.events.as_mut().map(|events| events.append(&line));
        if let Some(Err(error)) = result {
            tracing::error!("an event was not written: {error}");
        }
    }

    /// Takes a node that is not well into the status.
    pub fn unwell(&mut self, fields: &Value) {
        let text = |name: &str| fields.get(name).and_then(Value::as_str).unwrap_or_default();
        let (node, reason) = (text("node"), text("reason"));
        let unhealthy = &mut self.status.unhealthy;
        unhealthy.retain(|other| !other.starts_with(&format!("{node}: ")));
        unhealthy.push(format!("{node}: {reason}"));
        unhealthy.drain(..unhealthy.len().saturating_sub(MAX_UNHEALTHY));
        self.is_stale = true;
    }

    /// Writes the books into `events.jsonl`, for launchers to come.
    pub fn tell_ledger(&mut self) {
        self.ledger_told = Instant::now();
        // A step under way is booked once it is done, or by whoever comes after.
        let until = self.ledger.since();
        let mut fields = json!(self.ledger.sums(until));
        let open = self.ledger_told.saturating_duration_since(until);
        let until = SystemTime::now().checked_sub(open).map(crate::time::rfc3339);
        fields["until"] = until.unwrap_or_else(crate::time::now).into();
        fields["step"] = self.status.step.into();
        self.event("ledger", fields);
    }

    /// Writes a rank's error file and its event.
    pub fn failure(&mut self, cause: &Cause) {
        self.error_file(cause, false);
        self.event("rank_failed", self.describe(cause));
    }

    /// Marks the first cause in its error file and writes its event.
    pub fn first_cause(&mut self, cause: &Cause) {
        self.error_file(cause, true);
        self.event("first_cause", self.describe(cause));
    }

    fn describe(&self, cause: &Cause) -> Value {
        json!({
            "rank": cause.rank,
            "class": cause.class,
            "phase": cause.phase,
            "step": cause.step,
            "exit": cause.exit.describe(),
            "message": cause.lines.first(),
            "error_file": self.relative(&self.run.error(self.status.generation, cause.rank)),
        })
    }

    fn relative(&self, path: &Path) -> String {
        path.strip_prefix(self.run.root()).unwrap_or(path).display().to_string()
    }

    fn error_file(&self, cause: &Cause, is_first_cause: bool) {
        let generation = self.status.generation;
        let path = self.run.error(generation, cause.rank);
        let file = ErrorFile {
            time: crate::time::now(),
            generation,
            is_first_cause,
            cause: cause.clone(),
            log: self.relative(&self.run.log(generation, cause.rank)),
        };
        let written = std::fs::create_dir_all(self.run.errors(generation))
            .and_then(|()| Ok(serde_json::to_vec_pretty(&file)?))
            .and_then(|bytes| write_whole(&path, &bytes));
        if let Err(error) = written {
            tracing::error!("cannot write {}: {error}", path.display());
        }
    }

    /// Takes a step into the status; returns the time left in seconds.
    pub fn step(&mut self, report: &StepReport) -> Option<f64> {
        let mean = match self.mean_step_s {
            Some(mean) => mean + (report.step_time_s - mean) * 0.1,
            None => report.step_time_s,
        };
        self.mean_step_s = mean.is_finite().then_some(mean);
        let status = &mut self.status;
        status.step = report.step;
        status.last_step_at = Some(crate::time::now());
        // What an earlier generation did from here on no longer counts.
        self.skipped.split_off(&report.step);
        if report.skipped {
            self.skipped.insert(report.step);
        }
        status.skipped = self.skipped.len();
        status.loss = report.loss.is_finite().then_some(report.loss);
        status.validation_loss = report.validation_loss.or(status.validation_loss);
        status.tokens = report.tokens;
        let speed = report.tokens_per_second;
        status.tokens_per_second = speed.is_finite().then_some(speed);
        let left = status.steps.saturating_sub(report.step);
        status.eta_s = self.mean_step_s.map(|mean| mean * left as f64);
        status.eta_s
    }

    /// A new generation's first step is slow and does not count for the time left.
    pub fn forget_speed(&mut self) {
        self.mean_step_s = None;
        self.pace.forget();
        self.status.eta_s = None;
    }

    /// A rank did a step: tells of ranks that show to be slow.
    pub fn paced(&mut self, rank: usize, report: &StepReport) {
        for slow in self.pace.reported(rank, report) {
            let Slow { rank, own_s, usual_s, .. } = slow;
            tracing::warn!(
                "rank {rank} is slow: {own_s:.3} s of its own a step, others {usual_s:.3} s"
            );
            self.event("slow_rank", json!(slow));
        }
    }

    /// When the status is next to be written.
    pub fn next_write(&self) -> Instant {
        let share = self.write_time.saturating_mul(STATUS_SHARE);
        let pause = share.clamp(STATUS_EVERY, STATUS_LATEST);
        self.written.map_or_else(Instant::now, |written| written + pause)
    }

    /// When the executor must look at it although nothing happens.
    pub fn wake(&self) -> Instant {
        // Steps have it written as they come.
        self.next_write() + if self.is_stale { Duration::ZERO } else { STATUS_EVERY }
    }

    /// Writes the status.
    pub fn write_status(&mut self) {
        let begun = Instant::now();
        self.is_stale = false;
        if self.ledger_told.elapsed() >= LEDGER_EVERY {
            self.tell_ledger();
        }
        self.status.updated = crate::time::now();
        self.status.ledger = Some(self.ledger.sums(Instant::now()));
        let path = self.run.status();
        let written = serde_json::to_vec_pretty(&self.status)
            .map_err(std::io::Error::from)
            .and_then(|bytes| write_whole(&path, &bytes));
        if let Err(error) = &written
            && !self.has_told_error
        {
            // The status is written again and again; the reason stays the same.
            tracing::warn!("cannot write {}: {error}", path.display());
        }
        self.has_told_error = written.is_err();
        let now = Instant::now();
        self.write_time = now.saturating_duration_since(begun);
        self.written = Some(now);
    }
}

/// What [`write_whole`] writes before it has the file's name.
pub fn temporary(path: &Path) -> PathBuf {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    temporary.into()
}

/// Replaces a file at once, so that no reader sees a part; leaves no temporary file behind.
pub fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let temporary = temporary(path);
    let result = std::fs::write(&temporary, bytes).and_then(|()| std::fs::rename(&temporary, path));
    if result.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    result
}
