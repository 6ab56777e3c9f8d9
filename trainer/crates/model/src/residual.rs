//! The residual stream between blocks, with the last addition still to be done.
//!
//! Adding a branch and norming the sum reads the same memory, so the addition waits for the next
//! norm and both are one operation. Shapes: `B` batch, `S` sequence, `D` dim.

use crate::error::Result;
use torch_shim::tch::Tensor;

/// The sum of a stream and, at times, of a branch not added yet.
#[derive(Debug)]
pub struct Residual {
    /// The stream, `[B, S, D]`.
    pub stream_BSD: Tensor,
    /// A branch to be added, `[B, S, D]`.
    pub branch_BSD: Option<Tensor>,
}

impl Residual {
    /// A stream with nothing pending.
    pub fn new(stream_BSD: Tensor) -> Self {
        Self { stream_BSD, branch_BSD: None }
    }

    /// A stream and a branch.
    pub fn with_branch(stream_BSD: Tensor, branch_BSD: Tensor) -> Self {
        Self { stream_BSD, branch_BSD: Some(branch_BSD) }
    }

    /// The sum: what a pipeline stage sends to the next.
    ///
    /// # Errors
    /// Where libtorch refuses.
    pub fn sum(&self) -> Result<Tensor> {
        match &self.branch_BSD {
            None => Ok(self.stream_BSD.shallow_clone()),
            Some(branch) => Ok(self.stream_BSD.f_add(branch)?),
        }
    }
}
