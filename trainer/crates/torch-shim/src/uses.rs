//! The parts of a linear layer, for those who build autograd functions of their own around it:
//! products with a parameter, and a use of it in a graph.

use std::ptr::null_mut;

use tch::Tensor;

use crate::error::Result;
use crate::params::Parameter;
use crate::result::{check, made_one, raw};
use crate::scaled::Scaled;
use crate::sys::{self, RawUse};

/// `x weight^T` without a graph, for a weight `[out, in]`: `[.., in]` to `[.., out]`.
///
/// # Errors
/// When the shapes or dtypes do not fit.
pub fn project(x: &Tensor, weight: &Parameter) -> Result<Tensor> {
    // SAFETY: the tensor and the parameter live through the call.
    made_one(|out| unsafe { sys::phx_project(raw(x), weight.raw(), out) })
}

/// `dy weight` without a graph, for a weight `[out, in]`: `[.., out]` to `[.., in]`.
///
/// # Errors
/// When the shapes or dtypes do not fit.
pub fn product(dy: &Tensor, weight: &Parameter) -> Result<Tensor> {
    // SAFETY: the tensor and the parameter live through the call.
    made_one(|out| unsafe { sys::phx_product(raw(dy), weight.raw(), out) })
}

/// One use of a parameter in a graph. Open it before the forward pass of the function that uses the
/// parameter, with gradients on or off as they are for the caller; its backward adds the gradient
/// and calls [`Use::done`]. The set's ready hook is called when the last use in living graphs is
/// done. A use that is dropped without it is given back silently.
#[derive(Debug)]
pub struct Use(*mut RawUse);

// SAFETY: the C++ object is counted atomically, and used by one thread at a time.
unsafe impl Send for Use {}

impl Use {
    /// Opens a use; it counts where gradients are on.
    ///
    /// # Errors
    /// When the shim refuses.
    pub fn open(parameter: &Parameter) -> Result<Use> {
        let mut pointer = null_mut();
        // SAFETY: the parameter and the place for the answer live through the call.
        check(unsafe { sys::phx_use_open(parameter.raw(), &mut pointer) })?;
        Ok(Use(pointer))
    }

    /// Whether a backward pass can follow: gradients were on.
    pub fn counts(&self) -> bool {
        // SAFETY: the use is alive.
        unsafe { sys::phx_use_counts(self.0) }
    }

    /// Adds `dy^T x` to the parameter's accumulator: the gradient of a linear weight.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn accumulate(&self, dy: &Tensor, x: &Tensor) -> Result<()> {
        // SAFETY: the use and the tensors live through the call.
        check(unsafe { sys::phx_use_accumulate(self.0, raw(dy), raw(x)) })
    }

    /// As [`Use::accumulate`] of FP8 operands: rows of `dy^T` `[out, tokens]` and of `x^T` `[in,
    /// tokens]`. The product is rounded to BF16 before it is added.
    ///
    /// # Errors
    /// When the shapes or dtypes do not fit.
    pub fn accumulate_scaled(&self, dy: &Scaled, x: &Scaled) -> Result<()> {
        let (dy, x, dy_scales, x_scales) = (&dy.values, &x.values, &dy.scales, &x.scales);
        // SAFETY: the use and the tensors live through the call.
        check(unsafe {
            sys::phx_use_accumulate_scaled(self.0, raw(dy), raw(dy_scales), raw(x), raw(x_scales))
        })
    }

    /// Adds each row of `dy` to the accumulator's row of its token: the gradient of an embedding.
    ///
    /// # Errors
    /// When a token lies outside the table or the shapes do not fit.
    pub fn accumulate_rows(&self, tokens: &Tensor, dy: &Tensor) -> Result<()> {
        // SAFETY: the use and the tensors live through the call.
        check(unsafe { sys::phx_use_accumulate_rows(self.0, raw(tokens), raw(dy)) })
    }

    /// The gradient of this use is complete.
    ///
    /// # Errors
    /// What the ready hook failed with.
    pub fn done(&self) -> Result<()> {
        // SAFETY: the use lives through the call.
        check(unsafe { sys::phx_use_done(self.0) })
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        // SAFETY: this owner's reference is given back once.
        unsafe { sys::phx_use_free(self.0) }
    }
}
