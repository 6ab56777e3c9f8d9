//! `phalanx why`: the first cause of a run's last failure.

use crate::error::UserError;
use crate::print::out;
use crate::runs;
use crate::supervisor::restore::Tier;
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
    if let Some(next) = went_on(&events, cause) {
        out!("{next}");
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

/// What the generation after the one that failed began with.
fn went_on(events: &[Value], cause: &Value) -> Option<String> {
    let failed = cause["generation"].as_u64()?;
    let is_later = |event: &&Value| {
        event["kind"] == "generation_started" && event["generation"].as_u64() > Some(failed)
    };
    let next = events.iter().find(is_later)?;
    let generation = &next["generation"];
    let Some(step) = next["resume_step"].as_u64() else {
        return Some(format!("generation {generation} began again from the start"));
    };
    let tier = serde_json::from_value::<Tier>(next["resume_tier"].clone());
    let is_on_nodes = events.iter().any(|event| event["kind"] == "nodes_placed");
    let tier = tier.map(|tier| format!(", out of {}", tier.describe(is_on_nodes)));
    let tier = tier.unwrap_or_default();
    Some(format!("generation {generation} went on from step {step}{tier}"))
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[track_caller]
    fn check(next: Value, expected: Option<&str>) {
        let cause = json!({ "kind": "first_cause", "generation": 2 });
        let started = json!({ "kind": "generation_started", "generation": 2, "resume_step": 5 });
        let found = went_on(&[started, cause.clone(), next], &cause);
        assert_eq!(found.as_deref(), expected);
    }

    #[test]
    fn what_followed_a_failure_is_told_with_its_tier() {
        let mut next = json!({ "kind": "generation_started", "generation": 3, "resume_step": 20 });
        check(next.clone(), Some("generation 3 went on from step 20"));
        next["resume_tier"] = "remote".into();
        check(next.clone(), Some("generation 3 went on from step 20, out of the object store"));
        next["resume_tier"] = "memory".into();
        check(
            next.clone(),
            Some("generation 3 went on from step 20, out of this machine's memory"),
        );
        next["resume_tier"] = "local".into();
        check(next.clone(), Some("generation 3 went on from step 20, out of the run's folder"));
        next["resume_step"] = Value::Null;
        check(next, Some("generation 3 began again from the start"));
        check(json!({ "kind": "run_failed", "generation": 2 }), None);
    }
}
