//! One optimizer step.

use crate::error::{Result, TrainError};
use crate::state::Rank;
use collectives::ReduceOp;
use data_pipeline::MicroBatch;
use model::{Inputs, targets};
use optim::{clip_coefficient, learning_rate};
use parallel::{Pass, Worker, all_reduce_scalars};

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
    // The loss divides by the global number of targets. Ranks that share a batch count it once.
    let groups = rank.worker.groups.clone();
    let local_targets: u64 = batches.iter().map(|batch| batch.num_target_tokens).sum();
    let mut num_targets = [if groups.reads_first() { local_targets as f64 } else { 0.0 }];
    all_reduce_scalars(groups.world.as_ref(), &mut num_targets, ReduceOp::Sum)?;
    let scale = 1.0 / num_targets[0].max(1.0);

    rank.worker.params.zero_grad()?;
    let passes: Vec<Pass> = batches.iter().map(|batch| pass(rank, batch)).collect::<Result<_>>()?;
    let loss = rank.worker.forward_backward(&passes, scale)?;
    // All must agree to stop after this step, so the wish is read as late as it can be.
    let stop = f64::from(u8::from(rank.client.stop_requested()));
    let squares = squared_norm(&rank.worker)?;
    let mut sums = [loss, stop, squares];
    all_reduce_scalars(groups.world.as_ref(), &mut sums, ReduceOp::Sum)?;
    // What GPUs computed is worth something only if none of its collectives failed.
    groups.alive()?;
    let (loss, grad_norm) = (sums[0], sums[2].sqrt());

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
        rank.optimizer.step(&rank.worker.params, learning_rate, coefficient)?;
        rank.worker.weights_changed()?;
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

/// Square of the norm of the gradients that count on this rank.
///
/// # Errors
/// Where libtorch refuses.
pub fn squared_norm(worker: &Worker) -> Result<f64> {
    let gradients = worker.counted_gradients()?;
    // All are begun before one is read: on a GPU the host waits for each.
    let squares = gradients.iter().map(optim::squared_norm).collect::<Result<Vec<_>, _>>()?;
    squares.iter().try_fold(0.0, |sum, square| Ok(sum + square.f_double_value(&[])?))
}

/// A micro-batch on the device.
///
/// # Errors
/// Where libtorch refuses.
pub fn pass(rank: &Rank, batch: &MicroBatch) -> Result<Pass> {
    let documents = rank.config.data.document_mask.then_some(batch.document_ids.as_slice());
    let device = rank.worker.device();
    Ok(Pass {
        inputs: Inputs::new(&batch.tokens, &batch.position_ids, documents, batch.batch, device)?,
        targets_BS: targets(&batch.targets, batch.batch, device)?,
    })
}
