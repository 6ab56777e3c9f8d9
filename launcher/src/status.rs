//! `phalanx status`: what a run does, from the files it keeps and its lock.

use crate::error::UserError;
use crate::print::out;
use crate::runs::{self, holder, name_of};
use crate::supervisor::record::Status;
use crate::view::thousands;
use rank_protocol::{RunDir, exit_code};
use std::time::Duration;

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
    let all: Vec<Status> = runs::list().iter().filter_map(|run| read(run).ok()).collect();
    if args.json {
        out!("{}", to_json(&all)?);
    } else if all.is_empty() {
        out!("no runs in {}", runs::runs_dir().display());
    } else {
        out!("{:<28} {:<12} {:>16} {:>10} {:>9}", "run", "state", "step", "loss", "restarts");
        for status in &all {
            let steps = format!("{}/{}", status.step, status.steps);
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
        Ok(bytes) => serde_json::from_slice::<Status>(&bytes)
            .map_err(|error| UserError::failed(format!("{}: {error}", path.display())))?,
        Err(_) => Status { name: name_of(run), state: "starting".into(), ..Status::default() },
    };
    if status.exit_code.is_none() && holder(run).is_none() {
        status.state = "lost".into();
        status.reason = Some("its launcher is gone without a word; `phalanx resume` it".into());
        status.eta_s = None;
        status.ranks.clear();
    }
    Ok(status)
}

fn to_json<T: serde::Serialize>(value: &T) -> Result<String, UserError> {
    serde_json::to_string_pretty(value).map_err(|error| UserError::failed(error.to_string()))
}

fn describe(status: &Status) -> String {
    let mut lines = vec![
        ("run", format!("{}: {}", status.name, status.state)),
        ("step", format!("{} of {}", status.step, status.steps)),
    ];
    if let Some(reason) = &status.reason {
        lines.push(("reason", reason.clone()));
    }
    if let Some(loss) = status.loss {
        let validation = status.validation_loss.map(|loss| format!(" (validation {loss:.4})"));
        lines.push(("loss", format!("{loss:.4}{}", validation.unwrap_or_default())));
    }
    lines.push(("tokens", thousands(status.tokens as f64)));
    if let Some(speed) = status.tokens_per_second {
        lines.push(("tokens/s", thousands(speed)));
    }
    let eta = status.eta_s.and_then(|eta| Duration::try_from_secs_f64(eta).ok());
    if let Some(eta) = eta {
        lines.push(("time left", crate::time::short(eta)));
    }
    let checkpoint =
        status.last_checkpoint.map_or("none yet".into(), |step| format!("step {step}"));
    lines.push(("checkpoint", checkpoint));
    lines.push(("generation", format!("{} ({} restarts)", status.generation, status.restarts)));
    lines.push(("updated", status.updated.clone()));
    for rank in &status.ranks {
        let step = rank.step.map_or(String::new(), |step| format!(" step {step}"));
        let what = format!("pid {} {} ({}){step}", rank.pid, rank.state, rank.phase);
        lines.push(("rank", format!("{}: {what}", rank.rank)));
    }
    lines.iter().map(|(name, value)| format!("{name:<12}{value}\n")).collect()
}
