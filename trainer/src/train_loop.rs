//! The training loop.

use crate::error::{Result, TrainError};
use crate::faults;
use crate::gpu::Gpu;
use crate::metrics::{Metrics, Written};
use crate::numeric::too_many;
use crate::profile::Profile;
use crate::saving::Saving;
use crate::state::Rank;
use crate::train_step::{StepResult, learning_rate, train_step};
use crate::validation::validate;
use collectives::ReduceOp;
use parallel::all_reduce_scalars;
use rank_protocol::message::{Event, FailureClass, Phase, StepReport};
use run_config::batch_plan::step_batch;
use serde_json::{Value, json};
use std::time::Instant;
use torch_shim::profiler;

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
    let mut profile = profile(rank);
    while rank.step < last {
        profile.before(rank.step + 1);
        if rank.saving.as_ref().is_some_and(Saving::is_over) {
            finish_save(rank, false)?;
        }
        let kept = rank.memory.as_ref().and_then(|memory| memory.saving.as_ref());
        if kept.is_some_and(Saving::is_over) {
            finish_keep(rank)?;
        }
        rank.enter(Phase::Train)?;
        faults::at_step(rank)?;
        let results = match train_step(rank) {
            Err(error) if error.roll_back().is_some() => {
                // What is being written is the newest checkpoint before the trouble. It may take
                // longer than a step may; and of what is kept in memory nobody needs a copy.
                rank.client.phase(Phase::Save)?;
                rank.client.give_up_copy();
                finish_save(rank, false)?;
                finish_keep(rank)?;
                return Err(error);
            }
            results => results?,
        };
        for result in &results {
            conclude(rank, result, metrics.as_mut())?;
        }
        let stop_after = rank.client.assignment().stop_after;
        let stop = results.iter().any(|result| result.stop) || stop_after == Some(rank.step);
        let at_end = rank.step == last || stop;
        if at_end || rank.cadence.is_due(rank.step) {
            save(rank, learning_rate(rank, rank.step), at_end)?;
        } else if rank.memory.as_ref().is_some_and(|memory| memory.is_due(rank.step)) {
            keep(rank, learning_rate(rank, rank.step))?;
        }
        if profile.after(rank.step) {
            tell_of_profile(rank, &profile)?;
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

/// What follows from a step whose numbers are known: its report, and a validation behind it.
fn conclude(rank: &mut Rank, result: &StepResult, metrics: Option<&mut Metrics>) -> Result<()> {
    let mut report = report(rank, result)?;
    rank.cadence.stepped(result.step_time_s);
    let is_newest = result.step == rank.step;
    let is_last = result.step == rank.config.training.steps;
    if is_newest && (is_last || is_due(result.step, rank.config.validation.every_steps)) {
        report.validation_loss = validated(rank)?;
    }
    if let Some(metrics) = metrics {
        let written = metrics.write(&report)?;
        tell_of_metrics(rank, written)?;
    }
    rank.client.report_step(report)?;
    count_skips(rank, result)
}

/// The timeline that is asked for, if one is.
fn profile(rank: &Rank) -> Profile {
    let (place, groups) = (rank.client.assignment(), &rank.worker.groups);
    let path = rank.run_dir.profile(place.generation, place.rank);
    let ranks = (place.rank, groups.mesh.size());
    Profile::new(place.profile, path, rank.worker.device(), ranks)
}

/// Rank 0 speaks for all.
fn tell_of_profile(rank: &Rank, profile: &Profile) -> Result<()> {
    if rank.worker.groups.rank != 0 {
        return Ok(());
    }
    let folder = profile.path().parent().map(|folder| folder.display().to_string());
    let fields = [("step".to_owned(), rank.step.into()), ("folder".to_owned(), folder.into())];
    let fields = fields.into_iter().collect();
    Ok(rank.client.event(Event { kind: "profile_written".into(), fields })?)
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

/// Whether something that happens every so many steps happens after this one.
pub(crate) fn is_due(step: u64, every: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}

fn validated(rank: &mut Rank) -> Result<Option<f64>> {
    let validation = &rank.config.validation;
    let held_out = rank.config.data.validation_fraction > 0.0;
    if validation.every_steps == 0 || validation.steps == 0 || !held_out {
        return Ok(None);
    }
    rank.enter(Phase::Validate)?;
    let _phase = profiler::phase("validation");
    validate(rank).map(Some)
}

fn report(rank: &Rank, result: &StepResult) -> Result<StepReport> {
    let batch = step_batch(&rank.config.training.batch_stages, result.step);
    let tokens_per_second = batch.num_tokens() as f64 / result.step_time_s;
    let meter = rank.speedometer.as_ref();
    let speed = meter.map(|meter| meter.speed(tokens_per_second, batch.sequence_length));
    let memory = rank.gpu.as_ref().map(Gpu::take_memory_use).transpose()?;
    Ok(StepReport {
        step: result.step,
        loss: result.loss,
        grad_norm: result.grad_norm,
        learning_rate: result.learning_rate,
        tokens: batch.end_token(),
        tokens_per_second,
        step_time_s: result.step_time_s,
        data_wait_s: result.data_wait_s,
        comm_wait_s: result.comm_wait_s,
        generation: rank.client.assignment().generation,
        skipped: result.skipped.is_some(),
        tflops_full: speed.map(|speed| speed.tflops_full),
        tflops_half: speed.map(|speed| speed.tflops_half),
        mfu_full: speed.map(|speed| speed.mfu_full),
        mfu_half: speed.map(|speed| speed.mfu_half),
        memory_gib: memory.map(|memory| memory.peak_allocated as f64 / f64::from(1 << 30)),
        ..StepReport::default()
    })
}

fn count_skips(rank: &mut Rank, result: &StepResult) -> Result<()> {
    let Some(words) = &result.skipped else {
        rank.skipped_in_a_row = 0;
        return Ok(());
    };
    let samples = rank.loader.samples_of(result.step);
    rank.watch.skipped(result.step);
    rank.skipped_steps += 1;
    rank.skipped_in_a_row += 1;
    let num_interventions = rank.watch.num_interventions(result.step);
    let (in_a_row, limit) = (rank.skipped_in_a_row, rank.config.training.max_skipped_steps);
    if in_a_row < limit {
        return match num_interventions < rank.watch.config().max_interventions {
            true => Ok(()),
            false => Err(too_many(rank, result.step, words.clone(), num_interventions)),
        };
    }
    Err(TrainError::NotFinite {
        step: result.step,
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
    let _phase = profiler::phase("save");
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
/// no disk makes long, or being copied to another node: no more than two are ever there.
fn keep(rank: &mut Rank, learning_rate: f64) -> Result<()> {
    rank.enter(Phase::Save)?;
    let _phase = profiler::phase("keep in memory");
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
