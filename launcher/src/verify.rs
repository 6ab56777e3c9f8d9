//! `phalanx resume RUN --verify K`: does K steps of a run once more, from one of its checkpoints,
//! and compares what comes of them with what came of them before: losses, gradient norms and, where
//! a checkpoint of the last of them is there, every tensor, bit by bit. The run stays as it is.

use crate::error::UserError;
use crate::machine::Resolved;
use crate::print::{err, out};
use crate::runs;
use crate::supervisor::ledger::{Ledger, Sums};
use crate::supervisor::restore::is_current;
use crate::supervisor::run::{Plan, supervise};
use crate::view::View;
use checkpoint_format::Checkpoint;
use checkpoint_format::diff::diff;
use checkpoint_format::scan::{Found, scan};
use rank_protocol::jsonl::read_metrics;
use rank_protocol::{RunDir, StepReport, exit_code};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Steps that differ and are printed, at most.
const MAX_SHOWN: usize = 10;

/// What to do once more.
#[derive(Clone, Debug)]
struct Replay {
    /// The checkpoint that it starts from.
    from: Found,
    /// Steps from there.
    steps: u64,
    /// The checkpoint of the last of them, where there is one.
    to: Option<Found>,
}

/// Replays `steps` steps and says whether they came out the same; returns the exit code. `step`:
/// from this step's checkpoint.
pub fn verify(
    run: &RunDir,
    resolved: Resolved,
    (trainer, library_path): (PathBuf, Option<OsString>),
    (steps, step): (u64, Option<u64>),
) -> Result<i32, UserError> {
    let replay = choose(run, steps, step)?;
    let before = reports(run)?;
    refuse_changed(run, &before, &replay)?;
    let again = RunDir::new(run.root().join("verify"));
    let cleared = || match std::fs::remove_dir_all(again.root()) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(UserError::failed(format!("cannot remove {}: {error}", again.root().display())))
        }
        _ => Ok(()),
    };
    cleared()?;
    if let Err(error) = replay_steps(run, &again, resolved, (trainer, library_path), &replay) {
        let kept = format!("its logs are in {}", again.root().display());
        return Err(if error.hint.is_none() { error.hint(kept) } else { error });
    }
    let result = compare(run, &again, &before, &replay);
    cleared()?;
    result
}

/// The checkpoint that the replay starts from: the newest after which so many steps were done, if
/// possible one with another checkpoint at the end of them.
fn choose(run: &RunDir, steps: u64, step: Option<u64>) -> Result<Replay, UserError> {
    let name = runs::name_of(run);
    let history = runs::history(run)?;
    let mut found =
        scan(&run.checkpoints()).map_err(|error| UserError::failed(error.to_string()))?.committed;
    found.retain(|found| is_current(found.step, found.generation, &history.branches));
    let done = read_metrics(&run.metrics())?.last().map_or(0, |report| report.step);
    let is_long_enough = |found: &&Found| {
        step.is_none_or(|step| step == found.step) && found.step.saturating_add(steps) <= done
    };
    let end_of = |from: &Found| found.iter().find(|to| to.step == from.step + steps).cloned();
    let fits: Vec<&Found> = found.iter().filter(is_long_enough).collect();
    let best = fits.iter().rev().find(|from| end_of(from).is_some()).or(fits.last());
    let Some(from) = best else {
        let have: Vec<String> = found.iter().map(|found| found.step.to_string()).collect();
        let error = UserError::usage(format!(
            "--verify {steps}: run {name} has done {done} steps, and no checkpoint {steps} or more \
             before that"
        ));
        return Err(error.hint(match have.is_empty() {
            true => "it has no good checkpoint at all".to_owned(),
            false => format!("it has: {}", have.join(", ")),
        }));
    };
    Ok(Replay { from: (*from).clone(), steps, to: end_of(from) })
}

/// Keys that do not touch what training computes.
const WITHOUT_INFLUENCE: [&str; 5] =
    ["checkpoint.", "restart.", "metrics.", "validation.", "cluster.timeout_s"];

/// Steps that were done with another config cannot be repeated with this one.
fn refuse_changed(
    run: &RunDir,
    before: &BTreeMap<u64, StepReport>,
    replay: &Replay,
) -> Result<(), UserError> {
    let steps = replay.from.step + 1..=replay.from.step + replay.steps;
    let generations = before.range(steps.clone()).map(|(_, report)| report.generation);
    let Some(first) = generations.min() else { return Ok(()) };
    let changes = runs::history(run)?.config_changes;
    let later = changes.iter().filter(|change| change.generation >= first);
    let mut keys: BTreeSet<&str> =
        later.flat_map(|change| &change.keys).map(String::as_str).collect();
    keys.retain(|key| !WITHOUT_INFLUENCE.iter().any(|prefix| key.starts_with(prefix)));
    if keys.is_empty() {
        return Ok(());
    }
    let (from, to) = (steps.start(), steps.end());
    let error = UserError::usage(format!(
        "--verify: of the steps {from} to {to} some were done with another config; since then \
         changed: {}",
        keys.into_iter().collect::<Vec<_>>().join(", ")
    ));
    Err(error.hint("choose steps after the change (--step N, or fewer steps)"))
}

fn reports(run: &RunDir) -> Result<BTreeMap<u64, StepReport>, UserError> {
    let metrics = read_metrics(&run.metrics())?;
    Ok(metrics.into_iter().map(|report| (report.step, report)).collect())
}

/// Does the steps in a folder of their own, with the same config and a link to the same checkpoint.
fn replay_steps(
    run: &RunDir,
    again: &RunDir,
    resolved: Resolved,
    (trainer, library_path): (PathBuf, Option<OsString>),
    replay: &Replay,
) -> Result<(), UserError> {
    let cannot = |path: &Path, error: std::io::Error| {
        UserError::failed(format!("cannot write {}: {error}", path.display()))
    };
    let last = replay.from.step + replay.steps;
    err!("doing steps {} to {last} again, from the checkpoint before", replay.from.step + 1);
    let copy = again.checkpoint(replay.from.step);
    link_all(&replay.from.path, &copy).map_err(|error| cannot(&copy, error))?;
    let config = resolved.loaded.config;
    std::fs::write(again.config(), config.to_yaml())
        .map_err(|error| cannot(&again.config(), error))?;
    let plan = Plan {
        keeper: None,
        run: again.clone(),
        run_id: format!("{}-verify", runs::name_of(run)),
        world_size: resolved.world_size,
        threads: resolved.threads,
        trainer,
        library_path,
        // Its checkpoint is of this generation, and an older one may not save.
        last_generation: replay.from.generation,
        committed: Some(replay.from.step),
        ever_committed: None,
        branches: Vec::new(),
        resumes: Vec::new(),
        roll_backs: runs::history(run)?.roll_backs,
        first_step: Some(replay.from.step),
        restarts: 0,
        failures: 0,
        ledger: Ledger::new(&Sums::default(), Instant::now()),
        cluster: None,
        has_lost_coordinator: false,
        adopt: None,
        may_begin: false,
        stop_after: Some(last),
        remote: None,
        memory: None,
        profile: None,
        config,
    };
    let code = supervise(plan, View::start(false), Vec::new())
        .map_err(|error| UserError::failed(format!("the supervisor failed: {error}")))?;
    match code {
        exit_code::DONE | exit_code::PREEMPTED => Ok(()),
        _ => Err(UserError {
            code,
            message: "the replay did not come to its end".into(),
            hint: None,
        }),
    }
}

/// Files of a folder under a second name, where the file system has such, else copies: they are
/// read, and never written.
fn link_all(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let (file, second) = (entry.path(), to.join(entry.file_name()));
        if std::fs::hard_link(&file, &second).is_err() {
            std::fs::copy(&file, &second)?;
        }
    }
    Ok(())
}

fn compare(
    run: &RunDir,
    again: &RunDir,
    before: &BTreeMap<u64, StepReport>,
    replay: &Replay,
) -> Result<i32, UserError> {
    let after = reports(again)?;
    let last = replay.from.step + replay.steps;
    let done = after.last_key_value().map_or(replay.from.step, |(step, _)| *step);
    if done < last {
        err!("stopped after step {done}; nothing is said about the steps up to {last}");
        return Ok(exit_code::PREEMPTED);
    }
    let mut num_different = 0;
    for step in replay.from.step + 1..=last {
        let (Some(old), Some(new)) = (before.get(&step), after.get(&step)) else {
            return Err(UserError::failed(format!("step {step} has no line in metrics.jsonl")));
        };
        let bits = |report: &StepReport| (report.loss.to_bits(), report.grad_norm.to_bits());
        if bits(old) == bits(new) {
            continue;
        }
        num_different += 1;
        if num_different <= MAX_SHOWN {
            out!(
                "step {step} differs: loss {} then, {} now; gradient norm {} then, {} now",
                old.loss,
                new.loss,
                old.grad_norm,
                new.grad_norm
            );
        }
    }
    let tensors = match &replay.to {
        Some(to) => Some(compare_tensors(to, &again.checkpoint(last))?),
        None => None,
    };
    let name = runs::name_of(run);
    let (first, steps) = (replay.from.step + 1, replay.steps);
    let is_equal = num_different == 0 && tensors.as_ref().is_none_or(|(equal, _)| *equal);
    let losses = match num_different {
        0 => format!("{steps} losses and gradient norms are equal to the last bit"),
        n => format!("{n} of {steps} steps differ in loss or gradient norm"),
    };
    let tensors = tensors.map_or_else(
        || format!("no checkpoint of step {last} to compare tensors with"),
        |(_, words)| words,
    );
    out!("run {name}, steps {first} to {last}: {losses}; {tensors}");
    Ok(if is_equal { exit_code::DONE } else { exit_code::FAILED })
}

/// Whether all tensors are equal, and that in words.
fn compare_tensors(then: &Found, now: &Path) -> Result<(bool, String), UserError> {
    let open = |path: &Path| Checkpoint::open(path);
    let diff = open(&then.path).and_then(|then| diff(&then, &open(now)?));
    let diff = diff.map_err(|error| UserError::failed(error.to_string()))?;
    if diff.is_equal() {
        let words = format!("so are {} tensors of step {}", diff.compared, then.step);
        return Ok((true, words));
    }
    let names = diff.different.iter().map(|tensor| tensor.name.as_str());
    let names: Vec<&str> = names.chain(diff.only_in_a.iter().map(String::as_str)).take(3).collect();
    let count = diff.different.len() + diff.only_in_a.len() + diff.only_in_b.len();
    Ok((false, format!("{count} tensors of step {} differ: {} …", then.step, names.join(", "))))
}
