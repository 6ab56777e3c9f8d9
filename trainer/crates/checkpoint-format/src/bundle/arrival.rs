//! A bundle that comes from another node. It has its name only once every byte is there and has its
//! checksum.

use super::BundleManifest;
use crate::disk;
use crate::error::{FormatError, Result};
use crate::names;
use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};

/// One that is on its way; what is not finished is removed when dropped.
#[derive(Debug)]
pub struct BundleArrival {
    dir: PathBuf,
    manifest: BundleManifest,
    temporary: PathBuf,
    /// Files that are there and have their checksums.
    checked: BTreeSet<String>,
}

impl BundleArrival {
    /// Begins it, with the bytes of its `COMMIT` and of its manifest: in the folder `arriving`,
    /// until it takes its name in `dir`, of the same file system.
    ///
    /// # Errors
    /// As [`BundleManifest::sealed`]; [`FormatError::NoSpace`]; [`FormatError::Io`].
    pub fn begin(
        arriving: &Path,
        dir: &Path,
        commit: &[u8],
        manifest: &[u8],
    ) -> Result<BundleArrival> {
        let checked = BundleManifest::sealed(arriving, commit, manifest)?;
        for folder in [arriving, dir] {
            std::fs::create_dir_all(folder)
                .map_err(|error| FormatError::io("create", folder, error))?;
        }
        let needed = checked.bytes();
        if let Some(free) = disk::free_bytes(arriving).filter(|free| *free < needed) {
            return Err(FormatError::NoSpace { path: arriving.to_path_buf(), needed, free });
        }
        let temporary = arriving.join(checked.folder());
        let made = match std::fs::remove_dir_all(&temporary) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => std::fs::create_dir(&temporary),
        };
        made.map_err(|error| FormatError::io("create", &temporary, error))?;
        let arrival = BundleArrival {
            dir: dir.to_path_buf(),
            manifest: checked,
            temporary,
            checked: BTreeSet::new(),
        };
        for (name, bytes) in [(names::MANIFEST, manifest), (names::COMMIT, commit)] {
            let path = arrival.temporary.join(name);
            std::fs::write(&path, bytes).map_err(|error| FormatError::io("write", &path, error))?;
        }
        Ok(arrival)
    }

    /// Its manifest.
    pub fn manifest(&self) -> &BundleManifest {
        &self.manifest
    }

    /// Makes one of its files, which is written from its beginning to its end.
    ///
    /// # Errors
    /// [`FormatError::Write`]; [`FormatError::Request`] for a name that is not one of them.
    pub fn create(&self, name: &str) -> Result<File> {
        let path = self.temporary.join(name);
        let Some(entry) = self.manifest.files.get(name) else {
            return Err(FormatError::Request(format!("{name} is no file of the bundle")));
        };
        let (bytes, total) = (0, entry.size);
        File::create_new(&path).map_err(|error| FormatError::Write { path, bytes, total, error })
    }

    /// One of its files has been written, `checksum` being that of what was.
    ///
    /// # Errors
    /// [`FormatError::Damaged`] where that, or the size, is not what is recorded.
    pub fn wrote(&mut self, name: &str, checksum: crate::checksum::Checksum) -> Result<()> {
        let path = self.temporary.join(name);
        let Some(entry) = self.manifest.files.get(name) else {
            return Err(FormatError::Request(format!("{name} is no file of the bundle")));
        };
        crate::checksum::expect(&path, "it", checksum, entry.checksum)?;
        let found = std::fs::metadata(&path);
        let size = found.map_err(|error| FormatError::io("read", &path, error))?.len();
        if size != entry.size {
            let reason = format!("it has {size} bytes, recorded are {}", entry.size);
            return Err(FormatError::damaged(&path, reason));
        }
        self.checked.insert(name.to_owned());
        Ok(())
    }

    /// All files are there: the bundle takes its name, where none has it yet.
    ///
    /// # Errors
    /// [`FormatError::Damaged`] where one is missing; [`FormatError::Io`].
    pub fn finish(self) -> Result<()> {
        if let Some(name) = self.manifest.files.keys().find(|name| !self.checked.contains(*name)) {
            return Err(FormatError::damaged(&self.temporary, format!("{name} is missing")));
        }
        let path = self.dir.join(self.manifest.folder());
        if path.is_dir() {
            return Ok(());
        }
        std::fs::rename(&self.temporary, &path)
            .map_err(|error| FormatError::io("rename", &self.temporary, error))
    }
}

impl Drop for BundleArrival {
    fn drop(&mut self) {
        // Where it has its name by now, there is nothing under this one.
        let _ = std::fs::remove_dir_all(&self.temporary);
    }
}
