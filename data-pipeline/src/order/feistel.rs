//! A pseudo-random permutation of `0..n` that is evaluated at one point without a table.
//!
//! A Feistel network over the smallest number of bits that covers `n`, walked along its cycle until
//! the image is below `n` (Black and Rogaway 2002): at most two passes are expected, because the
//! domain is under `2 n`. Where the bits are odd, the halves differ by one.

/// Rounds of the network, an even number; more than the four that a strong permutation takes, for
/// small domains.
const NUM_ROUNDS: usize = 6;

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
    left_bits: u32,
    right_bits: u32,
    keys: [u64; NUM_ROUNDS],
}

impl Feistel {
    /// The permutation of `0..len` that belongs to `key`.
    pub fn new(len: u64, key: u64) -> Self {
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        let keys = std::array::from_fn(|round| mix(key.wrapping_add(round as u64)));
        Feistel { len, left_bits: bits / 2, right_bits: bits.div_ceil(2), keys }
    }

    /// Image of `index`, which must be below the length; anything else maps to itself.
    pub fn map(&self, index: u64) -> u64 {
        if index >= self.len || self.len < 2 {
            return index;
        }
        let mut image = self.permute(index);
        while image >= self.len {
            image = self.permute(image);
        }
        image
    }

    /// One pass over all bits. The halves swap their widths in every round, and have them back
    /// after an even number.
    fn permute(&self, value: u64) -> u64 {
        let (mut left_mask, mut right_mask) =
            ((1 << self.left_bits) - 1, (1 << self.right_bits) - 1);
        let (mut left, mut right) = (value >> self.right_bits, value & right_mask);
        for key in self.keys {
            let next = left ^ (mix(right ^ key) & left_mask);
            (left, right) = (right, next);
            (left_mask, right_mask) = (right_mask, left_mask);
        }
        (left << self.right_bits) | right
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
