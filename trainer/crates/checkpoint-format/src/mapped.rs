//! Read-only files in memory: the one place of this crate with unsafe code.
#![expect(unsafe_code, reason = "a memory map is unsafe by nature: the file could change under it")]

use crate::error::{FormatError, Result};
use std::fs::File;
use std::path::Path;

/// A whole file, mapped read-only; empty files have no map.
#[derive(Debug)]
pub struct Mapped(Option<memmap2::Mmap>);

impl Mapped {
    /// Maps a regular file, all of it.
    ///
    /// # Errors
    /// [`FormatError::Io`] where the file cannot be mapped.
    pub fn new(file: &File, path: &Path) -> Result<Mapped> {
        let size = file.metadata().map_err(|error| FormatError::io("read", path, error))?.len();
        if size == 0 {
            return Ok(Mapped(None));
        }
        // SAFETY: files of a committed checkpoint and of a published model are never written again:
        // writers make new files and rename them, and deletion leaves the mapped pages in place.
        // What a foreign process does to the bytes is found by the checksums; values read here are
        // plain bytes, for which every bit pattern is valid.
        let map = unsafe { memmap2::Mmap::map(file) };
        map.map(|map| Mapped(Some(map))).map_err(|error| FormatError::io("map", path, error))
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}
