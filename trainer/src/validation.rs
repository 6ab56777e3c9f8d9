//! Loss on held-out documents.

use crate::error::Result;
use crate::state::Rank;
use crate::train_step::pass;
use collectives::ReduceOp;
use data_pipeline::{Loader, LoaderOptions, Split};
use parallel::all_reduce_scalars;
use torch_shim::tch::no_grad_guard;

/// Mean loss per target token over the first `validation.steps` batches of the held-out
/// documents: the same batches at every call, and the same value on every rank.
///
/// # Errors
/// Where data, libtorch or a peer fail.
pub fn validate(rank: &Rank) -> Result<f64> {
    let groups = &rank.worker.groups;
    let options = LoaderOptions {
        split: Split::Validation,
        dp_rank: groups.mesh.data_rank(groups.rank),
        dp_size: groups.mesh.data_size(),
        first_step: 1,
        steps: rank.config.validation.steps,
    };
    let mut loader = Loader::open(&rank.config, options)?;
    let _no_grad = no_grad_guard();
    let mut sums = [0.0, 0.0];
    while let Some(batch) = loader.next()? {
        rank.client.alive()?;
        sums[0] += rank.worker.evaluate(&pass(rank, &batch)?)?;
        if groups.reads_first() {
            sums[1] += batch.num_target_tokens as f64;
        }
    }
    all_reduce_scalars(groups.world.as_ref(), &mut sums, ReduceOp::Sum)?;
    // On a GPU a collective that failed leaves numbers that mean nothing.
    groups.alive()?;
    Ok(sums[0] / sums[1].max(1.0))
}
