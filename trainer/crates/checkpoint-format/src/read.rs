//! Reading a checkpoint: any box of any tensor, from whatever boxes hold it.
//!
//! Opening checks `COMMIT`, the manifest, the small files and all sizes. A box's bytes are compared
//! with their checksum when they are first touched, so that nothing that was altered is ever
//! returned. A shared lock on the folder keeps it from being removed while it is read.

use crate::boxes::{self, TensorBox};
use crate::checksum::{self, Checksum, sha256_hex};
use crate::disk::{Folder, is_plain_name};
use crate::error::{FormatError, Result};
use crate::index::{Index, StoredBox, TensorEntry};
use crate::manifest::{MANIFEST_VERSION, Manifest, STATE_VERSION, TrainState};
use crate::mapped::Mapped;
use crate::names;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::OnceLock;

/// Largest `COMMIT` that is read.
const MAX_COMMIT: u64 = 1024;
/// Largest `MANIFEST.json` that is read.
pub const MAX_MANIFEST: u64 = 64 << 20;
/// Largest `index.json` that is read.
pub const MAX_INDEX: u64 = 512 << 20;
/// Largest `state.json` that is read.
pub const MAX_STATE: u64 = 16 << 20;

/// An open, committed checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    folder: Folder,
    manifest: Manifest,
    index: Index,
    state: TrainState,
    maps: BTreeMap<String, OnceLock<Mapped>>,
    /// Per tensor and box: whether its bytes have their checksum.
    intact: BTreeMap<String, Vec<OnceLock<bool>>>,
}

impl Checkpoint {
    /// Opens the checkpoint in a folder.
    ///
    /// # Errors
    /// [`FormatError::Damaged`] where it is not committed, incomplete or altered;
    /// [`FormatError::Refused`] for what no writer makes (links, paths in names, sizes that are not
    /// possible); [`FormatError::Io`].
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let folder = Folder::open(path)?;
        folder.try_lock(false);
        let manifest = read_manifest(&folder)?;
        for (name, entry) in &manifest.files {
            let metadata = folder.open_file(name)?.metadata();
            let size =
                metadata.map_err(|error| FormatError::io("read", &path.join(name), error))?.len();
            if size != entry.size {
                return Err(FormatError::damaged(
                    path,
                    format!("{name} has {size} bytes, recorded are {}", entry.size),
                ));
            }
        }
        let index: Index = read_json(&folder, &manifest, names::INDEX, MAX_INDEX)?;
        let state: TrainState = read_json(&folder, &manifest, names::STATE, MAX_STATE)?;
        let sizes = manifest.files.iter().map(|(name, file)| (name.clone(), file.size)).collect();
        let coverage = index
            .validate(&sizes)
            .map_err(|reason| FormatError::refused(&path.join(names::INDEX), reason))?;
        if coverage != manifest.coverage {
            return Err(FormatError::damaged(path, "the manifest's coverage is not the index's"));
        }
        if state.version != STATE_VERSION || state.step != manifest.step {
            return Err(FormatError::damaged(
                path,
                format!(
                    "state.json is version {} of step {}, not {STATE_VERSION} of step {}",
                    state.version, state.step, manifest.step
                ),
            ));
        }
        let maps = manifest.files.keys().map(|name| (name.clone(), OnceLock::new())).collect();
        let intact = index.tensors.iter().map(|(name, entry)| {
            (name.clone(), entry.boxes.iter().map(|_| OnceLock::new()).collect())
        });
        let intact = intact.collect();
        Ok(Checkpoint { folder, manifest, index, state, maps, intact })
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// All that is not a tensor.
    pub fn state(&self) -> &TrainState {
        &self.state
    }

    /// The tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorEntry> {
        &self.index.tensors
    }

    /// One of its files, in the folder that was opened, whatever has that folder's name by now.
    ///
    /// # Errors
    /// [`FormatError::Refused`] for a link or a special file; [`FormatError::Damaged`] where it is
    /// missing.
    pub fn open_file(&self, name: &str) -> Result<File> {
        self.folder.open_file(name)
    }

    /// The bytes of `COMMIT` and of the manifest, in the folder that was opened.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn seal(&self) -> Result<(Vec<u8>, Vec<u8>)> {
        let commit = self.folder.read(names::COMMIT, MAX_COMMIT)?;
        let manifest = self.folder.read(names::MANIFEST, MAX_MANIFEST)?;
        checked_manifest(&self.path().join(names::MANIFEST), &commit, &manifest)?;
        Ok((commit, manifest))
    }

    /// The index.
    pub(crate) fn index(&self) -> &Index {
        &self.index
    }

    /// A tensor's entry.
    ///
    /// # Errors
    /// [`FormatError::NotFound`], naming what there is instead.
    pub fn tensor(&self, name: &str) -> Result<&TensorEntry> {
        self.index.tensors.get(name).ok_or_else(|| {
            let first = self.index.tensors.keys().next().map_or("none", String::as_str);
            FormatError::NotFound {
                what: format!("tensor {name}"),
                path: self.path().to_path_buf(),
                hint: format!(
                    ", which holds {} tensors, the first {first}",
                    self.index.tensors.len()
                ),
            }
        })
    }

    /// Fills `target` with the elements of a box of a tensor, row-major.
    ///
    /// # Errors
    /// [`FormatError::NotFound`]; [`FormatError::Request`] where the box is not in the tensor or
    /// `target` has another size; [`FormatError::Damaged`] where bytes it needs do not have their
    /// checksum.
    pub fn read_box(&self, name: &str, region: &TensorBox, target: &mut [u8]) -> Result<()> {
        let entry = self.tensor(name)?;
        let size = entry.dtype.size();
        let bytes = region.num_elements().and_then(|n| n.checked_mul(size as u64));
        if !region.fits(&entry.shape) || bytes != Some(target.len() as u64) {
            return Err(FormatError::Request(format!(
                "{name}: a box at {:?} of {:?} in {} bytes does not fit shape {:?} {}",
                region.offsets,
                region.lengths,
                target.len(),
                entry.shape,
                entry.dtype.name()
            )));
        }
        for (number, stored) in entry.boxes.iter().enumerate() {
            let Some(part) = region.intersect(&stored.region) else { continue };
            let source = self.box_bytes(name, number, stored)?;
            boxes::copy_part(&part, (source, &stored.region), (&mut *target, region), size)
                .map_err(|reason| FormatError::Request(format!("{name}: {reason}")))?;
        }
        Ok(())
    }

    /// A box's bytes in memory, once they have been found to have their checksum.
    fn box_bytes(&self, name: &str, number: usize, stored: &StoredBox) -> Result<&[u8]> {
        let bytes = self.bytes_of(&stored.file, stored.range)?;
        let intact = self.intact.get(name).and_then(|boxes| boxes.get(number));
        let intact = intact
            .is_some_and(|intact| *intact.get_or_init(|| Checksum::of(bytes) == stored.checksum));
        if intact {
            return Ok(bytes);
        }
        let what = format!("bytes {}..{}, of {name},", stored.range[0], stored.range[1]);
        let path = self.path().join(&stored.file);
        checksum::expect(&path, &what, Checksum::of(bytes), stored.checksum)?;
        Err(FormatError::damaged(&path, format!("{what} changed while they were read")))
    }

    fn bytes_of(&self, file: &str, range: [u64; 2]) -> Result<&[u8]> {
        let bytes = self.map(file)?.bytes();
        bytes.get(range[0] as usize..range[1] as usize).ok_or_else(|| {
            FormatError::damaged(self.path(), format!("{file} has only {} bytes", bytes.len()))
        })
    }

    /// The whole of a file in memory.
    pub(crate) fn map(&self, file: &str) -> Result<&Mapped> {
        let slot = self.maps.get(file).ok_or_else(|| {
            FormatError::damaged(self.path(), format!("{file} is not in the manifest"))
        })?;
        if let Some(mapped) = slot.get() {
            return Ok(mapped);
        }
        let mapped = Mapped::new(&self.folder.open_file(file)?, &self.path().join(file))?;
        Ok(slot.get_or_init(|| mapped))
    }
}

fn read_manifest(folder: &Folder) -> Result<Manifest> {
    let path = folder.path();
    if !folder.has(names::COMMIT) {
        return Err(FormatError::damaged(path, "it has no COMMIT: the save was not finished"));
    }
    let commit = folder.read(names::COMMIT, MAX_COMMIT)?;
    let bytes = folder.read(names::MANIFEST, MAX_MANIFEST)?;
    checked_manifest(&path.join(names::MANIFEST), &commit, &bytes)
}

/// A manifest of which `commit` is the `COMMIT`. `path` is its own, for messages.
pub(crate) fn checked_manifest(path: &Path, commit: &[u8], bytes: &[u8]) -> Result<Manifest> {
    if commit != format!("{}\n", sha256_hex(bytes)).as_bytes() {
        let folder = path.parent().unwrap_or(path);
        return Err(FormatError::damaged(folder, "COMMIT is not the SHA-256 of MANIFEST.json"));
    }
    let refused = |reason: String| Err(FormatError::refused(path, reason));
    let manifest: Manifest = match serde_json::from_slice(bytes) {
        Ok(manifest) => manifest,
        Err(error) => return refused(error.to_string()),
    };
    if manifest.version != MANIFEST_VERSION {
        return refused(format!("version {} is not {MANIFEST_VERSION}", manifest.version));
    }
    if let Some(name) = manifest.files.keys().find(|name| !is_plain_name(name)) {
        return refused(format!("{name:?} is not a file name"));
    }
    Ok(manifest)
}

fn read_json<T: serde::de::DeserializeOwned>(
    folder: &Folder,
    manifest: &Manifest,
    name: &str,
    limit: u64,
) -> Result<T> {
    let path = folder.path().join(name);
    let entry = manifest
        .files
        .get(name)
        .ok_or_else(|| FormatError::damaged(folder.path(), format!("the manifest lacks {name}")))?;
    let bytes = folder.read(name, limit)?;
    checksum::expect(&path, "it", Checksum::of(&bytes), entry.checksum)?;
    serde_json::from_slice(&bytes).map_err(|error| FormatError::refused(&path, error.to_string()))
}
