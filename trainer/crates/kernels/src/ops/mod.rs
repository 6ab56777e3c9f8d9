//! The kernels, one file of CUDA each, and beside it what checks the arguments and launches it, the
//! autograd function where there is one, and the plain form that it is compared with.

pub mod accumulate;
pub mod adamw;
pub mod cross_entropy;
pub mod cut_cross_entropy;
pub mod embedding;
pub mod fp8;
pub mod gradient_norm;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;

use torch_shim::tch::Tensor;
use torch_shim::{Result as ShimResult, ShimError};

use crate::error::{KernelError, Result};
use crate::program::Program;

/// Every program.
pub const PROGRAMS: [&Program; 9] = [
    &accumulate::PROGRAM,
    &adamw::PROGRAM,
    &cross_entropy::PROGRAM,
    &embedding::PROGRAM,
    &fp8::PROGRAM,
    &gradient_norm::PROGRAM,
    &rms_norm::PROGRAM,
    &rope::PROGRAM,
    &swiglu::PROGRAM,
];

/// A tensor that an autograd function was given.
fn given(tensors: &[Option<Tensor>], index: usize) -> ShimResult<&Tensor> {
    let missing = || ShimError::Closure(format!("no tensor {index} came to an autograd function"));
    tensors.get(index).and_then(Option::as_ref).ok_or_else(missing)
}

/// The results of an autograd function, which are so many.
fn exactly<const N: usize>(results: Vec<Tensor>) -> Result<[Tensor; N]> {
    let wrong = |results: Vec<Tensor>| {
        let count = results.len();
        ShimError::Closure(format!("an autograd function made {count} tensors, not {N}"))
    };
    Ok(results.try_into().map_err(wrong)?)
}

/// That an argument is what a kernel expects.
fn expect(
    holds: bool,
    kernel: &'static str,
    what: &str,
    value: impl std::fmt::Debug,
    expected: impl Into<String>,
) -> Result<()> {
    if holds {
        return Ok(());
    }
    let value = format!("{value:?}");
    Err(KernelError::Argument { kernel, what: what.into(), value, expected: expected.into() })
}
