//! Which documents are held out for validation: a pure function of the shard's name and the row.
//!
//! The seed of the run has no part in it, so validation losses of runs with other seeds compare,
//! and documents that are added to a source move no other document between the splits.

use crate::order::feistel::mix;
use std::path::Path;

/// Training or validation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Split {
    /// What the model is trained on.
    Train,
    /// Held-out documents.
    Validation,
}

impl Split {
    /// Word for messages.
    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "training",
            Split::Validation => "validation",
        }
    }
}

/// Decides for the rows of one shard.
#[derive(Clone, Copy, Debug)]
pub struct HoldOut {
    key: u64,
    threshold: u64,
}

impl HoldOut {
    /// Holds out about `fraction` (0 to 1) of the rows of the shard of this file name.
    pub fn new(path: &Path, fraction: f64) -> Self {
        let name = path.file_name().unwrap_or_default();
        let key = xxhash_rust::xxh3::xxh3_64(name.as_encoded_bytes());
        HoldOut { key, threshold: (fraction.clamp(0.0, 1.0) * (1u64 << 53) as f64) as u64 }
    }

    /// Split of a row, counted from the start of the shard.
    pub fn split_of(&self, row: u64) -> Split {
        if mix(self.key ^ mix(row)) >> 11 < self.threshold {
            Split::Validation
        } else {
            Split::Train
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_out_the_fraction_and_depends_on_the_name_alone() {
        for fraction in [0.0, 0.01, 0.5] {
            let hold_out = HoldOut::new(Path::new("/a/x.parquet"), fraction);
            let moved = HoldOut::new(Path::new("/b/c/x.parquet"), fraction);
            let held = (0..100_000).filter(|&row| {
                assert_eq!(hold_out.split_of(row), moved.split_of(row));
                hold_out.split_of(row) == Split::Validation
            });
            let share = held.count() as f64 / 1e5;
            assert!((share - fraction).abs() < 0.005, "{share} of {fraction}");
        }
    }
}
