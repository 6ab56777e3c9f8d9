//! Norms of flat buffers.
//!
//! A sum of squares is taken in two levels: rows of the buffer in its own format, then all rows in
//! FP64, because a single FP32 sum over hundreds of millions of squares stops growing.

use crate::error::Result;
use tch::{Kind, Tensor};

/// Elements whose squares are summed in the buffer's own format.
const ROW_ELEMENTS: i64 = 4096;

/// Sum of the squares of a tensor, an FP64 scalar on its device. Equal tensors have sums that are
/// equal to the last bit, on devices of one kind with as many threads.
///
/// # Errors
/// Where libtorch refuses.
pub fn squared_norm(tensor: &Tensor) -> Result<Tensor> {
    let flat = tensor.f_view([-1])?;
    let rows = flat.numel() as i64 / ROW_ELEMENTS;
    let in_rows = rows * ROW_ELEMENTS;
    let rest = flat.f_narrow(0, in_rows, flat.numel() as i64 - in_rows)?;
    let squares = |rows: Tensor| -> Result<Tensor> {
        let norms = rows.f_norm_scalaropt_dim(2.0, [1_i64].as_slice(), false)?;
        Ok(norms.f_to_kind(Kind::Double)?.f_square()?.f_sum(Kind::Double)?)
    };
    let rest = squares(rest.f_view([1, -1])?)?;
    if rows == 0 {
        return Ok(rest);
    }
    Ok(squares(flat.f_narrow(0, 0, in_rows)?.f_view([rows, ROW_ELEMENTS])?)?.f_add(&rest)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn check_norm(size: i64) {
        let values: Vec<f64> = (0..size).map(|i| ((i * 37 % 101) as f64 - 50.0) / 9.0).collect();
        let expected: f64 = values.iter().map(|value| value * value).sum();
        for kind in [Kind::Double, Kind::Float] {
            let tensor = Tensor::from_slice(&values).to_kind(kind);
            let got = squared_norm(&tensor).unwrap().double_value(&[]);
            let tolerance = if kind == Kind::Double { 1e-13 } else { 1e-6 };
            assert!((got - expected).abs() <= tolerance * expected, "{size}: {got} {expected}");
        }
    }

    #[test]
    fn norms_of_all_sizes() {
        for size in [1, 2, 4095, 4096, 4097, 8192, 30_000] {
            check_norm(size);
        }
        assert_eq!(
            squared_norm(&Tensor::zeros([0], (Kind::Float, Device::Cpu)))
                .unwrap()
                .double_value(&[]),
            0.0
        );
    }

    #[test]
    fn a_long_fp32_sum_keeps_growing() {
        // 2^25 ones: a plain FP32 sum stops at 2^24.
        let ones = Tensor::ones([1 << 25], (Kind::Float, Device::Cpu));
        assert_eq!(squared_norm(&ones).unwrap().double_value(&[]), f64::from(1 << 25));
    }

    #[test]
    fn non_finite_gradients_show_in_the_norm() {
        for wrong in [f64::NAN, f64::INFINITY] {
            let mut values = vec![1.0; 5000];
            values[4321] = wrong;
            let norm = squared_norm(&Tensor::from_slice(&values)).unwrap().double_value(&[]);
            assert!(!norm.is_finite());
        }
    }
}
