//! RMSNorm, alone and with the residual addition before it.
//!
//! Shapes: `N` rows (all dimensions but the last), `D` width.

use torch_shim::params::Parameter;
use torch_shim::tch::Tensor;
use torch_shim::uses::Use;
use torch_shim::{Result as ShimResult, autograd, fused};

use super::{exactly, expect, given};
use crate::error::Result;
use crate::launch::{Argument, Grid, Kernels, cover, int, pieces, rows, threads};
use crate::program::{Program, Storage, Variant};

const KERNEL: &str = "rms_norm";

/// The CUDA source.
pub static PROGRAM: Program = Program {
    name: KERNEL,
    source: include_str!("rms_norm.cu"),
    kernels: &["rms_norm_forward", "rms_norm_backward", "rms_norm_weight_gradient"],
    storages: Storage::ALL,
    items: &ITEMS,
};

/// Elements that a thread holds: as few as do, because registers limit how many blocks run at once.
const ITEMS: [u32; 3] = [8, 16, 32];
const MAX_THREADS: u32 = 512;
/// The widest row that the kernels take.
pub const MAX_WIDTH: i64 = 512 * 32;
/// Columns of a block that sums up the weight's gradient.
const COLUMNS: i64 = 32;
/// Threads of a multiprocessor that forward has work for, several times what can run at once.
const FORWARD_THREADS: u32 = 16384;
/// Those that backward's partial sums are kept for: what can run at once.
const BACKWARD_THREADS: u32 = 1024;

/// What the forward pass makes.
#[derive(Debug)]
pub struct Normed {
    /// `weight * z * reciprocal`, of the shape of `x`.
    pub normed: Tensor,
    /// `z = x + residual`, rounded; `x` itself where there is no residual.
    pub sum: Tensor,
    /// `1 / sqrt(mean(z^2) + eps)`, `[N]`, FP32 (FP64 for FP64).
    pub reciprocal: Tensor,
}

/// The variant for rows of this width, and the threads of a block.
fn choose(storage: Storage, width: i64) -> Result<(Variant, u32)> {
    let expected = format!("at most {MAX_WIDTH}");
    expect(width <= MAX_WIDTH, KERNEL, "the width of a row", width, expected)?;
    let fits = |items: &&u32| i64::from(**items) * i64::from(MAX_THREADS) >= width;
    let items = ITEMS.iter().find(fits).copied().unwrap_or(ITEMS[2]);
    let threads = threads(pieces(width, i64::from(items)), MAX_THREADS);
    Ok((Variant { program: &PROGRAM, storage, items }, threads))
}

/// Adds and norms, without a graph: x and residual `[.., D]`, weight `[D]`.
///
/// # Errors
/// Where the tensors do not fit, or the launch fails.
pub fn forward(
    kernels: &Kernels,
    x: &Tensor,
    residual: Option<&Tensor>,
    weight: &Tensor,
    eps: f64,
) -> Result<Normed> {
    let storage = Storage::of(KERNEL, x)?;
    let (count, width) = rows(KERNEL, x)?;
    let (kind, shape) = (storage.kind(), x.size());
    kernels.check(KERNEL, "x", x, kind, &shape)?;
    kernels.check(KERNEL, "the weight", weight, kind, &[width])?;
    if let Some(residual) = residual {
        kernels.check(KERNEL, "the residual", residual, kind, &shape)?;
    }
    let (variant, threads) = choose(storage, width)?;
    let normed = kernels.empty(&shape, kind)?;
    let reciprocal = kernels.empty(&[count], storage.wide())?;
    let sum = residual.map(|_| kernels.empty(&shape, kind)).transpose()?;
    let arguments = [
        Argument::read(x),
        Argument::read(residual),
        Argument::read(weight),
        Argument::write(sum.as_ref()),
        Argument::write(&normed),
        Argument::write(&reciprocal),
        Argument::I64(count),
        Argument::I32(int(KERNEL, "the width of a row", width)?),
        Argument::F64(eps),
    ];
    let grid = Grid::line(kernels.share(count, FORWARD_THREADS / threads), threads);
    // SAFETY: the parameters are those of the source. All tensors were checked, or made, to have
    // `count` rows of `width` elements of the variant's format; threads times items reach a row.
    unsafe { kernels.launch(variant, "rms_norm_forward", grid, &arguments)? };
    Ok(Normed { normed, sum: sum.unwrap_or_else(|| x.shallow_clone()), reciprocal })
}

/// The gradient of x (which is that of the residual, too): that of the norm plus `d_sum`. Adds the
/// weight's to `gradient`, `[D]`, FP32 (FP64 for FP64). `z` and `reciprocal` are what the forward
/// pass made.
///
/// # Errors
/// Where the tensors do not fit, or a launch fails.
pub fn backward(
    kernels: &Kernels,
    (d_normed, d_sum): (&Tensor, Option<&Tensor>),
    z: &Tensor,
    weight: &Tensor,
    reciprocal: &Tensor,
    gradient: &Tensor,
) -> Result<Tensor> {
    let storage = Storage::of(KERNEL, z)?;
    let (count, width) = rows(KERNEL, z)?;
    let (kind, wide, shape) = (storage.kind(), storage.wide(), z.size());
    kernels.check(KERNEL, "z", z, kind, &shape)?;
    kernels.check(KERNEL, "the gradient of the output", d_normed, kind, &shape)?;
    kernels.check(KERNEL, "the weight", weight, kind, &[width])?;
    kernels.check(KERNEL, "the reciprocals", reciprocal, wide, &[count])?;
    kernels.check(KERNEL, "the weight's gradient", gradient, wide, &[width])?;
    if let Some(d_sum) = d_sum {
        kernels.check(KERNEL, "the gradient of the sum", d_sum, kind, &shape)?;
    }
    let (variant, threads) = choose(storage, width)?;
    let width_int = int(KERNEL, "the width of a row", width)?;
    let blocks = kernels.share(count, BACKWARD_THREADS / threads);
    let partial = kernels.empty(&[i64::from(blocks), width], wide)?;
    let dx = kernels.empty(&shape, kind)?;
    let arguments = [
        Argument::read(d_normed),
        Argument::read(d_sum),
        Argument::read(z),
        Argument::read(weight),
        Argument::read(reciprocal),
        Argument::write(&dx),
        Argument::write(&partial),
        Argument::I64(count),
        Argument::I32(width_int),
    ];
    let grid = Grid::line(blocks, threads);
    // SAFETY: as in `forward`; `partial` has a row for each block.
    unsafe { kernels.launch(variant, "rms_norm_backward", grid, &arguments)? };
    let arguments = [
        Argument::read(&partial),
        Argument::update(gradient),
        Argument::I32(int(KERNEL, "blocks", i64::from(blocks))?),
        Argument::I32(width_int),
    ];
    let blocks = cover(pieces(width, COLUMNS));
    let grid = Grid::line(blocks, MAX_THREADS);
    // SAFETY: the parameters are those of the source; there is a block for every 32 columns.
    unsafe { kernels.launch(variant, "rms_norm_weight_gradient", grid, &arguments)? };
    Ok(dx)
}

/// `weight * x / sqrt(mean(x^2) + eps)` over the last dimension, as [`fused::rms_norm`], which does
/// it where the kernels do not take `x`.
///
/// # Errors
/// Where the tensors do not fit, or a launch fails.
pub fn rms_norm(kernels: &Kernels, x: &Tensor, weight: &Parameter, eps: f64) -> Result<Tensor> {
    if !is_taken(kernels, x) {
        return Ok(fused::rms_norm(x, weight, eps)?);
    }
    let usage = Use::open(weight)?;
    let (own, weight_forward) = (kernels.clone(), weight.shallow_clone());
    let make = move |inputs: &[Option<Tensor>]| -> ShimResult<Vec<Tensor>> {
        let x = given(inputs, 0)?.f_contiguous()?;
        let Normed { normed, sum, reciprocal } =
            forward(&own, &x, None, &weight_forward.compute, eps)?;
        Ok(vec![normed, sum, reciprocal])
    };
    let (own, weight_backward) = (kernels.clone(), weight.shallow_clone());
    let derive = move |tensors: &[Option<Tensor>]| -> ShimResult<Vec<Option<Tensor>>> {
        let outer = (tensors.first().and_then(Option::as_ref), None);
        let saved = (given(tensors, 1)?, given(tensors, 2)?);
        let dx = derivative(&own, outer, saved, &weight_backward)?;
        usage.done()?;
        Ok(vec![dx, None])
    };
    let inputs = [x, &weight.compute];
    let [normed] = exactly(autograd::apply_saving(&inputs, (1, 2), make, derive)?)?;
    Ok(normed)
}

/// Residual addition and norm in one: `(rms_norm(x + residual), x + residual)`, as
/// [`fused::add_rms_norm`], which does it where the kernels do not take `x`.
///
/// # Errors
/// Where the tensors do not fit, or a launch fails.
pub fn add_rms_norm(
    kernels: &Kernels,
    x: &Tensor,
    residual: &Tensor,
    weight: &Parameter,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    if !is_taken(kernels, x) {
        return Ok(fused::add_rms_norm(x, residual, weight, eps)?);
    }
    let usage = Use::open(weight)?;
    let (own, weight_forward) = (kernels.clone(), weight.shallow_clone());
    let make = move |inputs: &[Option<Tensor>]| -> ShimResult<Vec<Tensor>> {
        let (x, residual) = (given(inputs, 0)?.f_contiguous()?, given(inputs, 1)?.f_contiguous()?);
        let Normed { normed, sum, reciprocal } =
            forward(&own, &x, Some(&residual), &weight_forward.compute, eps)?;
        let kept = sum.shallow_clone();
        Ok(vec![normed, sum, kept, reciprocal])
    };
    let (own, weight_backward) = (kernels.clone(), weight.shallow_clone());
    let derive = move |tensors: &[Option<Tensor>]| -> ShimResult<Vec<Option<Tensor>>> {
        let outer = |index: usize| tensors.get(index).and_then(Option::as_ref);
        let saved = (given(tensors, 2)?, given(tensors, 3)?);
        let dx = derivative(&own, (outer(0), outer(1)), saved, &weight_backward)?;
        usage.done()?;
        let of_residual = dx.as_ref().map(Tensor::shallow_clone);
        Ok(vec![dx, of_residual, None])
    };
    let inputs = [x, residual, &weight.compute];
    let [normed, sum] = exactly(autograd::apply_saving(&inputs, (2, 2), make, derive)?)?;
    Ok((normed, sum))
}

/// Whether the kernels take these rows: wider ones have the plain form.
fn is_taken(kernels: &Kernels, x: &Tensor) -> bool {
    kernels.takes(x) && x.size().last().is_some_and(|&width| width <= MAX_WIDTH)
}

/// The gradient of x, from those of the outputs that were used.
fn derivative(
    kernels: &Kernels,
    (d_normed, d_sum): (Option<&Tensor>, Option<&Tensor>),
    (z, reciprocal): (&Tensor, &Tensor),
    weight: &Parameter,
) -> ShimResult<Option<Tensor>> {
    let d_sum = d_sum.map(Tensor::f_contiguous).transpose()?;
    let Some(d_normed) = d_normed else { return Ok(d_sum) };
    let d_normed = d_normed.f_contiguous()?;
    let outer = (&d_normed, d_sum.as_ref());
    Ok(Some(backward(kernels, outer, z, &weight.compute, reciprocal, &weight.grad)?))
}

/// The plain form, differentiable by libtorch: `(normed, sum)`.
///
/// # Errors
/// Where libtorch refuses.
pub fn reference(
    x: &Tensor,
    residual: Option<&Tensor>,
    weight: &Tensor,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    let sum = residual.map_or_else(|| Ok(x.shallow_clone()), |residual| x.f_add(residual))?;
    Ok((fused::reference::rms_norm(&sum, weight, eps)?, sum))
}
