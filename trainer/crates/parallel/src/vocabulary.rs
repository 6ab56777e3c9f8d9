//! Output head and cross-entropy over a vocabulary that is cut over the tensor-parallel ranks: the
//! logits are never gathered (Shoeybi et al. 2019, section 3).
//!
//! With `l` the logits of a position, `m` their maximum and `t` the target,
//! `loss = log(sum exp(l - m)) + m - l[t]`. Each rank has the logits of its own tokens; the
//! maximum, the sum and the target's logit, three numbers a position, are reduced over the ranks.
//!
//! Shapes: `N` positions, `D` dim, `v` tokens of this rank.

use collectives::ReduceOp;
use torch_shim::params::Parameter;
use torch_shim::tch::{Device, Kind, Tensor};
use torch_shim::uses::{Use, product, project};
use torch_shim::{Result as ShimResult, ShimError, autograd};

use crate::slices::begin_reduce;
use crate::slot::Slot;
use crate::tensor::{TensorGroup, input, local, one, outside};

/// Stands for no target.
const NO_TARGET: i64 = -100;

/// What one chunk of positions gives.
struct Chunk {
    loss: Tensor,
    /// Gradient of this rank's logits, `[N, v]`.
    d_logits: Option<Tensor>,
}

impl TensorGroup {
    /// `scale` times the sum of the cross-entropies over positions with a target; the same on
    /// every rank. As [`torch_shim::fused::head_loss`] it makes its gradients in the forward pass
    /// and so wants a gradient of one.
    pub(crate) fn loss(
        &self,
        x: &Tensor,
        weight: &Parameter,
        targets: &Tensor,
        scale: f64,
        chunk_tokens: i64,
    ) -> ShimResult<Tensor> {
        let usage = Use::open(weight)?;
        let with_gradients = usage.counts();
        let slot = Slot::new();
        let (group, own, kept) = (self.clone(), weight.shallow_clone(), slot.share());
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
                let count = chunk_tokens.min(num_rows - first);
                let part_ND = rows_ND.f_narrow(0, first, count)?;
                let logits = project(&part_ND, &own)?.f_to_kind(wide)?;
                let goal = targets.f_narrow(0, first, count)?;
                let chunk = group.chunk(logits, &goal, &own, scale, with_gradients)?;
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
            Ok(vec![loss])
        };
        let backward = move |gradients: &[Option<Tensor>]| {
            let gradient = input(gradients, 0)?;
            // On a GPU the host would have to wait for it.
            if gradient.device() == Device::Cpu && gradient.f_double_value(&[])? != 1.0 {
                let text = "the loss computes its gradients in the forward pass, for a loss \
                            gradient of one; put every factor into its scale";
                return Err(ShimError::Closure(text.into()));
            }
            let dx = slot.take()?;
            finish.take()?.done()?;
            Ok(vec![Some(dx), None])
        };
        one(autograd::apply(&[x, &weight.compute], 1, forward, backward)?)
    }

    fn chunk(
        &self,
        mut logits_Nv: Tensor,
        targets_N: &Tensor,
        weight: &Parameter,
        scale: f64,
        with_gradients: bool,
    ) -> ShimResult<Chunk> {
        let reduce = |x: &Tensor, op| begin_reduce(self.comm.as_ref(), &self.failure, x, op);
        let rows = self.vocabulary(weight);
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

/// The tensor in another format; its own memory is free then.
fn narrowed(x: Tensor, kind: Kind) -> ShimResult<Tensor> {
    Ok(x.f_to_kind(kind)?)
}
