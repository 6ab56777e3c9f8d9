//! One optimizer step.

use crate::error::{Result, TrainError};
use crate::numeric::{Response, attend};
use crate::state::Rank;
use collectives::ReduceOp;
use data_pipeline::{Loader, MicroBatch};
use model::{Inputs, targets};
use optim::{clip_coefficient, learning_rate};
use parallel::{Pass, Worker, all_reduce_scalars};
use torch_shim::{norm, profiler};

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
    /// Whether the update was left out: something was not finite, or jumped; and that in words.
    pub skipped: Option<String>,
    /// Whether some rank was told to stop.
    pub stop: bool,
}

/// What a rank does of a step.
#[derive(Clone, Copy)]
pub struct Share<'a> {
    /// 1-based step.
    pub step: u64,
    /// Its micro-batches.
    pub batches: &'a [MicroBatch],
    /// The reciprocal of the global number of targets.
    pub scale: f64,
}

/// What came of the passes of a step; the gradients are those of the last one that was computed.
pub struct Computed {
    /// Mean loss per target token over all ranks.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// This rank's part of the loss.
    pub local_loss: f64,
    /// Whether some rank was told to stop.
    pub stop: bool,
}

impl Computed {
    /// Takes the numbers of the same step as it was done last.
    pub fn take_result_of(&mut self, last: Computed) {
        *self = Computed { stop: self.stop || last.stop, ..last };
    }
}

/// Does step `rank.step + 1`.
///
/// # Errors
/// Where data, libtorch or a peer fail, or numeric trouble ends the generation.
pub fn train_step(rank: &mut Rank) -> Result<StepResult> {
    let step = rank.step + 1;
    let batches = read(&mut rank.loader, step)?;
    let share = Share { step, batches: &batches, scale: scale(rank, &batches)? };
    let mut computed = compute(rank, &share)?;
    // All ranks see the same numbers, so that all decide alike.
    let trouble = rank.watch.look(computed.loss, computed.grad_norm);
    let response = match &trouble {
        None => Response::Apply,
        Some(trouble) => attend(rank, &share, &mut computed, trouble)?,
    };
    let Computed { loss, grad_norm, stop, .. } = computed;
    let config = &rank.config;
    let learning_rate = learning_rate(
        &config.schedule,
        config.optimizer.learning_rate,
        step,
        config.training.steps,
    );
    if response == Response::Apply {
        let _phase = profiler::phase("optimizer");
        let coefficient = clip_coefficient(grad_norm, config.training.clip_norm);
        rank.optimizer.step(&rank.worker.params, learning_rate, coefficient)?;
        rank.worker.weights_changed()?;
        rank.watch.applied(loss, grad_norm);
    }
    rank.step = step;
    let skipped = trouble.filter(|_| response == Response::Skip);
    Ok(StepResult {
        loss,
        grad_norm,
        learning_rate,
        data_wait_s: batches.iter().map(|batch| batch.wait_s).sum(),
        skipped: skipped.map(|trouble| trouble.describe(loss, grad_norm)),
        stop,
    })
}

/// The loss divides by the global number of targets. Ranks that share a batch count it once.
fn scale(rank: &Rank, batches: &[MicroBatch]) -> Result<f64> {
    let groups = &rank.worker.groups;
    let local_targets: u64 = batches.iter().map(|batch| batch.num_target_tokens).sum();
    let mut num_targets = [if groups.reads_first() { local_targets as f64 } else { 0.0 }];
    all_reduce_scalars(groups.world.as_ref(), &mut num_targets, ReduceOp::Sum)?;
    Ok(1.0 / num_targets[0].max(1.0))
}

/// The forward and backward passes of a share, together with all ranks.
///
/// # Errors
/// Where libtorch or a peer fails.
pub fn compute(rank: &mut Rank, share: &Share<'_>) -> Result<Computed> {
    rank.worker.params.zero_grad()?;
    let scale = share.scale * rank.faults.inject(&rank.client, &rank.worker, share)?;
    let passes: Vec<Pass> =
        share.batches.iter().map(|batch| pass(rank, batch)).collect::<Result<_>>()?;
    let local_loss = rank.worker.forward_backward(&passes, scale)?;
    // All must agree to stop after this step, so the wish is read as late as it can be.
    let stop = f64::from(u8::from(rank.client.stop_requested()));
    let squares = squared_norm(&rank.worker)?;
    let mut sums = [local_loss, stop, squares];
    let groups = &rank.worker.groups;
    all_reduce_scalars(groups.world.as_ref(), &mut sums, ReduceOp::Sum)?;
    // What GPUs computed is worth something only if none of its collectives failed.
    groups.alive()?;
    Ok(Computed { loss: sums[0], grad_norm: sums[2].sqrt(), local_loss, stop: sums[1] > 0.0 })
}

/// The loader's micro-batches of a step.
///
/// # Errors
/// Where there are none, or they cannot be read.
pub fn read(loader: &mut Loader, step: u64) -> Result<Vec<MicroBatch>> {
    let _phase = profiler::phase("data");
    let mut batches: Vec<MicroBatch> = Vec::new();
    loop {
        let Some(batch) = loader.next()? else {
            return Err(TrainError::Config(format!("no data for step {step}")));
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
    let squares = gradients.iter().map(norm::squared_norm).collect::<Result<Vec<_>, _>>()?;
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
