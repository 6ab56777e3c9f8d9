//! The files that the launcher keeps about a run: events, status, error files.
//!
//! A file that cannot be written does not end a run: training goes on, and the screen says so.

use super::cause::Cause;
use super::ledger::{Ledger, Sums};
use checkpoint_format::interval::Interval;
use rank_protocol::jsonl::{Appender, read_metrics};
use rank_protocol::{RunDir, StepReport, exit_code};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// Time between two entries of the books in `events.jsonl`.
const LEDGER_EVERY: Duration = Duration::from_secs(60);
/// Time between two writes of the status while nothing but steps happens.
const STATUS_EVERY: Duration = Duration::from_millis(500);

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
    /// the last checkpoint in the object store; at the end `finished`, `preempted`, `interrupted` or
    /// `failed`; `lost` for readers, where the launcher is gone without a word.
    pub state: String,
    /// Generation.
    pub generation: u64,
    /// Last step done.
    pub step: u64,
    /// When it was done; `None`: this launcher has done none yet.
    #[serde(default)]
    pub last_step_at: Option<String>,
    /// Steps whose update was skipped, because the loss or a gradient was not finite.
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
    /// With `checkpoint.every_steps: auto`: the steps between checkpoints, and what they follow from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_interval: Option<Interval>,
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
    /// The ranks of the current generation.
    pub ranks: Vec<RankStatus>,
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
    ledger_told: Instant,
    written: Option<Instant>,
    has_told_error: bool,
    mean_step_s: Option<f64>,
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
    /// For a run whose directory is there.
    pub fn open(run: RunDir, status: Status, ledger: Ledger) -> Self {
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
            ledger_told: Instant::now(),
            written: None,
            has_told_error: false,
            mean_step_s: None,
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
        let result = self.events.as_mut().map(|events| events.append(&line));
        if let Some(Err(error)) = result {
            tracing::error!("an event was not written: {error}");
        }
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
        self.status.eta_s = None;
    }

    /// When the status is next to be written.
    pub fn next_write(&self) -> Instant {
        self.written.map_or_else(Instant::now, |written| written + STATUS_EVERY)
    }

    /// Writes the status.
    pub fn write_status(&mut self) {
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
        self.written = Some(Instant::now());
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
