//! Element-wise combination and copies on the calling thread alone, for communication threads.
//! Contiguous CPU tensors only.

use tch::Tensor;

use crate::error::Result;
use crate::result::{check, raw};
use crate::sys;

/// How two elements become one. A NaN wins over every number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combine {
    /// Their sum (BF16: summed in FP32, rounded).
    Sum = 0,
    /// The smaller.
    Min = 1,
    /// The larger.
    Max = 2,
}

/// Combines `x` into `accumulator`, element by element.
///
/// # Errors
/// When sizes or dtypes differ, or the dtype is none of f32, f64, bf16, i64.
pub fn combine(accumulator: &Tensor, x: &Tensor, how: Combine) -> Result<()> {
    // SAFETY: both tensors live through the call; the shim checks sizes and dtypes.
    check(unsafe { sys::phx_combine(raw(accumulator), raw(x), how as i32) })
}

/// Divides every element in place.
///
/// # Errors
/// When the dtype is none of f32, f64, bf16.
pub fn divide(x: &Tensor, divisor: f64) -> Result<()> {
    // SAFETY: the tensor lives through the call.
    check(unsafe { sys::phx_divide(raw(x), divisor) })
}

/// Copies `from` into `to`, which have equally many elements of one dtype.
///
/// # Errors
/// When sizes or dtypes differ.
pub fn copy(to: &Tensor, from: &Tensor) -> Result<()> {
    // SAFETY: both tensors live through the call; the shim checks sizes and dtypes.
    check(unsafe { sys::phx_copy(raw(to), raw(from)) })
}
