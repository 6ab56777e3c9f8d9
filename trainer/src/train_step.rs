//! One optimizer step.
//!
//! On a CPU its numbers are read before its update is made. On a GPU the host would wait for it
//! there, and the GPU then for the host: so they are read one step later ([`crate::late`]).

use crate::error::{Result, TrainError};
use crate::late;
use crate::numeric::{Response, attend};
use crate::state::Rank;
use collectives::ReduceOp;
use data_pipeline::{Loader, MicroBatch};
use model::{Inputs, check_targets, targets};
use optim::clip_coefficient;
use parallel::{Pass, all_reduce_scalars, reduce};
use std::time::Instant;
use torch_shim::cuda::Readback;
use torch_shim::profiler;
use torch_shim::tch::{Kind, Tensor};

/// What came of a step; the same on every rank but for the times.
pub struct StepResult {
    /// 1-based step.
    pub step: u64,
    /// Mean loss per target token over all ranks.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Seconds of it.
    pub step_time_s: f64,
    /// Seconds spent waiting for data.
    pub data_wait_s: f64,
    /// Seconds spent waiting for other ranks; `None` where the host does not wait for them.
    pub comm_wait_s: Option<f64>,
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

/// What the passes of a share leave on the device: FP64 scalars, which nobody has waited for.
pub struct Given {
    /// This rank's part of the loss.
    pub local_loss: Tensor,
    /// Sum of the squares of the gradients that count on this rank.
    pub counted: Tensor,
}

/// What came of the passes of a step; the gradients are those of the last one that was computed.
pub struct Computed {
    /// Mean loss per target token over all ranks.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// This rank's part of the loss.
    pub local_loss: f64,
    /// [`Given::counted`].
    pub counted: Tensor,
    /// What `Worker::local_squares` was; `None` where it can still be asked.
    pub local_squares: Option<f64>,
    /// Whether some rank was told to stop.
    pub stop: bool,
}

impl Computed {
    /// Takes the numbers of the same step as it was done last.
    pub fn take_result_of(&mut self, last: Computed) {
        *self = Computed { stop: self.stop || last.stop, ..last };
    }
}

/// Does step `rank.step + 1`; returns what came of it, or where numbers are read late, of the steps
/// whose numbers have been read.
///
/// # Errors
/// Where data, libtorch or a peer fail, or numeric trouble ends the generation.
pub fn train_step(rank: &mut Rank) -> Result<Vec<StepResult>> {
    match rank.late {
        Some(_) => late::step(rank),
        None => Ok(vec![step_at_once(rank)?]),
    }
}

fn step_at_once(rank: &mut Rank) -> Result<StepResult> {
    let (started, waited) = (Instant::now(), collectives::waited());
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
    let learning_rate = learning_rate(rank, step);
    if response == Response::Apply {
        apply(rank, &computed, learning_rate)?;
    }
    rank.step = step;
    let Computed { loss, grad_norm, stop, .. } = computed;
    let skipped = trouble.filter(|_| response == Response::Skip);
    Ok(StepResult {
        step,
        loss,
        grad_norm,
        learning_rate,
        step_time_s: started.elapsed().as_secs_f64(),
        data_wait_s: data_wait_s(&batches),
        comm_wait_s: rank.waited_since(waited),
        skipped: skipped.map(|trouble| trouble.describe(loss, grad_norm)),
        stop,
    })
}

/// Seconds that the loader let the rank wait for these.
pub fn data_wait_s(batches: &[MicroBatch]) -> f64 {
    batches.iter().map(|batch| batch.wait_s).sum()
}

/// The learning rate of a step.
pub fn learning_rate(rank: &Rank, step: u64) -> f64 {
    let config = &rank.config;
    let (peak, steps) = (config.optimizer.learning_rate, config.training.steps);
    optim::learning_rate(&config.schedule, peak, step, steps)
}

/// The update by gradients that are there, whose numbers are known.
///
/// # Errors
/// Where libtorch or a peer fails.
pub fn apply(rank: &mut Rank, computed: &Computed, learning_rate: f64) -> Result<()> {
    let _phase = profiler::phase("optimizer");
    let coefficient = clip_coefficient(computed.grad_norm, rank.config.training.clip_norm);
    rank.optimizer.step(&rank.worker.params, learning_rate, coefficient)?;
    rank.worker.weights_changed()?;
    rank.watch.applied(computed.loss, computed.grad_norm);
    Ok(())
}

/// The loss divides by the global number of targets.
fn scale(rank: &Rank, batches: &[MicroBatch]) -> Result<f64> {
    let mut num_targets = [num_targets(rank, batches)];
    all_reduce_scalars(rank.worker.groups.world.as_ref(), &mut num_targets, ReduceOp::Sum)?;
    Ok(1.0 / num_targets[0].max(1.0))
}

/// This rank's targets; ranks that share a batch count it once.
pub fn num_targets(rank: &Rank, batches: &[MicroBatch]) -> f64 {
    match rank.worker.groups.reads_first() {
        true => batches.iter().map(|batch| batch.num_target_tokens).sum::<u64>() as f64,
        false => 0.0,
    }
}

/// The forward and backward passes of a share, together with all ranks; its numbers are read.
///
/// # Errors
/// Where libtorch or a peer fails.
pub fn compute(rank: &mut Rank, share: &Share<'_>) -> Result<Computed> {
    let given = give(rank, share)?;
    let sums = sums(rank, &given)?;
    let numbers = Tensor::f_cat(&[sums, given.local_loss.f_view([1])?], 0)?;
    let numbers = Readback::begin(&numbers)?.wait()?;
    // What GPUs computed is worth something only if none of its collectives failed.
    rank.worker.groups.alive()?;
    let [loss, stop, squares, local_loss] = numbers[..] else {
        return Err(TrainError::Panic(format!("{} numbers of a step", numbers.len())));
    };
    Ok(Computed {
        loss,
        grad_norm: squares.sqrt(),
        local_loss,
        counted: given.counted,
        local_squares: None,
        stop: stop > 0.0,
    })
}

/// The forward and backward passes of a share, given to the device.
///
/// # Errors
/// Where libtorch or a peer fails.
pub fn give(rank: &mut Rank, share: &Share<'_>) -> Result<Given> {
    rank.worker.params.zero_grad()?;
    let scale = share.scale * rank.faults.inject(&rank.client, &rank.worker, share)?;
    let passes: Vec<Pass> =
        share.batches.iter().map(|batch| pass(rank, batch)).collect::<Result<_>>()?;
    let local_loss = rank.worker.forward_backward(&passes, scale)?;
    Ok(Given { local_loss, counted: rank.worker.counted_squares()? })
}

/// Loss, ranks that were told to stop, and squares of the gradients, over all ranks: FP64 `[3]` on
/// the device.
///
/// # Errors
/// Where libtorch or a peer fails.
pub fn sums(rank: &Rank, given: &Given) -> Result<Tensor> {
    // All must agree to stop after this step, so the wish is read as late as it can be.
    let stop = f64::from(u8::from(rank.client.stop_requested()));
    let options = (Kind::Double, given.counted.device());
    let stop = Tensor::f_full([] as [i64; 0], stop, options)?;
    let sums = Tensor::f_stack(&[&given.local_loss, &stop, &given.counted], 0)?;
    reduce(rank.worker.groups.world.as_ref(), &sums, ReduceOp::Sum)?;
    Ok(sums)
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

/// A micro-batch on the device.
///
/// # Errors
/// Where libtorch refuses.
pub fn pass(rank: &Rank, batch: &MicroBatch) -> Result<Pass> {
    let documents = rank.config.data.document_mask.then_some(batch.document_ids.as_slice());
    let device = rank.worker.device();
    let MicroBatch { tokens, position_ids, .. } = batch;
    let inputs = Inputs::new(tokens, position_ids, documents, batch.batch, device)?;
    let inputs = match rank.kernels {
        Some(kernels) => inputs.with_kernels(kernels)?,
        None => inputs,
    };
    check_targets(&batch.targets, rank.config.model.vocab_size)?;
    Ok(Pass { inputs, targets_BS: targets(&batch.targets, batch.batch, device)? })
}
