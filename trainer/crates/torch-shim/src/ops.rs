//! Operators over lists of tensors that tch does not reach.

use std::borrow::Borrow;
use std::ptr::null_mut;

use tch::{Kind, Tensor};

use crate::error::{Result, ShimError};
use crate::result::{check, made_one, raw, raw_list};
use crate::sys;

/// The constants of one AdamW update.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate of this update.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// The number of this update, from 1.
    pub step: u64,
}

/// What of an update the device decides, so that the host need not wait for it.
#[derive(Clone, Copy, Debug, Default)]
pub struct OnDevice<'a> {
    /// Divides the gradients first; FP32, of one element.
    pub divisor: Option<&'a Tensor>,
    /// Where it is 1, nothing changes; FP32, of one element.
    pub held: Option<&'a Tensor>,
}

/// One AdamW update of all `parameters` in place, by libtorch's fused kernel. All four lists pair
/// up and have one dtype.
///
/// # Errors
/// When the lists differ in length, `step` is 0, or libtorch refuses.
pub fn fused_adamw<T: Borrow<Tensor>>(
    parameters: &[T],
    gradients: &[T],
    first_moments: &[T],
    second_moments: &[T],
    constants: &AdamW,
    on_device: OnDevice<'_>,
) -> Result<()> {
    let count = parameters.len();
    if [gradients.len(), first_moments.len(), second_moments.len()] != [count; 3]
        || constants.step == 0
    {
        let text =
            "fused_adamw wants four lists of one length and a step of at least 1".to_string();
        return Err(ShimError::Invalid(text));
    }
    let Some(first) = parameters.first() else { return Ok(()) };
    let options = (Kind::Float, first.borrow().device());
    for given in [on_device.divisor, on_device.held].into_iter().flatten() {
        if (given.kind(), given.device(), given.numel()) != (options.0, options.1, 1) {
            let (kind, size, device) = (given.kind(), given.size(), given.device());
            let text =
                format!("fused_adamw wants one FP32 number, not {kind:?} {size:?} {device:?}");
            return Err(ShimError::Invalid(text));
        }
    }
    let step = Tensor::f_full([] as [i64; 0], constants.step as f64, options)?;
    let (p, g) = (raw_list(parameters), raw_list(gradients));
    let (m, v) = (raw_list(first_moments), raw_list(second_moments));
    let given = |tensor: Option<&Tensor>| tensor.map_or(null_mut(), raw);
    // SAFETY: the four lists have `count` tensors each, which live through the call, as do the
    // others; null stands for none.
    check(unsafe {
        sys::phx_fused_adamw(
            p.as_ptr(),
            g.as_ptr(),
            m.as_ptr(),
            v.as_ptr(),
            count,
            raw(&step),
            constants.learning_rate,
            constants.beta1,
            constants.beta2,
            constants.weight_decay,
            constants.eps,
            given(on_device.divisor),
            given(on_device.held),
        )
    })
}

/// The 2-norm of all tensors together, as a tensor of no dimension.
///
/// # Errors
/// When libtorch refuses.
pub fn global_norm<T: Borrow<Tensor>>(tensors: &[T]) -> Result<Tensor> {
    let list = raw_list(tensors);
    // SAFETY: the list's tensors live through the call.
    made_one(|out| unsafe { sys::phx_global_norm(list.as_ptr(), list.len(), out) })
}

/// Multiplies each tensor in place.
///
/// # Errors
/// When libtorch refuses.
pub fn foreach_mul<T: Borrow<Tensor>>(tensors: &[T], factor: f64) -> Result<()> {
    let list = raw_list(tensors);
    // SAFETY: the list's tensors live through the call.
    check(unsafe { sys::phx_foreach_mul(list.as_ptr(), list.len(), factor) })
}

/// Multiplies each tensor in place by a tensor of one element, without reading it on the host.
///
/// # Errors
/// When libtorch refuses.
pub fn foreach_mul_tensor<T: Borrow<Tensor>>(tensors: &[T], factor: &Tensor) -> Result<()> {
    let list = raw_list(tensors);
    // SAFETY: the list's tensors and the factor live through the call.
    check(unsafe { sys::phx_foreach_mul_tensor(list.as_ptr(), list.len(), raw(factor)) })
}
