//! What the kernels compute, by its formulas: with scores `Z = Q K^T / sqrt(E)` of what a query may
//! see, `P = exp(Z - L)` for `L = log sum exp Z`, `O = P V`; and backward, with
//! `D = sum(dO * O)` over the width, `dV = P^T dO`, `dZ = P * (dO V^T - D)`, `dQ = dZ K / sqrt(E)`
//! and `dK = dZ^T Q / sqrt(E)`, each summed over the query heads of a key head.
//!
//! Shapes: `K` key and value heads, `G` query heads of each, `t` tokens of a document, `E`
//! head_dim.

use tch::{Kind, Tensor};

use crate::error::Result;

/// One document's queries, keys and values, wide: `[K, G, t, E]` and `[K, 1, t, E]`.
struct Document {
    range: (i64, i64),
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: i64,
}

/// Attention, and in the form of the tokens the logarithms `[T, H]`, and two that are empty.
pub(super) fn forward(inputs: &[Tensor; 3], starts: Option<&Tensor>) -> Result<[Tensor; 4]> {
    let out = inputs[0].f_empty_like()?;
    let flat_out = flat(&out)?;
    let (tokens, heads, _) = flat_out.size3()?;
    let wide = wide(&inputs[0]);
    let logarithms = Tensor::f_empty([tokens, heads], (wide, out.device()))?;
    for document in documents(inputs, starts)? {
        let (z, _) = document.scores()?;
        let l = z.f_logsumexp([-1].as_slice(), true)?;
        let mixed = z.f_sub(&l)?.f_exp()?.f_matmul(&document.v)?;
        document.put(&mixed, &flat_out)?;
        document.put(&l, &logarithms.f_unsqueeze(-1)?)?;
    }
    let options = (wide, out.device());
    let none = || Tensor::f_empty([0], options);
    Ok([out, logarithms, none()?, none()?])
}

/// The gradients of the inputs, in their forms.
pub(super) fn backward(
    d_out: &Tensor,
    inputs: &[Tensor; 3],
    made: &[Tensor; 4],
    starts: Option<&Tensor>,
) -> Result<[Tensor; 3]> {
    let gradients =
        [inputs[0].f_empty_like()?, inputs[1].f_empty_like()?, inputs[2].f_empty_like()?];
    let into = [flat(&gradients[0])?, flat(&gradients[1])?, flat(&gradients[2])?];
    let (out, d_out) = (flat(&made[0])?, flat(d_out)?);
    let logarithms = made[1].f_unsqueeze(-1)?;
    for document in documents(inputs, starts)? {
        let (z, scale) = document.scores()?;
        let p = z.f_sub(&document.cut(&logarithms)?)?.f_exp()?;
        let (o, d_o) = (document.cut(&out)?, document.cut(&d_out)?);
        let d = o.f_mul(&d_o)?.f_sum_dim_intlist([-1].as_slice(), true, None)?;
        let d_p = d_o.f_matmul(&document.v.f_transpose(-1, -2)?)?;
        let d_z = p.f_mul(&d_p.f_sub(&d)?)?.f_mul_scalar(scale)?;
        let over_group = |x: Tensor| x.f_sum_dim_intlist([1].as_slice(), true, None);
        document.put(&d_z.f_matmul(&document.k)?, &into[0])?;
        document.put(&over_group(d_z.f_transpose(-1, -2)?.f_matmul(&document.q)?)?, &into[1])?;
        document.put(&over_group(p.f_transpose(-1, -2)?.f_matmul(&d_o)?)?, &into[2])?;
    }
    Ok(gradients)
}

fn wide(x: &Tensor) -> Kind {
    if x.kind() == Kind::Double { Kind::Double } else { Kind::Float }
}

/// `[T, H, E]`, a view.
fn flat(x: &Tensor) -> Result<Tensor> {
    let [.., heads, width] = x.size()[..] else { return Ok(x.shallow_clone()) };
    Ok(x.f_view([-1, heads, width])?)
}

/// The documents, where they begin at `starts`, or the rows.
fn documents(inputs: &[Tensor; 3], starts: Option<&Tensor>) -> Result<Vec<Document>> {
    let places: Vec<i64> = match starts {
        Some(starts) => {
            Vec::try_from(&starts.f_to_device(tch::Device::Cpu)?.f_to_kind(Kind::Int64)?)?
        }
        None => {
            let (batch, sequence) = (inputs[0].size()[0], inputs[0].size()[1]);
            (0..=batch).map(|row| row * sequence).collect()
        }
    };
    let [q, k, v] = [flat(&inputs[0])?, flat(&inputs[1])?, flat(&inputs[2])?];
    let groups = q.size()[1] / k.size()[1].max(1);
    let of = |pair: &[i64]| {
        let range = (pair[0], pair[1] - pair[0]);
        let cut = |x: &Tensor, groups| cut(x, range, groups);
        Ok(Document { range, q: cut(&q, groups)?, k: cut(&k, 1)?, v: cut(&v, 1)?, groups })
    };
    places.windows(2).map(of).collect()
}

/// `[T, H, E]` to the `[K, G, t, E]` of some tokens.
fn cut(x: &Tensor, (start, length): (i64, i64), groups: i64) -> Result<Tensor> {
    let (_, heads, width) = x.size3()?;
    let x = x.f_narrow(0, start, length)?.f_to_kind(wide(x))?;
    let x = x.f_reshape([length, heads / groups, groups, width])?;
    Ok(x.f_permute([1, 2, 0, 3])?.f_contiguous()?)
}

impl Document {
    fn cut(&self, x: &Tensor) -> Result<Tensor> {
        cut(x, self.range, self.groups)
    }

    /// The scores, and what they are scaled by.
    fn scores(&self) -> Result<(Tensor, f64)> {
        let (_, _, length, width) = self.q.size4()?;
        let scale = 1.0 / (width as f64).sqrt();
        let z = self.q.f_matmul(&self.k.f_transpose(-1, -2)?)?.f_mul_scalar(scale)?;
        let ones = Tensor::f_ones([length, length], (Kind::Bool, z.device()))?;
        Ok((z.f_masked_fill(&ones.f_triu(1)?, f64::NEG_INFINITY)?, scale))
    }

    /// Writes `[K, G, t, E]` to its tokens of `[T, H, E]`.
    fn put(&self, x: &Tensor, to: &Tensor) -> Result<()> {
        let (start, length) = self.range;
        let (_, heads, width) = to.size3()?;
        let x = x.f_permute([2, 0, 1, 3])?.f_reshape([length, heads, width])?;
        to.f_narrow(0, start, length)?.f_copy_(&x)?;
        Ok(())
    }
}
