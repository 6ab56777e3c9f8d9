//! Weighted mixing: which source a global sample comes from, and which of that source's samples.
//!
//! The samples are cut in blocks of a fixed number of slots. Each source has a fixed number of
//! slots in every block (largest remainder), so proportions are exact block by block; a Feistel
//! permutation keyed by the block spreads them.

use super::feistel::{Feistel, key_of};
use crate::error::{DataError, Result};

/// Slots of a block, unless a small weight needs more.
const MIN_BLOCK: u64 = 1024;
/// The most slots of a block: weights under about 1 in 65,536 are refused.
const MAX_BLOCK: u64 = 1 << 16;
/// Relative error of a source's share up to which a block is fine enough.
const SHARE_TOLERANCE: f64 = 0.01;

/// The fixed proportions of a mixture.
#[derive(Clone, Debug)]
pub struct Mixture {
    /// Slots of each source in a block.
    counts: Vec<u64>,
    /// Slots of a block.
    block_len: u64,
    seed: u64,
}

impl Mixture {
    /// The mixture of `weights` (any positive scale), its slots permuted by `seed`.
    pub fn new(weights: &[f64], seed: u64) -> Result<Self> {
        let total: f64 = weights.iter().sum();
        if weights.is_empty() || !total.is_finite() || weights.iter().any(|w| *w <= 0.0) {
            return Err(setting(format!("{weights:?} must be above 0 and finite")));
        }
        let shares: Vec<f64> = weights.iter().map(|weight| weight / total).collect();
        if shares.len() == 1 {
            return Ok(Mixture { counts: vec![1], block_len: 1, seed });
        }
        let mut block_len = MIN_BLOCK;
        loop {
            let counts = largest_remainder(&shares, block_len);
            let fine = counts.iter().zip(&shares).all(|(&count, share)| {
                (count as f64 / block_len as f64 / share - 1.0).abs() <= SHARE_TOLERANCE
            });
            if fine || block_len == MAX_BLOCK {
                return match counts.iter().position(|count| *count == 0) {
                    None => Ok(Mixture { counts, block_len, seed }),
                    Some(source) => Err(setting(format!(
                        "source {source} has {:.2e} of the weight, the least is {:.2e}; raise it \
                         or remove the source",
                        shares[source],
                        1.0 / MAX_BLOCK as f64
                    ))),
                };
            }
            block_len *= 2;
        }
    }

    /// Slots of each source in one block, and the slots of a block.
    pub fn counts(&self) -> (&[u64], u64) {
        (&self.counts, self.block_len)
    }

    /// A reader of positions that keeps the table of the block it was last in.
    pub fn cursor(&self) -> MixtureCursor {
        MixtureCursor { mixture: self.clone(), block: None, table: Vec::new() }
    }

    /// Source of every slot of `block` with its rank among that source's slots.
    fn table(&self, block: u64) -> Vec<(u32, u32)> {
        let feistel = Feistel::new(self.block_len, key_of(&[self.seed, 0x6d69_7874, block]));
        let mut ends = self.counts.clone();
        for source in 1..ends.len() {
            ends[source] += ends[source - 1];
        }
        let mut taken = vec![0; self.counts.len()];
        let place = |slot| {
            let image = feistel.map(slot);
            let source = ends.partition_point(|&end| end <= image);
            taken[source] += 1;
            (source as u32, taken[source] - 1)
        };
        (0..self.block_len).map(place).collect()
    }
}

/// Where a global sample is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceSample {
    /// Index of the source.
    pub source: usize,
    /// Index among all samples of this source, over all epochs.
    pub index: u64,
}

/// Looks global samples up. O(1) within a block, O(slots of a block) on entering one.
#[derive(Clone, Debug)]
pub struct MixtureCursor {
    mixture: Mixture,
    block: Option<u64>,
    table: Vec<(u32, u32)>,
}

impl MixtureCursor {
    /// Source and index of a global sample.
    pub fn locate(&mut self, sample: u64) -> SourceSample {
        if self.mixture.block_len == 1 {
            return SourceSample { source: 0, index: sample };
        }
        let block = sample / self.mixture.block_len;
        if self.block != Some(block) {
            self.table = self.mixture.table(block);
            self.block = Some(block);
        }
        let (source, rank) = self.table[(sample % self.mixture.block_len) as usize];
        let source = source as usize;
        SourceSample { source, index: block * self.mixture.counts[source] + u64::from(rank) }
    }
}

/// `total` split by `shares` (which add up to 1): whole parts first, then one each to the largest
/// remainders, the first source winning a tie.
fn largest_remainder(shares: &[f64], total: u64) -> Vec<u64> {
    let exact: Vec<f64> = shares.iter().map(|share| share * total as f64).collect();
    let mut counts: Vec<u64> = exact.iter().map(|value| value.floor() as u64).collect();
    let mut order: Vec<usize> = (0..shares.len()).collect();
    order.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()).then(a.cmp(&b)));
    let missing = total.saturating_sub(counts.iter().sum()) as usize;
    for &source in order.iter().cycle().take(missing) {
        counts[source] += 1;
    }
    counts
}

fn setting(detail: String) -> DataError {
    DataError::Setting { key: "data.sources[].weight".into(), detail }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proportions_are_exact_in_every_block() {
        let mixture = Mixture::new(&[0.5, 0.3, 0.2], 3).unwrap();
        let (counts, block_len) = mixture.counts();
        assert_eq!((counts, block_len), (&[512, 307, 205][..], 1024));
        let mut cursor = mixture.cursor();
        let mut next = [0; 3];
        for block in 0..5 {
            let mut seen = [0; 3];
            for slot in 0..block_len {
                let at = cursor.locate(block * block_len + slot);
                assert_eq!(at.index, next[at.source], "in order, none skipped, none twice");
                next[at.source] += 1;
                seen[at.source] += 1;
            }
            assert_eq!(seen, [512, 307, 205]);
        }
    }

    #[test]
    fn a_jump_equals_the_walk() {
        let mixture = Mixture::new(&[1.0, 7.0], 9).unwrap();
        let mut walker = mixture.cursor();
        let walked: Vec<_> = (0..5000).map(|sample| walker.locate(sample)).collect();
        for sample in [0, 17, 1023, 1024, 4999] {
            assert_eq!(mixture.cursor().locate(sample), walked[sample as usize]);
        }
    }

    #[test]
    fn small_weights_get_a_finer_block_or_a_clear_error() {
        let mixture = Mixture::new(&[1.0, 1e-3], 0).unwrap();
        let (counts, block_len) = mixture.counts();
        let share = counts[1] as f64 / block_len as f64;
        assert!((share / (1e-3 / 1.001) - 1.0).abs() < 0.01, "{share}");
        let error = Mixture::new(&[1.0, 1e-7], 0).unwrap_err().to_string();
        assert!(error.contains("data.sources[].weight: source 1"), "{error}");
    }
}
