//! The operators of a Llama block, fused, as autograd functions in C++.
//!
//! An operator with a weight adds the weight's gradient to [`Parameter::grad`] in place (FP32, or
//! FP64) and then calls the set's ready hook; `.grad()` of tch is never used. Compute dtypes: FP32,
//! BF16 (norm and softmax statistics, and the weight gradients' sums, in FP32) and FP64 (everything
//! in FP64). [`reference`] holds the plain form of each.
//!
//! Shapes: B batch, S sequence, E model width, H heads, K key/value heads, D head width, F
//! feed-forward width, V vocabulary.

mod documents;
pub mod reference;

pub use documents::Documents;

use tch::Tensor;

use crate::error::{Result, ShimError};
use crate::params::Parameter;
use crate::result::{check, made, made_one, raw};
use crate::sys;

/// `x weight^T` for a weight `[out, in]`: `[.., in]` to `[.., out]`.
///
/// # Errors
/// When the shapes or dtypes do not fit.
pub fn linear(x: &Tensor, weight: &Parameter) -> Result<Tensor> {
    // SAFETY: the tensor and the parameter live through the call.
    made_one(|out| unsafe { sys::phx_linear(raw(x), weight.raw(), out) })
}

/// The graph of [`linear`] alone: a result of its shape without its values, for what is computed
/// again for the gradients of its inputs.
///
/// # Errors
/// As [`linear`].
pub fn linear_graph(x: &Tensor, weight: &Parameter) -> Result<Tensor> {
    // SAFETY: the tensor and the parameter live through the call.
    made_one(|out| unsafe { sys::phx_linear_graph(raw(x), weight.raw(), out) })
}

/// Rows of the weight `[V, E]` at `tokens` (int32 or int64): `[B, S]` to `[B, S, E]`.
///
/// # Errors
/// When a token lies outside the vocabulary or the dtypes do not fit.
pub fn embedding(tokens: &Tensor, weight: &Parameter) -> Result<Tensor> {
    // SAFETY: the tensor and the parameter live through the call.
    made_one(|out| unsafe { sys::phx_embedding(raw(tokens), weight.raw(), out) })
}

/// `weight * x / sqrt(mean(x^2) + eps)` over the last dimension, rounded to the dtype of `x` once,
/// at the end.
///
/// # Errors
/// When the shapes do not fit.
pub fn rms_norm(x: &Tensor, weight: &Parameter, eps: f64) -> Result<Tensor> {
    // SAFETY: the tensor and the parameter live through the call.
    made_one(|out| unsafe { sys::phx_rms_norm(raw(x), weight.raw(), eps, out) })
}

/// Residual addition and norm in one: returns `(rms_norm(x + residual), x + residual)`.
///
/// # Errors
/// When the shapes do not fit.
pub fn add_rms_norm(
    x: &Tensor,
    residual: &Tensor,
    weight: &Parameter,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    let (mut normed, mut sum) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the tensors and the parameter live through the call.
    check(unsafe {
        sys::phx_add_rms_norm(raw(x), raw(residual), weight.raw(), eps, &mut normed, &mut sum)
    })?;
    let own = |pointer| crate::result::own(pointer).unwrap_or_default();
    Ok((own(normed), own(sum)))
}

/// Splits the fused projection `qkv` `[B, S, (H + 2K) D]` (queries, keys, values in this order) and
/// rotates queries and keys by Hugging Face's convention (the two halves of a head pair up). `cos`
/// and `sin` are `[S, D]` or `[B, S, D]`, their halves equal, FP32 (FP64 with FP64). Returns q `[B,
/// H, S, D]`, k and v `[B, K, S, D]`, not necessarily contiguous.
///
/// # Errors
/// When the shapes do not fit.
pub fn rope_qkv(
    qkv: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
) -> Result<(Tensor, Tensor, Tensor)> {
    // SAFETY: the tensors live through the call; three results are taken.
    let [q, k, v] = made::<3>(|out| unsafe {
        sys::phx_rope_qkv(raw(qkv), raw(cos), raw(sin), heads, kv_heads, head_dim, out)
    })?;
    Ok((q, k, v))
}

/// Causal attention within each document, scaled by `1 / sqrt(D)`: q `[B, H, S, D]`, k and v `[B,
/// K, S, D]`, where H is a multiple of K. Returns `[B, S, H D]`.
///
/// # Errors
/// When the shapes do not fit, or the documents do not cover the rows.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, documents: &Documents) -> Result<Tensor> {
    let (batch, _, sequence, _) = q.size4()?;
    documents.check(batch, sequence)?;
    let (lengths, counts) = documents.flat();
    // SAFETY: the tensors and lists live through the call; `counts` sums up to the length of
    // `lengths`.
    made_one(|out| unsafe {
        let (lengths, rows) = (lengths.as_ptr(), counts.len());
        sys::phx_attention(raw(q), raw(k), raw(v), lengths, counts.as_ptr(), rows, out)
    })
}

/// `silu(gate) * up` for the fused projection `[.., 2F]` (gate first): `[.., F]`.
///
/// # Errors
/// When the last dimension is odd.
pub fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    let width = gate_up.size().last().copied().unwrap_or(0);
    if width == 0 || width % 2 != 0 {
        return Err(ShimError::Invalid(format!(
            "swiglu wants gate and up side by side, not width {width}"
        )));
    }
    // SAFETY: the tensor lives through the call.
    made_one(|out| unsafe { sys::phx_swiglu(raw(gate_up), out) })
}

/// `scale` times the sum of the cross-entropies of `softmax(x head^T)` at `targets` (`[B, S]`,
/// int32 or int64, -100 for no target), for x `[B, S, E]` and a head `[V, E]`. Logits are made for
/// `chunk_tokens` tokens at a time and never kept. The result is a scalar, FP32 (FP64 with FP64).
/// `scale` is the reciprocal of the global number of targets.
///
/// With gradients on, the forward pass computes the gradients too and adds the head's to its
/// accumulator; so backward must come with a gradient of exactly one for this loss (it may be added
/// to others, but not multiplied), and is refused otherwise.
///
/// # Errors
/// When the shapes do not fit or `chunk_tokens` is not positive.
pub fn head_loss(
    x: &Tensor,
    head: &Parameter,
    targets: &Tensor,
    scale: f64,
    chunk_tokens: i64,
) -> Result<Tensor> {
    // SAFETY: the tensors and the parameter live through the call.
    made_one(|out| unsafe {
        sys::phx_head_loss(raw(x), head.raw(), raw(targets), scale, chunk_tokens, out)
    })
}
