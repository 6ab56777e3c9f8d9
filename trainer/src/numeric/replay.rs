//! Does a step's forward and backward passes again: on other ranks, and on the same.

use super::finding::{Finding, Print, Results};
use crate::error::Result;
use crate::state::{Rank, open_share};
use crate::train_step::{Computed, Share, compute, read};
use collectives::ReduceOp;
use parallel::all_reduce_scalars;

/// What came of a replay.
pub struct Replayed {
    /// What it shows.
    pub finding: Finding,
    /// The step as it was done last, on its own ranks; its gradients are those that are there.
    pub computed: Computed,
    /// Whether another rank did the step's samples: there are several data-parallel ranks.
    pub is_elsewhere: bool,
}

/// Does a step twice more, of which `first` came: each data-parallel rank does the next one's
/// samples, which it reads by itself, and then its own. All ranks call it, and find the same.
///
/// # Errors
/// Where data, libtorch or a peer fail.
pub fn replay(rank: &mut Rank, share: &Share<'_>, first: &Computed) -> Result<Replayed> {
    let first = print(rank, first)?;
    let groups = rank.worker.groups.clone();
    let num_shares = groups.mesh.data_size();
    let is_elsewhere = num_shares > 1;
    let moved = match is_elsewhere {
        true => {
            let next = (groups.mesh.data_rank(groups.rank) + 1) % num_shares;
            let mut loader = open_share(&rank.config, &rank.loader, &groups, next, share.step)?;
            let batches = read(&mut loader, share.step)?;
            compute(rank, &Share { batches: &batches, ..*share })?
        }
        false => compute(rank, share)?,
    };
    let moved = print(rank, &moved)?;
    let computed = compute(rank, share)?;
    let again = print(rank, &computed)?;
    let results = gather(rank, num_shares, [first, moved, again])?;
    Ok(Replayed { finding: results.find(), computed, is_elsewhere })
}

/// What this rank made of the samples that it did last.
fn print(rank: &Rank, computed: &Computed) -> Result<Print> {
    let squares = match computed.local_squares {
        Some(squares) => squares,
        None => rank.worker.local_squares(&computed.counted)?.f_double_value(&[])?,
    };
    Ok(Print { loss: computed.local_loss, squares })
}

/// The results of all ranks. Each adds its own to zeros, which changes no bit of them.
fn gather(rank: &Rank, num_shares: usize, own: [Print; 3]) -> Result<Results> {
    let groups = &rank.worker.groups;
    let size = groups.mesh.size();
    let mut values = vec![0.0; size * 6];
    let own: Vec<f64> = own.iter().flat_map(|print| [print.loss, print.squares]).collect();
    values[groups.rank * 6..][..6].copy_from_slice(&own);
    all_reduce_scalars(groups.world.as_ref(), &mut values, ReduceOp::Sum)?;
    groups.alive()?;
    let of = |at: usize| -> Vec<Print> {
        let of_rank = |six: &[f64]| Print { loss: six[2 * at], squares: six[2 * at + 1] };
        values.chunks_exact(6).map(of_rank).collect()
    };
    Ok(Results { num_shares, first: of(0), moved: of(1), again: of(2) })
}
