//! The order of one source in one epoch: row groups permuted, cut in windows, samples counted.
//!
//! Set-up is O(row groups); finding a sample is O(log windows). Every epoch has the same number of
//! samples, so the epoch of a sample is a division.

use super::feistel::{Feistel, key_of};

/// What the order needs to know of a row group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupSize {
    /// All tokens of the row group: what it costs to hold it in memory.
    pub tokens: u64,
    /// Its share of the split in units of [`SampleUnit`]: tokens, or packed bins.
    pub units: u64,
}

/// What samples are counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SampleUnit {
    /// A sample is so many consecutive tokens of the stream, and one more for the last target.
    Tokens(u64),
    /// A sample is one packed bin.
    Bins,
}

/// What fixes the order of a source, besides its row groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OrderParams {
    /// What samples are counted in.
    pub unit: SampleUnit,
    /// Key of all permutations of this source; `None`: the order of the files.
    pub key: Option<u64>,
    /// Tokens of a window: documents and samples are shuffled within one.
    pub window_tokens: u64,
}

impl OrderParams {
    /// Samples of one epoch. What is left over, less than a sample and its last target, is
    /// another part of the data in each epoch when shuffled.
    pub fn samples_per_epoch(&self, total_units: u64) -> u64 {
        match self.unit {
            SampleUnit::Tokens(len) => total_units.saturating_sub(1) / len,
            SampleUnit::Bins => total_units,
        }
    }

    fn derived(&self, parts: &[u64]) -> Option<u64> {
        self.key.map(|key| key_of(&[key, key_of(parts)]))
    }
}

/// A run of row groups that is held in memory together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowSpan {
    /// First place in [`EpochOrder::groups`].
    pub first_group: usize,
    /// One past the last.
    pub end_group: usize,
    /// Units of the epoch before this window.
    pub first_unit: u64,
    /// Units up to the end of this window.
    pub end_unit: u64,
    /// Samples of the epoch before this window. A sample belongs to the window it starts in.
    pub first_sample: u64,
    /// Samples that start in this window.
    pub num_samples: u64,
}

/// Where a sample is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index of the window.
    pub window: usize,
    /// First unit of the sample, from the start of the epoch.
    pub unit: u64,
}

/// The order of one source in one epoch.
#[derive(Clone, Debug)]
pub struct EpochOrder {
    params: OrderParams,
    epoch: u64,
    /// Row groups in the order in which they are read.
    pub groups: Vec<u32>,
    /// Windows over `groups`; those in which no sample starts are among them.
    pub windows: Vec<WindowSpan>,
}

impl EpochOrder {
    /// The order of `sizes` in `epoch`.
    pub fn new(sizes: &[GroupSize], params: OrderParams, epoch: u64) -> Self {
        let permutation = Feistel::new(
            sizes.len() as u64,
            params.derived(&[epoch, 0x6772_6f75]).unwrap_or_default(),
        );
        let groups: Vec<u32> = match params.key {
            Some(_) => (0..sizes.len() as u64).map(|at| permutation.map(at) as u32).collect(),
            None => (0..sizes.len() as u32).collect(),
        };
        let windows = windows(sizes, &groups, &params);
        EpochOrder { params, epoch, groups, windows }
    }

    /// Finds a sample of the epoch. The samples of a window are permuted but for the last, which
    /// may reach into the next window and so comes when that one is at hand.
    pub fn locate(&self, sample: u64) -> Option<Place> {
        let after = self.windows.partition_point(|window| window.first_sample <= sample);
        let window = after.checked_sub(1)?;
        let span = &self.windows[window];
        let place = sample - span.first_sample;
        if place >= span.num_samples {
            return None;
        }
        let (permuted, unit_len) = match self.params.unit {
            SampleUnit::Tokens(len) => (span.num_samples - 1, len),
            SampleUnit::Bins => (span.num_samples, 1),
        };
        let key = self.params.derived(&[self.epoch, window as u64, 0x7361_6d70]);
        let place = key.map_or(place, |key| Feistel::new(permuted, key).map(place));
        Some(Place { window, unit: (span.first_sample + place) * unit_len })
    }

    /// Key of the order of documents in a window; `None`: the order of the file.
    pub fn document_key(&self, window: usize) -> Option<u64> {
        self.params.derived(&[self.epoch, window as u64, 0x646f_6375])
    }
}

/// Cuts `groups` in windows of about the same number of tokens, none under the wanted size but
/// where the source has less.
fn windows(sizes: &[GroupSize], groups: &[u32], params: &OrderParams) -> Vec<WindowSpan> {
    let total: u64 = sizes.iter().map(|size| size.tokens).sum();
    let total_units: u64 = sizes.iter().map(|size| size.units).sum();
    let num_samples = params.samples_per_epoch(total_units);
    let num_windows = (total / params.window_tokens.max(1)).max(1);
    let target = total.div_ceil(num_windows).max(1);
    let starts_before = |unit: u64| match params.unit {
        SampleUnit::Tokens(len) => unit.div_ceil(len).min(num_samples),
        SampleUnit::Bins => unit,
    };
    let mut windows: Vec<WindowSpan> = Vec::with_capacity(num_windows as usize);
    let (mut first_group, mut first_unit, mut unit, mut tokens) = (0, 0, 0, 0);
    for (at, &group) in groups.iter().enumerate() {
        let size = sizes[group as usize];
        unit += size.units;
        tokens += size.tokens;
        let last = at + 1 == groups.len();
        if last || tokens >= target * (windows.len() as u64 + 1) {
            let first_sample = starts_before(first_unit);
            windows.push(WindowSpan {
                first_group,
                end_group: at + 1,
                first_unit,
                end_unit: unit,
                first_sample,
                num_samples: starts_before(unit) - first_sample,
            });
            (first_group, first_unit) = (at + 1, unit);
        }
    }
    windows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(count: u64) -> Vec<GroupSize> {
        (0..count).map(|i| GroupSize { tokens: 900 + mixed(i), units: 880 + mixed(i) }).collect()
    }

    fn mixed(i: u64) -> u64 {
        super::super::feistel::mix(i) % 200
    }

    fn check_epoch(params: OrderParams, groups: u64, epoch: u64) {
        let sizes = sizes(groups);
        let total = sizes.iter().map(|size| size.units).sum();
        let order = EpochOrder::new(&sizes, params, epoch);
        let samples = params.samples_per_epoch(total);
        let mut seen = vec![false; samples as usize];
        for sample in 0..samples {
            let place = order.locate(sample).expect("every sample has a place");
            let len = match params.unit {
                SampleUnit::Tokens(len) => len,
                SampleUnit::Bins => 1,
            };
            assert_eq!(place.unit % len, 0);
            let span = order.windows[place.window];
            assert!((span.first_unit..span.end_unit).contains(&place.unit));
            let slot = (place.unit / len) as usize;
            assert!(!seen[slot], "sample {slot} twice");
            seen[slot] = true;
        }
        assert_eq!(order.locate(samples), None);
    }

    #[test]
    fn an_epoch_holds_every_sample_once() {
        for unit in [SampleUnit::Tokens(64), SampleUnit::Tokens(1000), SampleUnit::Bins] {
            for key in [None, Some(5)] {
                for (groups, window_tokens) in [(1, 1), (40, 1), (40, 5000), (40, 1 << 40)] {
                    check_epoch(OrderParams { unit, key, window_tokens }, groups, 3);
                }
            }
        }
    }

    #[test]
    fn epochs_differ_and_hold_as_many_samples() {
        let params =
            OrderParams { unit: SampleUnit::Tokens(64), key: Some(1), window_tokens: 5000 };
        let (a, b) =
            (EpochOrder::new(&sizes(40), params, 0), EpochOrder::new(&sizes(40), params, 1));
        assert_ne!(a.groups, b.groups);
        let count = |o: &EpochOrder| o.windows.iter().map(|w| w.num_samples).sum::<u64>();
        assert_eq!(count(&a), count(&b));
    }
}
