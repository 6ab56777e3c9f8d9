//! The norm of all gradients and the coefficient that they are clipped by, without the host.

use torch_shim::tch::{Kind, Tensor};

use super::adamw::Chunks;
use super::expect;
use crate::error::Result;
use crate::launch::{Argument, Grid, Kernels, plain};
use crate::program::{Program, Storage};

const KERNEL: &str = "gradient_norm";

/// The CUDA source.
pub static PROGRAM: Program = Program {
    name: KERNEL,
    source: include_str!("gradient_norm.cu"),
    kernels: &["squares_of_chunks", "sum_of_squares", "clip_coefficient"],
    storages: &[Storage::Fp32, Storage::Fp64],
    items: &[],
};

const THREADS: u32 = 256;
const SUM_THREADS: u32 = 1024;
/// Blocks of a multiprocessor, which share the chunks out.
const BLOCKS: u32 = 32;

/// The sum of the squares of all elements of the chunks of a flat buffer, FP32 or FP64: one FP64
/// number on the device. To add up with those of other ranks.
///
/// # Errors
/// Where the tensors do not fit, or a launch fails.
pub fn squared_norm(kernels: &Kernels, gradients: &Tensor, chunks: &Chunks) -> Result<Tensor> {
    let storage = Storage::of(KERNEL, gradients)?;
    let length = gradients.numel() as i64;
    expect(storage != Storage::Bf16, KERNEL, "the dtype", storage, "Float or Double")?;
    kernels.check(KERNEL, "the gradients", gradients, storage.kind(), &[length])?;
    let count = chunks.count();
    kernels.check(KERNEL, "the chunks", &chunks.table, Kind::Int64, &[count, 3])?;
    expect(chunks.end <= length, KERNEL, "the end of the chunks", chunks.end, length.to_string())?;
    let partial = kernels.empty(&[count], Kind::Double)?;
    let out = kernels.empty(&[], Kind::Double)?;
    if count > 0 {
        let arguments = [
            Argument::read(gradients),
            Argument::read(&chunks.table),
            Argument::I64(count),
            Argument::write(&partial),
        ];
        let grid = Grid::line(kernels.share(count, BLOCKS), THREADS);
        // SAFETY: the parameters are those of the source; the chunks lie within the buffer, and
        // there is a place for the sum of each.
        unsafe { kernels.launch(plain(&PROGRAM, storage), "squares_of_chunks", grid, &arguments)? };
    }
    let arguments = [Argument::read(&partial), Argument::I64(count), Argument::write(&out)];
    let grid = Grid::line(1, SUM_THREADS);
    // SAFETY: as above; a block sums up `count` numbers into one.
    unsafe { kernels.launch(plain(&PROGRAM, storage), "sum_of_squares", grid, &arguments)? };
    Ok(out)
}

/// The norm (FP64) whose square is `squares`, and what gradients of this norm are multiplied by
/// (FP32) to come to at most `limit`: `min(1, limit / (norm + 1e-6))`, as torch's
/// `clip_grad_norm_`. NaN where the norm is not finite, which is how AdamW learns of it.
///
/// # Errors
/// Where the tensor does not fit, the limit is not positive, or the launch fails.
pub fn clip(kernels: &Kernels, squares: &Tensor, limit: Option<f64>) -> Result<(Tensor, Tensor)> {
    kernels.check(KERNEL, "the sum of squares", squares, Kind::Double, &[])?;
    if let Some(limit) = limit {
        expect(limit > 0.0, KERNEL, "the limit", limit, "above 0")?;
    }
    let (norm, coefficient) = (kernels.empty(&[], Kind::Double)?, kernels.empty(&[], Kind::Float)?);
    let arguments = [
        Argument::read(squares),
        Argument::F64(limit.unwrap_or(0.0)),
        Argument::write(&norm),
        Argument::write(&coefficient),
    ];
    let variant = plain(&PROGRAM, Storage::Fp32);
    // SAFETY: the parameters are those of the source; each tensor has one element.
    unsafe { kernels.launch(variant, "clip_coefficient", Grid::line(1, 32), &arguments)? };
    Ok((norm, coefficient))
}

/// The plain form, in FP64: `(norm, coefficient)`.
///
/// # Errors
/// Where libtorch refuses.
pub fn reference(gradients: &Tensor, limit: Option<f64>) -> Result<(f64, f64)> {
    let squares = gradients.f_to_kind(Kind::Double)?.f_square()?.f_sum(Kind::Double)?;
    let norm = squares.f_double_value(&[])?.sqrt();
    Ok((norm, limit.map_or(1.0, |limit| (limit / (norm + 1e-6)).min(1.0))))
}
