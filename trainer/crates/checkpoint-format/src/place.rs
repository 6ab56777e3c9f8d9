//! How a checkpoint's folder comes to its name: from a save, or from another place (an object
//! store) file by file.

use crate::disk::{self, Folder, Points};
use crate::error::{FormatError, Result};
use crate::fence::{self, Fence};
use crate::manifest::FileEntry;
use crate::read::{MAX_MANIFEST, checked_manifest};
use crate::{Checkpoint, failpoint, names, parallel, retention};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Under the fence: `temporary` becomes the checkpoint of `step`, in exchange for an earlier one of
/// the same step.
pub(crate) fn take_name(dir: &Path, step: u64, generation: u64, temporary: &Path) -> Result<()> {
    let folder = dir.join(names::step_folder(step));
    let _fence = Fence::raise(dir, generation)?;
    if std::fs::symlink_metadata(&folder).is_err() {
        disk::rename(temporary, &folder, failpoint::RENAME_STEP)?;
        return disk::sync_folder(dir, failpoint::FSYNC_PARENT);
    }
    let retired = dir.join(names::retired_folder(step, generation));
    failpoint::hit(failpoint::RENAME_STEP)
        .map_err(|error| FormatError::io("rename", temporary, error))?;
    let exchanged = rustix::fs::renameat_with(
        rustix::fs::CWD,
        temporary,
        rustix::fs::CWD,
        &folder,
        rustix::fs::RenameFlags::EXCHANGE,
    );
    // A file system that cannot exchange: for a moment the step is under neither name, and the
    // checkpoint before it is the newest.
    let renames: Vec<(&Path, &Path)> = if exchanged.is_ok() {
        vec![(temporary, retired.as_path())]
    } else {
        vec![(folder.as_path(), retired.as_path()), (temporary, folder.as_path())]
    };
    for (from, to) in renames {
        std::fs::rename(from, to).map_err(|error| FormatError::io("rename", from, error))?;
    }
    disk::sync_folder(dir, failpoint::FSYNC_PARENT)?;
    retention::remove_unless_read(&retired)
}

/// Makes one of the `files` that are to come, of its full size, all of it a hole.
///
/// # Errors
/// [`FormatError::Write`]; [`FormatError::Request`] for a name that is not one of them.
pub(crate) fn create_listed(
    folder: &Path,
    files: &BTreeMap<String, FileEntry>,
    name: &str,
) -> Result<File> {
    let path = folder.join(name);
    let Some(entry) = files.get(name) else {
        return Err(FormatError::Request(format!("{name} is no file of the checkpoint")));
    };
    let made = File::create_new(&path).and_then(|file| file.set_len(entry.size).map(|()| file));
    let (bytes, total) = (0, entry.size);
    made.map_err(|error| FormatError::Write { path, bytes, total, error })
}

/// A checkpoint that comes from another place. Its folder has no checkpoint's name until every byte
/// is there and has its checksum; what is not finished is removed when dropped.
#[derive(Debug)]
pub struct Arrival {
    dir: PathBuf,
    step: u64,
    generation: u64,
    files: BTreeMap<String, FileEntry>,
    temporary: PathBuf,
}

impl Arrival {
    /// Largest manifest that is taken.
    pub const MAX_MANIFEST: u64 = MAX_MANIFEST;

    /// Begins it, with the bytes of its `COMMIT` and of its manifest, in the folder of checkpoints
    /// (made where absent).
    ///
    /// # Errors
    /// [`FormatError::Damaged`] and [`FormatError::Refused`], as for one on disk;
    /// [`FormatError::NoSpace`]; [`FormatError::Io`].
    pub fn begin(checkpoints_dir: &Path, commit: &[u8], manifest: &[u8]) -> Result<Arrival> {
        let dir = checkpoints_dir.to_path_buf();
        let checked = checked_manifest(&dir.join(names::MANIFEST), commit, manifest)?;
        let step = checked.step;
        std::fs::create_dir_all(&dir).map_err(|error| FormatError::io("create", &dir, error))?;
        // An old generation's checkpoint may come; it keeps no newer one's from being written.
        let generation = checked.generation.max(fence::newest_generation(&dir)?);
        // A manifest may say anything; a sum that overflows is more than there is.
        let sizes = checked.files.values().map(|file| file.size);
        let needed = sizes.fold(0u64, u64::saturating_add);
        if let Some(free) = disk::free_bytes(&dir).filter(|free| *free < needed) {
            return Err(FormatError::NoSpace { path: dir, needed, free });
        }
        let temporary = dir.join(names::temporary_folder(step, checked.generation));
        let made = match std::fs::remove_dir_all(&temporary) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => std::fs::create_dir(&temporary),
        };
        made.map_err(|error| FormatError::io("create", &temporary, error))?;
        let arrival = Arrival { dir, step, generation, files: checked.files, temporary };
        let points = Points { write: failpoint::WRITE_ARRIVED, fsync: failpoint::FSYNC_ARRIVED };
        let write = |name: &str, bytes: &[u8]| {
            disk::write_file(&arrival.temporary.join(name), bytes, points).map(|_| ())
        };
        write(names::MANIFEST, manifest)?;
        write(names::COMMIT, commit)?;
        Ok(arrival)
    }

    /// Its step.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The files that are to come, but for the manifest and `COMMIT`.
    pub fn files(&self) -> &BTreeMap<String, FileEntry> {
        &self.files
    }

    /// Makes one of them, of its full size; whoever fills it may do so in any order.
    ///
    /// # Errors
    /// [`FormatError::Write`]; [`FormatError::Request`] for a name that is not one of them.
    pub fn create(&self, name: &str) -> Result<File> {
        create_listed(&self.temporary, &self.files, name)
    }

    /// All files are there: puts them on disk, checks every byte, and gives the folder its name, in
    /// exchange for an earlier one of the same step. Its bytes.
    ///
    /// # Errors
    /// [`FormatError::Damaged`] and [`FormatError::Refused`], as for one on disk;
    /// [`FormatError::StaleGeneration`]; [`FormatError::Io`].
    pub fn finish(self) -> Result<u64> {
        let names: Vec<&String> = self.files.keys().collect();
        let folder = Folder::open(&self.temporary)?;
        parallel::for_each(&names, |name| {
            let synced = folder.open_file(name)?.sync_all();
            synced.map_err(|error| FormatError::io("flush", &self.temporary.join(name), error))
        })?;
        disk::sync_folder(&self.temporary, failpoint::FSYNC_ARRIVED)?;
        drop(folder);
        let bytes = Checkpoint::open(&self.temporary)?.verify()?.bytes;
        take_name(&self.dir, self.step, self.generation, &self.temporary)?;
        Ok(bytes)
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        // Where it has its name by now, there is nothing under this one.
        let _ = std::fs::remove_dir_all(&self.temporary);
    }
}
