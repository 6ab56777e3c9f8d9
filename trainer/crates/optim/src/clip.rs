//! Global-norm gradient clipping. The norm is that of all gradients as one vector.

use crate::error::Result;
use torch_shim::norm::squared_norm;
use torch_shim::params::ParameterSet;
use torch_shim::tch::Tensor;

/// Added to the norm before dividing, as torch's `clip_grad_norm_` does.
const NORM_EPS: f64 = 1e-6;

/// Norm of all gradients of `parameters` as one vector. Not finite where some gradient is not:
/// then the step must be skipped, not clipped.
///
/// # Errors
/// Where libtorch refuses.
pub fn gradient_norm(parameters: &ParameterSet) -> Result<f64> {
    let squared = squared_norm(parameters.flat_grad())?;
    Ok(squared.f_sqrt()?.f_double_value(&[])?)
}

/// What gradients of global norm `norm` are multiplied by: at most 1.
pub fn clip_coefficient(norm: f64, clip_norm: Option<f64>) -> f64 {
    clip_norm.map_or(1.0, |limit| (limit / (norm + NORM_EPS)).min(1.0))
}

/// The same for a norm that the host has not read, an FP64 scalar, with the same bits; `None` where
/// nothing is clipped. For a norm that is not finite it is of no use.
///
/// # Errors
/// Where libtorch refuses.
pub(crate) fn clip_coefficient_of(norm: &Tensor, clip_norm: Option<f64>) -> Result<Option<Tensor>> {
    let Some(limit) = clip_norm else { return Ok(None) };
    let limit = norm.f_full_like(limit)?;
    Ok(Some(limit.f_div(&norm.f_add_scalar(NORM_EPS)?)?.f_clamp_max(1.0)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_comes_to_the_same_bits() {
        for norm in [0.0, 1e-300, 0.3, 0.999_999, 1.0, 7.7, 1e9] {
            for limit in [0.1, 1.0, 3.3] {
                let got = clip_coefficient_of(&Tensor::from(norm), Some(limit)).unwrap();
                let got = got.unwrap().double_value(&[]);
                assert_eq!(got.to_bits(), clip_coefficient(norm, Some(limit)).to_bits());
            }
        }
        assert!(clip_coefficient_of(&Tensor::from(1f64), None).unwrap().is_none());
    }

    #[test]
    fn the_coefficient_only_shrinks() {
        assert_eq!(clip_coefficient(0.5, Some(1.0)), 1.0);
        assert_eq!(clip_coefficient(0.0, Some(1.0)), 1.0);
        assert_eq!(clip_coefficient(4.0, None), 1.0);
        assert_eq!(clip_coefficient(4.0, Some(1.0)), 1.0 / 4.000_001);
    }
}
