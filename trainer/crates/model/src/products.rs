//! How the three products of a linear layer are made: `x W^T` forward, and backward `dy W` and
//! `dy^T x`.
//!
//! In FP8 both operands of each are rounded to e4m3 with a scale for each row along the dimension
//! that is summed; see `ops/decisions/0035-fp8.md`.

use crate::error::Result;
use kernels::Kernels;
use kernels::ops::fp8::{columns, rows};
use run_config::Matmul;
use torch_shim::params::Parameter;
use torch_shim::tch::Tensor;
use torch_shim::uses::{self, Use};
use torch_shim::{Result as ShimResult, ShimError, autograd, fused, scaled};

/// How the products of the linear layers of blocks are made. The output head's are as
/// [`Products::Same`].
#[derive(Clone, Debug, Default)]
pub enum Products {
    /// In the format of their operands.
    #[default]
    Same,
    /// In FP8, rounded by kernels of our own where there are any.
    Fp8(Option<Kernels>),
}

impl Products {
    /// Those that `precision.matmul` asks for.
    pub fn new(matmul: Matmul, kernels: Option<Kernels>) -> Self {
        match matmul {
            Matmul::Same => Self::Same,
            Matmul::Fp8 => Self::Fp8(kernels),
        }
    }

    /// `x W^T` without a graph: `[.., in]` to `[.., out]`.
    ///
    /// # Errors
    /// Where the shapes or dtypes do not fit; so for all methods.
    pub fn project(&self, x: &Tensor, weight: &Parameter) -> ShimResult<Tensor> {
        let Self::Fp8(kernels) = self else { return uses::project(x, weight) };
        let weight = rows(kernels.as_ref(), &weight.compute.f_detach()?)?;
        let y = scaled::product(&rows(kernels.as_ref(), &flat(x)?)?, &weight, sums())?;
        like(&y, x)
    }

    /// `dy W` without a graph: `[.., out]` to `[.., in]`.
    ///
    /// # Errors
    /// As [`Products::project`].
    pub fn product(&self, dy: &Tensor, weight: &Parameter) -> ShimResult<Tensor> {
        let Self::Fp8(kernels) = self else { return uses::product(dy, weight) };
        let weight = columns(kernels.as_ref(), &weight.compute.f_detach()?)?;
        let dx = scaled::product(&rows(kernels.as_ref(), &flat(dy)?)?, &weight, sums())?;
        like(&dx, dy)
    }

    /// Adds `dy^T x` to the accumulator of the used weight's gradient.
    ///
    /// # Errors
    /// As [`Products::project`].
    pub fn accumulate(&self, usage: &Use, dy: &Tensor, x: &Tensor) -> ShimResult<()> {
        let Self::Fp8(kernels) = self else { return usage.accumulate(dy, x) };
        let columns = |x: &Tensor| columns(kernels.as_ref(), &flat(x)?);
        usage.accumulate_scaled(&columns(dy)?, &columns(x)?)
    }

    /// `x W^T` with its graph.
    ///
    /// # Errors
    /// As [`Products::project`].
    pub fn linear(&self, x: &Tensor, weight: &Parameter) -> Result<Tensor> {
        match self {
            Self::Same => Ok(fused::linear(x, weight)?),
            Self::Fp8(_) => self.in_fp8(x, weight, true),
        }
    }

    /// The graph of [`Products::linear`] alone: a result of its shape without its values.
    ///
    /// # Errors
    /// As [`Products::project`].
    pub fn linear_graph(&self, x: &Tensor, weight: &Parameter) -> Result<Tensor> {
        match self {
            Self::Same => Ok(fused::linear_graph(x, weight)?),
            Self::Fp8(_) => self.in_fp8(x, weight, false),
        }
    }

    fn in_fp8(&self, x: &Tensor, weight: &Parameter, with_values: bool) -> Result<Tensor> {
        let usage = Use::open(weight)?;
        let (products, own) = (self.clone(), weight.shallow_clone());
        let forward = move |inputs: &[Option<Tensor>]| {
            let x = given(inputs, 0)?.f_detach()?;
            if with_values {
                return Ok(vec![products.project(&x, &own)?, x]);
            }
            let mut shape = x.size();
            if let Some(last) = shape.last_mut() {
                *last = own.shape[0];
            }
            let none = Tensor::f_empty([1], (x.kind(), x.device()))?;
            Ok(vec![none.f_expand(shape, false)?, x])
        };
        let (products, own) = (self.clone(), weight.shallow_clone());
        let backward = move |tensors: &[Option<Tensor>]| {
            let (dy, x) = (given(tensors, 0)?, given(tensors, 1)?);
            let dx = products.product(dy, &own)?;
            products.accumulate(&usage, dy, x)?;
            usage.done()?;
            Ok(vec![Some(dx), None])
        };
        let outputs = autograd::apply_saving(&[x, &weight.compute], (1, 1), forward, backward)?;
        let only = outputs.into_iter().next();
        Ok(only.ok_or_else(|| ShimError::Closure("a linear layer without an output".into()))?)
    }
}

/// As training sums.
fn sums() -> scaled::Accumulation {
    scaled::accumulation()
}

/// One row a token, without gaps.
fn flat(x: &Tensor) -> ShimResult<Tensor> {
    let width = x.size().last().copied().unwrap_or(1);
    Ok(x.f_detach()?.f_reshape([-1, width])?.f_contiguous()?)
}

/// The rows `[tokens, _]` in the shape of `x` but for the last dimension.
fn like(rows: &Tensor, x: &Tensor) -> ShimResult<Tensor> {
    let mut shape = x.size();
    if let Some(last) = shape.last_mut() {
        *last = -1;
    }
    Ok(rows.f_view(shape.as_slice())?)
}

fn given(tensors: &[Option<Tensor>], index: usize) -> ShimResult<&Tensor> {
    let missing = || ShimError::Closure(format!("no tensor {index} came to a linear layer"));
    tensors.get(index).and_then(Option::as_ref).ok_or_else(missing)
}
