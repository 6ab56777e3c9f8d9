//! The index of boxes: where each part of each tensor lies. It knows tensors and files, and no
//! parallelism.

use crate::boxes::{self, MAX_DIMS, TensorBox};
use crate::checksum::Checksum;
use crate::disk::is_plain_name;
use crate::dtype::Dtype;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Version of `index.json`.
pub const INDEX_VERSION: u32 = 1;
/// Longest name of a tensor, in bytes.
pub const MAX_NAME: usize = 1024;

/// The index of a checkpoint (or of one rank's share of it).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Index {
    /// [`INDEX_VERSION`].
    pub version: u32,
    /// Tensors by name: weights under their Hugging Face names, `m/…`, `v/…`, `master/…`.
    pub tensors: BTreeMap<String, TensorEntry>,
}

/// A tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorEntry {
    /// Global shape.
    pub shape: Vec<u64>,
    /// Element type.
    pub dtype: Dtype,
    /// Where its parts are.
    pub boxes: Vec<StoredBox>,
}

/// A part of a tensor in a file: row-major, without gaps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredBox {
    /// Which part.
    #[serde(flatten)]
    pub region: TensorBox,
    /// The file.
    pub file: String,
    /// First byte in the file, and the one past the last.
    pub range: [u64; 2],
    /// Of those bytes.
    pub checksum: Checksum,
}

/// What the boxes add up to, recorded in the manifest and counted again by whoever checks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Coverage {
    /// Number of tensors.
    pub tensors: u64,
    /// Number of boxes.
    pub boxes: u64,
    /// Elements of all tensors, each of which is in exactly one box.
    pub elements_exactly_once: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
}

impl Default for Index {
    fn default() -> Index {
        Index { version: INDEX_VERSION, tensors: BTreeMap::new() }
    }
}

impl TensorEntry {
    /// Bytes of the whole tensor; `None` where that is over 2^63.
    pub fn num_bytes(&self) -> Option<u64> {
        boxes::num_elements(&self.shape)?.checked_mul(self.dtype.size() as u64)
    }
}

impl Index {
    /// Adds another rank's share.
    ///
    /// # Errors
    /// Says so where the two disagree on a tensor's shape or type.
    pub fn merge(&mut self, other: Index) -> Result<(), String> {
        for (name, entry) in other.tensors {
            let Some(known) = self.tensors.get_mut(&name) else {
                self.tensors.insert(name, entry);
                continue;
            };
            if known.shape != entry.shape || known.dtype != entry.dtype {
                return Err(format!(
                    "ranks disagree on {name}: {:?} {} and {:?} {}",
                    known.shape,
                    known.dtype.name(),
                    entry.shape,
                    entry.dtype.name()
                ));
            }
            known.boxes.extend(entry.boxes);
        }
        Ok(())
    }

    /// Checks everything that can be checked without reading tensors: names, shapes, that each box
    /// lies in its tensor and in its file (`files`: size by name), that no two boxes share bytes,
    /// and that each element of each tensor is in exactly one box.
    ///
    /// # Errors
    /// Names the first tensor that is wrong, and how.
    pub fn validate(&self, files: &BTreeMap<String, u64>) -> Result<Coverage, String> {
        if self.version != INDEX_VERSION {
            return Err(format!("index version {} is not {INDEX_VERSION}", self.version));
        }
        let mut coverage = Coverage::default();
        let mut ranges: BTreeMap<&str, Vec<[u64; 2]>> = BTreeMap::new();
        for (name, entry) in &self.tensors {
            let counted = entry.validate(name, files).map_err(|why| format!("{name:?}: {why}"))?;
            coverage.tensors += 1;
            coverage.boxes += entry.boxes.len() as u64;
            coverage.elements_exactly_once = coverage.elements_exactly_once.saturating_add(counted);
            let bytes = counted.saturating_mul(entry.dtype.size() as u64);
            coverage.bytes = coverage.bytes.saturating_add(bytes);
            for stored in &entry.boxes {
                ranges.entry(&stored.file).or_default().push(stored.range);
            }
        }
        for (file, ranges) in &mut ranges {
            ranges.sort_unstable();
            if let Some(pair) = ranges.windows(2).find(|pair| pair[1][0] < pair[0][1]) {
                return Err(format!("two boxes share byte {} of {file}", pair[1][0]));
            }
        }
        Ok(coverage)
    }

    /// The boxes of one file, in the order of their bytes, with the tensor of each.
    pub fn boxes_of<'a>(&'a self, file: &str) -> Vec<(&'a str, &'a TensorEntry, &'a StoredBox)> {
        let mut boxes: Vec<_> = self
            .tensors
            .iter()
            .flat_map(|(name, entry)| {
                entry.boxes.iter().map(move |stored| (name.as_str(), entry, stored))
            })
            .filter(|(_, _, stored)| stored.file == file)
            .collect();
        boxes.sort_by_key(|(_, _, stored)| stored.range);
        boxes
    }
}

impl TensorEntry {
    /// Checks one tensor; returns its number of elements.
    fn validate(&self, name: &str, files: &BTreeMap<String, u64>) -> Result<u64, String> {
        if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
            return Err(format!("a name has 1 to {MAX_NAME} printable characters"));
        }
        if self.shape.len() > MAX_DIMS {
            return Err(format!("{} dimensions, the limit is {MAX_DIMS}", self.shape.len()));
        }
        let elements = boxes::num_elements(&self.shape)
            .filter(|_| self.num_bytes().is_some())
            .ok_or_else(|| format!("shape {:?} is too large", self.shape))?;
        for stored in &self.boxes {
            if !is_plain_name(&stored.file) {
                return Err(format!("{:?} is not a file name", stored.file));
            }
            let size = files
                .get(&stored.file)
                .ok_or_else(|| format!("{} is not in the manifest", stored.file))?;
            let [start, end] = stored.range;
            if start > end || end > *size {
                return Err(format!(
                    "bytes {start}..{end} are not in {} of {size} bytes",
                    stored.file
                ));
            }
            let needed =
                stored.region.num_elements().and_then(|n| n.checked_mul(self.dtype.size() as u64));
            if needed != Some(end - start) {
                return Err(format!(
                    "a box of {:?} {} in {} has {} bytes",
                    stored.region.lengths,
                    self.dtype.name(),
                    stored.file,
                    end - start
                ));
            }
        }
        let regions: Vec<&TensorBox> = self.boxes.iter().map(|stored| &stored.region).collect();
        boxes::check_exact_cover(&self.shape, &regions)?;
        Ok(elements)
    }
}
