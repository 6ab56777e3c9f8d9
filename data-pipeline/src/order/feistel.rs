//! A pseudo-random permutation of `0..n` that is evaluated at one point without a table.
//!
//! A balanced Feistel network over the smallest even number of bits that covers `n`, walked along
//! its cycle until the image is below `n` (Black and Rogaway 2002): at most four rounds of walking
//! are expected, because the domain is under `4 n`.

/// Rounds of the network; more than the four that give a strong permutation, for small domains.
const NUM_ROUNDS: u64 = 6;

/// Mixes 64 bits (the finalizer of splitmix64, Steele et al. 2014).
pub(crate) fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// One key out of several parts; the order of the parts matters.
pub(crate) fn key_of(parts: &[u64]) -> u64 {
    parts.iter().fold(0, |key, &part| mix(key ^ mix(part)))
}

/// A keyed permutation of `0..len`.
#[derive(Clone, Debug)]
pub struct Feistel {
    len: u64,
    half_bits: u32,
    key: u64,
}

impl Feistel {
    /// The permutation of `0..len` that belongs to `key`.
    pub fn new(len: u64, key: u64) -> Self {
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        Feistel { len, half_bits: bits.div_ceil(2), key }
    }

    /// Image of `index`, which must be below the length; anything else maps to itself.
    pub fn map(&self, index: u64) -> u64 {
        if index >= self.len || self.len < 2 {
            return index;
        }
        let mut image = self.round_trip(index);
        while image >= self.len {
            image = self.round_trip(image);
        }
        image
    }

    fn round_trip(&self, value: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for round in 0..NUM_ROUNDS {
            let next = left ^ (mix(right ^ mix(self.key.wrapping_add(round))) & mask);
            (left, right) = (right, next);
        }
        (left << self.half_bits) | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_is_a_permutation() {
        for len in (0..70).chain([255, 256, 257, 1000, 4096, 5001]) {
            let feistel = Feistel::new(len, 7);
            let mut seen = vec![false; len as usize];
            for index in 0..len {
                let image = feistel.map(index) as usize;
                assert!(!seen[image], "length {len}: {image} twice");
                seen[image] = true;
            }
        }
    }

    #[test]
    fn keys_and_neighbours_do_not_stay_together() {
        let (a, b) = (Feistel::new(1 << 16, 1), Feistel::new(1 << 16, 2));
        let equal = (0..1 << 16).filter(|&i| a.map(i) == b.map(i)).count();
        assert!(equal < 16, "{equal} fixed between two keys, about 1 expected");
        let adjacent = (1..1u64 << 16).filter(|&i| a.map(i).abs_diff(a.map(i - 1)) == 1).count();
        assert!(adjacent < 16, "{adjacent} neighbours kept, about 2 expected");
    }

    #[test]
    fn small_domains_reach_every_permutation() {
        let mut seen = std::collections::HashSet::new();
        for key in 0..2000 {
            let feistel = Feistel::new(4, key_of(&[key]));
            seen.insert((0..4).map(|i| feistel.map(i)).collect::<Vec<_>>());
        }
        assert!(seen.len() >= 12, "{} of 24 permutations", seen.len());
    }
}
