//! `phalanx why`: the first cause of a run's last failure.

use crate::error::UserError;
use crate::print::out;
use crate::runs;
use rank_protocol::{exit_code, jsonl};
use serde_json::Value;

/// Arguments of `phalanx why`.
#[derive(Clone, Debug, clap::Args)]
pub struct WhyArgs {
    /// The run's directory or name.
    pub run: String,
    /// Print the error file as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Prints the first cause; returns the exit code.
pub fn run(args: WhyArgs) -> Result<i32, UserError> {
    let run = runs::find(&args.run)?;
    let events: Vec<Value> = jsonl::read(&run.events())?;
    let is_kind = |event: &&Value, kind: &str| event["kind"] == kind;
    let cause = events.iter().rev().find(|event| is_kind(event, "first_cause"));
    let end = events.iter().rev().find(|event| event.get("exit_code").is_some());
    let Some(cause) = cause else {
        match args.json {
            true => out!("null"),
            false => out!("run {}: no rank has failed", runs::name_of(&run)),
        }
        if let (Some(reason), false) = (end.and_then(|end| end["reason"].as_str()), args.json) {
            out!("{reason}");
        }
        return Ok(exit_code::DONE);
    };
    let path = run.root().join(cause["error_file"].as_str().unwrap_or_default());
    let file: Option<Value> =
        std::fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let detail = file.unwrap_or_else(|| cause.clone());
    if args.json {
        out!("{detail:#}");
        return Ok(exit_code::DONE);
    }
    let described = describe(cause, &detail);
    out!("{described}");
    out!("details: {}", path.display());
    if let Some(log) = detail["log"].as_str() {
        out!("log: {}", run.root().join(log).display());
    }
    let reason = end.and_then(|end| end["reason"].as_str());
    let told = |reason: &&str| described.lines().any(|line| reason.contains(line.trim()));
    match reason {
        // What the rank said is above; the rest of the reason is what the launcher made of it.
        Some(reason) if told(&reason) => {
            out!("the run then ended: {}", reason.rsplit("; ").next().unwrap_or(reason))
        }
        Some(reason) => out!("the run then ended: {reason}"),
        None => {}
    }
    Ok(exit_code::DONE)
}

fn describe(cause: &Value, detail: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let at = match cause["step"].as_u64() {
        Some(step) => format!("step {step}, "),
        None => String::new(),
    };
    let mut out = format!(
        "generation {}: rank {} failed first ({} failure, {at}phase {}, {})",
        cause["generation"],
        cause["rank"],
        text(&cause["class"]),
        text(&cause["phase"]),
        text(&cause["exit"]),
    );
    if let Some(collective) = detail["collective"].as_str() {
        out.push_str(&format!("\n  in {collective}"));
    }
    for line in detail["lines"].as_array().into_iter().flatten() {
        out.push_str(&format!("\n  {}", text(line)));
    }
    out
}
