//! The norm of what one rank adds to the gradients, before it is summed with that of others: where
//! the same samples give another on another rank, one of the two has a bad device.

use torch_shim::Result;
use torch_shim::norm::squared_norm;
use torch_shim::tch::{Device, Tensor, no_grad};

use crate::scalars::sum;

/// Sums of squares of one step's parts, in the order in which they were added: the same on every
/// rank that holds the same parameters.
#[derive(Debug)]
pub(crate) struct Squares {
    is_on: bool,
    /// FP64 scalars. None is read: on a GPU that would wait for all that was issued before.
    parts: Vec<Tensor>,
}

impl Squares {
    pub(crate) fn new(is_on: bool) -> Self {
        Self { is_on, parts: Vec::new() }
    }

    pub(crate) fn clear(&mut self) {
        self.parts.clear();
    }

    pub(crate) fn add(&mut self, gradients: &Tensor) -> Result<()> {
        if self.is_on {
            self.parts.push(no_grad(|| squared_norm(gradients))?);
        }
        Ok(())
    }

    /// An FP64 scalar on `device`.
    pub(crate) fn sum(&self, device: Device) -> Result<Tensor> {
        sum(&self.parts, device)
    }
}
