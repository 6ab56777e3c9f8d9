//! `phalanx status`: what a run does, from the files it keeps and its lock.

use crate::error::UserError;
use crate::print::{err, out};
use crate::runs::{self, holder, name_of};
use crate::supervisor::ledger::Sums;
use crate::supervisor::record::{Layout, Resumed, Status, ended};
use crate::view::thousands;
use checkpoint_format::interval::Interval;
use rank_protocol::jsonl::read_metrics;
use rank_protocol::{RunDir, exit_code};
use std::time::{Duration, SystemTime};

/// Arguments of `phalanx status`.
#[derive(Clone, Debug, clap::Args)]
pub struct StatusArgs {
    /// The run's directory or name; all runs where absent.
    pub run: Option<String>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Prints the status; returns the exit code.
pub fn run(args: StatusArgs) -> Result<i32, UserError> {
    if let Some(run) = &args.run {
        let status = read(&runs::find(run)?)?;
        match args.json {
            true => out!("{}", to_json(&status)?),
            false => out!("{}", describe(&status).trim_end()),
        }
        return Ok(exit_code::DONE);
    }
    let told = |error: UserError| err!("{error}");
    let read = |run: &RunDir| read(run).map_err(told).ok();
    let all: Vec<Status> = runs::list().iter().filter_map(read).collect();
    if args.json {
        out!("{}", to_json(&all)?);
    } else if all.is_empty() {
        out!("no runs in {}", runs::runs_dir().display());
    } else {
        out!("{:<28} {:<12} {:>16} {:>10} {:>9}", "run", "state", "step", "loss", "restarts");
        for status in &all {
            let steps = format!("{}/{}", step_of(status), status.steps);
            let loss = status.loss.map_or("-".into(), |loss| format!("{loss:.4}"));
            let Status { name, state, restarts, .. } = status;
            out!("{name:<28} {state:<12} {steps:>16} {loss:>10} {restarts:>9}");
        }
    }
    Ok(exit_code::DONE)
}

/// What a run does. A launcher that is gone without a word leaves `lost`.
pub fn read(run: &RunDir) -> Result<Status, UserError> {
    let path = run.status();
    let mut status = match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice::<Status>(&bytes).map_err(|error| {
            let error = UserError::failed(format!("{} is damaged: {error}", path.display()));
            error.hint("remove it: what it says follows from events.jsonl and metrics.jsonl")
        })?,
        Err(_) => from_history(run)?,
    };
    if status.exit_code.is_none() && holder(run).is_none() {
        status.state = "lost".into();
        status.reason = Some("its launcher is gone without a word; `phalanx resume` it".into());
        (status.eta_s, status.memory_checkpoint, status.memory_copied) = (None, None, None);
        status.ranks.clear();
    }
    Ok(status)
}

/// What a run does, as far as its events and metrics say.
fn from_history(run: &RunDir) -> Result<Status, UserError> {
    let history = runs::history(run)?;
    let metrics = read_metrics(&run.metrics())?;
    let last = metrics.last().cloned().unwrap_or_default();
    let state = history.end.as_ref().map_or("starting", |(code, _)| ended(*code).0);
    Ok(Status {
        name: name_of(run),
        run_id: history.run_id.unwrap_or_default(),
        state: state.into(),
        generation: history.last_generation,
        step: last.step,
        steps: history.steps,
        loss: Some(last.loss).filter(|loss| loss.is_finite() && last.step > 0),
        validation_loss: metrics.iter().rev().find_map(|report| report.validation_loss),
        skipped: metrics.iter().filter(|report| report.skipped).count(),
        tokens: last.tokens,
        last_checkpoint: history.committed,
        restarts: history.restarts,
        started: history.started,
        exit_code: history.end.as_ref().map(|(code, _)| *code),
        reason: history.end.map(|(_, reason)| reason),
        ..Status::default()
    })
}

fn to_json<T: serde::Serialize>(value: &T) -> Result<String, UserError> {
    serde_json::to_string_pretty(value).map_err(|error| UserError::failed(error.to_string()))
}

/// The last step done; where this launcher has done none yet, that of the checkpoint.
fn step_of(status: &Status) -> u64 {
    match status.last_step_at {
        Some(_) => status.step,
        None => status.step.max(status.last_checkpoint.unwrap_or(0)),
    }
}

fn describe(status: &Status) -> String {
    let mut lines = vec![
        ("run", format!("{}: {}", status.name, status.state)),
        ("step", format!("{} of {}", step_of(status), status.steps)),
    ];
    if let Some(reason) = &status.reason {
        lines.push(("reason", reason.clone()));
    }
    let last_step = status.last_step_at.as_deref().and_then(crate::time::parse);
    if let (Some(at), None) = (last_step, status.exit_code) {
        let age = SystemTime::now().duration_since(at).unwrap_or_default();
        lines.push(("last step", format!("{} ago", crate::time::short(age))));
    }
    if status.step > 0 {
        let loss = status.loss.map_or("-".to_owned(), |loss| format!("{loss:.4}"));
        let validation = status.validation_loss.map(|loss| format!(" (validation {loss:.4})"));
        lines.push(("loss", format!("{loss}{}", validation.unwrap_or_default())));
    }
    if status.skipped > 0 {
        let why = "an update with a loss or gradient that is not finite, or jumps";
        lines.push(("skipped", format!("{} steps: {why}", status.skipped)));
    }
    lines.push(("tokens", thousands(status.tokens as f64)));
    if let Some(speed) = status.tokens_per_second {
        lines.push(("tokens/s", thousands(speed)));
    }
    let eta = status.eta_s.and_then(|eta| Duration::try_from_secs_f64(eta).ok());
    if let Some(eta) = eta {
        lines.push(("time left", crate::time::short(eta)));
    }
    lines.extend(checkpoints(status));
    if let Some(alarm) = &status.store_alarm {
        let meanwhile = "the ranks go on; nothing is restarted meanwhile";
        lines.push(("ALARM", format!("the store does not answer ({meanwhile}): {alarm}")));
    }
    for node in &status.unhealthy {
        lines.push(("unhealthy", format!("node {node}")));
    }
    if let Some(missing) = status.layout.as_ref().and_then(Layout::missing) {
        lines.push(("ALARM", format!("the run has {missing}")));
    }
    let is_on_nodes = status.ranks.iter().any(|rank| rank.node.is_some());
    let from = status.resumed.map(|Resumed { step, tier }| {
        format!(", from step {step} out of {}", tier.describe(is_on_nodes))
    });
    let (generation, restarts) = (status.generation, status.restarts);
    let from = from.unwrap_or_default();
    lines.push(("generation", format!("{generation} ({restarts} restarts){from}")));
    if let Some(ledger) = &status.ledger {
        lines.push(("ettr", ettr(ledger)));
        lines.push(("time", ledger.describe()));
    }
    if !status.updated.is_empty() {
        lines.push(("updated", status.updated.clone()));
    }
    for rank in &status.ranks {
        let step = rank.step.map_or(String::new(), |step| format!(" step {step}"));
        let node = rank.node.as_ref().map_or(String::new(), |node| format!("{node} "));
        let what = format!("{node}pid {} {} ({}){step}", rank.pid, rank.state, rank.phase);
        lines.push(("rank", format!("{}: {what}", rank.rank)));
    }
    lines.iter().map(|(name, value)| format!("{name:<12}{value}\n")).collect()
}

/// What is saved, where, and what goes wrong with it.
fn checkpoints(status: &Status) -> Vec<(&'static str, String)> {
    let newest = status.last_checkpoint.map_or("none yet".into(), |step| format!("step {step}"));
    let mut lines = vec![("checkpoint", newest)];
    if let Some(interval) = &status.checkpoint_interval {
        lines.push(("", every(interval)));
    }
    if let Some(alarm) = &status.alarm {
        lines.push(("ALARM", format!("the last checkpoint was not written: {alarm}")));
    }
    if let Some(step) = status.memory_checkpoint {
        let copied = match status.memory_copied {
            Some(copied) => format!("; copied to other nodes: step {copied}"),
            None => String::new(),
        };
        lines.push(("in memory", format!("step {step}{copied}")));
    }
    if let Some(alarm) = &status.memory_copy_alarm {
        lines.push(("ALARM", format!("what is in memory is not copied to other nodes: {alarm}")));
    }
    if let Some(alarm) = &status.memory_alarm {
        lines.push(("ALARM", format!("no checkpoint is kept in memory: {alarm}")));
    }
    if let Some(remote) = &status.remote {
        let copied = status.remote_checkpoint.map(|step| format!("step {step}"));
        let copied = copied.unwrap_or_else(|| "none copied yet".into());
        lines.push(("remote", format!("{copied}, in {remote}")));
    }
    if let Some(alarm) = &status.remote_alarm {
        lines.push(("ALARM", format!("copying to the object store fails: {alarm}")));
    }
    lines
}

/// The interval between checkpoints, where the run chose it, and why.
fn every(interval: &Interval) -> String {
    let short = |s: f64| crate::time::short(Duration::try_from_secs_f64(s).unwrap_or_default());
    let Interval { steps, seconds, stall_s, mttf_s, .. } = interval;
    format!(
        "one every {steps} steps ({seconds:.1} s): a save stalls for {stall_s:.3} s, and something \
         fails every {}",
        short(*mttf_s)
    )
}

fn ettr(ledger: &Sums) -> String {
    let percent = |ratio: Option<f64>| ratio.map_or("-".into(), |r| format!("{:.1} %", 100.0 * r));
    let wall = Duration::try_from_secs_f64(ledger.wall_s).unwrap_or_default();
    format!(
        "{} of {} (last hour {}): first-time steps / wall time",
        percent(ledger.ettr),
        crate::time::short(wall),
        percent(ledger.ettr_last_hour)
    )
}
