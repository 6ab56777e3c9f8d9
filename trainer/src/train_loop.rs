//! The training loop.

use crate::error::{Result, TrainError};
use crate::faults;
use crate::metrics::{Metrics, Written};
use crate::numeric::too_many;
use crate::saving::Saving;
use crate::state::Rank;
use crate::train_step::{StepResult, train_step};
use crate::validation::validate;
use collectives::ReduceOp;
use parallel::all_reduce_scalars;
use rank_protocol::message::{Event, FailureClass, Phase, StepReport};
use run_config::batch_plan::step_batch;
use serde_json::{Value, json};
use std::time::Instant;

/// How a rank's training ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done and saved.
    Finished,
    /// Told to stop; the state is saved.
    Preempted,
}

/// Trains from the step after `rank.step` to the last.
///
/// # Errors
/// Where something fails that another try, from the last checkpoint, may mend, or not.
pub fn train(rank: &mut Rank) -> Result<Outcome> {
    let last = rank.config.training.steps;
    let mut metrics = match rank.worker.groups.rank {
        0 => Some(Metrics::open(&rank.run_dir, rank.config.metrics.tensorboard, rank.step + 1)?),
        _ => None,
    };
    while rank.step < last {
        if rank.saving.as_ref().is_some_and(Saving::is_over) {
            finish_save(rank, false)?;
        }
        let kept = rank.memory.as_ref().and_then(|memory| memory.saving.as_ref());
        if kept.is_some_and(Saving::is_over) {
            finish_keep(rank)?;
        }
        rank.enter(Phase::Train)?;
        faults::at_step(rank)?;
        let (started, waited) = (Instant::now(), collectives::waited());
        let result = match train_step(rank) {
            Err(error) if error.roll_back().is_some() => {
                // What is being written is the newest checkpoint before the trouble.
                finish_save(rank, false)?;
                finish_keep(rank)?;
                return Err(error);
            }
            result => result?,
        };
        let mut report = report(rank, &result, started.elapsed().as_secs_f64());
        report.comm_wait_s = rank.waited_since(waited);
        rank.cadence.stepped(report.step_time_s);
        if is_due(rank.step, rank.config.validation.every_steps) || rank.step == last {
            report.validation_loss = validated(rank)?;
        }
        if let Some(metrics) = &mut metrics {
            let written = metrics.write(&report)?;
            tell_of_metrics(rank, written)?;
        }
        rank.client.report_step(report)?;
        count_skips(rank, &result)?;
        let stop = result.stop || rank.client.assignment().stop_after == Some(rank.step);
        let at_end = rank.step == last || stop;
        if at_end || rank.cadence.is_due(rank.step) {
            save(rank, result.learning_rate, at_end)?;
        } else if rank.memory.as_ref().is_some_and(|m| is_due(rank.step, m.every_steps)) {
            keep(rank, result.learning_rate)?;
        }
        if stop && rank.step < last {
            finish_metrics(rank, metrics)?;
            return Ok(Outcome::Preempted);
        }
    }
    finish_metrics(rank, metrics)?;
    rank.enter(Phase::Exit)?;
    Ok(Outcome::Finished)
}

/// Says once that the metrics cannot be written, and once that they are again.
fn tell_of_metrics(rank: &Rank, written: Written) -> Result<()> {
    let (kind, reason) = match written {
        Written::All | Written::StillNotAll => return Ok(()),
        Written::NotAll(error) => ("metrics_failed", error.to_string()),
        Written::AllAgain => ("metrics_recovered", "all steps are written".to_owned()),
    };
    let fields = [("step".to_owned(), rank.step.into()), ("reason".to_owned(), reason.into())];
    rank.client.event(Event { kind: kind.into(), fields: fields.into_iter().collect() })?;
    Ok(())
}

/// The last chance for what was not written.
fn finish_metrics(rank: &Rank, metrics: Option<Metrics>) -> Result<()> {
    let Some(mut metrics) = metrics.filter(|metrics| metrics.num_waiting() > 0) else {
        return Ok(());
    };
    let written = metrics.write_waiting()?;
    tell_of_metrics(rank, written)?;
    if metrics.num_waiting() > 0 {
        let path = rank.run_dir.metrics();
        tracing::error!(
            "the metrics of the last {} steps are lost: {} cannot be written",
            metrics.num_waiting(),
            path.display()
        );
    }
    Ok(())
}

fn is_due(step: u64, every: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}

fn validated(rank: &mut Rank) -> Result<Option<f64>> {
    let validation = &rank.config.validation;
    let held_out = rank.config.data.validation_fraction > 0.0;
    if validation.every_steps == 0 || validation.steps == 0 || !held_out {
        return Ok(None);
    }
    rank.enter(Phase::Validate)?;
    validate(rank).map(Some)
}

fn report(rank: &Rank, result: &StepResult, step_time_s: f64) -> StepReport {
    let batch = step_batch(&rank.config.training.batch_stages, rank.step);
    StepReport {
        step: rank.step,
        loss: result.loss,
        grad_norm: result.grad_norm,
        learning_rate: result.learning_rate,
        tokens: batch.end_token(),
        tokens_per_second: batch.num_tokens() as f64 / step_time_s,
        step_time_s,
        data_wait_s: result.data_wait_s,
        generation: rank.client.assignment().generation,
        skipped: result.skipped.is_some(),
        ..StepReport::default()
    }
}

fn count_skips(rank: &mut Rank, result: &StepResult) -> Result<()> {
    let Some(words) = &result.skipped else {
        rank.skipped_in_a_row = 0;
        return Ok(());
    };
    let samples = rank.loader.samples_of(rank.step);
    rank.watch.skipped(rank.step);
    rank.skipped_steps += 1;
    rank.skipped_in_a_row += 1;
    let num_interventions = rank.watch.num_interventions(rank.step);
    let (in_a_row, limit) = (rank.skipped_in_a_row, rank.config.training.max_skipped_steps);
    if in_a_row < limit {
        return match num_interventions < rank.watch.config().max_interventions {
            true => Ok(()),
            false => Err(too_many(rank, rank.step, words.clone(), num_interventions)),
        };
    }
    Err(TrainError::NotFinite {
        step: rank.step,
        in_a_row,
        limit,
        loss: result.loss,
        grad_norm: result.grad_norm,
        samples,
    })
}

/// Saves, while training goes on; the last one is waited for, as is one still being written.
fn save(rank: &mut Rank, learning_rate: f64, is_last: bool) -> Result<()> {
    rank.enter(Phase::Save)?;
    if is_last {
        finish_keep(rank)?;
    }
    let began = Instant::now();
    finish_save(rank, false)?;
    rank.begin_save(learning_rate, is_last)?;
    if is_last {
        return finish_save(rank, true);
    }
    rank.cadence.stalled(began.elapsed());
    agree_on_the_next(rank)
}

/// Keeps the state in memory, while training goes on; one still being written is waited for, which
/// no disk makes long.
fn keep(rank: &mut Rank, learning_rate: f64) -> Result<()> {
    rank.enter(Phase::Save)?;
    finish_keep(rank)?;
    rank.begin_keep(learning_rate)
}

/// Waits for what is being kept. Where there is no room for it, training goes on without.
fn finish_keep(rank: &mut Rank) -> Result<()> {
    let saving = rank.memory.as_mut().and_then(|memory| memory.saving.take());
    let Some(saving) = saving else { return Ok(()) };
    let step = saving.step;
    let Err(error) = saving.finish() else { return Ok(()) };
    if !error.is_of_storage() {
        return Err(error);
    }
    tracing::warn!("the state after step {step} is not kept in memory: {error}");
    if error.class() == FailureClass::Storage {
        event(rank, "checkpoint_not_kept", json!({ "step": step, "reason": error.to_string() }))?;
    }
    Ok(())
}

/// Where the interval is the run's to choose: all ranks choose it alike, from the largest of what
/// each measured.
fn agree_on_the_next(rank: &mut Rank) -> Result<()> {
    let Some(mut measured) = rank.cadence.measured() else { return Ok(()) };
    all_reduce_scalars(rank.worker.groups.world.as_ref(), &mut measured, ReduceOp::Max)?;
    let Some(interval) = rank.cadence.agreed(rank.step, measured) else { return Ok(()) };
    if rank.worker.groups.rank == 0 {
        event(rank, "checkpoint_interval", json!(interval))?;
    }
    Ok(())
}

/// Tells something for `events.jsonl`; `fields` is an object.
fn event(rank: &Rank, kind: &str, fields: Value) -> Result<()> {
    let fields = fields.as_object().cloned().unwrap_or_default();
    Ok(rank.client.event(Event { kind: kind.to_owned(), fields })?)
}

/// Waits for a save that is under way. Where there is no room, or a disk fails, training goes on
/// with what memory holds (but for the last save): the next one may fare better.
fn finish_save(rank: &mut Rank, is_last: bool) -> Result<()> {
    let Some(saving) = rank.saving.take() else { return Ok(()) };
    let step = saving.step;
    let error = match saving.finish() {
        Ok(seconds) => {
            rank.cadence.written(seconds);
            return Ok(());
        }
        Err(error) if !is_last && error.is_of_storage() => error,
        Err(error) => return Err(error),
    };
    tracing::warn!("the checkpoint of step {step} was not written: {error}");
    // Others only know that some rank failed.
    if error.class() == FailureClass::Storage {
        event(rank, "checkpoint_failed", json!({ "step": step, "reason": error.to_string() }))?;
    }
    Ok(())
}
