//! Scans shards once: which files a source has, and the sizes of their row groups.

use super::decode::{DecodeRequest, GroupLayout};
use super::footer::{FileRange, Footer, damaged};
use super::manifest::{RowGroup, ScanParams, ShardFile, SplitSize};
use super::split::{HoldOut, Split};
use crate::error::{DataError, Result};
use crate::packing;
use bytes::Bytes;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The parquet files a source's path names, sorted: a file, a folder (all `*.parquet` in it), or a
/// glob.
pub fn find_files(source_name: &str, pattern: &str) -> Result<Vec<PathBuf>> {
    let none = |why: String| DataError::NoFiles {
        source_name: source_name.to_string(),
        pattern: pattern.to_string(),
        wanted: "parquet file",
        why,
    };
    let path = Path::new(pattern);
    let pattern = if path.is_dir() {
        format!("{}/*.parquet", glob::Pattern::escape(pattern.trim_end_matches('/')))
    } else {
        pattern.to_string()
    };
    let paths = glob::glob(&pattern).map_err(|error| none(format!("it is no pattern: {error}")))?;
    let mut files = Vec::new();
    for path in paths {
        let path = path.map_err(|error| none(error.to_string()))?;
        if path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(none(why_none(path)));
    }
    Ok(files)
}

/// Says which part of a path is missing.
fn why_none(path: &Path) -> String {
    if path.is_dir() {
        return "the folder holds no `*.parquet`".into();
    }
    let is_pattern = |part: &Path| part.to_string_lossy().contains(['*', '?', '[']);
    let folder = path.ancestors().skip(1).find(|part| !is_pattern(part));
    match folder {
        Some(folder) if !folder.as_os_str().is_empty() && !folder.exists() => {
            format!("the folder `{}` does not exist", folder.display())
        }
        _ if is_pattern(path) => "no file has such a name".into(),
        _ => "the file does not exist".into(),
    }
}

/// Reads the footer and the document lengths of one shard.
pub fn scan_file(
    path: &Path,
    file: u32,
    params: &ScanParams,
) -> Result<(ShardFile, Vec<RowGroup>)> {
    let footer = Footer::read(path)?;
    let num_groups = footer.metadata.num_row_groups();
    let hold_out = HoldOut::new(path, params.validation_fraction);
    let mut groups = Vec::with_capacity(num_groups);
    let mut first_row = 0;
    for group in 0..num_groups {
        let row_group = scan_group(path, &footer, group, first_row, params, &hold_out)?;
        first_row += u64::from(row_group.rows);
        groups.push(RowGroup { file, ..row_group });
    }
    if groups.iter().all(|group| group.tokens == 0) {
        return Err(DataError::EmptyShard { path: path.to_path_buf(), rows: first_row });
    }
    let shard = ShardFile::new(path, &footer);
    Ok((shard, groups))
}

fn scan_group(
    path: &Path,
    footer: &Footer,
    group: usize,
    first_row: u64,
    params: &ScanParams,
    hold_out: &HoldOut,
) -> Result<RowGroup> {
    let layout = GroupLayout::of(path, footer, group)?;
    let bytes = layout.byte_range(&footer.metadata, group);
    let needed = match layout {
        GroupLayout::Own { lengths, .. } => {
            let (start, len) = footer.metadata.row_group(group).column(lengths).byte_range();
            start..start + len
        }
        GroupLayout::Foreign { .. } => bytes.clone(),
    };
    let range = read_range(path, needed, footer.file_bytes)?;
    let request = DecodeRequest { path, footer, group, first_row, vocab_size: params.vocab_size };
    let lengths = request.lengths(&range)?;
    let size = |split| {
        let lengths = packing::split_rows(&lengths, first_row, hold_out, split);
        let documents = lengths.iter().filter(|row| row.len > 0).count() as u64;
        let tokens = lengths.iter().map(|row| u64::from(row.len)).sum();
        let bins = params.bin_len.map_or(0, |len| packing::best_fit(&lengths, len).len() as u64);
        SplitSize { documents, tokens, bins }
    };
    Ok(RowGroup {
        file: 0,
        index: group as u32,
        first_row,
        rows: lengths.len() as u32,
        tokens: lengths.iter().map(|&length| u64::from(length)).sum(),
        offset: bytes.start,
        bytes: bytes.end - bytes.start,
        train: size(Split::Train),
        validation: size(Split::Validation),
    })
}

/// Reads a range of a local file.
pub fn read_range(path: &Path, range: std::ops::Range<u64>, file_bytes: u64) -> Result<FileRange> {
    if range.end > file_bytes {
        let detail = format!("a row group ends at byte {}", range.end);
        return Err(damaged(path, file_bytes, detail));
    }
    let mut bytes = vec![0; (range.end - range.start) as usize];
    std::fs::File::open(path)
        .and_then(|file| file.read_exact_at(&mut bytes, range.start))
        .map_err(|error| DataError::io("read", path, error))?;
    Ok(FileRange { offset: range.start, bytes: Bytes::from(bytes), file_bytes })
}
