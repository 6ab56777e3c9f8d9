//! The fence: a left-over process of an older generation can never commit.
//!
//! The newest generation that wrote in a folder of checkpoints is kept in a file there. It only
//! rises, and it is compared under a lock right before a checkpoint takes its name.

use crate::error::{FormatError, Result};
use crate::names;
use rustix::fs::FlockOperation;
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

/// Longest wait for the lock, which is held for milliseconds.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// The lock on a folder of checkpoints; given back on drop.
#[derive(Debug)]
pub struct Fence {
    _lock: File,
}

impl Fence {
    /// Takes the lock, refuses an older generation, and records a newer one.
    ///
    /// # Errors
    /// [`FormatError::StaleGeneration`]; [`FormatError::Io`] (also where the lock is not free in 10
    /// s).
    pub fn raise(checkpoints_dir: &Path, generation: u64) -> Result<Fence> {
        let lock = lock(checkpoints_dir)?;
        let newest = newest_generation(checkpoints_dir)?;
        if newest > generation {
            let path = checkpoints_dir.to_path_buf();
            return Err(FormatError::StaleGeneration { path, ours: generation, newest });
        }
        if newest < generation {
            let path = checkpoints_dir.join(names::FENCE);
            let fresh = checkpoints_dir.join(format!("{}.tmp", names::FENCE));
            std::fs::write(&fresh, format!("{generation}\n"))
                .and_then(|()| File::open(&fresh)?.sync_all())
                .and_then(|()| std::fs::rename(&fresh, &path))
                .map_err(|error| FormatError::io("write", &path, error))?;
        }
        Ok(Fence { _lock: lock })
    }
}

/// The newest generation that wrote in that folder; 0 where none did.
///
/// # Errors
/// [`FormatError::Io`]; [`FormatError::Refused`] where the file is not a number.
pub fn newest_generation(checkpoints_dir: &Path) -> Result<u64> {
    let path = checkpoints_dir.join(names::FENCE);
    match std::fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().map_err(|_| {
            FormatError::refused(&path, "it does not hold a generation number; remove the file")
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(FormatError::io("read", &path, error)),
    }
}

fn lock(checkpoints_dir: &Path) -> Result<File> {
    let path = checkpoints_dir.join(names::LOCK);
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(|error| FormatError::io("open", &path, error))?;
    let deadline = Instant::now() + LOCK_TIMEOUT;
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            // A file system without locks: the comparison still stands, only without the lock.
            Err(
                rustix::io::Errno::NOTSUP | rustix::io::Errno::NOLCK | rustix::io::Errno::NOSYS,
            ) => {
                return Ok(file);
            }
            Err(error) => return Err(FormatError::io("lock", &path, error.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fence_only_rises() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(newest_generation(folder.path()).unwrap(), 0);
        drop(Fence::raise(folder.path(), 2).unwrap());
        drop(Fence::raise(folder.path(), 2).unwrap());
        let error = Fence::raise(folder.path(), 1).unwrap_err();
        assert!(
            matches!(error, FormatError::StaleGeneration { ours: 1, newest: 2, .. }),
            "{error}"
        );
        drop(Fence::raise(folder.path(), 3).unwrap());
        assert_eq!(newest_generation(folder.path()).unwrap(), 3);
    }
}
