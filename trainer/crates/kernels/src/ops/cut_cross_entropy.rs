//! Cross-entropy where each rank has the logits of a part of the vocabulary: three numbers of a row
//! go over the ranks between the launches, the maximum, the sum of the exponentials and the logit
//! of the target.
//!
//! Shapes: `N` positions, `V` tokens of this rank.

use torch_shim::tch::{Kind, Tensor};

use super::cross_entropy::{KERNEL, PROGRAM, grid};
use super::expect;
use crate::error::Result;
use crate::launch::{Argument, Grid, Kernels, int, pieces, plain, rows};
use crate::program::Storage;

/// Threads of a block that takes a number each.
const THREADS: u32 = 256;
/// Blocks of a multiprocessor.
const BLOCKS: u32 = 8;

/// Which tokens this rank has the logits of.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// The first one.
    pub first: i64,
    /// Tokens of all ranks.
    pub vocabulary: i64,
}

/// What a rank knows of its part of the rows; no graph.
#[derive(Debug)]
pub struct Gauged {
    /// The maxima, `[N]`, FP32 (FP64 for FP64).
    pub maxima: Tensor,
    /// `[2, N]` of the same format: the sums of the exponentials of what the logits are below the
    /// own maximum, and the target's logit, or 0 where another rank has it.
    pub sums: Tensor,
}

/// Looks through the logits, `[N, V]`, for targets of the whole vocabulary, `[N]` int64. Rows
/// without a target are 0.
///
/// # Errors
/// Where the tensors do not fit, or the launch fails.
pub fn gauge(kernels: &Kernels, logits: &Tensor, targets: &Tensor, part: Part) -> Result<Gauged> {
    let (storage, [count, width]) = check(kernels, logits, targets, part)?;
    let maxima = kernels.empty(&[count], storage.wide())?;
    let sums = kernels.empty(&[2, count], storage.wide())?;
    let arguments = [
        Argument::read(logits),
        Argument::read(targets),
        Argument::write(&maxima),
        Argument::write(&sums),
        Argument::I64(count),
        Argument::I32(int(KERNEL, "the vocabulary", width)?),
        Argument::I64(part.first),
        Argument::I64(part.vocabulary),
    ];
    let grid = grid(kernels, storage, [count, width]);
    // SAFETY: the parameters are those of the source; logits have `count` rows of `width` elements,
    // targets and maxima `count` elements, sums twice as many.
    unsafe { kernels.launch(plain(&PROGRAM, storage), "cut_gauge", grid, &arguments)? };
    Ok(Gauged { maxima, sums })
}

/// The sums of exponentials below `largest`, the largest maxima of all ranks, instead of below the
/// rank's own: in place. Then those of all ranks can be added up, as can the targets' logits.
///
/// # Errors
/// Where the tensors do not fit, or the launch fails.
pub fn rescale(kernels: &Kernels, gauged: &Gauged, largest: &Tensor) -> Result<()> {
    let Gauged { maxima, sums } = gauged;
    let storage = Storage::of(KERNEL, maxima)?;
    let count = maxima.numel() as i64;
    kernels.check(KERNEL, "the maxima", maxima, storage.kind(), &[count])?;
    kernels.check(KERNEL, "the largest maxima", largest, storage.kind(), &[count])?;
    kernels.check(KERNEL, "the sums", sums, storage.kind(), &[2, count])?;
    expect(storage != Storage::Bf16, KERNEL, "the dtype", storage, "Float or Double")?;
    let arguments = [
        Argument::read(maxima),
        Argument::read(largest),
        Argument::update(sums),
        Argument::I64(count),
    ];
    let blocks = kernels.share(pieces(count, i64::from(THREADS)), BLOCKS);
    let grid = Grid::line(blocks, THREADS);
    // SAFETY: the parameters are those of the source, for this storage; each tensor has at least
    // `count` elements.
    unsafe { kernels.launch(plain(&PROGRAM, storage), "cut_rescale", grid, &arguments) }
}

/// The cross-entropies of the whole rows, `[N]`, from the largest maxima and the sums of all ranks;
/// as [`cross_entropy`](super::cross_entropy::cross_entropy) else. With `gradients`, `logits`
/// become this rank's part of `scale * (softmax - onehot(target))`.
///
/// # Errors
/// Where the tensors do not fit, or the launch fails.
pub fn cross_entropy(
    kernels: &Kernels,
    (logits, targets, part): (&Tensor, &Tensor, Part),
    (largest, sums): (&Tensor, &Tensor),
    scale: f64,
    gradients: bool,
) -> Result<Tensor> {
    let (storage, [count, width]) = check(kernels, logits, targets, part)?;
    kernels.check(KERNEL, "the largest maxima", largest, storage.wide(), &[count])?;
    kernels.check(KERNEL, "the sums", sums, storage.wide(), &[2, count])?;
    let losses = kernels.empty(&[count], storage.wide())?;
    let arguments = [
        if gradients { Argument::update(logits) } else { Argument::read(logits) },
        Argument::read(targets),
        Argument::read(largest),
        Argument::read(sums),
        Argument::write(&losses),
        Argument::I64(count),
        Argument::I32(int(KERNEL, "the vocabulary", width)?),
        Argument::I64(part.first),
        Argument::I64(part.vocabulary),
        Argument::F64(scale),
        Argument::I32(i32::from(gradients)),
    ];
    let grid = grid(kernels, storage, [count, width]);
    // SAFETY: as in `gauge`.
    unsafe { kernels.launch(plain(&PROGRAM, storage), "cut_cross_entropy", grid, &arguments)? };
    Ok(losses)
}

fn check(
    kernels: &Kernels,
    logits: &Tensor,
    targets: &Tensor,
    part: Part,
) -> Result<(Storage, [i64; 2])> {
    let storage = Storage::of(KERNEL, logits)?;
    let (count, width) = rows(KERNEL, logits)?;
    kernels.check(KERNEL, "the logits", logits, storage.kind(), &[count, width])?;
    kernels.check(KERNEL, "the targets", targets, Kind::Int64, &[count])?;
    let holds = part.first >= 0 && part.first + width <= part.vocabulary;
    expect(holds, KERNEL, "the part of the vocabulary", part, format!("{width} tokens within"))?;
    Ok((storage, [count, width]))
}
