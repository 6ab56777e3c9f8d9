//! The norm of what one rank adds to the gradients, before it is summed with that of others: where
//! the same samples give another on another rank, one of the two has a bad device.

use torch_shim::norm::squared_norm;
use torch_shim::tch::{Tensor, no_grad};
use torch_shim::{Result, ShimError};

/// Sums of squares of one step's parts, in the order in which they were added: the same on every
/// rank that holds the same parameters.
#[derive(Debug)]
pub(crate) struct Squares {
    is_on: bool,
    /// FP64 scalars. Read at the end: reading one on a GPU waits for all that was issued before.
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

    pub(crate) fn sum(&self) -> Result<f64> {
        let value = |part: &Tensor| part.f_double_value(&[]).map_err(ShimError::from);
        self.parts.iter().try_fold(0.0, |sum, part| Ok(sum + value(part)?))
    }
}
