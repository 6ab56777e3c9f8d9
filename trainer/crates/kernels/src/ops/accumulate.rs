//! Adding a tensor of a compute format to an accumulator of FP32, in place.

use torch_shim::tch::Tensor;

use crate::error::Result;
use crate::launch::{Argument, Grid, Kernels, pieces, plain, threads};
use crate::program::{Program, Storage};

const KERNEL: &str = "accumulate";

/// The CUDA source.
pub static PROGRAM: Program = Program {
    name: KERNEL,
    source: include_str!("accumulate.cu"),
    kernels: &[KERNEL],
    storages: Storage::ALL,
    items: &[],
};

const MAX_THREADS: u32 = 256;
/// Threads of a multiprocessor that there is work for, several times what can run at once.
const THREADS: u32 = 8192;

/// `sum += x`, for x of FP32, BF16 or FP64 and a sum of the same shape, FP32 (FP64 for FP64).
///
/// # Errors
/// Where the tensors do not fit, or the launch fails.
pub fn accumulate(kernels: &Kernels, sum: &Tensor, x: &Tensor) -> Result<()> {
    let storage = Storage::of(KERNEL, x)?;
    let shape = x.size();
    kernels.check(KERNEL, "x", x, storage.kind(), &shape)?;
    kernels.check(KERNEL, "the sum", sum, storage.wide(), &shape)?;
    let count = x.numel() as i64;
    let arguments = [Argument::update(sum), Argument::read(x), Argument::I64(count)];
    let vectors = pieces(count, storage.lanes());
    let threads = threads(vectors, MAX_THREADS);
    let blocks = kernels.share(pieces(vectors, i64::from(threads)), THREADS / threads);
    // SAFETY: the parameters are those of the source; both tensors have `count` elements.
    unsafe {
        kernels.launch(plain(&PROGRAM, storage), KERNEL, Grid::line(blocks, threads), &arguments)
    }
}

/// The plain form: the sum afterwards.
///
/// # Errors
/// Where libtorch refuses.
pub fn reference(sum: &Tensor, x: &Tensor) -> Result<Tensor> {
    Ok(sum.f_add(&x.f_to_kind(sum.kind())?)?)
}
