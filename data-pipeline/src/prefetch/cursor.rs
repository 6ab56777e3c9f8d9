//! The position in the data that a checkpoint keeps: small, and the same on every rank.

use crate::error::{DataError, Result};
use crate::order::LeftOut;
use crate::order::left_out::describe;
use run_config::SampleRange;
use serde::{Deserialize, Serialize};

/// Version of the order: raised when the same cursor would name other samples.
pub const ORDER_VERSION: u32 = 1;

/// Position in the data, and what the order of the data depends on. Under 1 KB as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataCursor {
    /// Version of the order.
    pub version: u32,
    /// Tokens of the global stream that the steps so far have read.
    pub consumed_tokens: u64,
    /// Samples of the longest sequence length that they make, the last perhaps in part.
    pub consumed_samples: u64,
    /// Seed of the order.
    pub seed: u64,
    /// Hash of the content of all sources.
    pub manifest_hash: String,
    /// Hash of the names and weights of the sources.
    pub sources_hash: String,
    /// Number of sources.
    pub num_sources: usize,
    /// Tokens of a sample: the longest sequence length.
    pub sequence_length: u64,
    /// How documents become samples.
    pub packing: String,
    /// Whether the order is shuffled.
    pub shuffle: bool,
    /// Share of the documents held out.
    pub validation_fraction: f64,
    /// The bound of memory that fixes the size of the shuffle's windows, in MiB.
    pub buffer_mib: usize,
    /// Samples that are left out of the order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<SampleRange>,
}

impl DataCursor {
    /// Checks that a loader whose cursor at the same step is `other` goes on in the order in which
    /// this saved cursor was read.
    pub fn verify_resumes(&self, other: &DataCursor) -> Result<()> {
        let same_batches = "keep `training.global_batch` and the sequence lengths of the steps \
                            already done; change them with a stage of the ramp that begins later";
        let same_data = "restore the shards (same files, same contents), or start a new run with \
                         `model.init_from` to train on other data";
        same("the version of the data order", self.version, other.version, "use the same release")?;
        same("`seed`", self.seed, other.seed, "set it back")?;
        same("the number of `data.sources`", self.num_sources, other.num_sources, same_data)?;
        same("the hash of the shards", &self.manifest_hash, &other.manifest_hash, same_data)?;
        let restore = "set the names and weights back";
        same(
            "`data.sources` by name and weight",
            &self.sources_hash,
            &other.sources_hash,
            restore,
        )?;
        let back = "set it back";
        let (saved, current) = (self.sequence_length, other.sequence_length);
        same("the longest `data.sequence_length`", saved, current, back)?;
        same("`data.packing`", &self.packing, &other.packing, back)?;
        same("`data.shuffle`", self.shuffle, other.shuffle, back)?;
        let (saved, current) = (self.validation_fraction, other.validation_fraction);
        same("`data.validation_fraction`", saved, current, back)?;
        let windows = "set it back: it fixes the windows of the shuffle";
        same("`data.buffer_mib`", self.buffer_mib, other.buffer_mib, windows)?;
        // What is still to come may change, and what was read to its end may not.
        let num_read = self.consumed_tokens / self.sequence_length.max(1);
        let left_out =
            |cursor: &DataCursor| describe(LeftOut::new(&cursor.left_out).before(num_read));
        let to_come = "set `data.skip_samples` back: only samples that are still to come can be \
                       left out";
        same("the samples left out so far", left_out(self), left_out(other), to_come)?;
        let (saved, current) = (self.consumed_tokens, other.consumed_tokens);
        same("the number of tokens read", saved, current, same_batches)
    }
}

fn same<T: PartialEq + std::fmt::Display>(
    what: &'static str,
    saved: T,
    current: T,
    hint: &'static str,
) -> Result<()> {
    if saved == current {
        return Ok(());
    }
    let (saved, current) = (saved.to_string(), current.to_string());
    Err(DataError::CursorMismatch { what, saved, current, hint })
}
