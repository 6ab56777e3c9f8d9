//! Recomputation: a part of the graph keeps only its inputs and runs again in the backward pass
//! (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"). The same operations on the
//! same bits, so gradients are bit-equal to those without it.

use crate::error::{ModelError, Result};
use std::sync::{Arc, Mutex, PoisonError};
use torch_shim::autograd::{self, Tensors};
use torch_shim::tch::{Tensor, with_grad};
use torch_shim::{Result as ShimResult, ShimError};

/// A part of the graph that owns all it reads but its inputs.
pub(crate) type Body = Box<dyn FnMut(&[Tensor]) -> Result<Vec<Tensor>> + Send>;

/// What the forward pass leaves for the backward pass.
struct Kept {
    body: Body,
    inputs: Vec<Tensor>,
}

/// Runs `body` without keeping what is between its inputs and its `num_out` outputs.
pub(crate) fn recomputed(inputs: &[&Tensor], num_out: usize, body: Body) -> Result<Vec<Tensor>> {
    let kept = Arc::new(Mutex::new(Kept { body, inputs: Vec::new() }));
    let again = kept.clone();
    let forward = move |inputs: &[Option<Tensor>]| {
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        let inputs = detached(inputs)?;
        let outputs = (kept.body)(&inputs).map_err(closure_error)?;
        kept.inputs = inputs;
        Ok(outputs)
    };
    let backward = move |gradients: &[Option<Tensor>]| {
        let mut kept = again.lock().unwrap_or_else(PoisonError::into_inner);
        let inputs = std::mem::take(&mut kept.inputs);
        with_grad(|| run_again(&mut kept.body, inputs, gradients))
    };
    Ok(autograd::apply(inputs, num_out, forward, backward)?)
}

fn detached(inputs: &[Option<Tensor>]) -> ShimResult<Vec<Tensor>> {
    let missing = || ShimError::Closure("a recomputed part without an input".into());
    inputs.iter().map(|x| Ok(x.as_ref().ok_or_else(missing)?.f_detach()?)).collect()
}

fn run_again(
    body: &mut Body,
    inputs: Vec<Tensor>,
    gradients: &[Option<Tensor>],
) -> ShimResult<Tensors> {
    let leaves: Vec<Tensor> =
        inputs.into_iter().map(|x| Ok(x.f_set_requires_grad(true)?)).collect::<ShimResult<_>>()?;
    let outputs = body(&leaves).map_err(closure_error)?;
    let pairs = outputs.iter().zip(gradients);
    let (outputs, given): (Vec<&Tensor>, Vec<&Tensor>) =
        pairs.filter_map(|(output, gradient)| Some((output, gradient.as_ref()?))).unzip();
    let leaves: Vec<&Tensor> = leaves.iter().collect();
    autograd::gradients(&outputs, &given, &leaves, false)
}

fn closure_error(error: ModelError) -> ShimError {
    match error {
        ModelError::Shim(error) => error,
        other => ShimError::Closure(other.to_string()),
    }
}
