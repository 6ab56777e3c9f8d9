//! Counter-based random numbers: value `i` of a stream is a pure function of (seed, name, i).
//!
//! No state is carried along, so any piece of a stream can be made anywhere, in any order.
//! Logarithm, sine and cosine are sums of plain products here, so that every machine makes the same
//! bits whatever its libm and instructions, and several values are made at once.

use std::f64::consts::{FRAC_1_SQRT_2, LN_2, TAU};

/// Weyl constant of SplitMix64, 2^64 over the golden ratio.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// One named stream of one seed.
#[derive(Clone, Copy, Debug)]
pub struct RandomStream {
    key: u64,
}

impl RandomStream {
    /// The stream `name` of `seed`; FNV-1a over the name, mixed with the seed.
    pub fn new(seed: u64, name: &str) -> Self {
        let hash = name.bytes().fold(0xCBF2_9CE4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
        });
        Self { key: mix(hash ^ mix(seed.wrapping_add(GOLDEN))) }
    }

    /// 53 random bits, uniform.
    fn bits(self, index: u64) -> u64 {
        mix(self.key.wrapping_add(index.wrapping_mul(GOLDEN))) >> 11
    }

    /// Value `index`, uniform in [0, 1).
    pub fn uniform(self, index: u64) -> f64 {
        self.bits(index) as f64 * 2.0_f64.powi(-53)
    }

    /// Fills `out`, of an even length, with the pairs of normals from `first_pair` on, times `std`:
    /// those of [`RandomStream::normal_pair`], bit by bit, several at a time.
    pub fn fill_normal_pairs(self, first_pair: u64, std: f64, out: &mut [f32]) {
        torch_shim::random::fill_normal_pairs(self.key, first_pair, std, out);
    }

    /// Standard normals `2 * pair` and `2 * pair + 1` (Box and Muller 1958).
    pub fn normal_pair(self, pair: u64) -> (f64, f64) {
        // In (0, 1], so that the logarithm is finite.
        let radius_from = (self.bits(2 * pair) + 1) as f64 * 2.0_f64.powi(-53);
        let radius = (-2.0 * ln(radius_from)).sqrt();
        let (sin, cos) = sin_cos_of_turn(self.uniform(2 * pair + 1));
        (radius * cos, radius * sin)
    }
}

/// The natural logarithm of a normal number, to 1e-14: of its mantissa m between sqrt(1/2) and
/// sqrt(2), log m = 2 artanh s with s = (m - 1) / (m + 1), and the series of artanh.
#[inline(always)]
fn ln(x: f64) -> f64 {
    const EXPONENT_OF_ONE: i64 = 1023;
    let bits = x.to_bits();
    let half = f64::from_bits((bits & ((1 << 52) - 1)) | (1022 << 52)); // in [1/2, 1)
    let is_low = half < FRAC_1_SQRT_2;
    let mantissa = if is_low { 2.0 * half } else { half };
    let exponent = (bits >> 52) as i64 - EXPONENT_OF_ONE + i64::from(!is_low);
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let z = s * s;
    let mut sum = 2.0 / 19.0;
    for n in [17.0, 15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0] {
        sum = sum * z + 2.0 / n;
    }
    exponent as f64 * LN_2 + s * sum
}

/// Sine and cosine of so much of a full turn, in [0, 1), to 1e-14: the Taylor series of the angle
/// to the nearest quarter turn, which is at most an eighth.
#[inline(always)]
fn sin_cos_of_turn(turn: f64) -> (f64, f64) {
    let quarter = (turn * 4.0 + 0.5) as i64;
    let angle = TAU * (turn - quarter as f64 * 0.25);
    let z = angle * angle;
    let (mut sin, mut cos) = (1.0, 1.0);
    for n in [14.0, 12.0, 10.0, 8.0, 6.0, 4.0, 2.0] {
        sin = 1.0 - sin * z * (1.0 / (n * (n + 1.0)));
        cos = 1.0 - cos * z * (1.0 / (n * (n - 1.0)));
    }
    sin *= angle;
    // A quarter turn exchanges the two, and half a turn their signs.
    let (a, b) = if quarter & 1 == 0 { (sin, cos) } else { (cos, sin) };
    let sign_of = |is_negative: bool| if is_negative { -1.0 } else { 1.0 };
    (a * sign_of(quarter & 2 != 0), b * sign_of((quarter + 1) & 2 != 0))
}

/// The finalizer of SplitMix64: every bit of the input reaches every bit of the output.
fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_at_once_are_the_same_bits() {
        let stream = RandomStream::new(3, "many");
        for (first, pairs) in [(0, 1), (5, 7), (1_000_003, 4099)] {
            let mut out = vec![0.0_f32; 2 * pairs];
            stream.fill_normal_pairs(first, 0.02, &mut out);
            for (index, pair) in out.chunks_exact(2).enumerate() {
                let (even, odd) = stream.normal_pair(first + index as u64);
                let expected = [(0.02 * even) as f32, (0.02 * odd) as f32];
                assert_eq!(pair, expected, "pair {index} from {first}");
            }
        }
    }

    #[test]
    fn the_series_are_the_functions() {
        let stream = RandomStream::new(1, "series");
        let tiny = 2.0_f64.powi(-53);
        let edges = [0.0, 0.125, 0.25, 0.374, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0 - tiny];
        let turns = (0..100_000).map(|index| stream.uniform(index)).chain(edges);
        for turn in turns {
            let (sin, cos) = sin_cos_of_turn(turn);
            let (expected_sin, expected_cos) = (TAU * turn).sin_cos();
            assert!((sin - expected_sin).abs() < 2e-15 && (cos - expected_cos).abs() < 2e-15);
            let x = turn.max(tiny);
            assert!((ln(x) - x.ln()).abs() <= 1e-14 * x.ln().abs().max(1e-2), "ln {x}");
        }
        assert_eq!(ln(1.0), 0.0);
    }
}
