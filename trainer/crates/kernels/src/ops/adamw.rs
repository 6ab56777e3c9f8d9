//! AdamW over chunks of flat buffers, in one launch and without the host: the clip coefficient is
//! read on the device.

use std::ops::Range;

use torch_shim::ops::AdamW;
use torch_shim::tch::{Kind, Tensor};

use super::expect;
use crate::error::Result;
use crate::launch::{Argument, Grid, Kernels, plain};
use crate::program::{Program, Storage};

const KERNEL: &str = "adamw";

/// The CUDA source.
pub static PROGRAM: Program = Program {
    name: KERNEL,
    source: include_str!("adamw.cu"),
    kernels: &[KERNEL],
    storages: Storage::ALL,
    items: &[],
};

const THREADS: u32 = 256;
/// Blocks of a multiprocessor, which share the chunks out.
const BLOCKS: u32 = 32;
/// Elements of a chunk, at the most.
const CHUNK_ELEMENTS: i64 = 1 << 14;

/// Runs of elements of flat buffers, cut into chunks of work, on the device.
#[derive(Debug)]
pub struct Chunks {
    /// `[chunks, 3]`: first element, elements, 1 or 0.
    pub(super) table: Tensor,
    /// Behind the last element of all.
    pub(super) end: i64,
}

impl Chunks {
    /// Cuts runs up; each comes with a flag (for AdamW, whether its elements decay). They must not
    /// overlap.
    ///
    /// # Errors
    /// Where a run begins before the buffers do, or libtorch refuses.
    pub fn new(kernels: &Kernels, runs: &[(Range<i64>, bool)]) -> Result<Chunks> {
        let mut cells = Vec::new();
        for (run, flag) in runs {
            expect(run.start >= 0, KERNEL, "the beginning of a run", run.start, "0 or more")?;
            let mut first = run.start;
            while first < run.end {
                let elements = CHUNK_ELEMENTS.min(run.end - first);
                cells.extend([first, elements, i64::from(*flag)]);
                first += elements;
            }
        }
        let count = cells.len() as i64 / 3;
        let table = Tensor::f_from_slice(&cells)?.f_view([count, 3])?;
        let end = runs.iter().map(|(run, _)| run.end).max().unwrap_or(0).max(0);
        Ok(Chunks { table: table.f_to_device(kernels.device())?, end })
    }

    /// Number of chunks.
    pub(super) fn count(&self) -> i64 {
        self.table.size().first().copied().unwrap_or(0)
    }
}

/// Flat buffers of one length.
#[derive(Clone, Copy, Debug)]
pub struct Buffers<'a> {
    /// Master weights, FP32 (FP64 for FP64).
    pub master: &'a Tensor,
    /// Gradients, of the same format.
    pub gradients: &'a Tensor,
    /// First moments.
    pub first: &'a Tensor,
    /// Second moments.
    pub second: &'a Tensor,
    /// The weights that are computed with, where they are not the master weights themselves.
    pub copy: Option<&'a Tensor>,
}

/// One update of the elements of all chunks, gradients being multiplied by `factor` (one FP32
/// number on the device) first; gradients themselves stay. Where `factor` is not finite, nothing
/// changes.
///
/// # Errors
/// Where the tensors do not fit, the step is 0, or the launch fails.
pub fn adamw(
    kernels: &Kernels,
    buffers: Buffers<'_>,
    chunks: &Chunks,
    factor: Option<&Tensor>,
    constants: &AdamW,
) -> Result<()> {
    let Buffers { master, gradients, first, second, copy } = buffers;
    let storage = Storage::of(KERNEL, copy.unwrap_or(master))?;
    let length = master.numel() as i64;
    let own = [("the master weights", master), ("the gradients", gradients)];
    for (name, tensor) in own.into_iter().chain([("first moments", first), ("second", second)]) {
        kernels.check(KERNEL, name, tensor, storage.wide(), &[length])?;
    }
    if let Some(copy) = copy {
        kernels.check(KERNEL, "the copy of the weights", copy, storage.kind(), &[length])?;
    }
    if let Some(factor) = factor {
        kernels.check(KERNEL, "the factor", factor, Kind::Float, &[])?;
    }
    let count = chunks.count();
    kernels.check(KERNEL, "the chunks", &chunks.table, Kind::Int64, &[count, 3])?;
    expect(chunks.end <= length, KERNEL, "the end of the chunks", chunks.end, length.to_string())?;
    expect(constants.step > 0, KERNEL, "the step", constants.step, "at least 1")?;
    if count == 0 {
        return Ok(());
    }
    let AdamW { learning_rate, beta1, beta2, eps, weight_decay, step } = *constants;
    let power = |base: f64| base.powf(step as f64);
    let numbers = [
        learning_rate,
        beta1,
        beta2,
        eps,
        weight_decay,
        learning_rate / (1.0 - power(beta1)),
        1.0 / (1.0 - power(beta2)).sqrt(),
    ];
    let mut arguments = vec![
        Argument::update(master),
        Argument::read(gradients),
        Argument::update(first),
        Argument::update(second),
        // Elements outside the chunks stay.
        Argument::update(copy),
        Argument::read(&chunks.table),
        Argument::I64(count),
        Argument::read(factor),
    ];
    arguments.extend(numbers.map(Argument::F64));
    let grid = Grid::line(kernels.share(count, BLOCKS), THREADS);
    // SAFETY: the parameters are those of the source; the chunks lie within the buffers, which have
    // one length.
    unsafe { kernels.launch(plain(&PROGRAM, storage), KERNEL, grid, &arguments) }
}

/// The plain form on whole buffers: the weights and both moments after an update.
///
/// # Errors
/// Where libtorch refuses.
pub fn reference(
    [weight, gradient, first, second]: [&Tensor; 4],
    factor: f64,
    constants: &AdamW,
) -> Result<[Tensor; 3]> {
    let AdamW { learning_rate, beta1, beta2, eps, weight_decay, step } = *constants;
    let gradient = gradient.f_mul_scalar(factor)?;
    let weight = weight.f_mul_scalar(1.0 - learning_rate * weight_decay)?;
    let first = first.f_mul_scalar(beta1)?.f_add(&gradient.f_mul_scalar(1.0 - beta1)?)?;
    let square = gradient.f_square()?;
    let second = second.f_mul_scalar(beta2)?.f_add(&square.f_mul_scalar(1.0 - beta2)?)?;
    let unbiased = |moment: &Tensor, beta: f64| moment.f_div_scalar(1.0 - beta.powf(step as f64));
    let root = unbiased(&second, beta2)?.f_sqrt()?.f_add_scalar(eps)?;
    let change = unbiased(&first, beta1)?.f_div(&root)?.f_mul_scalar(learning_rate)?;
    Ok([weight.f_sub(&change)?, first, second])
}
