//! Which checkpoint a resumed run goes on from.

use super::{ResumeArgs, Start};
use crate::error::UserError;
use crate::remote::{self, Place};
use crate::runs::{self, History};
use crate::supervisor::restore::{Branch, is_current};
use checkpoint_format::scan::scan;
use rank_protocol::RunDir;
use run_config::RunConfig;

/// The checkpoint from which a run goes on.
///
/// # Errors
/// Where there is none, or not the one that was asked for.
pub(super) fn choose_start(
    run: &RunDir,
    config: &RunConfig,
    history: &History,
    args: &ResumeArgs,
) -> Result<Start, UserError> {
    let scan = scan(&run.checkpoints()).map_err(|error| UserError::failed(error.to_string()))?;
    let here = scan.committed.iter().map(|found| (found.step, found.generation)).collect();
    let steps = with_remote(here, config, history, args);
    let is_current =
        |(step, generation): &&(u64, u64)| is_current(*step, *generation, &history.branches);
    let newest = steps.iter().rev().find(is_current).map(|(step, _)| *step);
    let name = runs::name_of(run);
    if let Some(step) = args.step {
        if !steps.iter().any(|(found, _)| *found == step) {
            let steps: Vec<String> = steps.iter().map(|(step, _)| step.to_string()).collect();
            let error =
                UserError::usage(format!("run {name} has no good checkpoint of step {step}"));
            return Err(error.hint(format!("it has: {}", steps.join(", "))));
        }
        let generation = history.last_generation + 1;
        let branch = (Some(step) != newest).then_some(Branch { step, generation });
        let (committed, first_step) = (Some(step), Some(step));
        return Ok(Start { committed, first_step, branch, ..Start::default() });
    }
    match (newest, args.from_start) {
        (Some(step), true) => {
            let error = UserError::usage(format!(
                "run {name} has a good checkpoint of step {step}: --from-start is for runs without"
            ));
            Err(error.hint("start a new run with --set name=…"))
        }
        (Some(step), false) => Ok(Start { committed: Some(step), ..Start::default() }),
        (None, true) => Ok(Start { may_begin: true, ..Start::default() }),
        (None, false) => Err(without_a_checkpoint(&name, history, scan.damaged.len())),
    }
}

/// The (step, generation) of the good checkpoints that are `here`, rising; with those of the object
/// store, where what is wanted is not here.
fn with_remote(
    here: Vec<(u64, u64)>,
    config: &RunConfig,
    history: &History,
    args: &ResumeArgs,
) -> Vec<(u64, u64)> {
    let is_here = match args.step {
        Some(step) => here.iter().any(|(found, _)| *found == step),
        None => here.last().map(|(step, _)| *step) >= history.committed,
    };
    let place = Place::of(config, history.run_id.clone()).filter(|_| !is_here);
    let Some(place) = place else { return here };
    let stored = remote::list_or_say(&place);
    let stored = stored.iter().map(|stored| (stored.target.step, stored.target.generation));
    // What is of a generation that never was is none of this run's.
    let stored = stored.filter(|(_, generation)| *generation <= history.last_generation);
    let mut all: Vec<(u64, u64)> = here.into_iter().chain(stored).collect();
    all.sort_unstable();
    all.dedup();
    all
}

fn without_a_checkpoint(name: &str, history: &History, num_damaged: usize) -> UserError {
    let again = "--from-start begins again from the initial weights";
    match history.committed {
        Some(step) => UserError::usage(format!(
            "run {name} committed step {step}, and no good checkpoint is left \
             ({num_damaged} damaged)"
        ))
        .hint(format!("`phalanx checkpoint verify {name}` says what is wrong; {again}")),
        None => {
            UserError::usage(format!("run {name} ended before its first checkpoint")).hint(again)
        }
    }
}
