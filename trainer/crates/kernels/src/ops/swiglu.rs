//! SwiGLU on the fused projection of gate and up.
//!
//! Shapes: `N` rows (all dimensions but the last), `F` inner width.

use torch_shim::tch::Tensor;
use torch_shim::{Result as ShimResult, autograd, fused};

use super::{exactly, expect, given};
use crate::error::Result;
use crate::launch::{Argument, Grid, Kernels, int, pieces, plain, rows, threads};
use crate::program::{Program, Storage};

const KERNEL: &str = "swiglu";

/// The CUDA source.
pub static PROGRAM: Program = Program {
    name: KERNEL,
    source: include_str!("swiglu.cu"),
    kernels: &["swiglu_forward", "swiglu_backward"],
    storages: Storage::ALL,
    items: &[],
};

const MAX_THREADS: u32 = 256;
/// Threads of a multiprocessor that there is work for, several times what can run at once.
const THREADS: u32 = 8192;

/// Rows and inner width of a fused projection, which is checked.
fn measure(kernels: &Kernels, storage: Storage, gate_up: &Tensor) -> Result<(i64, i64)> {
    let (count, width) = rows(KERNEL, gate_up)?;
    expect(width % 2 == 0, KERNEL, "the width of gate and up", width, "an even number")?;
    kernels.check(KERNEL, "gate and up", gate_up, storage.kind(), &gate_up.size())?;
    Ok((count, width / 2))
}

/// Blocks across a row, then as many rows of them as keep the device busy.
fn grid(kernels: &Kernels, storage: Storage, count: i64, width: i64) -> Grid {
    let lanes = if width % storage.lanes() == 0 { storage.lanes() } else { 1 };
    let threads = threads(width / lanes, MAX_THREADS);
    let across = kernels.share(pieces(width / lanes, i64::from(threads)), THREADS / threads);
    let down = kernels.share(count, (THREADS / threads / across).max(1)).min(65_535);
    Grid { blocks: (across, down), threads }
}

/// The shape of the result.
fn inner_shape(gate_up: &Tensor, width: i64) -> Vec<i64> {
    let mut shape = gate_up.size();
    if let Some(last) = shape.last_mut() {
        *last = width;
    }
    shape
}

/// `silu(gate) * up` without a graph: `[.., 2 F]` to `[.., F]`.
///
/// # Errors
/// Where the tensor does not fit, or the launch fails.
pub fn forward(kernels: &Kernels, gate_up: &Tensor) -> Result<Tensor> {
    let storage = Storage::of(KERNEL, gate_up)?;
    let (count, width) = measure(kernels, storage, gate_up)?;
    let y = kernels.empty(&inner_shape(gate_up, width), storage.kind())?;
    let arguments = [
        Argument::read(gate_up),
        Argument::write(&y),
        Argument::I64(count),
        Argument::I32(int(KERNEL, "the inner width", width)?),
    ];
    let grid = grid(kernels, storage, count, width);
    // SAFETY: the parameters are those of the source; the tensors have `count` rows of twice the
    // width, and of the width.
    unsafe { kernels.launch(plain(&PROGRAM, storage), "swiglu_forward", grid, &arguments)? };
    Ok(y)
}

/// The gradient of gate and up.
///
/// # Errors
/// Where the tensors do not fit, or the launch fails.
pub fn backward(kernels: &Kernels, dy: &Tensor, gate_up: &Tensor) -> Result<Tensor> {
    let storage = Storage::of(KERNEL, gate_up)?;
    let (count, width) = measure(kernels, storage, gate_up)?;
    let shape = inner_shape(gate_up, width);
    kernels.check(KERNEL, "the gradient of the output", dy, storage.kind(), &shape)?;
    let d_gate_up = kernels.empty(&gate_up.size(), storage.kind())?;
    let arguments = [
        Argument::read(dy),
        Argument::read(gate_up),
        Argument::write(&d_gate_up),
        Argument::I64(count),
        Argument::I32(int(KERNEL, "the inner width", width)?),
    ];
    let grid = grid(kernels, storage, count, width);
    // SAFETY: as in `forward`.
    unsafe { kernels.launch(plain(&PROGRAM, storage), "swiglu_backward", grid, &arguments)? };
    Ok(d_gate_up)
}

/// `silu(gate) * up` for the fused projection `[.., 2 F]`, as [`fused::swiglu`], which does it
/// where the kernels do not take it.
///
/// # Errors
/// Where the tensor does not fit, or a launch fails.
pub fn swiglu(kernels: &Kernels, gate_up: &Tensor) -> Result<Tensor> {
    if !kernels.takes(gate_up) {
        return Ok(fused::swiglu(gate_up)?);
    }
    let own = kernels.clone();
    let make = move |inputs: &[Option<Tensor>]| -> ShimResult<Vec<Tensor>> {
        let gate_up = given(inputs, 0)?.f_contiguous()?;
        Ok(vec![forward(&own, &gate_up)?, gate_up])
    };
    let own = kernels.clone();
    let derive = move |tensors: &[Option<Tensor>]| -> ShimResult<Vec<Option<Tensor>>> {
        let dy = given(tensors, 0)?.f_contiguous()?;
        Ok(vec![Some(backward(&own, &dy, given(tensors, 1)?)?)])
    };
    let [y] = exactly(autograd::apply_saving(&[gate_up], (1, 1), make, derive)?)?;
    Ok(y)
}

/// The plain form, differentiable by libtorch.
///
/// # Errors
/// Where libtorch refuses.
pub fn reference(gate_up: &Tensor) -> Result<Tensor> {
    Ok(fused::reference::swiglu(gate_up)?)
}
