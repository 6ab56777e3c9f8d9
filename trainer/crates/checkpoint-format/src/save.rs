//! Writing a checkpoint: each rank its share, in a temporary folder; then rank 0 merges and
//! commits.
//!
//! ```text
//! rank 0      begin      fence, old temporaries away, room checked, temporary folder
//! barrier
//! each rank   write_rank tensor files, fsync, its part of the index, fsync, rename
//! barrier
//! rank 0      commit     index, state, manifest (coverage proven), COMMIT, fence, rename
//! barrier
//! each rank   committed  looks for the commit
//! ```
//! A rank that fails leaves no part (and, where it still can, a note why); rank 0 finds that, and
//! nothing is committed. All ranks pass all barriers whatever happens, so that no failure of a disk
//! makes another rank wait.

use crate::boxes::TensorBox;
use crate::checksum::sha256_hex;
use crate::disk::{self, Folder, Points};
use crate::dtype::Dtype;
use crate::error::{FormatError, Result};
use crate::failpoint;
use crate::fence::Fence;
use crate::index::{Index, StoredBox, TensorEntry};
use crate::manifest::{FileEntry, MANIFEST_VERSION, Manifest, TrainState};
use crate::tensor_file::{HeaderEntry, TensorFile};
use crate::{names, parallel, place, retention};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Largest tensor file a rank writes.
pub const MAX_FILE_BYTES: u64 = 4 << 30;
/// Largest part of an index that is read back.
const MAX_PART: u64 = 256 << 20;

const TENSORS: Points = Points { write: failpoint::WRITE_TENSORS, fsync: failpoint::FSYNC_TENSORS };
const PART: Points = Points { write: failpoint::WRITE_PART, fsync: failpoint::FSYNC_PART };
pub(crate) const STATE: Points =
    Points { write: failpoint::WRITE_STATE, fsync: failpoint::FSYNC_STATE };
pub(crate) const INDEX: Points =
    Points { write: failpoint::WRITE_INDEX, fsync: failpoint::FSYNC_INDEX };
pub(crate) const MANIFEST: Points =
    Points { write: failpoint::WRITE_MANIFEST, fsync: failpoint::FSYNC_MANIFEST };
pub(crate) const COMMIT: Points =
    Points { write: failpoint::WRITE_COMMIT, fsync: failpoint::FSYNC_COMMIT };

/// A part of a tensor that this rank writes.
#[derive(Clone, Debug)]
pub struct Piece<'a> {
    /// The tensor's name.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its global shape.
    pub shape: Vec<u64>,
    /// Which part of it.
    pub region: TensorBox,
    /// The part's elements, row-major.
    pub data: &'a [u8],
}

/// A rank's share as it was written.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RankPart {
    files: BTreeMap<String, FileEntry>,
    index: Index,
}

/// One save in progress; every rank has one.
#[derive(Clone, Debug)]
pub struct Save {
    checkpoints_dir: PathBuf,
    pub(crate) step: u64,
    pub(crate) generation: u64,
    max_file_bytes: u64,
}

impl Save {
    /// Of `step`, by that generation of the run, in `checkpoints_dir` (made where absent).
    pub fn new(checkpoints_dir: &Path, step: u64, generation: u64) -> Save {
        let checkpoints_dir = checkpoints_dir.to_path_buf();
        Save { checkpoints_dir, step, generation, max_file_bytes: MAX_FILE_BYTES }
    }

    /// With smaller files.
    #[must_use]
    pub fn with_max_file_bytes(mut self, max_file_bytes: u64) -> Save {
        self.max_file_bytes = max_file_bytes.max(1);
        self
    }

    /// The folder of checkpoints.
    pub fn checkpoints_dir(&self) -> &Path {
        &self.checkpoints_dir
    }

    /// The folder it is written in.
    pub fn temporary(&self) -> PathBuf {
        self.checkpoints_dir.join(names::temporary_folder(self.step, self.generation))
    }

    /// The folder it will be.
    pub fn folder(&self) -> PathBuf {
        self.checkpoints_dir.join(names::step_folder(self.step))
    }

    /// Rank 0, first: checks the fence, removes what older saves left, checks that `needed_bytes`
    /// (of all ranks) are free, and makes the temporary folder.
    ///
    /// # Errors
    /// [`FormatError::StaleGeneration`], [`FormatError::NoSpace`], [`FormatError::Io`].
    pub fn begin(&self, needed_bytes: u64) -> Result<()> {
        let dir = &self.checkpoints_dir;
        std::fs::create_dir_all(dir).map_err(|error| FormatError::io("create", dir, error))?;
        let _fence = Fence::raise(dir, self.generation)?;
        retention::remove_temporaries(dir, self.generation)?;
        if let Some(free) = disk::free_bytes(dir).filter(|free| *free < needed_bytes) {
            return Err(FormatError::NoSpace { path: dir.clone(), needed: needed_bytes, free });
        }
        let temporary = self.temporary();
        failpoint::hit(failpoint::CREATE_FOLDER)
            .and_then(|()| std::fs::create_dir(&temporary))
            .map_err(|error| FormatError::io("create", &temporary, error))
    }

    /// Each rank: writes its share. Returns the bytes written.
    ///
    /// # Errors
    /// [`FormatError::Write`] and the like; a note of it is left for rank 0 where the disk allows
    /// it.
    pub fn write_rank(&self, rank: usize, pieces: &[Piece<'_>]) -> Result<u64> {
        let written = self.write_share(rank, pieces);
        if let Err(error) = &written {
            // The missing part alone says that it failed; the note only says why.
            let note = self.temporary().join(names::failure_file(rank));
            let _ = std::fs::write(note, error.to_string());
        }
        written
    }

    fn write_share(&self, rank: usize, pieces: &[Piece<'_>]) -> Result<u64> {
        let mut pieces = self.cut(pieces)?;
        // Larger elements first keeps every tensor aligned to its element size.
        pieces.sort_by_key(|piece| std::cmp::Reverse(piece.dtype.size()));
        let mut groups: Vec<Vec<Piece<'_>>> = Vec::new();
        let mut group_bytes = 0;
        for piece in pieces {
            let size = piece.data.len() as u64;
            match groups.last_mut() {
                Some(group) if group_bytes + size <= self.max_file_bytes => {
                    group_bytes += size;
                    group.push(piece);
                }
                _ => {
                    group_bytes = size;
                    groups.push(vec![piece]);
                }
            }
        }
        let mut part = RankPart { files: BTreeMap::new(), index: Index::default() };
        let mut files = Vec::with_capacity(groups.len());
        for (number, group) in groups.iter().enumerate() {
            let name = names::tensor_file(rank, number);
            let (file, index) = self.write_file(&name, group)?;
            part.index.merge(index).map_err(FormatError::Request)?;
            files.push((name, file, OnceLock::new()));
        }
        // None waits for another to be on disk.
        parallel::for_each(&files, |(_, file, entry)| {
            let (size, checksum) = file.finish()?;
            entry.get_or_init(|| FileEntry { size, checksum });
            Ok(())
        })?;
        let entries =
            files.into_iter().filter_map(|(name, _, entry)| Some((name, entry.into_inner()?)));
        part.files.extend(entries);
        let bytes = part.files.values().map(|entry| entry.size).sum();
        let path = self.temporary().join(names::part_file(rank));
        let unfinished = path.with_extension("unfinished");
        disk::write_file(&unfinished, &json(&path, &part)?, PART)?;
        disk::rename(&unfinished, &path, failpoint::RENAME_PART)?;
        Ok(bytes)
    }

    /// Pieces larger than a file, cut by rows.
    fn cut<'a>(&self, pieces: &[Piece<'a>]) -> Result<Vec<Piece<'a>>> {
        let mut out = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let elements = piece.region.num_elements();
            if elements.map(|n| n as usize * piece.dtype.size()) != Some(piece.data.len()) {
                return Err(FormatError::Request(format!(
                    "{}: {} bytes do not fill a box of {:?} {}",
                    piece.name,
                    piece.data.len(),
                    piece.region.lengths,
                    piece.dtype.name()
                )));
            }
            let rows = piece.region.lengths.first().copied().unwrap_or(1);
            if piece.data.is_empty() {
                out.push(piece.clone());
                continue;
            }
            let row_bytes = piece.data.len() as u64 / rows;
            let at_once = (self.max_file_bytes / row_bytes).clamp(1, rows);
            let chunks = piece.data.chunks((at_once * row_bytes) as usize);
            for (number, data) in chunks.enumerate() {
                let mut region = piece.region.clone();
                if let (Some(offset), Some(length)) =
                    (region.offsets.first_mut(), region.lengths.first_mut())
                {
                    *offset += number as u64 * at_once;
                    *length = data.len() as u64 / row_bytes;
                }
                out.push(Piece { region, data, ..piece.clone() });
            }
        }
        Ok(out)
    }

    fn write_file(&self, name: &str, pieces: &[Piece<'_>]) -> Result<(TensorFile, Index)> {
        let entries: Vec<HeaderEntry> = pieces.iter().map(header_entry).collect();
        let path = self.temporary().join(name);
        let mut file = TensorFile::create(&path, &entries, &[], TENSORS)?;
        let mut index = Index::default();
        let mut start = file.data_start();
        let data: Vec<&[u8]> = pieces.iter().map(|piece| piece.data).collect();
        let checksums = file.write_all(&data)?;
        for (piece, checksum) in pieces.iter().zip(checksums) {
            let range = [start, start + piece.data.len() as u64];
            start = range[1];
            let file = name.to_string();
            let stored = StoredBox { region: piece.region.clone(), file, range, checksum };
            let entry =
                TensorEntry { shape: piece.shape.clone(), dtype: piece.dtype, boxes: vec![stored] };
            let share = Index { tensors: [(piece.name.clone(), entry)].into(), ..Index::default() };
            index.merge(share).map_err(FormatError::Request)?;
        }
        Ok((file, index))
    }

    /// Rank 0, when all have written: merges, proves the coverage, and commits. The bytes of the
    /// whole checkpoint.
    ///
    /// # Errors
    /// [`FormatError::NotCommitted`] where a rank failed or elements are missing;
    /// [`FormatError::StaleGeneration`]; [`FormatError::Write`] and the like. Nothing is committed
    /// then: call [`Save::abandon`].
    pub fn commit(&self, world_size: usize, state: &TrainState) -> Result<u64> {
        let temporary = self.temporary();
        let (mut files, index) = self.merge(0..world_size)?;
        let sizes = files.iter().map(|(name, file)| (name.clone(), file.size)).collect();
        let coverage = index.validate(&sizes).map_err(|reason| self.not_committed(reason))?;
        let mut write = |name: &str, bytes: &[u8], points: Points| -> Result<()> {
            let (size, checksum) = disk::write_file(&temporary.join(name), bytes, points)?;
            files.insert(name.to_string(), FileEntry { size, checksum });
            Ok(())
        };
        write(names::STATE, &pretty_json(&temporary.join(names::STATE), state)?, STATE)?;
        write(names::INDEX, &json(&temporary.join(names::INDEX), &index)?, INDEX)?;
        let bytes = files.values().map(|file| file.size).sum();
        let (step, generation) = (self.step, self.generation);
        let manifest = Manifest { version: MANIFEST_VERSION, step, generation, files, coverage };
        let path = temporary.join(names::MANIFEST);
        let manifest = pretty_json(&path, &manifest)?;
        disk::write_file(&path, &manifest, MANIFEST)?;
        disk::sync_folder(&temporary, failpoint::FSYNC_FOLDER)?;
        let path = temporary.join(names::COMMIT);
        let unfinished = path.with_extension("unfinished");
        disk::write_file(&unfinished, format!("{}\n", sha256_hex(&manifest)).as_bytes(), COMMIT)?;
        disk::rename(&unfinished, &path, failpoint::RENAME_COMMIT)?;
        disk::sync_folder(&temporary, failpoint::FSYNC_COMMITTED)?;
        place::take_name(&self.checkpoints_dir, self.step, self.generation, &temporary)?;
        Ok(bytes)
    }

    /// Reads the ranks' parts, checks that their files are there in full, and removes the parts.
    pub(crate) fn merge(
        &self,
        ranks: Range<usize>,
    ) -> Result<(BTreeMap<String, FileEntry>, Index)> {
        let folder = Folder::open(&self.temporary())?;
        let mut files = BTreeMap::new();
        let mut index = Index::default();
        for rank in ranks.clone() {
            let name = names::part_file(rank);
            if !folder.has(&name) {
                let why = folder.read(&names::failure_file(rank), 4096).unwrap_or_default();
                let why = String::from_utf8_lossy(&why);
                let why = if why.is_empty() { "it left no note why" } else { &why };
                return Err(self.not_committed(format!("rank {rank} wrote no share: {why}")));
            }
            let part: RankPart =
                serde_json::from_slice(&folder.read(&name, MAX_PART)?).map_err(|error| {
                    FormatError::damaged(&folder.path().join(&name), error.to_string())
                })?;
            for (name, entry) in part.files {
                let size = folder.open_file(&name)?.metadata().map(|metadata| metadata.len());
                if size.as_ref().ok() != Some(&entry.size) {
                    return Err(self.not_committed(format!(
                        "{name} of rank {rank} has {size:?} bytes, {} were written",
                        entry.size
                    )));
                }
                files.insert(name, entry);
            }
            index.merge(part.index).map_err(|reason| self.not_committed(reason))?;
        }
        for rank in ranks {
            let path = self.temporary().join(names::part_file(rank));
            std::fs::remove_file(&path).map_err(|error| FormatError::io("remove", &path, error))?;
        }
        Ok((files, index))
    }

    /// Rank 0, after a failure: removes what was written. Old checkpoints stay.
    pub fn abandon(&self) {
        let _ = std::fs::remove_dir_all(self.temporary());
    }

    /// Every rank, at the end: whether this save, and no older one of the same step, was committed.
    /// Its bytes.
    ///
    /// # Errors
    /// [`FormatError::NotCommitted`] where it was not.
    pub fn committed(&self) -> Result<u64> {
        let read = || -> Result<Manifest> {
            let folder = Folder::open(&self.folder())?;
            folder.open_file(names::COMMIT)?;
            let manifest = folder.read(names::MANIFEST, crate::read::MAX_MANIFEST)?;
            serde_json::from_slice(&manifest)
                .map_err(|error| FormatError::damaged(folder.path(), error.to_string()))
        };
        match read() {
            Ok(manifest) if manifest.generation == self.generation => {
                Ok(manifest.files.values().map(|file| file.size).sum())
            }
            Ok(manifest) => {
                let found = manifest.generation;
                Err(self.not_committed(format!("the one found is of generation {found}")))
            }
            Err(_) => Err(self.not_committed("another rank failed; its log says why".to_string())),
        }
    }

    pub(crate) fn not_committed(&self, reason: String) -> FormatError {
        FormatError::NotCommitted { step: self.step, reason }
    }
}

/// In a file, a part of a tensor is named `NAME[0:4,2:8]`, a whole one just NAME.
fn header_entry(piece: &Piece<'_>) -> HeaderEntry {
    HeaderEntry {
        name: entry_name(&piece.name, &piece.shape, &piece.region),
        dtype: piece.dtype,
        shape: piece.region.lengths.clone(),
        size: piece.data.len() as u64,
    }
}

/// The name of a box in the header of its file.
pub(crate) fn entry_name(name: &str, shape: &[u64], region: &TensorBox) -> String {
    if *region == TensorBox::whole(shape) {
        return name.to_string();
    }
    let spans = region.offsets.iter().zip(&region.lengths);
    let spans: Vec<_> =
        spans.map(|(offset, length)| format!("{offset}:{}", offset + length)).collect();
    format!("{name}[{}]", spans.join(","))
}

pub(crate) fn json(path: &Path, value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value)
        .map_err(|error| FormatError::Request(format!("cannot make {}: {error}", path.display())))
}

pub(crate) fn pretty_json(path: &Path, value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(value)
        .map_err(|error| FormatError::Request(format!("cannot make {}: {error}", path.display())))
}
