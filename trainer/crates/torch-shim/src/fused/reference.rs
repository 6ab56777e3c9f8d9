//! The plain form of each fused operator: slow, obvious, differentiable by libtorch itself. Tests
//! compare with it.

use tch::{Kind, Tensor};

use super::Documents;
use crate::error::Result;

/// `x weight^T`.
///
/// # Errors
/// As for all of this module: when libtorch refuses the shapes.
pub fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    Ok(x.f_linear(weight, None::<&Tensor>)?)
}

/// Rows of `weight` at `tokens`.
///
/// # Errors
/// When libtorch refuses.
pub fn embedding(tokens: &Tensor, weight: &Tensor) -> Result<Tensor> {
    Ok(Tensor::f_embedding(weight, tokens, -1, false, false)?)
}

fn wide(x: &Tensor) -> Kind {
    if x.kind() == Kind::Double { Kind::Double } else { Kind::Float }
}

/// `weight * x / sqrt(mean(x^2) + eps)`.
///
/// # Errors
/// When libtorch refuses.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let kind = wide(x);
    let x_wide = x.f_to_kind(kind)?;
    let mean = x_wide.f_square()?.f_mean_dim([-1].as_slice(), true, kind)?;
    let unit = x_wide.f_mul(&mean.f_add_scalar(eps)?.f_rsqrt()?)?;
    Ok(unit.f_mul(&weight.f_to_kind(kind)?)?.f_to_kind(x.kind())?)
}

/// The two halves of each head pair up and turn.
fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let kind = x.kind();
    let x = x.f_to_kind(cos.kind())?;
    let halves = x.f_chunk(2, -1)?;
    let turned = Tensor::f_cat(&[halves[1].f_neg()?, halves[0].shallow_clone()], -1)?;
    Ok(x.f_mul(cos)?.f_add(&turned.f_mul(sin)?)?.f_to_kind(kind)?)
}

/// Splits and rotates; see [`super::rope_qkv`].
///
/// # Errors
/// When libtorch refuses.
pub fn rope_qkv(
    qkv: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (batch, sequence, _) = qkv.size3()?;
    let split = qkv.f_view([batch, sequence, heads + 2 * kv_heads, head_dim])?;
    let (cos, sin) = (cos.f_unsqueeze(-2)?, sin.f_unsqueeze(-2)?);
    let part = |start, count| split.f_narrow(2, start, count);
    let q = rotate(&part(0, heads)?, &cos, &sin)?.f_transpose(1, 2)?;
    let k = rotate(&part(heads, kv_heads)?, &cos, &sin)?.f_transpose(1, 2)?;
    let v = part(heads + kv_heads, kv_heads)?.f_transpose(1, 2)?;
    Ok((q, k, v))
}

/// Attention through the full matrix of scores, with an additive mask.
///
/// # Errors
/// When libtorch refuses.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, documents: &Documents) -> Result<Tensor> {
    let (batch, heads, sequence, head_dim) = q.size4()?;
    let kind = wide(q);
    let groups = heads / k.size4()?.1;
    let repeat = |x: &Tensor| x.f_repeat_interleave_self_int(groups, 1, None);
    let (k, v) = (repeat(k)?.f_to_kind(kind)?, repeat(v)?.f_to_kind(kind)?);
    let scale = 1.0 / (head_dim as f64).sqrt();
    let scores = q.f_to_kind(kind)?.f_matmul(&k.f_transpose(2, 3)?)?.f_mul_scalar(scale)?;
    let mut ids = vec![0i64; (batch * sequence) as usize];
    for (row, lengths) in documents.rows().iter().enumerate() {
        let each = lengths
            .iter()
            .enumerate()
            .flat_map(|(id, &n)| std::iter::repeat_n(id as i64, n as usize));
        ids.splice(row * sequence as usize..(row + 1) * sequence as usize, each);
    }
    let ids =
        Tensor::f_from_slice(&ids)?.f_to_device(q.device())?.f_view([batch, 1, sequence, 1])?;
    let same = ids.f_eq_tensor(&ids.f_transpose(2, 3)?)?;
    let causal = Tensor::f_ones([sequence, sequence], (Kind::Bool, q.device()))?.f_tril(0)?;
    let hidden = same.f_logical_and(&causal)?.f_logical_not()?;
    let weights = scores.f_masked_fill(&hidden, f64::NEG_INFINITY)?.f_softmax(-1, kind)?;
    let out = weights.f_matmul(&v)?.f_transpose(1, 2)?;
    Ok(out.f_reshape([batch, sequence, heads * head_dim])?.f_to_kind(q.kind())?)
}

/// `silu(gate) * up`.
///
/// # Errors
/// When libtorch refuses.
pub fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    let kind = wide(gate_up);
    let halves = gate_up.f_to_kind(kind)?.f_chunk(2, -1)?;
    Ok(halves[0].f_silu()?.f_mul(&halves[1])?.f_to_kind(gate_up.kind())?)
}

/// Head and cross-entropy with all logits at once.
///
/// # Errors
/// When libtorch refuses.
pub fn head_loss(x: &Tensor, head: &Tensor, targets: &Tensor, scale: f64) -> Result<Tensor> {
    let width = x.size().last().copied().unwrap_or(1);
    let logits = x.f_reshape([-1, width])?.f_linear(head, None::<&Tensor>)?.f_to_kind(wide(x))?;
    let targets = targets.f_reshape([-1])?.f_to_kind(Kind::Int64)?;
    let sum = tch::Reduction::Sum;
    let loss = logits.f_cross_entropy_loss(&targets, None::<&Tensor>, sum, -100, 0.0)?;
    Ok(loss.f_mul_scalar(scale)?)
}
