//! Rotary position embedding: frequencies, Llama 3.1's long-context scaling, and tables.
//!
//! Shapes: `B` sequences, `S` positions, `E` = head_dim, `R` = E / 2 rotated pairs.
//!
//! Pairs are laid out as transformers does it (rotate-half: element `i` turns with `i + R`).

use crate::error::Result;
use crate::inputs::Inputs;
use run_config::{Rope, RopeFrequencies, RopeScaling};
use std::f64::consts::PI;
use torch_shim::tch::{Device, Kind, Tensor};

/// cos and sin of every position below `num_positions`, looked up by position id.
#[derive(Debug)]
pub struct RopeTables {
    /// `[S, E]`, both halves equal; FP32 (FP64 for FP64 compute).
    pub cos_SE: Tensor,
    /// `[S, E]`, of the same kind.
    pub sin_SE: Tensor,
}

/// cos and sin of each token of a micro-batch: `[S, E]` where all rows are at the same consecutive
/// positions, else `[B, S, E]`.
#[derive(Debug)]
pub struct RopeFactors {
    /// Cosines.
    pub cos: Tensor,
    /// Sines.
    pub sin: Tensor,
}

impl RopeFactors {
    /// Another owner of the same tensors.
    pub fn share(&self) -> Self {
        Self { cos: self.cos.shallow_clone(), sin: self.sin.shallow_clone() }
    }
}

impl RopeTables {
    /// Tables for positions `0..num_positions` on `device`.
    ///
    /// With frequencies rounded to FP32 and compute other than FP64 the angles are FP32 products
    /// too, as in transformers and in Meta's code: the models were trained with those. In all other
    /// cases angles and their cosines are FP64 and rounded once.
    ///
    /// # Errors
    /// Where libtorch is out of memory.
    pub fn new(
        rope: &Rope,
        head_dim: usize,
        num_positions: usize,
        compute: Kind,
        device: Device,
    ) -> Result<Self> {
        let table_kind = if compute == Kind::Double { Kind::Double } else { Kind::Float };
        let angle_kind = match (rope.frequencies, table_kind) {
            (RopeFrequencies::Fp32, Kind::Float) => Kind::Float,
            _ => Kind::Double,
        };
        let frequencies_R = frequencies(rope, head_dim)?.f_to_kind(angle_kind)?;
        let positions_S = Tensor::f_arange(num_positions as i64, (angle_kind, Device::Cpu))?;
        let angles_SR = positions_S.f_unsqueeze(1)?.f_mul(&frequencies_R.f_unsqueeze(0)?)?;
        let angles_SE = Tensor::f_cat(&[&angles_SR, &angles_SR], 1)?;
        let table = |values: Tensor| values.f_to_kind(table_kind)?.f_to_device(device);
        Ok(Self { cos_SE: table(angles_SE.f_cos()?)?, sin_SE: table(angles_SE.f_sin()?)? })
    }

    /// The rows of the tables at the positions of `inputs`.
    ///
    /// # Errors
    /// Where libtorch refuses.
    pub fn factors(&self, inputs: &Inputs) -> Result<RopeFactors> {
        let (batch, sequence) = (inputs.batch(), inputs.sequence());
        let rows = |table_SE: &Tensor| -> Result<Tensor> {
            if let Some(first) = inputs.consecutive_from() {
                return Ok(table_SE.f_narrow(0, first, sequence)?);
            }
            let rows = table_SE.f_index_select(0, &inputs.positions_BS.f_view([-1])?)?;
            Ok(rows.f_view([batch, sequence, -1])?)
        };
        Ok(RopeFactors { cos: rows(&self.cos_SE)?, sin: rows(&self.sin_SE)? })
    }

    /// Number of positions the tables reach.
    pub fn num_positions(&self) -> usize {
        self.cos_SE.size().first().map_or(0, |&size| size as usize)
    }
}

/// The `head_dim / 2` frequencies in radians per position, scaled; FP32 or FP64 as `rope` says.
///
/// The FP32 path is the same sequence of libtorch operations that transformers runs, so that the
/// rounding is the same in the last bit.
///
/// # Errors
/// Where libtorch refuses.
pub fn frequencies(rope: &Rope, head_dim: usize) -> Result<Tensor> {
    let kind = match rope.frequencies {
        RopeFrequencies::Fp32 => Kind::Float,
        RopeFrequencies::Exact => Kind::Double,
    };
    let exponents_R =
        Tensor::f_arange_start_step(0, head_dim as i64, 2, (Kind::Int64, Device::Cpu))?
            .f_to_kind(kind)?
            .f_div_scalar(head_dim as f64)?;
    let frequencies_R = Tensor::f_pow_scalar(rope.theta, &exponents_R)?.f_reciprocal()?;
    match &rope.scaling {
        None => Ok(frequencies_R),
        Some(scaling) => scale(&frequencies_R, scaling),
    }
}

/// Llama 3.1's scaling. Wavelengths in positions: the long ones are stretched by `factor`, the
/// short ones kept, and those between interpolated by how often they fit the original context.
fn scale(frequencies_R: &Tensor, scaling: &RopeScaling) -> Result<Tensor> {
    let RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } =
        scaling;
    let context = *original_context as f64;
    let (longest_kept, shortest_scaled) = (context / high_freq_factor, context / low_freq_factor);
    let wavelengths_R = frequencies_R.f_reciprocal()?.f_mul_scalar(2.0 * PI)?;
    let slowed_R = frequencies_R.f_div_scalar(*factor)?;
    let long_R = wavelengths_R.f_gt(shortest_scaled)?;
    let scaled_R = slowed_R.f_where_self(&long_R, frequencies_R)?;
    let smooth_R = wavelengths_R
        .f_reciprocal()?
        .f_mul_scalar(context)?
        .f_sub_scalar(*low_freq_factor)?
        .f_div_scalar(high_freq_factor - low_freq_factor)?;
    let rest_R = smooth_R.f_neg()?.f_add_scalar(1.0)?;
    let ramp_R =
        rest_R.f_mul(&scaled_R)?.f_div_scalar(*factor)?.f_add(&smooth_R.f_mul(&scaled_R)?)?;
    let between_R =
        wavelengths_R.f_ge(longest_kept)?.f_logical_and(&wavelengths_R.f_le(shortest_scaled)?)?;
    Ok(ramp_R.f_where_self(&between_R, &scaled_R)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(frequencies: RopeFrequencies, scaled: bool) -> Rope {
        let scaling = scaled.then_some(RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192,
        });
        Rope { theta: 500_000.0, frequencies, scaling }
    }

    /// The published formula, one frequency at a time.
    fn plain_frequency(rope: &Rope, head_dim: usize, pair: usize) -> f64 {
        let frequency = rope.theta.powf(-2.0 * pair as f64 / head_dim as f64);
        let Some(RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context,
        }) = &rope.scaling
        else {
            return frequency;
        };
        let wavelength = 2.0 * PI / frequency;
        let turns = *original_context as f64 / wavelength;
        if turns > *high_freq_factor {
            frequency
        } else if turns < *low_freq_factor {
            frequency / factor
        } else {
            let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
            (1.0 - smooth) * frequency / factor + smooth * frequency
        }
    }

    fn check(frequencies_kind: RopeFrequencies, scaled: bool, tolerance: f64) {
        let rope = rope(frequencies_kind, scaled);
        let got = Vec::<f64>::try_from(frequencies(&rope, 128).unwrap().to_kind(Kind::Double));
        for (pair, got) in got.unwrap().into_iter().enumerate() {
            let expected = plain_frequency(&rope, 128, pair);
            assert!((got / expected - 1.0).abs() < tolerance, "pair {pair}: {got} {expected}");
        }
    }

    #[test]
    fn frequencies_follow_the_published_formula() {
        for scaled in [false, true] {
            check(RopeFrequencies::Exact, scaled, 1e-14);
            check(RopeFrequencies::Fp32, scaled, 1e-6);
        }
    }

    #[test]
    fn tables_are_cosines_of_position_times_frequency() {
        let rope = rope(RopeFrequencies::Exact, true);
        let tables = RopeTables::new(&rope, 64, 100, Kind::Double, Device::Cpu).unwrap();
        assert_eq!(tables.cos_SE.size(), [100, 64]);
        for (position, pair) in [(0, 0), (1, 0), (99, 0), (50, 7), (99, 31), (99, 63)] {
            let angle = position as f64 * plain_frequency(&rope, 64, pair % 32);
            let at = [position as i64, pair as i64];
            assert!((tables.cos_SE.double_value(&at) - angle.cos()).abs() < 1e-12);
            assert!((tables.sin_SE.double_value(&at) - angle.sin()).abs() < 1e-12);
        }
    }
}
