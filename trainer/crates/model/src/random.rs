//! Counter-based random numbers: value `i` of a stream is a pure function of (seed, name, i).
//!
//! No state is carried along, so any piece of a stream can be made anywhere, in any order.

use std::f64::consts::TAU;

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

    /// Standard normals `2 * pair` and `2 * pair + 1` (Box and Muller 1958).
    pub fn normal_pair(self, pair: u64) -> (f64, f64) {
        // In (0, 1], so that the logarithm is finite.
        let radius_from = (self.bits(2 * pair) + 1) as f64 * 2.0_f64.powi(-53);
        let radius = (-2.0 * radius_from.ln()).sqrt();
        let (sin, cos) = (TAU * self.uniform(2 * pair + 1)).sin_cos();
        (radius * cos, radius * sin)
    }
}

/// The finalizer of SplitMix64: every bit of the input reaches every bit of the output.
fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}
