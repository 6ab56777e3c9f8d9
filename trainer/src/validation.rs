//! Loss on held-out documents.

use crate::error::Result;
use crate::state::Rank;
use crate::train_step::inputs;
use collectives::ReduceOp;
use data_pipeline::{Loader, LoaderOptions, Split};
use model::targets;
use parallel::all_reduce_scalars;
use torch_shim::tch::no_grad_guard;

/// Mean loss per target token over the first `validation.steps` batches of the held-out
/// documents: the same batches at every call, and the same value on every rank.
///
/// # Errors
/// Where data, libtorch or a peer fail.
pub fn validate(rank: &Rank) -> Result<f64> {
    let options = LoaderOptions {
        split: Split::Validation,
        dp_rank: rank.comm.rank(),
        dp_size: rank.comm.size(),
        first_step: 1,
        steps: rank.config.validation.steps,
    };
    let mut loader = Loader::open(&rank.config, options)?;
    let _no_grad = no_grad_guard();
    let mut sums = [0.0, 0.0];
    while let Some(batch) = loader.next()? {
        let goal = targets(&batch.targets, batch.batch, rank.trainee.device)?;
        let loss = rank.trainee.model.forward_loss(&inputs(rank, &batch)?, &goal, 1.0)?;
        sums[0] += loss.f_double_value(&[])?;
        sums[1] += batch.num_target_tokens as f64;
    }
    all_reduce_scalars(rank.comm.as_ref(), &mut sums, ReduceOp::Sum)?;
    Ok(sums[0] / sums[1].max(1.0))
}
