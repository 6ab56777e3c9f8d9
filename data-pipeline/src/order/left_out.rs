//! Samples that are left out of the order: those behind them move up, so that which sample is the
//! n-th is a function of n and of what is left out alone.

use run_config::SampleRange;

/// What is left out, and where the order jumps over it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Rising, and never next to one another.
    ranges: Vec<SampleRange>,
    /// Of each range: its place in the order, and the samples left out up to its end.
    jumps: Vec<(u64, u64)>,
}

impl LeftOut {
    /// Of ranges in any order, which may overlap; one that ends before it begins is none.
    pub fn new(ranges: &[SampleRange]) -> Self {
        let mut sorted: Vec<SampleRange> =
            ranges.iter().filter(|range| range.first <= range.last).copied().collect();
        sorted.sort_unstable();
        let mut out = Self::default();
        for range in sorted {
            match out.ranges.last_mut() {
                Some(before) if range.first <= before.last.saturating_add(1) => {
                    before.last = before.last.max(range.last);
                }
                _ => out.ranges.push(range),
            }
        }
        let mut sum = 0u64;
        for range in &out.ranges {
            let place = range.first - sum;
            sum = sum.saturating_add(range.last - range.first).saturating_add(1);
            out.jumps.push((place, sum));
        }
        out
    }

    /// The ranges: rising, and never next to one another.
    pub fn ranges(&self) -> &[SampleRange] {
        &self.ranges
    }

    /// The sample that is the `index`-th, from 0, of those that are not left out.
    /// O(log ranges).
    pub fn sample_at(&self, index: u64) -> u64 {
        let passed = self.jumps.partition_point(|(place, _)| *place <= index);
        index.saturating_add(passed.checked_sub(1).map_or(0, |last| self.jumps[last].1))
    }

    /// The ranges that the first `count` samples of the order depend on.
    pub fn before(&self, count: u64) -> &[SampleRange] {
        &self.ranges[..self.jumps.partition_point(|(place, _)| *place < count)]
    }
}

/// Ranges as people read them: `16-23, 40`, or `none`.
pub fn describe(ranges: &[SampleRange]) -> String {
    let range = |range: &SampleRange| match range.first == range.last {
        true => range.first.to_string(),
        false => format!("{}-{}", range.first, range.last),
    };
    match ranges {
        [] => "none".to_owned(),
        ranges => ranges.iter().map(range).collect::<Vec<_>>().join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ranges(pairs: &[(u64, u64)]) -> Vec<SampleRange> {
        pairs.iter().map(|&(first, last)| SampleRange { first, last }).collect()
    }

    fn check(pairs: &[(u64, u64)], expected: &[(u64, u64)], order: &[u64]) {
        let left_out = LeftOut::new(&ranges(pairs));
        assert_eq!(left_out.ranges(), ranges(expected));
        let found: Vec<u64> = (0..order.len() as u64).map(|at| left_out.sample_at(at)).collect();
        assert_eq!(found, order);
    }

    #[test]
    fn samples_behind_move_up() {
        check(&[], &[], &[0, 1, 2]);
        check(&[(2, 3)], &[(2, 3)], &[0, 1, 4, 5]);
        check(&[(0, 0)], &[(0, 0)], &[1, 2]);
        check(&[(4, 5), (1, 2)], &[(1, 2), (4, 5)], &[0, 3, 6, 7]);
        check(&[(1, 2), (3, 4)], &[(1, 4)], &[0, 5]);
        check(&[(1, 5), (2, 3)], &[(1, 5)], &[0, 6]);
        check(&[(3, 2)], &[], &[0, 1, 2, 3]);
    }

    #[test]
    fn what_is_read_depends_on_what_was_left_out_before() {
        let left_out = LeftOut::new(&ranges(&[(2, 3), (6, 6)]));
        assert!(left_out.before(2).is_empty());
        assert_eq!(left_out.before(3), ranges(&[(2, 3)]));
        assert_eq!(left_out.before(4), ranges(&[(2, 3)]), "samples 0, 1, 4 and 5");
        assert_eq!(left_out.before(5), ranges(&[(2, 3), (6, 6)]));
    }

    #[test]
    fn ranges_in_words() {
        assert_eq!(describe(&[]), "none");
        assert_eq!(describe(&ranges(&[(16, 23), (40, 40)])), "16-23, 40");
    }

    proptest! {
        /// The definition, by search; and more ranges behind what was read change nothing of it.
        #[test]
        fn the_order_is_that_of_the_samples_that_are_left(
            pairs in proptest::collection::vec((0u64..60, 0u64..8), 0..6),
            more in proptest::collection::vec((0u64..60, 0u64..8), 0..3),
            count in 0u64..40,
        ) {
            let of = |pairs: &[(u64, u64)]| ranges(
                &pairs.iter().map(|(first, length)| (*first, first + length)).collect::<Vec<_>>(),
            );
            let all = of(&pairs);
            let left_out = LeftOut::new(&all);
            let is_left = |sample: &u64| !all.iter().any(|r| (r.first..=r.last).contains(sample));
            let expected: Vec<u64> = (0..).filter(is_left).take(80).collect();
            let found: Vec<u64> = (0..80).map(|at| left_out.sample_at(at)).collect();
            prop_assert_eq!(&found, &expected);

            let other = LeftOut::new(&[all, of(&more)].concat());
            let is_same = left_out.before(count) == other.before(count);
            let reads_same = (0..count).all(|at| left_out.sample_at(at) == other.sample_at(at));
            prop_assert_eq!(is_same, reads_same);
        }
    }
}
