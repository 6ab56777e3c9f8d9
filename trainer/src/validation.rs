//! Loss on held-out documents.

use crate::error::Result;
use crate::state::Rank;
use crate::train_step::{num_targets, pass, read};
use collectives::ReduceOp;
use data_pipeline::{Loader, LoaderOptions, Split};
use parallel::{Pass, all_reduce_scalars};
use torch_shim::tch::no_grad_guard;

/// Mean loss per target token over the first `validation.steps` batches of the held-out
/// documents: the same batches at every call, and the same value on every rank. As in training, a
/// batch's micro-batches go through the pipeline together.
///
/// # Errors
/// Where data, libtorch or a peer fail.
pub fn validate(rank: &Rank) -> Result<f64> {
    let groups = &rank.worker.groups;
    let steps = rank.config.validation.steps;
    let options = LoaderOptions {
        split: Split::Validation,
        dp_rank: groups.mesh.data_rank(groups.rank),
        dp_size: groups.mesh.data_size(),
        first_step: 1,
        steps,
    };
    let mut loader = Loader::open(&rank.config, options)?;
    let _no_grad = no_grad_guard();
    let mut sums = [0.0, 0.0];
    for step in 1..=steps {
        rank.client.alive()?;
        let batches = read(&mut loader, step)?;
        let passes: Vec<Pass> =
            batches.iter().map(|batch| pass(rank, batch)).collect::<Result<_>>()?;
        // One by one: the sum has the same bits however many go through together.
        rank.worker.evaluate(&passes)?.into_iter().for_each(|loss| sums[0] += loss);
        sums[1] += num_targets(rank, &batches);
    }
    all_reduce_scalars(groups.world.as_ref(), &mut sums, ReduceOp::Sum)?;
    // On a GPU a collective that failed leaves numbers that mean nothing.
    groups.alive()?;
    Ok(sums[0] / sums[1].max(1.0))
}
