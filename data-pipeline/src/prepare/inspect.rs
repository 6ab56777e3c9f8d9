//! Looking at shards: what they hold, and whether every row of them is sound.

use super::tokenizer::Tokenizer;
use crate::error::{DataError, Result};
use crate::shards::ANY_VOCABULARY;
use crate::shards::decode::{DecodeRequest, DecodedGroup, GroupLayout};
use crate::shards::footer::Footer;
use crate::shards::scan::{find_files, read_range};
use rayon::prelude::*;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// What one shard holds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ShardReport {
    /// The shard.
    pub path: PathBuf,
    /// Its size in bytes.
    pub bytes: u64,
    /// Row groups.
    pub row_groups: usize,
    /// Rows, one a document.
    pub documents: u64,
    /// Tokens.
    pub tokens: u64,
    /// Tokens of the longest document.
    pub longest_document: u64,
    /// Largest token id.
    pub largest_id: Option<u32>,
    /// Bits of the file per token.
    pub bits_per_token: f64,
    /// Program that wrote it, where it says so.
    pub writer: Option<String>,
    /// SHA-256 of its tokenizer, where it says so.
    pub tokenizer_sha256: Option<String>,
    /// Vocabulary of its tokenizer, where it says so.
    pub vocab_size: Option<usize>,
}

/// A document as tokens and, with a tokenizer, as text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DocumentView {
    /// The shard.
    pub path: PathBuf,
    /// Its row.
    pub row: u64,
    /// Number of its tokens.
    pub tokens: usize,
    /// Its first ids.
    pub ids: Vec<u32>,
    /// Their text.
    pub text: Option<String>,
}

/// Outcome of verifying one shard.
#[derive(Debug)]
pub struct Verified {
    /// The shard.
    pub path: PathBuf,
    /// What it holds, or what is wrong with it.
    pub outcome: Result<ShardReport>,
}

/// Reads and checks every token of the shards that `pattern` names, all cores at once. Ids are
/// checked against `vocab_size`, or else against the vocabulary that the shard itself names; with a
/// tokenizer, shards that were made with another are an error.
pub fn verify(
    pattern: &str,
    tokenizer: Option<&Tokenizer>,
    vocab_size: Option<usize>,
) -> Result<Vec<Verified>> {
    let files = find_files("shards", pattern)?;
    let check = |path: &PathBuf| Verified {
        path: path.clone(),
        outcome: report(path, tokenizer, vocab_size, Depth::Lengths),
    };
    Ok(files.par_iter().map(check).collect())
}

/// Describes the shards that `pattern` names.
pub fn inspect(pattern: &str) -> Result<Vec<ShardReport>> {
    let files = find_files("shards", pattern)?;
    files.par_iter().map(|path| report(path, None, Some(ANY_VOCABULARY), Depth::Ids)).collect()
}

/// The first `count` documents of the first shard, up to `limit` ids each.
pub fn first_documents(
    pattern: &str,
    tokenizer: Option<&Tokenizer>,
    count: usize,
    limit: usize,
) -> Result<Vec<DocumentView>> {
    let files = find_files("shards", pattern)?;
    let mut views = Vec::new();
    for path in files.iter().take_while(|_| count > 0) {
        each_group(path, ANY_VOCABULARY, Depth::Ids, |first_row, group| {
            let mut start = 0;
            for (row, &length) in group.lengths.iter().enumerate() {
                let document = &group.ids[start..start + length as usize];
                start += length as usize;
                if views.len() == count {
                    return Ok(false);
                }
                let ids: Vec<u32> = document.iter().take(limit).map(|&id| id as u32).collect();
                let text = tokenizer.map(|tokenizer| tokenizer.decode(&ids)).transpose()?;
                let row = first_row + row as u64;
                let view =
                    DocumentView { path: path.clone(), row, tokens: document.len(), ids, text };
                views.push(view);
            }
            Ok(true)
        })?;
        if views.len() == count {
            break;
        }
    }
    Ok(views)
}

/// How thoroughly a shard is read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Depth {
    /// Every id is checked.
    Ids,
    /// The lengths of the documents too, against the lists.
    Lengths,
}

/// Calls `see` with the first row and the documents of each row group, until it says `false`.
fn each_group(
    path: &Path,
    vocab_size: usize,
    depth: Depth,
    mut see: impl FnMut(u64, &DecodedGroup) -> Result<bool>,
) -> Result<Footer> {
    let footer = Footer::read(path)?;
    let mut first_row = 0;
    for group in 0..footer.metadata.num_row_groups() {
        let bytes = GroupLayout::of(path, &footer, group)?.byte_range(&footer.metadata, group);
        let range = read_range(path, bytes, footer.file_bytes)?;
        let request = DecodeRequest { path, footer: &footer, group, first_row, vocab_size };
        let decoded = request.decode(&range)?;
        if depth == Depth::Lengths {
            let columns = footer.metadata.row_group(group).columns().iter();
            let ends = columns.map(|column| column.byte_range()).map(|(at, len)| (at, at + len));
            let (start, end) = ends.fold((u64::MAX, 0), |(a, b), (s, e)| (a.min(s), b.max(e)));
            request.check_lengths(&read_range(path, start.min(end)..end, footer.file_bytes)?)?;
        }
        if !see(first_row, &decoded)? {
            break;
        }
        first_row += decoded.lengths.len() as u64;
    }
    Ok(footer)
}

fn report(
    path: &Path,
    tokenizer: Option<&Tokenizer>,
    vocab_size: Option<usize>,
    depth: Depth,
) -> Result<ShardReport> {
    let info = Footer::read(path)?.info;
    if let (Some(tokenizer), Some(info)) = (tokenizer, &info)
        && tokenizer.sha256 != info.tokenizer_sha256
    {
        return Err(DataError::TokenizerMismatch {
            path: path.to_path_buf(),
            shard_sha256: info.tokenizer_sha256.clone(),
            tokenizer: tokenizer.path.clone(),
            tokenizer_sha256: tokenizer.sha256.clone(),
        });
    }
    let named = info.as_ref().map(|info| info.vocab_size);
    let known = vocab_size.or(tokenizer.map(|tokenizer| tokenizer.vocab_size)).or(named);
    let (mut documents, mut tokens, mut longest, mut largest) = (0, 0, 0, None);
    let footer = each_group(path, known.unwrap_or(ANY_VOCABULARY), depth, |_, group| {
        documents += group.lengths.len() as u64;
        tokens += group.ids.len() as u64;
        longest = longest.max(group.lengths.iter().copied().max().map_or(0, u64::from));
        largest = largest.max(group.ids.iter().map(|&id| id as u32).max());
        Ok(true)
    })?;
    if tokens == 0 {
        return Err(DataError::EmptyShard { path: path.to_path_buf(), rows: documents });
    }
    Ok(ShardReport {
        path: path.to_path_buf(),
        bytes: footer.file_bytes,
        row_groups: footer.metadata.num_row_groups(),
        documents,
        tokens,
        longest_document: longest,
        largest_id: largest,
        bits_per_token: footer.file_bytes as f64 * 8.0 / tokens as f64,
        writer: info.as_ref().map(|info| info.writer.clone()),
        tokenizer_sha256: info.as_ref().map(|info| info.tokenizer_sha256.clone()),
        vocab_size: named,
    })
}
