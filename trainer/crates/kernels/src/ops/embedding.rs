//! The embedding table, whose gradient is added up in a fixed order: libtorch's own uses atomics on
//! a GPU, and gives other bits each time.
//!
//! Shapes: `N` tokens, `V` vocabulary, `D` model width.

use torch_shim::params::Parameter;
use torch_shim::tch::{Kind, Tensor};
use torch_shim::uses::Use;
use torch_shim::{Result as ShimResult, autograd, fused};

use super::{exactly, given};
use crate::error::Result;
use crate::launch::{Argument, Grid, Kernels, int, pieces, plain, rows, threads};
use crate::program::{Program, Storage};

const KERNEL: &str = "embedding";

/// The CUDA source.
pub static PROGRAM: Program = Program {
    name: KERNEL,
    source: include_str!("embedding.cu"),
    kernels: &["embedding_gradient"],
    storages: Storage::ALL,
    items: &[],
};

const MAX_THREADS: u32 = 256;
/// Blocks of a multiprocessor, which share the tokens out.
const BLOCKS: u32 = 32;

/// Adds each row of dy, `[N, D]`, to the row of its token in `gradient`, `[V, D]`, FP32 (FP64 for
/// FP64): tokens are `[N]`, int64.
///
/// # Errors
/// Where the tensors do not fit, or the launch fails.
pub fn accumulate_rows(
    kernels: &Kernels,
    tokens: &Tensor,
    dy: &Tensor,
    gradient: &Tensor,
) -> Result<()> {
    let storage = Storage::of(KERNEL, dy)?;
    let (count, width) = rows(KERNEL, dy)?;
    let (table, _) = rows(KERNEL, gradient)?;
    kernels.check(KERNEL, "the tokens", tokens, Kind::Int64, &[count])?;
    kernels.check(KERNEL, "the gradient of the output", dy, storage.kind(), &[count, width])?;
    kernels.check(KERNEL, "the gradient", gradient, storage.wide(), &[table, width])?;
    let (sorted, order) = tokens.f_sort_stable(true, 0, false)?;
    let arguments = [
        Argument::read(&sorted),
        Argument::read(&order),
        Argument::read(dy),
        Argument::update(gradient),
        Argument::I64(count),
        Argument::I64(table),
        Argument::I32(int(KERNEL, "the model's width", width)?),
    ];
    let lanes = if width % storage.lanes() == 0 { storage.lanes() } else { 1 };
    let threads = threads(width / lanes, MAX_THREADS);
    // A token that comes often keeps its blocks busy for long: so there are several for each.
    let across = kernels.share(pieces(width / lanes, i64::from(threads)), BLOCKS);
    let grid = Grid { blocks: (kernels.share(count, BLOCKS), across), threads };
    // SAFETY: the parameters are those of the source; tokens and their order have `count` elements,
    // dy as many rows, and the gradient `table` rows.
    unsafe { kernels.launch(plain(&PROGRAM, storage), "embedding_gradient", grid, &arguments) }
}

/// Rows of the weight `[V, D]` at `tokens` (int64), `[.., D]`, as [`fused::embedding`], which does
/// it where the kernels do not take the weight.
///
/// # Errors
/// Where the tensors do not fit, or a launch fails.
pub fn embedding(kernels: &Kernels, tokens: &Tensor, weight: &Parameter) -> Result<Tensor> {
    if !kernels.takes(&weight.compute) {
        return Ok(fused::embedding(tokens, weight)?);
    }
    let usage = Use::open(weight)?;
    let table = weight.shallow_clone();
    let make = move |inputs: &[Option<Tensor>]| -> ShimResult<Vec<Tensor>> {
        let tokens = given(inputs, 0)?;
        Ok(vec![fused::reference::embedding(tokens, &table.compute)?, tokens.shallow_clone()])
    };
    let (own, table) = (kernels.clone(), weight.shallow_clone());
    let derive = move |tensors: &[Option<Tensor>]| -> ShimResult<Vec<Option<Tensor>>> {
        let width = table.shape.last().copied().unwrap_or(1);
        let dy = given(tensors, 0)?.f_contiguous()?.f_view([-1, width])?;
        let tokens = given(tensors, 1)?.f_reshape([-1])?.f_to_kind(Kind::Int64)?;
        accumulate_rows(&own, &tokens, &dy, &table.grad)?;
        usage.done()?;
        Ok(vec![None, None])
    };
    let inputs = [tokens, &weight.compute];
    let [rows] = exactly(autograd::apply_saving(&inputs, (1, 1), make, derive)?)?;
    Ok(rows)
}

/// The plain form: the gradient afterwards.
///
/// # Errors
/// Where libtorch refuses.
pub fn reference(tokens: &Tensor, dy: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    Ok(gradient.f_index_add(0, tokens, &dy.f_to_kind(gradient.kind())?)?)
}
