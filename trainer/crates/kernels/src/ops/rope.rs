//! Rotary embedding on the fused projection, in place; back in the backward pass.
//!
//! Shapes: `B` batch, `S` sequence, `H` query heads, `K` key and value heads, `E` head_dim,
//! `F` = (H + 2 K) E.

use torch_shim::tch::Tensor;
use torch_shim::{Result as ShimResult, autograd, fused};

use super::{exactly, expect, given};
use crate::error::Result;
use crate::launch::{Argument, Grid, Kernels, int, plain, threads};
use crate::program::{Program, Storage};

const KERNEL: &str = "rope";

/// The CUDA source.
pub static PROGRAM: Program = Program {
    name: KERNEL,
    source: include_str!("rope.cu"),
    kernels: &[KERNEL],
    storages: Storage::ALL,
    items: &[],
};

const MAX_THREADS: u32 = 512;
/// Threads of a multiprocessor that there is work for, several times what can run at once.
const THREADS: u32 = 16384;

/// How many heads the fused projection holds, and how wide they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Query heads.
    pub heads: i64,
    /// Key heads, and as many value heads.
    pub kv_heads: i64,
    /// Elements of a head: an even number.
    pub head_dim: i64,
}

impl Layout {
    fn width(self) -> i64 {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// `cos` and `sin` of the tokens: `[S, E]`, or `[B, S, E]`, their halves equal, FP32 (FP64 with
/// FP64).
#[derive(Clone, Copy, Debug)]
pub struct Tables<'a> {
    /// Cosines.
    pub cos: &'a Tensor,
    /// Sines.
    pub sin: &'a Tensor,
}

/// Turns queries and keys of `qkv`, `[B, S, F]`, in place, and returns the places of queries `[B,
/// H, S, E]`, keys and values `[B, K, S, E]` in it. Without a graph.
///
/// # Errors
/// Where the tensors do not fit, or the launch fails.
pub fn forward(
    kernels: &Kernels,
    qkv: &Tensor,
    tables: Tables<'_>,
    layout: Layout,
) -> Result<[Tensor; 3]> {
    let storage = Storage::of(KERNEL, qkv)?;
    let shape = qkv.size();
    let fits = shape.len() == 3 && shape[2] == layout.width();
    expect(fits, KERNEL, "the shape of qkv", &shape, format!("[B, S, {}]", layout.width()))?;
    kernels.check(KERNEL, "qkv", qkv, storage.kind(), &shape)?;
    let parts = parts(qkv, layout)?;
    launch(kernels, storage, (&parts, false), qkv, Argument::update(qkv), tables, layout, 1)?;
    autograd::written(qkv)?;
    Ok(parts)
}

/// The gradient of the fused projection, `[B, S, F]`, from those of what [`forward`] returned, of
/// any strides. Without a graph.
///
/// # Errors
/// Where the tensors do not fit, or the launch fails.
pub fn backward(
    kernels: &Kernels,
    gradients: [&Tensor; 3],
    tables: Tables<'_>,
    layout: Layout,
) -> Result<Tensor> {
    let storage = Storage::of(KERNEL, gradients[0])?;
    let Layout { heads, kv_heads, head_dim } = layout;
    let (batch, _, sequence, _) = gradients[0].size4()?;
    let mut parts = Vec::new();
    for (gradient, heads) in gradients.into_iter().zip([heads, kv_heads, kv_heads]) {
        let expected = [batch, heads, sequence, head_dim];
        let fits = gradient.size() == expected
            && gradient.kind() == storage.kind()
            && gradient.device() == kernels.device();
        expect(fits, KERNEL, "a gradient", gradient, format!("{expected:?} of one dtype"))?;
        let has_gaps = head_dim > 1 && gradient.stride()[3] != 1;
        parts.push(if has_gaps { gradient.f_contiguous()? } else { gradient.shallow_clone() });
    }
    let parts: [Tensor; 3] = exactly(parts)?;
    let out = kernels.empty(&[batch, sequence, layout.width()], storage.kind())?;
    launch(kernels, storage, (&parts, true), &out, Argument::write(&out), tables, layout, -1)?;
    Ok(out)
}

/// Queries, keys and values as views of the fused projection.
fn parts(qkv: &Tensor, layout: Layout) -> Result<[Tensor; 3]> {
    let Layout { heads, kv_heads, head_dim } = layout;
    let (batch, sequence, _) = qkv.size3()?;
    // Not a view that libtorch would trace back to the projection: the graph is the caller's.
    let split = qkv.f_detach()?.f_view([batch, sequence, heads + 2 * kv_heads, head_dim])?;
    let part = |first, count| -> Result<Tensor> {
        Ok(split.f_narrow(2, first, count)?.f_transpose(1, 2)?)
    };
    Ok([part(0, heads)?, part(heads, kv_heads)?, part(heads + kv_heads, kv_heads)?])
}

#[expect(clippy::too_many_arguments, reason = "the two directions differ in each of them")]
fn launch(
    kernels: &Kernels,
    storage: Storage,
    (parts, with_values): (&[Tensor; 3], bool),
    fused: &Tensor,
    out: Argument<'_>,
    tables: Tables<'_>,
    layout: Layout,
    sign: i32,
) -> Result<()> {
    let Layout { heads, kv_heads, head_dim } = layout;
    let (batch, sequence, _) = fused.size3()?;
    expect(head_dim % 2 == 0, KERNEL, "head_dim", head_dim, "an even number")?;
    let has_rows = tables.cos.dim() == 3;
    let shape = if has_rows { vec![batch, sequence, head_dim] } else { vec![sequence, head_dim] };
    kernels.check(KERNEL, "the cosines", tables.cos, storage.wide(), &shape)?;
    kernels.check(KERNEL, "the sines", tables.sin, storage.wide(), &shape)?;
    let mut arguments = Vec::with_capacity(22);
    for (index, part) in parts.iter().enumerate() {
        // In place, values stay where they are.
        let is_read = index < 2 || with_values;
        arguments.push(if is_read { Argument::read(part) } else { Argument::Null });
        // [B, heads, S, E]
        let strides = part.stride();
        arguments.extend([strides[0], strides[2], strides[1]].map(Argument::I64));
    }
    let dims = [sequence, heads, kv_heads, head_dim];
    arguments.extend([out, Argument::read(tables.cos), Argument::read(tables.sin)]);
    arguments.push(Argument::I64(batch));
    for dim in dims {
        arguments.push(Argument::I32(int(KERNEL, "a dimension", dim)?));
    }
    arguments.extend([Argument::I32(i32::from(has_rows)), Argument::I32(sign)]);
    let lanes = if head_dim % (2 * storage.lanes()) == 0 { storage.lanes() } else { 1 };
    let threads = threads((heads + 2 * kv_heads) * head_dim / 2 / lanes, MAX_THREADS);
    let grid = Grid::line(kernels.share(batch * sequence, THREADS / threads), threads);
    // SAFETY: the parameters are those of the source. The parts were checked, or made, to have the
    // shapes that the numbers say, at their strides; the tables have a row for each token.
    unsafe { kernels.launch(plain(&PROGRAM, storage), KERNEL, grid, &arguments) }
}

/// Splits and turns the fused projection as [`fused::rope_qkv`], which does it where the kernels do
/// not take `qkv`; here in the memory of `qkv`, whose values are lost. Nothing else may read them:
/// a leaf of the graph is copied first.
///
/// # Errors
/// Where the tensors do not fit, or the launch fails.
pub fn rope_qkv(
    kernels: &Kernels,
    qkv: &Tensor,
    tables: Tables<'_>,
    layout: Layout,
) -> Result<(Tensor, Tensor, Tensor)> {
    let Tables { cos, sin } = tables;
    let Layout { heads, kv_heads, head_dim } = layout;
    if !kernels.takes(qkv) {
        return Ok(fused::rope_qkv(qkv, cos, sin, heads, kv_heads, head_dim)?);
    }
    let is_leaf = qkv.is_leaf() && qkv.requires_grad();
    let own = kernels.clone();
    let (cos_forward, sin_forward) = (cos.shallow_clone(), sin.shallow_clone());
    let make = move |inputs: &[Option<Tensor>]| -> ShimResult<Vec<Tensor>> {
        let mut qkv = given(inputs, 0)?.f_contiguous()?;
        if is_leaf {
            let mut copy = qkv.f_empty_like()?;
            copy.f_copy_(&qkv)?;
            qkv = copy;
        }
        let tables = Tables { cos: &cos_forward, sin: &sin_forward };
        Ok(forward(&own, &qkv, tables, layout)?.into())
    };
    let own = kernels.clone();
    let (cos, sin) = (cos.shallow_clone(), sin.shallow_clone());
    let derive = move |gradients: &[Option<Tensor>]| -> ShimResult<Vec<Option<Tensor>>> {
        let gradients = [given(gradients, 0)?, given(gradients, 1)?, given(gradients, 2)?];
        let tables = Tables { cos: &cos, sin: &sin };
        Ok(vec![Some(backward(&own, gradients, tables, layout)?)])
    };
    let [q, k, v] = exactly(autograd::apply(&[qkv], 3, make, derive)?)?;
    Ok((q, k, v))
}

/// The plain form, differentiable by libtorch.
///
/// # Errors
/// Where libtorch refuses.
pub fn reference(qkv: &Tensor, tables: Tables<'_>, layout: Layout) -> Result<[Tensor; 3]> {
    let Layout { heads, kv_heads, head_dim } = layout;
    let (cos, sin) = (tables.cos, tables.sin);
    Ok(fused::reference::rope_qkv(qkv, cos, sin, heads, kv_heads, head_dim)?.into())
}
