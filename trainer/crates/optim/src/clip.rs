//! Global-norm gradient clipping. The norm is that of all gradients as one vector.

use crate::error::Result;
use torch_shim::norm::squared_norm;
use torch_shim::params::ParameterSet;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_coefficient_only_shrinks() {
        assert_eq!(clip_coefficient(0.5, Some(1.0)), 1.0);
        assert_eq!(clip_coefficient(0.0, Some(1.0)), 1.0);
        assert_eq!(clip_coefficient(4.0, None), 1.0);
        assert_eq!(clip_coefficient(4.0, Some(1.0)), 1.0 / 4.000_001);
    }
}
