//! Products of FP8 matrices (e4m3) with a scale a row: on a GPU libtorch's `_scaled_mm`, on a CPU
//! the same in FP32. Matrices keep the dimension that is summed in their rows.

use tch::Tensor;

use crate::error::Result;
use crate::result::{made_one, raw};
use crate::sys;

/// A matrix in FP8: `x = values * scales`, a scale a row.
#[derive(Debug)]
pub struct Scaled {
    /// e4m3, contiguous.
    pub values: Tensor,
    /// FP32, one a row.
    pub scales: Tensor,
}

/// Where a GPU sums the products of FP8 numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accumulation {
    /// In FP32 registers, in short intervals.
    Fp32,
    /// In the tensor cores alone, with fewer bits, and faster.
    Fast,
}

/// How training sums; see `ops/decisions/0035-fp8.md`.
pub fn accumulation() -> Accumulation {
    // SAFETY: reads a constant.
    if unsafe { sys::phx_scaled_is_fast() } { Accumulation::Fast } else { Accumulation::Fp32 }
}

/// `a b^T` of rows `[M, K]` and `[N, K]`, where K and N are multiples of 16: BF16 `[M, N]`, rounded
/// once. A CPU always sums in FP32.
///
/// # Errors
/// When the shapes or dtypes do not fit.
pub fn product(a: &Scaled, b: &Scaled, accumulation: Accumulation) -> Result<Tensor> {
    let fast = accumulation == Accumulation::Fast;
    let ((a, a_scales), (b, b_scales)) = ((&a.values, &a.scales), (&b.values, &b.scales));
    // SAFETY: the tensors live through the call.
    made_one(|out| unsafe {
        sys::phx_scaled_product(raw(a), raw(a_scales), raw(b), raw(b_scales), fast, out)
    })
}
