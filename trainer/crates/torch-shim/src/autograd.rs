//! Autograd with Rust closures: custom functions, hooks, backward with given gradients. An error or
//! a panic in a closure comes back as an error of the call that ran it.

use std::ptr::{null, null_mut};

use tch::Tensor;

use crate::error::Result;
use crate::result::{
    TensorClosure, call_tensor_closure, check, context, drop_tensor_closure, own, raw, raw_list,
};
use crate::sys;

/// Tensors in and out of a closure; `None` stands for an undefined one (no gradient).
pub type Tensors = Vec<Option<Tensor>>;

/// Whether gradients are on, so that what is computed now records a graph.
pub fn is_recording() -> bool {
    // SAFETY: reads a thread-local flag.
    unsafe { sys::phx_is_recording() }
}

/// Runs `forward` on `inputs` as one node of the graph, with `backward` as its derivative.
/// `forward` runs with gradients off and returns `num_out` tensors; `backward` gets the outputs'
/// gradients and returns one for each input.
///
/// # Errors
/// What `forward` returned or panicked with, or a refusal of libtorch.
pub fn apply(
    inputs: &[&Tensor],
    num_out: usize,
    forward: impl FnMut(&[Option<Tensor>]) -> Result<Vec<Tensor>> + Send + 'static,
    backward: impl FnMut(&[Option<Tensor>]) -> Result<Tensors> + Send + 'static,
) -> Result<Vec<Tensor>> {
    apply_saving(inputs, (num_out, 0), forward, backward)
}

/// As [`apply`], where `forward` returns `num_saved` more tensors, which the graph keeps for
/// `backward`: they come behind the gradients, and are let go when the graph is, or when backward
/// has passed. With some, the gradient of an output that nobody used is `None`, not zeros.
///
/// # Errors
/// As [`apply`]; in backward also where a saved tensor was written in the meantime.
pub fn apply_saving(
    inputs: &[&Tensor],
    (num_out, num_saved): (usize, usize),
    mut forward: impl FnMut(&[Option<Tensor>]) -> Result<Vec<Tensor>> + Send + 'static,
    mut backward: impl FnMut(&[Option<Tensor>]) -> Result<Tensors> + Send + 'static,
) -> Result<Vec<Tensor>> {
    let forward: TensorClosure =
        Box::new(move |inputs, _| Ok(forward(inputs)?.into_iter().map(Some).collect()));
    let backward: TensorClosure = Box::new(move |gradients, _| backward(gradients));
    let pointers = raw_list(inputs);
    let mut out = vec![null_mut(); num_out];
    // SAFETY: the lists have the lengths that are given; the shim owns both contexts from here on.
    check(unsafe {
        sys::phx_apply(
            pointers.as_ptr(),
            pointers.len(),
            out.as_mut_ptr(),
            num_out,
            num_saved,
            context(forward),
            call_tensor_closure,
            context(backward),
            call_tensor_closure,
            drop_tensor_closure,
        )
    })?;
    Ok(out.into_iter().map(|pointer| own(pointer).unwrap_or_default()).collect())
}

/// Says that the tensor's memory was written by someone whom libtorch does not know, so that it
/// notices where a graph wants what was there before.
///
/// # Errors
/// When libtorch refuses.
pub fn written(tensor: &Tensor) -> Result<()> {
    // SAFETY: the tensor lives through the call.
    check(unsafe { sys::phx_written(raw(tensor)) })
}

/// Calls `hook` with the leaf after each accumulation into its `.grad`.
///
/// # Errors
/// When the tensor is not a leaf that requires a gradient.
pub fn post_accumulate_hook(
    leaf: &Tensor,
    mut hook: impl FnMut(&Tensor) -> Result<()> + Send + 'static,
) -> Result<()> {
    let closure: TensorClosure = Box::new(move |tensors, _| {
        if let Some(Some(tensor)) = tensors.first() {
            hook(tensor)?;
        }
        Ok(Vec::new())
    });
    // SAFETY: the tensor lives through the call; the shim owns the context.
    check(unsafe {
        sys::phx_post_accumulate_hook(
            raw(leaf),
            context(closure),
            call_tensor_closure,
            drop_tensor_closure,
        )
    })
}

/// Calls `hook` with the gradient of `tensor` when it is known; a returned tensor takes its place.
///
/// # Errors
/// When the tensor requires no gradient.
pub fn gradient_hook(
    tensor: &Tensor,
    mut hook: impl FnMut(&Tensor) -> Result<Option<Tensor>> + Send + 'static,
) -> Result<()> {
    let closure: TensorClosure = Box::new(move |gradients, _| {
        gradients.iter().map(|gradient| gradient.as_ref().map_or(Ok(None), &mut hook)).collect()
    });
    // SAFETY: the tensor lives through the call; the shim owns the context.
    check(unsafe {
        sys::phx_gradient_hook(
            raw(tensor),
            context(closure),
            call_tensor_closure,
            drop_tensor_closure,
        )
    })
}

/// Runs backward from `outputs` (gradient one where none is `given`) and accumulates into the
/// leaves.
///
/// # Errors
/// What a closure or hook failed with, or a refusal of libtorch.
pub fn backward(outputs: &[&Tensor], given: &[&Tensor]) -> Result<()> {
    run(outputs, given, &[], false).map(drop)
}

/// Runs backward from `outputs` with the gradients `given`, and returns the gradients of `inputs`;
/// leaves stay as they are.
///
/// # Errors
/// What a closure or hook failed with, or a refusal of libtorch.
pub fn gradients(
    outputs: &[&Tensor],
    given: &[&Tensor],
    inputs: &[&Tensor],
    keep_graph: bool,
) -> Result<Tensors> {
    run(outputs, given, inputs, keep_graph)
}

fn run(
    outputs: &[&Tensor],
    given: &[&Tensor],
    inputs: &[&Tensor],
    keep_graph: bool,
) -> Result<Tensors> {
    if !given.is_empty() && given.len() != outputs.len() {
        let text = format!("{} gradients are given for {} outputs", given.len(), outputs.len());
        return Err(crate::ShimError::Invalid(text));
    }
    let (output_list, given_list, input_list) =
        (raw_list(outputs), raw_list(given), raw_list(inputs));
    let given_pointer = if given.is_empty() { null() } else { given_list.as_ptr() };
    let mut gradients = vec![null_mut(); inputs.len()];
    // SAFETY: the lists have the lengths that are given, and live through the call.
    check(unsafe {
        sys::phx_backward(
            output_list.as_ptr(),
            given_pointer,
            output_list.len(),
            input_list.as_ptr(),
            input_list.len(),
            gradients.as_mut_ptr(),
            keep_graph,
        )
    })?;
    Ok(gradients.into_iter().map(own).collect())
}
