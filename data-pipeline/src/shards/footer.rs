//! The footer of a shard: what was written with the tokens, and a view of its row groups.

use crate::error::{DataError, Result};
use bytes::Bytes;
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::metadata::{KeyValue, ParquetMetaData, ParquetMetaDataReader};
use parquet::file::reader::{ChunkReader, Length};
use serde::{Deserialize, Serialize};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

/// Key of [`ShardInfo`] among the footer's key-value pairs.
const INFO_KEY: &str = "phalanx.shard";
/// Key of the checksums of the ids, per row group, among the footer's key-value pairs.
const CHECKSUMS_KEY: &str = "phalanx.xxh3";
/// Version of the layout that this crate writes.
pub const LAYOUT_VERSION: u32 = 1;
/// Bytes read from the end of a file at first: a footer is rarely longer.
const TAIL_BYTES: u64 = 64 << 10;

/// What a shard's footer says about its tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardInfo {
    /// Version of the layout.
    pub layout: u32,
    /// Program and version that wrote it.
    pub writer: String,
    /// SHA-256 of the tokenizer's file, in hex.
    pub tokenizer_sha256: String,
    /// Number of ids of the tokenizer.
    pub vocab_size: usize,
    /// Id that begins a document.
    pub bos_id: Option<u32>,
    /// Id that ends a document.
    pub eos_id: Option<u32>,
    /// How documents lie in rows; always `document`: one a row.
    pub packing: String,
}

impl ShardInfo {
    /// The pair to store in the footer.
    pub fn to_key_value(&self) -> KeyValue {
        KeyValue::new(INFO_KEY.to_string(), serde_json::to_string(self).ok())
    }
}

/// The pair that holds the checksums of all row groups' ids, in hex.
pub fn checksums_to_key_value(checksums: &[u64]) -> KeyValue {
    let words: Vec<String> = checksums.iter().map(|sum| format!("{sum:016x}")).collect();
    KeyValue::new(CHECKSUMS_KEY.to_string(), words.join(" "))
}

/// A parsed footer.
#[derive(Clone, Debug)]
pub struct Footer {
    /// Parquet's own metadata.
    pub metadata: Arc<ParquetMetaData>,
    /// What the writer noted; `None` for shards of other programs.
    pub info: Option<ShardInfo>,
    /// XXH3 of the ids of each row group; empty for shards of other programs.
    pub checksums: Vec<u64>,
    /// Size of the file in bytes.
    pub file_bytes: u64,
    /// XXH3 of the footer's bytes: changes with the content's sizes and statistics.
    pub hash: u64,
}

impl Footer {
    /// Reads the footer of a local file.
    pub fn read(path: &Path) -> Result<Self> {
        let mut file =
            std::fs::File::open(path).map_err(|error| DataError::io("open", path, error))?;
        let file_bytes = file.metadata().map_err(|error| DataError::io("read", path, error))?.len();
        let mut tail = |len: u64| -> Result<Bytes> {
            let mut bytes = vec![0; len as usize];
            file.seek(SeekFrom::Start(file_bytes - len))
                .and_then(|_| file.read_exact(&mut bytes))
                .map_err(|error| DataError::io("read", path, error))?;
            Ok(Bytes::from(bytes))
        };
        let bytes = tail(TAIL_BYTES.min(file_bytes))?;
        let needed = footer_bytes(path, &bytes, file_bytes)?;
        let bytes = if needed > bytes.len() as u64 { tail(needed)? } else { bytes };
        let footer = bytes.slice(bytes.len() - needed as usize..);
        Footer::parse(path, footer, file_bytes)
    }

    /// Parses the bytes of a footer: metadata, its length and the magic number.
    fn parse(path: &Path, footer: Bytes, file_bytes: u64) -> Result<Self> {
        let hash = xxhash_rust::xxh3::xxh3_64(&footer);
        let metadata = ParquetMetaDataReader::decode_metadata(&footer[..footer.len() - 8])
            .map_err(|error| damaged(path, file_bytes, error.to_string()))?;
        let pairs = metadata.file_metadata().key_value_metadata();
        let value = |key: &str| {
            pairs?.iter().find(|pair| pair.key == key).and_then(|pair| pair.value.as_deref())
        };
        let info = value(INFO_KEY)
            .map(serde_json::from_str)
            .transpose()
            .map_err(|error| damaged(path, file_bytes, format!("footer: {error}")))?;
        let words = value(CHECKSUMS_KEY).unwrap_or_default().split_whitespace();
        let checksums = words
            .map(|word| u64::from_str_radix(word, 16))
            .collect::<std::result::Result<_, _>>()
            .map_err(|error| damaged(path, file_bytes, format!("footer, checksums: {error}")))?;
        Ok(Footer { metadata: Arc::new(metadata), info, checksums, file_bytes, hash })
    }
}

/// Bytes of the footer with its trailer, from the trailer at the end of `tail`.
fn footer_bytes(path: &Path, tail: &[u8], file_bytes: u64) -> Result<u64> {
    let Some(trailer) = tail.last_chunk::<8>() else {
        return Err(damaged(path, file_bytes, "shorter than a parquet footer".into()));
    };
    let [a, b, c, d, magic @ ..] = *trailer;
    if &magic != b"PAR1" {
        let detail = "it does not end with the mark `PAR1`, so its end is missing";
        return Err(damaged(path, file_bytes, detail.into()));
    }
    let needed = u64::from(u32::from_le_bytes([a, b, c, d])) + 8;
    if needed + 4 > file_bytes {
        let detail = format!("its footer claims {needed} bytes");
        return Err(damaged(path, file_bytes, detail));
    }
    Ok(needed)
}

/// A [`DataError::Damaged`].
pub(crate) fn damaged(path: &Path, bytes: u64, detail: String) -> DataError {
    DataError::Damaged { path: path.to_path_buf(), bytes, detail }
}

/// A range of a file in memory that answers reads by the file's own offsets.
#[derive(Clone, Debug)]
pub struct FileRange {
    /// Offset of the first byte in the file.
    pub offset: u64,
    /// The bytes.
    pub bytes: Bytes,
    /// Size of the whole file.
    pub file_bytes: u64,
}

impl Length for FileRange {
    fn len(&self) -> u64 {
        self.file_bytes
    }
}

impl ChunkReader for FileRange {
    type T = std::io::Cursor<Bytes>;

    fn get_read(&self, start: u64) -> ParquetResult<Self::T> {
        let end = self.offset + self.bytes.len() as u64;
        let len = end.saturating_sub(start) as usize;
        Ok(std::io::Cursor::new(self.get_bytes(start, len)?))
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        let from = start.checked_sub(self.offset).map(|from| from as usize);
        match from {
            Some(from) if from + length <= self.bytes.len() => {
                Ok(self.bytes.slice(from..from + length))
            }
            _ => Err(ParquetError::EOF(format!("bytes {start} + {length} were not read"))),
        }
    }
}
