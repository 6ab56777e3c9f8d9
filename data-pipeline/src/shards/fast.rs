//! Decodes a row group of the layout that [`super::ShardWriter`] writes, page by page, without
//! building arrays: the levels are skipped, because the lengths stand in a column of their own.

use super::footer::{FileRange, ShardInfo};
use super::{IDS_COLUMN, LENGTHS_COLUMN};
use arrow_buffer::ToByteSlice;
use parquet::basic::{Encoding, Type};
use parquet::column::page::{Page, PageReader};
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData, RowGroupMetaData};
use parquet::file::serialized_reader::SerializedPageReader;
use std::sync::Arc;
use xxhash_rust::xxh3::Xxh3;

/// Indices of the two leaf columns, where a row group has exactly the layout of our writer.
pub fn columns(info: Option<&ShardInfo>, group: &RowGroupMetaData) -> Option<(usize, usize)> {
    info?;
    let find = |name: &str| {
        group.columns().iter().position(|column| {
            let path = column.column_path().parts();
            path.first().is_some_and(|part| part == name)
        })
    };
    let (ids, lengths) = (find(IDS_COLUMN)?, find(LENGTHS_COLUMN)?);
    let usual = |column: &ColumnChunkMetaData| {
        column.column_type() == Type::INT32
            && column
                .encodings()
                .all(|encoding| matches!(encoding, Encoding::BYTE_STREAM_SPLIT | Encoding::RLE))
    };
    let (ids_column, lengths_column) = (group.column(ids), group.column(lengths));
    let ids_levels =
        (ids_column.column_descr().max_def_level(), ids_column.column_descr().max_rep_level());
    let usable = usual(ids_column)
        && usual(lengths_column)
        && ids_levels == (1, 1)
        && lengths_column.column_descr().max_def_level() == 0
        && lengths_column.column_descr().max_rep_level() == 0;
    usable.then_some((ids, lengths))
}

/// The checksum is of little-endian words, and is taken of the values as they lie in memory.
const _: () = assert!(cfg!(target_endian = "little"), "Phalanx runs on little-endian machines");

/// Values that are joined, summed and compared at a time: they stay in the first-level cache.
const PART: usize = 2048;

/// What is known of the values of a column once they are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// XXH3 of their little-endian bytes.
    pub checksum: u64,
    /// The largest, negative ones taken as unsigned; 0 where there are none.
    pub largest: u32,
}

/// Sees the values of a column go by, part after part.
struct Watch {
    checksum: Xxh3,
    largest: u32,
}

impl Watch {
    fn new() -> Self {
        Watch { checksum: Xxh3::new(), largest: 0 }
    }

    fn see(&mut self, part: &[i32]) {
        self.checksum.update(part.to_byte_slice());
        self.largest = part.iter().fold(self.largest, |most, &value| most.max(value as u32));
    }

    fn seen(&self) -> Seen {
        Seen { checksum: self.checksum.digest(), largest: self.largest }
    }
}

/// Appends the values of one leaf column of a row group, int32 without nulls.
pub fn read_values(
    range: &FileRange,
    metadata: &ParquetMetaData,
    group: usize,
    column: usize,
    values: &mut Vec<i32>,
) -> Result<Seen> {
    let group = metadata.row_group(group);
    let chunk = group.column(column);
    let rows = group.num_rows() as usize;
    let mut pages = SerializedPageReader::new(Arc::new(range.clone()), chunk, rows, None)?;
    let mut watch = Watch::new();
    while let Some(page) = pages.get_next_page()? {
        let levels = level_bytes(&page, chunk)?;
        let bytes = page.buffer().get(levels..).unwrap_or_default();
        if !bytes.len().is_multiple_of(4) {
            return Err(ParquetError::General(format!("a page of {} bytes", bytes.len())));
        }
        join_streams(bytes, values, &mut watch);
    }
    Ok(watch.seen())
}

/// The checksum that [`read_values`] finds, of values that are to be written.
pub fn checksum(values: &[i32]) -> u64 {
    let mut watch = Watch::new();
    watch.see(values);
    watch.seen().checksum
}

/// Appends the values whose first bytes stand first, then all second bytes, and so on
/// (BYTE_STREAM_SPLIT of the parquet format).
fn join_streams(bytes: &[u8], values: &mut Vec<i32>, watch: &mut Watch) {
    let count = bytes.len() / 4;
    let (low, high) = bytes.split_at(2 * count);
    let ((first, second), (third, fourth)) = (low.split_at(count), high.split_at(count));
    let low = first.chunks(PART).zip(second.chunks(PART));
    let high = third.chunks(PART).zip(fourth.chunks(PART));
    for ((first, second), (third, fourth)) in low.zip(high) {
        let words = first.iter().zip(second).zip(third.iter().zip(fourth));
        let joined = values.len();
        values.extend(words.map(|((&a, &b), (&c, &d))| i32::from_le_bytes([a, b, c, d])));
        watch.see(&values[joined..]);
    }
}

/// Bytes of repetition and definition levels in front of a page's values.
fn level_bytes(page: &Page, chunk: &ColumnChunkMetaData) -> Result<usize> {
    let unsupported = || ParquetError::General("a page in another encoding".into());
    match page {
        Page::DataPage { buf, encoding: Encoding::BYTE_STREAM_SPLIT, .. } => {
            let mut at = 0;
            let descr = chunk.column_descr();
            for level in [descr.max_rep_level(), descr.max_def_level()] {
                if level > 0 {
                    let prefix = buf.get(at..).and_then(|rest| rest.first_chunk::<4>());
                    let prefix = prefix.ok_or_else(|| ParquetError::EOF("levels".into()))?;
                    at += 4 + u32::from_le_bytes(*prefix) as usize;
                }
            }
            Ok(at)
        }
        Page::DataPageV2 {
            encoding: Encoding::BYTE_STREAM_SPLIT,
            def_levels_byte_len,
            rep_levels_byte_len,
            ..
        } => Ok((def_levels_byte_len + rep_levels_byte_len) as usize),
        _ => Err(unsupported()),
    }
}
