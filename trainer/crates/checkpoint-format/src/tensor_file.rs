//! A safetensors file: the header first (all sizes are known), then the tensors' bytes, checksummed
//! as they pass.

use crate::checksum::Checksum;
use crate::disk::{DurableFile, Points};
use crate::dtype::Dtype;
use crate::error::{FormatError, Result};
use std::path::Path;

/// An entry of the header.
#[derive(Clone, Debug)]
pub struct HeaderEntry {
    /// Name, unique in the file.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<u64>,
    /// Bytes.
    pub size: u64,
}

/// A file being written, entry by entry in the order of the header.
#[derive(Debug)]
pub struct TensorFile {
    file: DurableFile,
    /// Where the tensors' bytes begin.
    data_start: u64,
}

impl TensorFile {
    /// Makes the file and writes its header; `metadata` becomes `__metadata__`.
    ///
    /// # Errors
    /// [`FormatError::Write`], or [`FormatError::Request`] where the header cannot be made.
    pub fn create(
        path: &Path,
        entries: &[HeaderEntry],
        metadata: &[(&str, &str)],
        points: Points,
    ) -> Result<TensorFile> {
        let header = header(entries, metadata).map_err(|error| {
            FormatError::Request(format!("cannot make the header of {}: {error}", path.display()))
        })?;
        let data_start = 8 + header.len() as u64;
        let total = data_start + entries.iter().map(|entry| entry.size).sum::<u64>();
        let mut file = DurableFile::create(path, total, points)?;
        file.write(&[&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat())?;
        Ok(TensorFile { file, data_start })
    }

    /// Where the tensors' bytes begin in the file.
    pub fn data_start(&self) -> u64 {
        self.data_start
    }

    /// Appends bytes of the current entry; returns their checksum.
    ///
    /// # Errors
    /// [`FormatError::Write`].
    pub fn write(&mut self, bytes: &[u8]) -> Result<Checksum> {
        self.file.write(bytes)
    }

    /// Appends bytes of the entries to come, on several threads; returns the checksum of each.
    ///
    /// # Errors
    /// [`FormatError::Write`].
    pub fn write_all(&mut self, entries: &[&[u8]]) -> Result<Vec<Checksum>> {
        self.file.write_parts(entries)
    }

    /// Puts the file on disk; returns its size and checksum.
    ///
    /// # Errors
    /// [`FormatError::Write`].
    pub fn finish(&self) -> Result<(u64, Checksum)> {
        self.file.finish()
    }
}

/// The header as transformers' own writer spells it: entries in order, no spaces, padded to 8
/// bytes.
fn header(entries: &[HeaderEntry], metadata: &[(&str, &str)]) -> serde_json::Result<String> {
    let mut fields = Vec::with_capacity(entries.len() + 1);
    if !metadata.is_empty() {
        let mut pairs = Vec::new();
        for (key, value) in metadata {
            pairs.push(format!(
                "{}:{}",
                serde_json::to_string(key)?,
                serde_json::to_string(value)?
            ));
        }
        fields.push(format!("\"__metadata__\":{{{}}}", pairs.join(",")));
    }
    let mut start = 0;
    for entry in entries {
        let end = start + entry.size;
        fields.push(format!(
            "{}:{{\"dtype\":\"{}\",\"shape\":{},\"data_offsets\":[{start},{end}]}}",
            serde_json::to_string(&entry.name)?,
            entry.dtype.name(),
            serde_json::to_string(&entry.shape)?,
        ));
        start = end;
    }
    let mut header = format!("{{{}}}", fields.join(","));
    let padded = header.len().next_multiple_of(8);
    header.extend(std::iter::repeat_n(' ', padded - header.len()));
    Ok(header)
}
