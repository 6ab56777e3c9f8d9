//! Writes one shard: BYTE_STREAM_SPLIT and zstd(1), pages of 1 MiB, an offset index, facts in the
//! footer. Split streams, because two of the four bytes of an id are nearly always zero and the
//! other two then need few matches: smaller and faster to read than PLAIN (`ops/benches`).
//!
//! A shard appears under its name only when it is whole: it is written beside it, synced, renamed,
//! and the folder is synced.

use super::fast::checksum;
use super::footer::{ShardInfo, checksums_to_key_value};
use super::{IDS_COLUMN, LENGTHS_COLUMN};
use crate::error::{DataError, Result};
use arrow_array::{ArrayRef, Int32Array, ListArray, RecordBatch};
use arrow_buffer::{OffsetBuffer, ScalarBuffer};
use arrow_schema::{DataType, Field, Schema};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Uncompressed bytes of a page.
const PAGE_BYTES: usize = 1 << 20;
/// Zstandard level. On ids in byte streams level 3 finds short matches that save no bytes and cost
/// time to read.
const ZSTD_LEVEL: i32 = 1;

/// What a finished shard holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ShardTotals {
    /// Documents.
    pub documents: u64,
    /// Tokens.
    pub tokens: u64,
    /// Size of the file.
    pub bytes: u64,
}

/// Writes documents to one parquet shard.
pub struct ShardWriter {
    path: PathBuf,
    partial: PathBuf,
    writer: ArrowWriter<File>,
    schema: Arc<Schema>,
    ids: Vec<i32>,
    lengths: Vec<i32>,
    checksums: Vec<u64>,
    group_tokens: usize,
    totals: ShardTotals,
}

impl ShardWriter {
    /// Begins the shard `path`, with row groups of about `group_tokens` tokens.
    pub fn create(path: &Path, info: &ShardInfo, group_tokens: usize) -> Result<Self> {
        let schema = Arc::new(schema());
        let partial = partial_path(path);
        let file =
            File::create(&partial).map_err(|error| DataError::io("create", &partial, error))?;
        let level = ZstdLevel::try_new(ZSTD_LEVEL).unwrap_or_default();
        let properties = WriterProperties::builder()
            .set_dictionary_enabled(false)
            .set_encoding(Encoding::BYTE_STREAM_SPLIT)
            .set_compression(Compression::ZSTD(level))
            .set_data_page_size_limit(PAGE_BYTES)
            .set_data_page_row_count_limit(usize::MAX)
            .set_max_row_group_row_count(None)
            .set_statistics_enabled(EnabledStatistics::Chunk)
            .set_created_by(info.writer.clone())
            .set_key_value_metadata(Some(vec![info.to_key_value()]))
            .build();
        let writer = ArrowWriter::try_new(file, schema.clone(), Some(properties))
            .map_err(|error| write_error(&partial, error))?;
        Ok(ShardWriter {
            path: path.to_path_buf(),
            partial,
            writer,
            schema,
            ids: Vec::new(),
            lengths: Vec::new(),
            checksums: Vec::new(),
            group_tokens: group_tokens.max(1),
            totals: ShardTotals::default(),
        })
    }

    /// Appends one document. A document without tokens is left out.
    pub fn push(&mut self, ids: impl ExactSizeIterator<Item = u32>) -> Result<()> {
        if ids.len() == 0 {
            return Ok(());
        }
        self.totals.documents += 1;
        self.totals.tokens += ids.len() as u64;
        self.lengths.push(ids.len() as i32);
        self.ids.extend(ids.map(|id| id as i32));
        if self.ids.len() >= self.group_tokens { self.flush_group() } else { Ok(()) }
    }

    /// What was pushed so far; `bytes` is what reached the file.
    pub fn totals(&self) -> ShardTotals {
        ShardTotals { bytes: self.writer.bytes_written() as u64, ..self.totals }
    }

    /// Ends the shard and gives it its name.
    pub fn finish(mut self) -> Result<ShardTotals> {
        self.flush_group()?;
        let path = &self.path;
        self.writer.append_key_value_metadata(checksums_to_key_value(&self.checksums));
        self.writer.finish().map_err(|error| write_error(path, error))?;
        let file = self.writer.inner();
        let synced = file.sync_all().and_then(|()| file.metadata());
        let bytes = synced.map_err(|error| DataError::io("write", path, error))?.len();
        publish(&self.partial, path)?;
        Ok(ShardTotals { bytes, ..self.totals })
    }

    fn flush_group(&mut self) -> Result<()> {
        if self.lengths.is_empty() {
            return Ok(());
        }
        let (ids, lengths) = (std::mem::take(&mut self.ids), std::mem::take(&mut self.lengths));
        self.checksums.push(checksum(&ids));
        let offsets = OffsetBuffer::from_lengths(lengths.iter().map(|&length| length as usize));
        let lists = ListArray::new(
            Arc::new(element()),
            offsets,
            Arc::new(Int32Array::new(ScalarBuffer::from(ids), None)),
            None,
        );
        let columns: Vec<ArrayRef> = vec![Arc::new(lists), Arc::new(Int32Array::from(lengths))];
        let batch = RecordBatch::try_new(self.schema.clone(), columns)
            .map_err(|error| write_error(&self.partial, error.into()))?;
        self.writer
            .write(&batch)
            .and_then(|()| self.writer.flush())
            .map_err(|error| write_error(&self.partial, error))
    }
}

/// Writes a file beside its place, syncs and renames it. What a failure leaves half written is
/// deleted.
pub(crate) fn write_and_publish(partial: &Path, path: &Path, bytes: &[u8]) -> Result<()> {
    let written = File::create(partial)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .map_err(|error| DataError::io("write", path, error));
    let published = written.and_then(|()| publish(partial, path));
    if published.is_err() {
        let _ = std::fs::remove_file(partial);
    }
    published
}

/// Renames a synced file into place and syncs the folder.
pub(crate) fn publish(partial: &Path, path: &Path) -> Result<()> {
    let failed = |error| DataError::io("rename to", path, error);
    std::fs::rename(partial, path).map_err(failed)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new("."))).and_then(|dir| dir.sync_all()).map_err(failed)
}

/// Where a file is written before it has its name.
pub(crate) fn partial_path(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".partial");
    path.with_file_name(name)
}

fn element() -> Field {
    Field::new("element", DataType::Int32, false)
}

fn schema() -> Schema {
    Schema::new(vec![
        Field::new(IDS_COLUMN, DataType::List(Arc::new(element())), false),
        Field::new(LENGTHS_COLUMN, DataType::Int32, false),
    ])
}

fn write_error(path: &Path, error: parquet::errors::ParquetError) -> DataError {
    DataError::io("write", path, std::io::Error::other(error.to_string()))
}
