//! Steps whose numbers are read while the next one is computed, so that no GPU waits for its host.
//!
//! Whether a step is in numeric trouble is decided before its update (decision 21), by its loss and
//! gradient norm; but to read these the host would wait until the GPU has nothing left to do. So
//! the GPU itself looks: the update comes with limits that the host has worked out of the steps
//! before, and is held back where the numbers are not within them. The host reads them when it has
//! given the GPU the passes of the next step, and looks for itself. A step that was held back is
//! attended to with the weights that it was computed with, and the step behind it is done again. So
//! each step ends with the weights that it would have if its numbers had been read at once, bit by
//! bit.
//!
//! The limits of a step hang on all steps before it, whose numbers have been read by then: at most
//! one step is open. It is closed at once where something needs it: a checkpoint, a validation, the
//! end, and the first step, whose report people wait for.
//!
//! Nothing else of a step is read either: the number of its targets, by which the loss is divided,
//! is summed over the ranks while the step before it is computed.

use crate::error::{Result, TrainError};
use crate::numeric::{Limits, Response, attend};
use crate::state::Rank;
use crate::train_loop::is_due;
use crate::train_step::{
    Computed, Given, Share, StepResult, apply, compute, data_wait_s, give, learning_rate,
    num_targets, read, sums,
};
use collectives::ReduceOp;
use data_pipeline::MicroBatch;
use parallel::Reducing;
use std::time::Instant;
use torch_shim::cuda::{Readback, Stream};
use torch_shim::profiler;
use torch_shim::tch::{Device, Kind, Tensor};

/// Says whether numbers are read late: `1` on a CPU too, for tests; `0` not even on a GPU.
pub const VARIABLE: &str = "PHALANX_LATE_NUMBERS";

/// What is open between two steps.
#[derive(Default)]
pub struct Late {
    /// The step whose numbers have not been read.
    open: Option<Open>,
    /// The next step's data.
    ahead: Option<Ahead>,
    /// Where sums of what the host knows are made, on a GPU.
    beside: Option<Stream>,
    /// From when on the time of the open step counts.
    since: Option<Instant>,
    has_closed: bool,
}

/// A step whose update has been given to the device.
struct Open {
    step: u64,
    batches: Vec<MicroBatch>,
    scale: f64,
    learning_rate: f64,
    counted: Tensor,
    /// Loss, ranks that were told to stop, squares of the gradients; whether the update was held
    /// back; this rank's loss, and its squares.
    numbers: Readback,
}

/// What is read ahead of its step.
struct Ahead {
    step: u64,
    batches: Vec<MicroBatch>,
    num_targets: Reducing,
}

impl Late {
    /// What a rank on `device` needs; `None` where numbers are read at once.
    ///
    /// # Errors
    /// Where libtorch refuses.
    pub fn on(device: Device) -> Result<Option<Self>> {
        let asked = std::env::var(VARIABLE).ok();
        let is_late = match asked.as_deref() {
            Some("1") => true,
            Some("0") => false,
            _ => matches!(device, Device::Cuda(_)),
        };
        let beside = match device {
            Device::Cuda(index) if is_late => Some(Stream::take(index)?),
            _ => None,
        };
        Ok(is_late.then(|| Self { beside, ..Self::default() }))
    }
}

/// Does step `rank.step + 1`; returns the steps whose numbers are read by now.
///
/// # Errors
/// As [`crate::train_step::train_step`]; a step that is open then is lost, as is the step.
pub fn step(rank: &mut Rank) -> Result<Vec<StepResult>> {
    let step = rank.step + 1;
    with(rank).since.get_or_insert_with(Instant::now);
    let ahead = with(rank).ahead.take().filter(|ahead| ahead.step == step);
    let Ahead { batches, num_targets, .. } = match ahead {
        Some(ahead) => ahead,
        None => read_ahead(rank, step)?,
    };
    let scale = 1.0 / num_targets.wait()?.first().copied().unwrap_or(0.0).max(1.0);
    let share = Share { step, batches: &batches, scale };
    let mut given = give(rank, &share)?;
    if step < rank.config.training.steps {
        // The device is at work meanwhile.
        let ahead = read_ahead(rank, step + 1)?;
        with(rank).ahead = Some(ahead);
    }
    let mut summed = sums(rank, &given)?;
    let mut results = Vec::new();
    if let Some(open) = with(rank).open.take() {
        let (result, was_held) = close(rank, open)?;
        if was_held {
            // It was computed with weights that are none any more, or its gradients are gone.
            given = give(rank, &share)?;
            summed = sums(rank, &given)?;
        }
        results.push(result);
        with(rank).since = Some(Instant::now());
    }
    let numbers = update(rank, step, &given, &summed)?;
    let learning_rate = learning_rate(rank, step);
    rank.step = step;
    let open = Open { step, batches, scale, learning_rate, counted: given.counted, numbers };
    if closes_at_once(rank, step) || results.iter().any(|result| result.stop) {
        results.push(close(rank, open)?.0);
        with(rank).since = None;
    } else {
        with(rank).open = Some(open);
    }
    Ok(results)
}

fn with(rank: &mut Rank) -> &mut Late {
    rank.late.get_or_insert_default()
}

/// Whether what comes after the step needs its numbers.
fn closes_at_once(rank: &mut Rank, step: u64) -> bool {
    let is_first = !std::mem::replace(&mut with(rank).has_closed, true);
    let config = &rank.config;
    is_first
        || step == config.training.steps
        || is_due(step, config.validation.every_steps)
        || rank.cadence.is_due(step)
        || rank.memory.as_ref().is_some_and(|memory| memory.is_due(step))
        || rank.client.assignment().stop_after == Some(step)
}

/// Reads a step's data and begins to count its targets over all ranks.
fn read_ahead(rank: &mut Rank, step: u64) -> Result<Ahead> {
    let batches = read(&mut rank.loader, step)?;
    let own = [num_targets(rank, &batches)];
    let beside = rank.late.as_ref().and_then(|late| late.beside.as_ref());
    let world = rank.worker.groups.world.as_ref();
    let num_targets = Reducing::begin(world, &own, ReduceOp::Sum, beside)?;
    Ok(Ahead { step, batches, num_targets })
}

/// Gives the device the update of a step, to be held back where its numbers are not within the
/// limits, and begins to read these.
fn update(rank: &mut Rank, step: u64, given: &Given, sums: &Tensor) -> Result<Readback> {
    let _phase = profiler::phase("optimizer");
    let clip_norm = rank.config.training.clip_norm;
    let (norm, coefficient) = rank.optimizer.clip(&sums.f_select(0, 2)?, clip_norm)?;
    let held = held(&sums.f_select(0, 0)?, &norm, rank.watch.limits())?;
    let local_squares = match rank.watch.config().replay {
        true => rank.worker.local_squares(&given.counted)?,
        false => given.counted.f_zeros_like()?,
    };
    let learning_rate = learning_rate(rank, step);
    let params = &rank.worker.params;
    rank.optimizer.step_unless(params, learning_rate, coefficient.as_ref(), &held)?;
    rank.worker.weights_changed()?;
    let others = [held.f_to_kind(Kind::Double)?, given.local_loss.shallow_clone(), local_squares];
    let numbers = Tensor::f_cat(&[sums.shallow_clone(), Tensor::f_stack(&others, 0)?], 0)?;
    Ok(Readback::begin(&numbers)?)
}

/// 1 where the loss or the norm is not finite or above its limit, else 0; FP32.
fn held(loss: &Tensor, norm: &Tensor, limits: Limits) -> Result<Tensor> {
    // No comparison with NaN holds.
    let loss_is_sound = loss.f_ge(f64::MIN)?.f_logical_and(&loss.f_le(limits.loss)?)?;
    let is_sound = loss_is_sound.f_logical_and(&norm.f_le(limits.grad_norm)?)?;
    Ok(is_sound.f_logical_not()?.f_to_kind(Kind::Float)?)
}

/// Reads a step's numbers, and attends to it where it is in trouble; returns what came of it, and
/// whether its update was held back at first.
fn close(rank: &mut Rank, open: Open) -> Result<(StepResult, bool)> {
    let Open { step, batches, scale, learning_rate, counted, numbers } = open;
    let numbers = numbers.wait()?;
    // What GPUs computed is worth something only if none of its collectives failed.
    rank.worker.groups.alive()?;
    let [loss, stop, squares, held, local_loss, local_squares] = numbers[..] else {
        return Err(TrainError::Panic(format!("{} numbers of a step", numbers.len())));
    };
    let mut computed = Computed {
        loss,
        grad_norm: squares.sqrt(),
        local_loss,
        counted,
        local_squares: Some(local_squares),
        stop: stop > 0.0,
    };
    let trouble = rank.watch.look(computed.loss, computed.grad_norm);
    let was_held = held != 0.0;
    let mut response = Response::Apply;
    if was_held {
        rank.optimizer.take_back();
        // It is in work again.
        rank.step = step - 1;
        let share = Share { step, batches: &batches, scale };
        let is_repeated = trouble.is_some() && rank.watch.config().replay;
        if let Some(trouble) = &trouble {
            response = attend(rank, &share, &mut computed, trouble)?;
        }
        if response == Response::Apply {
            if !is_repeated {
                // The gradients that are there may be the next step's.
                computed.take_result_of(compute(rank, &share)?);
            }
            apply(rank, &computed, learning_rate)?;
        }
        rank.step = step;
    } else if let Some(trouble) = &trouble {
        let words = trouble.describe(computed.loss, computed.grad_norm);
        return Err(TrainError::Panic(format!("step {step} was not held back: {words}")));
    } else {
        rank.watch.applied(computed.loss, computed.grad_norm);
    }
    let Computed { loss, grad_norm, stop, .. } = computed;
    let since = with(rank).since.unwrap_or_else(Instant::now);
    let skipped = trouble.filter(|_| response == Response::Skip);
    let result = StepResult {
        step,
        loss,
        grad_norm,
        learning_rate,
        step_time_s: since.elapsed().as_secs_f64(),
        data_wait_s: data_wait_s(&batches),
        comm_wait_s: None,
        skipped: skipped.map(|trouble| trouble.describe(loss, grad_norm)),
        stop,
    };
    Ok((result, was_held))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn updates_are_held_back_where_numbers_are_beyond_their_limits() {
        let limits = Limits { loss: 3.0, grad_norm: 2.0 };
        let check = |loss: f64, norm: f64, expected: f64| {
            let held = held(&Tensor::from(loss), &Tensor::from(norm), limits).unwrap();
            assert_eq!((held.kind(), held.double_value(&[])), (Kind::Float, expected));
        };
        check(3.0, 2.0, 0.0);
        check(-1.0, 0.0, 0.0);
        check(3.0 + 1e-15 * 3.0, 2.0, 1.0);
        check(3.0, 2.0 + 1e-15, 1.0);
        for value in [f64::NAN, f64::INFINITY] {
            check(value, 1.0, 1.0);
            check(1.0, value, 1.0);
        }
        check(f64::NEG_INFINITY, 1.0, 1.0);
        let none = Limits { loss: f64::MAX, grad_norm: f64::MAX };
        let all = held(&Tensor::from(f64::INFINITY), &Tensor::from(1f64), none).unwrap();
        assert_eq!(all.double_value(&[]), 1.0, "without limits too");
    }
}
