//! One optimizer step.

use crate::error::{Result, TrainError};
use crate::state::Rank;
use collectives::ReduceOp;
use data_pipeline::MicroBatch;
use model::{Inputs, targets};
use optim::{clip_coefficient, gradient_norm, learning_rate};
use parallel::all_reduce_scalars;

/// What came of a step; the same on every rank but for the waiting.
pub struct StepResult {
    /// Mean loss per target token over all ranks.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Seconds spent waiting for data.
    pub data_wait_s: f64,
    /// Whether the update was left out because something was not finite.
    pub skipped: bool,
    /// Whether some rank was told to stop.
    pub stop: bool,
}

/// Does step `rank.step + 1`.
///
/// # Errors
/// Where data, libtorch or a peer fail.
pub fn train_step(rank: &mut Rank) -> Result<StepResult> {
    let step = rank.step + 1;
    let batches = read(rank)?;
    // The loss divides by the global number of targets.
    let local_targets: u64 = batches.iter().map(|batch| batch.num_target_tokens).sum();
    let mut num_targets = [local_targets as f64];
    all_reduce_scalars(rank.comm.as_ref(), &mut num_targets, ReduceOp::Sum)?;
    let scale = 1.0 / num_targets[0].max(1.0);

    rank.trainee.params.zero_grad()?;
    let loss = forward_backward(rank, &batches, scale)?;
    // All must agree to stop after this step, so the wish is read as late as it can be.
    let stop = f64::from(u8::from(rank.client.stop_requested()));
    let mut sums = [loss, stop];
    all_reduce_scalars(rank.comm.as_ref(), &mut sums, ReduceOp::Sum)?;
    let loss = sums[0];

    let grad_norm = gradient_norm(&rank.trainee.params)?;
    let config = &rank.config;
    let learning_rate = learning_rate(
        &config.schedule,
        config.optimizer.learning_rate,
        step,
        config.training.steps,
    );
    let skipped = !(loss.is_finite() && grad_norm.is_finite());
    if !skipped {
        let coefficient = clip_coefficient(grad_norm, config.training.clip_norm);
        rank.optimizer.step(&rank.trainee.params, learning_rate, coefficient)?;
    }
    rank.step = step;
    Ok(StepResult {
        loss,
        grad_norm,
        learning_rate,
        data_wait_s: batches.iter().map(|batch| batch.wait_s).sum(),
        skipped,
        stop: sums[1] > 0.0,
    })
}

/// This rank's micro-batches of the step.
fn read(rank: &mut Rank) -> Result<Vec<MicroBatch>> {
    let mut batches: Vec<MicroBatch> = Vec::new();
    loop {
        let Some(batch) = rank.loader.next()? else {
            return Err(TrainError::Config(format!("no data for step {}", rank.step + 1)));
        };
        let num_left = batch.num_micro_batches - 1 - batch.index;
        batches.push(batch);
        if num_left == 0 {
            return Ok(batches);
        }
    }
}

/// Accumulates the gradients of all micro-batches, summed over ranks; returns this rank's part of
/// the loss.
fn forward_backward(rank: &Rank, batches: &[MicroBatch], scale: f64) -> Result<f64> {
    let mut sum = 0.0;
    for (index, batch) in batches.iter().enumerate() {
        let inputs = inputs(rank, batch)?;
        let goal = targets(&batch.targets, batch.batch, rank.trainee.device)?;
        if index + 1 == batches.len() {
            rank.data_parallel.begin_last_micro_batch();
        }
        let loss = rank.trainee.model.forward_loss(&inputs, &goal, scale)?;
        if let Err(error) = loss.f_backward() {
            // A reduction that fails in a hook ends the backward pass: name the peer, not the hook.
            rank.data_parallel.finish()?;
            return Err(error.into());
        }
        sum += loss.f_double_value(&[])?;
    }
    rank.data_parallel.finish()?;
    Ok(sum)
}

/// A micro-batch on the device.
///
/// # Errors
/// Where libtorch refuses.
pub fn inputs(rank: &Rank, batch: &MicroBatch) -> Result<Inputs> {
    let documents = rank.config.data.document_mask.then_some(batch.document_ids.as_slice());
    let device = rank.trainee.device;
    Ok(Inputs::new(&batch.tokens, &batch.position_ids, documents, batch.batch, device)?)
}
