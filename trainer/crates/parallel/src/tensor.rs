//! Tensor parallelism with sequence parallelism (Shoeybi et al. 2019; Korthikanti et al. 2022).
//!
//! A column-split linear reads the whole sequence and makes a part of the output; a row-split one
//! reads that part and makes a summand of the output. With sequence parallelism the residual stream
//! is cut along the sequence, so the first gathers and the second reduce-scatters; without it every
//! rank holds the whole stream, and the second (in the backward pass the first) all-reduces.
//!
//! Shapes: `B` batch, `S` sequence, `s` this rank's part of it, `D` dim, `F` outputs of a rank.

use std::ops::Range;
use std::sync::Arc;

use collectives::{Communicator, ReduceOp};
use model::Products;
use torch_shim::params::Parameter;
use torch_shim::tch::Tensor;
use torch_shim::uses::Use;
use torch_shim::{Result as ShimResult, ShimError, autograd};

use crate::failure::Failure;
use crate::slices::{Reducing, Scattering, begin_gather, begin_reduce, begin_scatter};
use crate::slot::Slot;

/// The dimension of tokens in activations.
const SEQUENCE: i64 = 1;

/// One rank's end of a tensor-parallel group.
#[derive(Clone)]
pub(crate) struct TensorGroup {
    pub(crate) comm: Arc<dyn Communicator>,
    /// Whether the residual stream is cut along the sequence.
    pub(crate) sequence: bool,
    pub(crate) failure: Failure,
    /// How the products of blocks are made; in FP8 each rank scales its own part of what is cut.
    pub(crate) products: Products,
}

/// A sum over the ranks under way, to be left whole or in pieces.
pub(crate) enum Summing {
    Whole(Reducing),
    Pieces(Scattering),
}

impl Summing {
    pub(crate) fn finish(self) -> ShimResult<Tensor> {
        match self {
            Summing::Whole(reducing) => reducing.finish(),
            Summing::Pieces(scattering) => scattering.finish(),
        }
    }
}

impl TensorGroup {
    /// The whole sequence of what the residual stream holds a part of.
    pub(crate) fn whole(&self, x: &Tensor) -> ShimResult<Tensor> {
        if !self.sequence {
            return Ok(x.shallow_clone());
        }
        begin_gather(self.comm.as_ref(), &self.failure, x, SEQUENCE)?.finish()
    }

    /// Begins to sum what each rank has a summand of into the residual stream's form.
    pub(crate) fn begin_sum(&self, x_BSD: &Tensor) -> ShimResult<Summing> {
        let (comm, failure) = (self.comm.as_ref(), &self.failure);
        Ok(if self.sequence {
            Summing::Pieces(begin_scatter(comm, failure, x_BSD, SEQUENCE)?)
        } else {
            Summing::Whole(begin_reduce(comm, failure, x_BSD, ReduceOp::Sum)?)
        })
    }

    /// `x W^T` for a weight cut by rows: `[B, s, D]` to `[B, S, F]`.
    pub(crate) fn column(&self, x: &Tensor, weight: &Parameter) -> ShimResult<Tensor> {
        let usage = Use::open(weight)?;
        let slot = Slot::new();
        let (group, kept, own) = (self.clone(), slot.share(), weight.shallow_clone());
        let forward = move |inputs: &[Option<Tensor>]| {
            let x = input(inputs, 0)?;
            let y = group.products.project(&group.whole(x)?, &own)?;
            kept.put(x.f_detach()?);
            Ok(vec![y])
        };
        let (group, own) = (self.clone(), weight.shallow_clone());
        let backward = move |gradients: &[Option<Tensor>]| {
            let (dy, x) = (input(gradients, 0)?, slot.take()?);
            // The sequence comes back while the input's gradient is made, and the input's gradient
            // goes out while the weight's is made.
            let gathering = match group.sequence {
                true => Some(begin_gather(group.comm.as_ref(), &group.failure, &x, SEQUENCE)?),
                false => None,
            };
            let summing = group.begin_sum(&group.products.product(dy, &own)?)?;
            let x = gathering.map_or(Ok(x), |gathering| gathering.finish())?;
            group.products.accumulate(&usage, dy, &x)?;
            let dx = summing.finish()?;
            usage.done()?;
            Ok(vec![Some(dx), None])
        };
        one(autograd::apply(&[x, &weight.compute], 1, forward, backward)?)
    }

    /// `x W^T` for a weight cut by columns: `[B, S, F]` to `[B, s, D]`; without values the graph
    /// alone.
    pub(crate) fn row(
        &self,
        x: &Tensor,
        weight: &Parameter,
        with_values: bool,
    ) -> ShimResult<Tensor> {
        let usage = Use::open(weight)?;
        let slot = Slot::new();
        let (group, kept, own) = (self.clone(), slot.share(), weight.shallow_clone());
        let forward = move |inputs: &[Option<Tensor>]| {
            let x = input(inputs, 0)?;
            kept.put(x.f_detach()?);
            if with_values {
                let y = group.products.project(x, &own)?;
                return Ok(vec![group.begin_sum(&y)?.finish()?]);
            }
            let mut shape = x.size();
            shape[1] /= if group.sequence { group.comm.size() as i64 } else { 1 };
            shape[2] = own.shape[0];
            let none = Tensor::f_empty([1, 1, 1], (x.kind(), x.device()))?;
            Ok(vec![none.f_expand(shape, false)?])
        };
        let (group, own) = (self.clone(), weight.shallow_clone());
        let backward = move |gradients: &[Option<Tensor>]| {
            let x = slot.take()?;
            let dy = group.whole(input(gradients, 0)?)?;
            let dx = group.products.product(&dy, &own)?;
            group.products.accumulate(&usage, &dy, &x)?;
            usage.done()?;
            Ok(vec![Some(dx), None])
        };
        one(autograd::apply(&[x, &weight.compute], 1, forward, backward)?)
    }

    /// Rows of an embedding table that is cut by tokens: `[B, S]` ids to `[B, s, D]`. Each rank
    /// looks up its own tokens, and the sum over the ranks has one summand that is not zero.
    pub(crate) fn embedding(&self, tokens_BS: &Tensor, weight: &Parameter) -> ShimResult<Tensor> {
        let usage = Use::open(weight)?;
        let rows = self.vocabulary(weight);
        let elsewhere = outside(tokens_BS, &rows)?.f_unsqueeze(-1)?;
        let local_BS = local(tokens_BS, &rows)?;
        let (group, own) = (self.clone(), weight.shallow_clone());
        let (ids, masked) = (local_BS.shallow_clone(), elsewhere.shallow_clone());
        let forward = move |_: &[Option<Tensor>]| {
            let found = own.compute.f_detach()?.f_index_select(0, &ids.f_view([-1])?)?;
            let mut shape = ids.size();
            shape.push(-1);
            let found = found.f_view(shape.as_slice())?.f_masked_fill(&masked, 0.0)?;
            Ok(vec![group.begin_sum(&found)?.finish()?])
        };
        let group = self.clone();
        let backward = move |gradients: &[Option<Tensor>]| {
            let dy = group.whole(input(gradients, 0)?)?.f_masked_fill(&elsewhere, 0.0)?;
            usage.accumulate_rows(&local_BS, &dy)?;
            usage.done()?;
            Ok(vec![None])
        };
        one(autograd::apply(&[&weight.compute], 1, forward, backward)?)
    }

    /// The tokens whose rows of a table this rank holds.
    pub(crate) fn vocabulary(&self, weight: &Parameter) -> Range<i64> {
        let rows = weight.shape[0];
        let first = self.comm.rank() as i64 * rows;
        first..first + rows
    }
}

/// Where a token's row is held by another rank.
pub(crate) fn outside(tokens: &Tensor, rows: &Range<i64>) -> ShimResult<Tensor> {
    Ok(tokens.f_lt(rows.start)?.f_logical_or(&tokens.f_ge(rows.end)?)?)
}

/// Tokens as rows of this rank's table; 0 for those of others.
pub(crate) fn local(tokens: &Tensor, rows: &Range<i64>) -> ShimResult<Tensor> {
    Ok(tokens.f_sub_scalar(rows.start)?.f_masked_fill(&outside(tokens, rows)?, 0)?)
}

/// The defined tensor at `index`.
pub(crate) fn input(tensors: &[Option<Tensor>], index: usize) -> ShimResult<&Tensor> {
    let tensor = tensors.get(index).and_then(Option::as_ref);
    tensor.ok_or_else(|| ShimError::Closure(format!("tensor {index} is undefined")))
}

/// The only output.
pub(crate) fn one(outputs: Vec<Tensor>) -> ShimResult<Tensor> {
    let only = outputs.into_iter().next();
    only.ok_or_else(|| ShimError::Closure("a function without an output".into()))
}
