//! The manifest of a source: its row groups and their sizes, scanned once, cached beside the
//! shards, and hashed by content.

use super::footer::Footer;
use super::scan;
use super::split::Split;
use super::writer::{partial_path, write_and_publish};
use crate::error::{DataError, Result};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// First bytes of a cached manifest; the last one is the version of its layout.
const MAGIC: &[u8; 8] = b"PHLXMAN\x01";
/// Folder of the cache, beside the first shard.
const CACHE_FOLDER: &str = ".phalanx";
/// Numbers of a row group in the cache.
const NUMBERS: usize = 13;

/// What the sizes in a manifest depend on, besides the shards.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScanParams {
    /// Share of the documents held out for validation.
    pub validation_fraction: f64,
    /// Tokens of a bin, where documents are packed by best fit.
    pub bin_len: Option<u64>,
    /// Ids must be below this, where the scan reads them (in shards of other programs).
    pub vocab_size: usize,
}

/// One shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardFile {
    /// Its path.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// XXH3 of its footer.
    pub footer_hash: u64,
    /// SHA-256 of the tokenizer it was made with, where the writer noted it.
    pub tokenizer_sha256: Option<String>,
    /// Vocabulary of that tokenizer.
    pub vocab_size: Option<usize>,
    /// Id that ends a document.
    pub eos_id: Option<u32>,
}

impl ShardFile {
    /// A shard with this footer.
    pub fn new(path: &Path, footer: &Footer) -> Self {
        let info = footer.info.as_ref();
        ShardFile {
            path: path.to_path_buf(),
            bytes: footer.file_bytes,
            footer_hash: footer.hash,
            tokenizer_sha256: info.map(|info| info.tokenizer_sha256.clone()),
            vocab_size: info.map(|info| info.vocab_size),
            eos_id: info.and_then(|info| info.eos_id),
        }
    }
}

/// The documents of one split in a row group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SplitSize {
    /// Documents with at least one token.
    pub documents: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Bins they fill, where packed by best fit.
    pub bins: u64,
}

/// One row group of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowGroup {
    /// Index of the shard.
    pub file: u32,
    /// Index in the shard.
    pub index: u32,
    /// Rows of the shard before it.
    pub first_row: u64,
    /// Its rows.
    pub rows: u32,
    /// Its tokens, of both splits.
    pub tokens: u64,
    /// First byte of its columns in the file.
    pub offset: u64,
    /// Bytes of its columns.
    pub bytes: u64,
    /// What is trained on.
    pub train: SplitSize,
    /// What is held out.
    pub validation: SplitSize,
}

impl RowGroup {
    /// Sizes of one split.
    pub fn split(&self, split: Split) -> SplitSize {
        match split {
            Split::Train => self.train,
            Split::Validation => self.validation,
        }
    }

    fn to_numbers(self) -> [u64; NUMBERS] {
        let (t, v) = (self.train, self.validation);
        let (file, index, rows) = (self.file.into(), self.index.into(), self.rows.into());
        [
            file,
            index,
            self.first_row,
            rows,
            self.tokens,
            self.offset,
            self.bytes,
            t.documents,
            t.tokens,
            t.bins,
            v.documents,
            v.tokens,
            v.bins,
        ]
    }

    fn from_numbers(n: [u64; NUMBERS]) -> Self {
        RowGroup {
            file: n[0] as u32,
            index: n[1] as u32,
            first_row: n[2],
            rows: n[3] as u32,
            tokens: n[4],
            offset: n[5],
            bytes: n[6],
            train: SplitSize { documents: n[7], tokens: n[8], bins: n[9] },
            validation: SplitSize { documents: n[10], tokens: n[11], bins: n[12] },
        }
    }
}

/// All row groups of a source.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    /// Shards, sorted by path.
    pub files: Vec<ShardFile>,
    /// Row groups, shard by shard.
    pub groups: Vec<RowGroup>,
    /// Hash of names, footers and sizes; folders and times have no part in it.
    pub content_hash: u128,
}

impl Manifest {
    /// The manifest of `files`, from the cache where it is up to date, else scanned and cached.
    pub fn load(files: &[PathBuf], params: &ScanParams) -> Result<Self> {
        let key = cache_key(files, params)?;
        let cache = cache_path(files, key);
        if let Some(manifest) = cache.as_deref().and_then(read_cache) {
            return Ok(manifest);
        }
        let manifest = Manifest::scan(files, params)?;
        if let Some(path) = cache
            && let Err(error) = manifest.write_cache(&path)
        {
            tracing::debug!(%error, "the manifest is not cached, the next start scans again");
        }
        Ok(manifest)
    }

    /// Scans `files`, all cores at once. The first error in the order of the files is returned.
    pub fn scan(files: &[PathBuf], params: &ScanParams) -> Result<Self> {
        let scanned: Vec<Result<_>> = files
            .par_iter()
            .enumerate()
            .map(|(index, path)| scan::scan_file(path, index as u32, params))
            .collect();
        let (mut shards, mut groups) = (Vec::new(), Vec::new());
        for result in scanned {
            let (shard, shard_groups) = result?;
            shards.push(shard);
            groups.extend(shard_groups.into_iter().filter(|group| group.rows > 0));
        }
        Ok(Manifest::new(shards, groups))
    }

    /// A manifest of known parts.
    pub fn new(files: Vec<ShardFile>, groups: Vec<RowGroup>) -> Self {
        let mut hash = Xxh3::new();
        for file in &files {
            hash.update(file.path.file_name().unwrap_or_default().as_encoded_bytes());
            hash.update(&[0]);
            hash.update(&file.bytes.to_le_bytes());
            hash.update(&file.footer_hash.to_le_bytes());
        }
        for group in &groups {
            for number in [group.file.into(), group.index.into(), group.tokens] {
                hash.update(&u64::to_le_bytes(number));
            }
        }
        Manifest { files, groups, content_hash: hash.digest128() }
    }

    /// Documents and tokens of one split.
    pub fn totals(&self, split: Split) -> SplitSize {
        self.groups.iter().map(|group| group.split(split)).fold(
            SplitSize::default(),
            |sum, size| SplitSize {
                documents: sum.documents + size.documents,
                tokens: sum.tokens + size.tokens,
                bins: sum.bins + size.bins,
            },
        )
    }

    fn write_cache(&self, path: &Path) -> Result<()> {
        let failed = |error| DataError::io("write", path, error);
        let folder = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(failed)?;
        let header = serde_json::to_vec(&self.files).map_err(|error| failed(error.into()))?;
        let mut bytes = Vec::with_capacity(64 + header.len() + self.groups.len() * NUMBERS * 8);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&(header.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&header);
        for number in self.groups.iter().flat_map(|group| group.to_numbers()) {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&xxh3_64(&bytes).to_le_bytes());
        // The ranks of one machine may write at the same time: each its own file, then a rename.
        let own = partial_path(&path.with_extension(std::process::id().to_string()));
        write_and_publish(&own, path, &bytes)
    }
}

/// Hash of all that a cached manifest depends on: paths, sizes, times and parameters.
fn cache_key(files: &[PathBuf], params: &ScanParams) -> Result<u64> {
    let mut hash = Xxh3::new();
    hash.update(&params.validation_fraction.to_bits().to_le_bytes());
    hash.update(&params.bin_len.unwrap_or(0).to_le_bytes());
    hash.update(&params.vocab_size.to_le_bytes());
    for path in files {
        let facts = path.metadata().map_err(|error| DataError::io("read", path, error))?;
        let modified =
            facts.modified().ok().and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
        hash.update(path.as_os_str().as_encoded_bytes());
        hash.update(&facts.len().to_le_bytes());
        hash.update(&modified.map_or(0, |time| time.as_nanos()).to_le_bytes());
    }
    Ok(hash.digest())
}

fn cache_path(files: &[PathBuf], key: u64) -> Option<PathBuf> {
    let folder = files.first()?.parent()?.join(CACHE_FOLDER);
    Some(folder.join(format!("manifest-{key:016x}.bin")))
}

/// A cached manifest, where it is there and whole.
fn read_cache(path: &Path) -> Option<Manifest> {
    let bytes = std::fs::read(path).ok()?;
    let (body, checksum) = bytes.split_last_chunk::<8>()?;
    if xxh3_64(body) != u64::from_le_bytes(*checksum) {
        return None;
    }
    let body = body.strip_prefix(MAGIC)?;
    let (header_len, body) = body.split_first_chunk::<8>()?;
    let (header, numbers) = body.split_at_checked(u64::from_le_bytes(*header_len) as usize)?;
    let files = serde_json::from_slice(header).ok()?;
    let (words, rest) = numbers.as_chunks::<8>();
    let numbers: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
    let (groups, tail) = numbers.as_chunks::<NUMBERS>();
    if !rest.is_empty() || !tail.is_empty() {
        return None;
    }
    Some(Manifest::new(files, groups.iter().copied().map(RowGroup::from_numbers).collect()))
}
