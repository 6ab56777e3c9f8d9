//! Output head and cross-entropy over a vocabulary that is cut over the tensor-parallel ranks: the
//! logits are never gathered (Shoeybi et al. 2019, section 3).
//!
//! With `l` the logits of a position, `m` their maximum and `t` the target,
//! `loss = log(sum exp(l - m)) + m - l[t]`. Each rank has the logits of its own tokens; the
//! maximum, the sum and the target's logit, three numbers a position, are reduced over the ranks.
//!
//! Shapes: `N` positions, `D` dim, `v` tokens of this rank.

use collectives::ReduceOp;
use kernels::Kernels;
use kernels::ops::cut_cross_entropy::{self, Part};
use torch_shim::params::Parameter;
use torch_shim::tch::{Kind, Tensor};
use torch_shim::uses::{Use, product, project};
use torch_shim::{Result as ShimResult, ShimError, autograd};

use crate::slices::begin_reduce;
use crate::slot::Slot;
use crate::tensor::{TensorGroup, input, local, one, outside};

/// Stands for no target.
const NO_TARGET: i64 = -100;

/// How a loss is computed.
#[derive(Clone, Copy)]
pub(crate) struct LossBy<'a> {
    /// The kernels of the device, where there are any: they are used where they take the input.
    pub(crate) kernels: Option<&'a Kernels>,
    /// Positions whose logits are held at a time.
    pub(crate) tokens: i64,
}

/// What one chunk of positions gives.
struct Chunk {
    loss: Tensor,
    /// Gradient of this rank's logits, `[N, v]`.
    d_logits: Option<Tensor>,
}

/// What the losses of a chunk are made of.
struct Goal<'a> {
    targets_N: &'a Tensor,
    head: &'a Parameter,
    scale: f64,
    with_gradients: bool,
}

impl TensorGroup {
    /// `scale` times the sum of the cross-entropies over positions with a target; the same on
    /// every rank. As [`torch_shim::fused::head_loss`] it makes its gradients in the forward pass,
    /// for a loss gradient of one; behind any other the input's gradient is not a number.
    pub(crate) fn loss(
        &self,
        x: &Tensor,
        weight: &Parameter,
        targets: &Tensor,
        scale: f64,
        LossBy { kernels, tokens }: LossBy<'_>,
    ) -> ShimResult<Tensor> {
        let usage = Use::open(weight)?;
        let with_gradients = usage.counts();
        let slot = Slot::new();
        let (group, own, kept) = (self.clone(), weight.shallow_clone(), slot.share());
        let kernels = kernels.filter(|kernels| kernels.takes(x)).cloned();
        let (targets, usage_forward) = (targets.f_reshape([-1])?, usage);
        let finish = Slot::new();
        let keep_use = finish.share();
        let mut usage_forward = Some(usage_forward);
        let forward = move |inputs: &[Option<Tensor>]| {
            let usage = usage_forward.take();
            let usage =
                usage.ok_or_else(|| ShimError::Closure("a loss is computed once".into()))?;
            let x = group.whole(input(inputs, 0)?)?;
            let width = x.size().last().copied().unwrap_or(1);
            let rows_ND = x.f_reshape([-1, width])?;
            let num_rows = rows_ND.size()[0];
            let wide = if x.kind() == Kind::Double { Kind::Double } else { Kind::Float };
            let mut loss = Tensor::f_zeros([] as [i64; 0], (wide, x.device()))?;
            let dx_ND = rows_ND.f_empty_like()?;
            let mut first = 0;
            while first < num_rows {
                let count = tokens.min(num_rows - first);
                let part_ND = rows_ND.f_narrow(0, first, count)?;
                let logits = project(&part_ND, &own)?;
                let targets_N = &targets.f_narrow(0, first, count)?;
                let goal = Goal { targets_N, head: &own, scale, with_gradients };
                let chunk = match &kernels {
                    Some(kernels) => group.chunk_by_kernels(kernels, logits, &goal)?,
                    None => group.chunk(logits.f_to_kind(wide)?, &goal)?,
                };
                loss = loss.f_add(&chunk.loss)?;
                if let Some(d_logits) = chunk.d_logits {
                    let d_logits = narrowed(d_logits, x.kind())?;
                    let mut place = dx_ND.f_narrow(0, first, count)?;
                    place.f_copy_(&product(&d_logits, &own)?)?;
                    usage.accumulate(&d_logits, &part_ND)?;
                }
                first += count;
            }
            if with_gradients {
                let dx = group.begin_sum(&dx_ND.f_view(x.size().as_slice())?)?.finish()?;
                kept.put(dx);
            }
            keep_use.put(usage);
            Ok(vec![loss.f_to_kind(wide)?])
        };
        let backward = move |gradients: &[Option<Tensor>]| {
            let dx = only_for_one(slot.take()?, input(gradients, 0)?)?;
            finish.take()?.done()?;
            Ok(vec![Some(dx), None])
        };
        one(autograd::apply(&[x, &weight.compute], 1, forward, backward)?)
    }

    /// Two launches on each side of what goes over the ranks, and a short one in between.
    fn chunk_by_kernels(
        &self,
        kernels: &Kernels,
        logits_Nv: Tensor,
        &Goal { targets_N, head, scale, with_gradients }: &Goal<'_>,
    ) -> ShimResult<Chunk> {
        let reduce = |x: &Tensor, op| begin_reduce(self.comm.as_ref(), &self.failure, x, op);
        let rows = self.vocabulary(head);
        let vocabulary = self.comm.size() as i64 * (rows.end - rows.start);
        let part = Part { first: rows.start, vocabulary };
        let targets_N = targets_N.f_to_kind(Kind::Int64)?;
        let gauged = cut_cross_entropy::gauge(kernels, &logits_Nv, &targets_N, part)?;
        // The own maxima are needed again.
        let mut most_N = gauged.maxima.f_empty_like()?;
        most_N.f_copy_(&gauged.maxima)?;
        let most_N = reduce(&most_N, ReduceOp::Max)?.finish()?;
        cut_cross_entropy::rescale(kernels, &gauged, &most_N)?;
        let sums_2N = reduce(&gauged.sums, ReduceOp::Sum)?.finish()?;
        let own = (&logits_Nv, &targets_N, part);
        let all = (&most_N, &sums_2N);
        let losses_N = cut_cross_entropy::cross_entropy(kernels, own, all, scale, with_gradients)?;
        // In FP64, because the sum is over all tokens.
        let loss = losses_N.f_sum(Kind::Double)?.f_mul_scalar(scale)?;
        Ok(Chunk { loss, d_logits: with_gradients.then_some(logits_Nv) })
    }

    fn chunk(
        &self,
        mut logits_Nv: Tensor,
        &Goal { targets_N, head, scale, with_gradients }: &Goal<'_>,
    ) -> ShimResult<Chunk> {
        let reduce = |x: &Tensor, op| begin_reduce(self.comm.as_ref(), &self.failure, x, op);
        let rows = self.vocabulary(head);
        let kind = logits_Nv.kind();
        let valid_N = targets_N.f_ne(NO_TARGET)?.f_to_kind(kind)?;
        let here_N = outside(targets_N, &rows)?.f_logical_not()?.f_to_kind(kind)?;
        let index_N1 = local(targets_N, &rows)?.f_unsqueeze(1)?;
        let most_N = reduce(&logits_Nv.f_amax([1].as_slice(), false)?, ReduceOp::Max)?.finish()?;
        // Each takes the memory of the one before: logits are the largest tensors of all.
        let mut shifted_Nv = logits_Nv.f_sub_(&most_N.f_unsqueeze(1)?)?;
        let target_N = shifted_Nv.f_gather(1, &index_N1, false)?.f_squeeze_dim(1)?;
        let target_N = target_N.f_mul(&here_N)?;
        let mut powers_Nv = shifted_Nv.f_exp_()?;
        let sum_N = powers_Nv.f_sum_dim_intlist([1].as_slice(), false, None)?;
        let both_2N = reduce(&Tensor::f_stack(&[&sum_N, &target_N], 0)?, ReduceOp::Sum)?;
        let both_2N = both_2N.finish()?;
        let (sum_N, target_N) = (both_2N.f_select(0, 0)?, both_2N.f_select(0, 1)?);
        let losses_N = sum_N.f_log()?.f_sub(&target_N)?.f_mul(&valid_N)?;
        let loss = losses_N.f_sum(kind)?.f_mul_scalar(scale)?;
        if !with_gradients {
            return Ok(Chunk { loss, d_logits: None });
        }
        let mut d_logits = powers_Nv.f_div_(&sum_N.f_unsqueeze(1)?)?;
        let _ = d_logits.f_scatter_add_(1, &index_N1, &here_N.f_neg()?.f_unsqueeze(1)?)?;
        let factor_N1 = valid_N.f_mul_scalar(scale)?.f_unsqueeze(1)?;
        Ok(Chunk { loss, d_logits: Some(d_logits.f_mul_(&factor_N1)?) })
    }
}

/// The gradient of a loss's input, made for a loss gradient of one: bit by bit what it was for
/// that, and not a number for any other. A host that looked would wait for all that it gave a GPU.
fn only_for_one(mut dx: Tensor, gradient: &Tensor) -> ShimResult<Tensor> {
    // 1 / 1, or 0 / 0.
    let is_one = gradient.f_eq(1.0)?.f_to_kind(dx.kind())?;
    Ok(dx.f_mul_(&is_one.f_div(&is_one)?)?)
}

/// The tensor in another format; its own memory is free then.
fn narrowed(x: Tensor, kind: Kind) -> ShimResult<Tensor> {
    Ok(x.f_to_kind(kind)?)
}
