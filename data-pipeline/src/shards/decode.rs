//! Row groups in, documents out: any accepted column layout, every id checked.

use super::footer::{FileRange, Footer, damaged};
use super::{ANY_VOCABULARY, IDS_COLUMN_NAMES, LENGTHS_COLUMN, fast};
use crate::error::{DataError, Result};
use crate::recycled::Recycled;
use arrow_array::cast::AsArray;
use arrow_array::types::{Int32Type, Int64Type, UInt16Type, UInt32Type, UInt64Type};
use arrow_array::{Array, ArrayRef, OffsetSizeTrait};
use arrow_schema::DataType;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder,
};
use parquet::file::metadata::ParquetMetaData;
use std::ops::Range;
use std::path::Path;

/// Rows decoded at a time on the general path.
const BATCH_ROWS: usize = 1024;

/// The documents of one row group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DecodedGroup {
    /// Token ids, document after document.
    pub ids: Recycled<i32>,
    /// Tokens of each document; their sum is the length of `ids`.
    pub lengths: Vec<u32>,
}

/// Where the tokens of a row group lie in the file, and how they are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupLayout {
    /// As [`super::ShardWriter`] writes it.
    Own {
        /// Leaf column of the ids.
        ids: usize,
        /// Leaf column of the lengths.
        lengths: usize,
    },
    /// Another accepted layout.
    Foreign {
        /// Root column of the ids.
        root: usize,
    },
}

impl GroupLayout {
    /// Layout of a row group, or an error that names the columns the file has.
    pub fn of(path: &Path, footer: &Footer, group: usize) -> Result<Self> {
        let row_group = footer.metadata.row_group(group);
        if let Some((ids, lengths)) = fast::columns(footer.info.as_ref(), row_group) {
            return Ok(GroupLayout::Own { ids, lengths });
        }
        let schema = footer.metadata.file_metadata().schema_descr();
        let fields = schema.root_schema().get_fields();
        IDS_COLUMN_NAMES
            .iter()
            .find_map(|name| fields.iter().position(|field| field.name() == *name))
            .map(|root| GroupLayout::Foreign { root })
            .ok_or_else(|| DataError::Schema {
                path: path.to_path_buf(),
                found: match fields.iter().map(|field| field.name()).collect::<Vec<_>>() {
                    names if names.is_empty() => "it has no columns".into(),
                    names => format!("its columns are {names:?}"),
                },
            })
    }

    /// The bytes of the file that hold the columns of a row group.
    pub fn byte_range(&self, metadata: &ParquetMetaData, group: usize) -> Range<u64> {
        let row_group = metadata.row_group(group);
        let schema = metadata.file_metadata().schema_descr();
        let used = |leaf: usize| match *self {
            GroupLayout::Own { ids, lengths } => leaf == ids || leaf == lengths,
            GroupLayout::Foreign { root } => schema.get_column_root_idx(leaf) == root,
        };
        let ranges = (0..row_group.num_columns()).filter(|&leaf| used(leaf)).map(|leaf| {
            let (start, len) = row_group.column(leaf).byte_range();
            (start, start + len)
        });
        let (start, end) = ranges.fold((u64::MAX, 0), |(a, b), (s, e)| (a.min(s), b.max(e)));
        start.min(end)..end
    }
}

/// What a decoder needs to know of a row group besides its bytes.
#[derive(Clone, Copy, Debug)]
pub struct DecodeRequest<'a> {
    /// The shard, for messages.
    pub path: &'a Path,
    /// The shard's footer.
    pub footer: &'a Footer,
    /// Index of the row group in the shard.
    pub group: usize,
    /// Rows of the shard before this row group.
    pub first_row: u64,
    /// Ids must be below this.
    pub vocab_size: usize,
}

impl DecodeRequest<'_> {
    /// Decodes and checks the row group whose bytes are in `range`.
    pub fn decode(&self, range: &FileRange) -> Result<DecodedGroup> {
        self.decode_into(range, Recycled::default())
    }

    /// As [`DecodeRequest::decode`], with the ids put in an empty buffer.
    pub fn decode_into(&self, range: &FileRange, buffer: Recycled<i32>) -> Result<DecodedGroup> {
        let layout = GroupLayout::of(self.path, self.footer, self.group)?;
        match layout {
            GroupLayout::Own { ids, lengths } => self.decode_own(range, ids, lengths, buffer),
            GroupLayout::Foreign { root } => self.decode_foreign(range, root, buffer),
        }
    }

    /// The lengths of the documents alone, from the column of lengths where there is one.
    pub fn lengths(&self, range: &FileRange) -> Result<Vec<u32>> {
        match GroupLayout::of(self.path, self.footer, self.group)? {
            GroupLayout::Own { lengths, .. } => self.own_lengths(range, lengths),
            GroupLayout::Foreign { root } => {
                Ok(self.decode_foreign(range, root, Recycled::default())?.lengths)
            }
        }
    }

    /// Checks that the column of lengths, where there is one, holds those of the lists. Reading
    /// does not: it goes by the lengths alone, or by the lists alone. `whole` has all of the row
    /// group.
    pub fn check_lengths(&self, whole: &FileRange) -> Result<()> {
        let schema = self.footer.metadata.file_metadata().schema_descr();
        let fields = schema.root_schema().get_fields();
        let find = |name: &str| fields.iter().position(|field| field.name() == name);
        let (Some(lengths), Some(root)) =
            (find(LENGTHS_COLUMN), IDS_COLUMN_NAMES.iter().find_map(|name| find(name)))
        else {
            return Ok(());
        };
        let mut noted = Vec::new();
        self.read_column(whole, lengths, |column| {
            let whole = |length: Option<i32>| length.map(i64::from);
            match column.data_type() {
                DataType::Int32 => {
                    noted.extend(column.as_primitive::<Int32Type>().iter().map(whole));
                }
                DataType::Int64 => noted.extend(column.as_primitive::<Int64Type>().iter()),
                found => {
                    let detail = format!("`{LENGTHS_COLUMN}` has type {found}, not int32");
                    return Err(self.damaged(detail));
                }
            }
            Ok(())
        })?;
        let lists = self.decode_foreign(whole, root, Recycled::default())?.lengths;
        let wrong = lists.iter().zip(&noted).position(|(&l, &noted)| noted != Some(i64::from(l)));
        let Some(row) = wrong else { return Ok(()) };
        let noted = noted[row].map_or("null".into(), |noted| noted.to_string());
        Err(self.damaged(format!(
            "row {} holds {} tokens, but its `{LENGTHS_COLUMN}` is {noted}",
            self.first_row + row as u64,
            lists[row]
        )))
    }

    fn own_lengths(&self, range: &FileRange, column: usize) -> Result<Vec<u32>> {
        let metadata = &self.footer.metadata;
        let rows = metadata.row_group(self.group).num_rows() as usize;
        let mut lengths = Vec::with_capacity(rows);
        fast::read_values(range, metadata, self.group, column, &mut lengths)
            .map_err(|error| self.damaged(error.to_string()))?;
        if lengths.len() != rows {
            return Err(self.damaged(format!("{} lengths for {rows} rows", lengths.len())));
        }
        let row = |at: usize| self.first_row + at as u64;
        let length = |(at, &length): (usize, &i32)| {
            u32::try_from(length).map_err(|_| {
                self.damaged(format!("the `{LENGTHS_COLUMN}` of row {} is {length}", row(at)))
            })
        };
        lengths.iter().enumerate().map(length).collect()
    }

    fn decode_own(
        &self,
        range: &FileRange,
        column: usize,
        lengths: usize,
        mut ids: Recycled<i32>,
    ) -> Result<DecodedGroup> {
        let lengths = self.own_lengths(range, lengths)?;
        let tokens: u64 = lengths.iter().map(|&length| u64::from(length)).sum();
        let limit = self.footer.metadata.row_group(self.group).column(column).num_values() as u64;
        if tokens > limit {
            return Err(self.damaged(format!("{tokens} tokens claimed, {limit} stored")));
        }
        let metadata = &self.footer.metadata;
        ids.reserve(tokens as usize);
        let seen = fast::read_values(range, metadata, self.group, column, &mut ids)
            .map_err(|error| self.damaged(error.to_string()))?;
        if self.footer.checksums.get(self.group).is_some_and(|&noted| noted != seen.checksum) {
            return Err(self.damaged("its tokens are not those its checksum was made of".into()));
        }
        if ids.len() as u64 != tokens {
            return Err(self.damaged(format!("{} ids, but {tokens} by `n_tokens`", ids.len())));
        }
        let decoded = DecodedGroup { ids, lengths };
        self.check_ids(&decoded, seen.largest)?;
        Ok(decoded)
    }

    fn decode_foreign(
        &self,
        range: &FileRange,
        root: usize,
        ids: Recycled<i32>,
    ) -> Result<DecodedGroup> {
        let mut decoded = DecodedGroup { ids, lengths: Vec::new() };
        self.read_column(range, root, |column| self.append(column, &mut decoded))?;
        let largest = decoded.ids.iter().map(|&id| id as u32).max().unwrap_or(0);
        self.check_ids(&decoded, largest)?;
        Ok(decoded)
    }

    /// Calls `see` with the parts of one root column, in order.
    fn read_column(
        &self,
        range: &FileRange,
        root: usize,
        mut see: impl FnMut(&ArrayRef) -> Result<()>,
    ) -> Result<()> {
        let failed = |error: &dyn std::fmt::Display| self.damaged(error.to_string());
        let metadata = self.footer.metadata.clone();
        let mask =
            ProjectionMask::roots(metadata.file_metadata().schema_descr(), std::iter::once(root));
        let options = ArrowReaderOptions::new();
        let metadata =
            ArrowReaderMetadata::try_new(metadata, options).map_err(|error| failed(&error))?;
        let batches = ParquetRecordBatchReaderBuilder::new_with_metadata(range.clone(), metadata)
            .with_row_groups(vec![self.group])
            .with_projection(mask)
            .with_batch_size(BATCH_ROWS)
            .build()
            .map_err(|error| failed(&error))?;
        for batch in batches {
            see(batch.map_err(|error| failed(&error))?.column(0))?;
        }
        Ok(())
    }

    /// Appends the rows of one array, whatever its type.
    fn append(&self, rows: &ArrayRef, decoded: &mut DecodedGroup) -> Result<()> {
        match rows.data_type() {
            DataType::List(_) => self.append_lists(rows.as_list::<i32>(), decoded),
            DataType::LargeList(_) => self.append_lists(rows.as_list::<i64>(), decoded),
            DataType::FixedSizeList(_, _) => {
                let lists = rows.as_fixed_size_list();
                (0..lists.len()).try_for_each(|row| {
                    let values = lists.is_valid(row).then(|| lists.value(row));
                    self.append_document(values, decoded)
                })
            }
            DataType::Binary => self.append_binary(rows.as_binary::<i32>().iter(), decoded),
            DataType::LargeBinary => self.append_binary(rows.as_binary::<i64>().iter(), decoded),
            other => Err(DataError::Schema {
                path: self.path.to_path_buf(),
                found: format!("its column of ids has type {other}"),
            }),
        }
    }

    fn append_lists<O: OffsetSizeTrait>(
        &self,
        lists: &arrow_array::GenericListArray<O>,
        decoded: &mut DecodedGroup,
    ) -> Result<()> {
        (0..lists.len()).try_for_each(|row| {
            let values = lists.is_valid(row).then(|| lists.value(row));
            self.append_document(values, decoded)
        })
    }

    fn append_document(&self, values: Option<ArrayRef>, decoded: &mut DecodedGroup) -> Result<()> {
        let Some(values) = values else {
            decoded.lengths.push(0);
            return Ok(());
        };
        let row = self.first_row + decoded.lengths.len() as u64;
        if values.null_count() > 0 {
            return Err(self.damaged(format!("row {row} holds a null instead of a token id")));
        }
        match values.data_type() {
            DataType::Int32 => decoded.ids.extend(values.as_primitive::<Int32Type>().values()),
            DataType::UInt16 => {
                let ids = values.as_primitive::<UInt16Type>().values();
                decoded.ids.extend(ids.iter().map(|&id| i32::from(id)));
            }
            DataType::UInt32 => {
                let ids = values.as_primitive::<UInt32Type>().values();
                self.extend_wide(ids.iter().map(|&id| i64::from(id)), row, &mut decoded.ids)?;
            }
            DataType::Int64 => {
                let ids = values.as_primitive::<Int64Type>().values();
                self.extend_wide(ids.iter().copied(), row, &mut decoded.ids)?;
            }
            DataType::UInt64 => {
                let ids = values.as_primitive::<UInt64Type>().values();
                let ids = ids.iter().map(|&id| i64::try_from(id).unwrap_or(i64::MAX));
                self.extend_wide(ids, row, &mut decoded.ids)?;
            }
            other => {
                return Err(DataError::Schema {
                    path: self.path.to_path_buf(),
                    found: format!("its token ids have type {other}"),
                });
            }
        }
        decoded.lengths.push(values.len() as u32);
        Ok(())
    }

    fn append_binary<'b>(
        &self,
        rows: impl Iterator<Item = Option<&'b [u8]>>,
        decoded: &mut DecodedGroup,
    ) -> Result<()> {
        for bytes in rows {
            let row = self.first_row + decoded.lengths.len() as u64;
            let (words, rest) = bytes.unwrap_or_default().as_chunks::<4>();
            if !rest.is_empty() {
                let detail = format!("row {row} has {} bytes over whole uint32", rest.len());
                return Err(self.damaged(detail));
            }
            let ids = words.iter().map(|word| i64::from(u32::from_le_bytes(*word)));
            self.extend_wide(ids, row, &mut decoded.ids)?;
            decoded.lengths.push(words.len() as u32);
        }
        Ok(())
    }

    /// Narrows ids to 32 bits; those that do not fit are over the vocabulary too.
    fn extend_wide(
        &self,
        ids: impl Iterator<Item = i64>,
        row: u64,
        into: &mut Vec<i32>,
    ) -> Result<()> {
        for (position, id) in ids.enumerate() {
            into.push(i32::try_from(id).map_err(|_| self.out_of_range(row, position as u64, id))?);
        }
        Ok(())
    }

    /// Checks the ids, of which `largest` is the largest, against the vocabulary. The culprit is
    /// looked for only where there is one.
    fn check_ids(&self, decoded: &DecodedGroup, largest: u32) -> Result<()> {
        if (largest as usize) < self.vocab_size || decoded.ids.is_empty() {
            return Ok(());
        }
        let mut start = 0;
        for (row, &length) in decoded.lengths.iter().enumerate() {
            let document = &decoded.ids[start..start + length as usize];
            let bad = document.iter().position(|&id| id as u32 as usize >= self.vocab_size);
            if let Some(position) = bad {
                let id = i64::from(document[position]);
                return Err(self.out_of_range(self.first_row + row as u64, position as u64, id));
            }
            start += length as usize;
        }
        Ok(())
    }

    fn out_of_range(&self, row: u64, position: u64, id: i64) -> DataError {
        if self.vocab_size == ANY_VOCABULARY {
            let detail = format!("row {row}, position {position}: {id} is no token id");
            return self.damaged(detail);
        }
        let path = self.path.to_path_buf();
        DataError::TokenOutOfRange { path, row, position, id, vocab_size: self.vocab_size }
    }

    fn damaged(&self, detail: String) -> DataError {
        let detail = format!("row group {}: {detail}", self.group);
        damaged(self.path, self.footer.file_bytes, detail)
    }
}
