//! Gathering and scattering a dimension of activations over a group.
//!
//! Collectives put the ranks' pieces one after another; where the dimension is not the outermost,
//! the pieces are put in their places by a copy.

use collectives::{CommError, Communicator, ReduceOp, Work};
use torch_shim::Result as ShimResult;
use torch_shim::tch::Tensor;

use crate::failure::Failure;

/// An all-gather under way.
pub(crate) struct Gathering {
    pieces: Tensor,
    work: Work,
    /// The dimension that is gathered.
    dim: i64,
    failure: Failure,
}

/// Begins to gather the ranks' `x` along `dim`.
pub(crate) fn begin_gather(
    comm: &dyn Communicator,
    failure: &Failure,
    x: &Tensor,
    dim: i64,
) -> ShimResult<Gathering> {
    let x = x.f_contiguous()?;
    let mut shape = x.size();
    shape.insert(0, comm.size() as i64);
    let pieces = Tensor::f_empty(shape, (x.kind(), x.device()))?;
    let work = comm.all_gather(&pieces, &x).map_err(|error| failure.keep(error))?;
    Ok(Gathering { pieces, work, dim, failure: failure.clone() })
}

impl Gathering {
    /// Waits, and returns the whole.
    pub(crate) fn finish(self) -> ShimResult<Tensor> {
        self.work.wait().map_err(|error| self.failure.keep(error))?;
        join(&self.pieces, self.dim)
    }
}

/// Pieces `[ranks, .., n, ..]` side by side along `dim` of each: `[.., ranks n, ..]`.
fn join(pieces: &Tensor, dim: i64) -> ShimResult<Tensor> {
    let mut shape = pieces.size();
    let ranks = shape.remove(0);
    shape[dim as usize] *= ranks;
    let outer: i64 = shape[..dim as usize].iter().product();
    let in_place =
        if outer == 1 { pieces.shallow_clone() } else { pieces.f_movedim_int(0, dim)? };
    Ok(in_place.f_reshape(shape)?)
}

/// A reduce-scatter under way.
pub(crate) struct Scattering {
    piece: Tensor,
    work: Work,
    failure: Failure,
}

/// Begins to sum the ranks' `x` and to leave each rank its piece along `dim`.
pub(crate) fn begin_scatter(
    comm: &dyn Communicator,
    failure: &Failure,
    x: &Tensor,
    dim: i64,
) -> ShimResult<Scattering> {
    let ranks = comm.size() as i64;
    let mut shape = x.size();
    let length = shape[dim as usize] / ranks;
    let outer: i64 = shape[..dim as usize].iter().product();
    shape[dim as usize] = length;
    let piece = Tensor::f_empty(&shape, (x.kind(), x.device()))?;
    shape.insert(dim as usize, ranks);
    let cut = x.f_reshape(&shape)?;
    let cut = if outer == 1 { cut } else { cut.f_movedim_int(dim, 0)? }.f_contiguous()?;
    let work = comm.reduce_scatter(&piece, &cut, ReduceOp::Sum);
    let work = work.map_err(|error| failure.keep(error))?;
    Ok(Scattering { piece, work, failure: failure.clone() })
}

impl Scattering {
    /// Waits, and returns this rank's piece.
    pub(crate) fn finish(self) -> ShimResult<Tensor> {
        self.work.wait().map_err(|error| self.failure.keep(error))?;
        Ok(self.piece)
    }
}

/// An all-reduce under way, in place.
pub(crate) struct Reducing {
    whole: Tensor,
    work: Work,
    failure: Failure,
}

/// Begins to reduce the ranks' `x`, in place where it lies without gaps.
pub(crate) fn begin_reduce(
    comm: &dyn Communicator,
    failure: &Failure,
    x: &Tensor,
    op: ReduceOp,
) -> ShimResult<Reducing> {
    let whole = x.f_contiguous()?;
    let work = comm.all_reduce(&whole, op).map_err(|error: CommError| failure.keep(error))?;
    Ok(Reducing { whole, work, failure: failure.clone() })
}

impl Reducing {
    /// Waits, and returns the reduced tensor.
    pub(crate) fn finish(self) -> ShimResult<Tensor> {
        self.work.wait().map_err(|error| self.failure.keep(error))?;
        Ok(self.whole)
    }
}
