//! Random choices that a printed seed brings back.

use std::time::{SystemTime, UNIX_EPOCH};

/// Names a seed, to repeat a test that failed.
pub const SEED: &str = "PHALANX_TEST_SEED";

/// SplitMix64.
pub struct Random(u64);

impl Random {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// From `$PHALANX_TEST_SEED`, else from the clock; prints the seed.
    pub fn from_env() -> Self {
        let given = std::env::var(SEED).ok().and_then(|seed| seed.parse().ok());
        let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
        let seed = given.unwrap_or_else(|| clock() as u64);
        eprintln!("{SEED}={seed}");
        Self(seed)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }

    /// A number from `first` to `last`, both included.
    pub fn from_to(&mut self, first: u64, last: u64) -> u64 {
        first + self.below(last - first + 1)
    }
}
