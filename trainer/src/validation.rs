//! Loss on held-out documents.

use crate::error::Result;
use crate::state::Rank;
use crate::train_step::{num_targets, pass, read};
use collectives::ReduceOp;
use data_pipeline::{Loader, LoaderOptions, Split};
use parallel::{Pass, all_reduce_scalars};
use std::time::{Duration, Instant};
use torch_shim::tch::no_grad_guard;

/// An evaluation has so long to come to its end once the run is to stop: whoever asked waits, and
/// may not wait for long.
const PATIENCE: Duration = Duration::from_secs(10);

/// Mean loss per target token over the first `validation.steps` batches of the held-out
/// documents: the same batches at every call, and the same value on every rank. As in training, a
/// batch's micro-batches go through the pipeline together. `None`, on every rank, where the run is
/// to stop and this would take long.
///
/// # Errors
/// Where data, libtorch or a peer fail.
pub fn validate(rank: &Rank) -> Result<Option<f64>> {
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
    let mut stops_since = None;
    for step in 1..=steps {
        rank.client.alive()?;
        if rank.client.stop_requested() {
            stops_since.get_or_insert_with(Instant::now);
        }
        let is_over = stops_since.is_some_and(|since| since.elapsed() >= PATIENCE);
        let mut any_is = [if is_over { 1.0 } else { 0.0 }];
        all_reduce_scalars(groups.world.as_ref(), &mut any_is, ReduceOp::Max)?;
        if any_is[0] > 0.0 {
            tracing::info!("the evaluation is left at its step {step}: the run is to stop");
            return Ok(None);
        }
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
    Ok(Some(sums[0] / sums[1].max(1.0)))
}
