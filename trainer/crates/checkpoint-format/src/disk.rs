//! Files that are safe to read and durable once written.
//!
//! Reading: names with no path in them, no symbolic link followed, regular files only, sizes
//! bounded before anything is allocated. Writing: the checksum is taken of each piece while it is
//! in the cache, then it is written; a full disk is an error that names the file and the byte;
//! failpoints stand at each write, fsync and rename.

use crate::checksum::Checksum;
use crate::error::{FormatError, Result};
use crate::failpoint::{self, Fault};
use crate::parallel;
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes checksummed and written at a time: within the cache of a core.
const PIECE: usize = 256 << 10;
/// Bytes that one thread writes before it looks for more.
const SHARE: usize = 8 << 20;

/// Whether a name may stand in a manifest or an index: one plain component, no path.
pub fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 200
        && name != "."
        && name != ".."
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
}

/// An open folder, through which its files are reached without following links.
#[derive(Debug)]
pub struct Folder {
    fd: OwnedFd,
    path: PathBuf,
}

impl Folder {
    /// Opens a folder that is not itself a symbolic link.
    ///
    /// # Errors
    /// [`FormatError::Io`] where there is none; [`FormatError::Refused`] where it is a link.
    pub fn open(path: &Path) -> Result<Folder> {
        let link = std::fs::symlink_metadata(path)
            .map_err(|error| FormatError::io("open", path, error))?
            .file_type()
            .is_symlink();
        if link {
            return Err(FormatError::refused(path, "it is a symbolic link"));
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|error| FormatError::io("open", path, error.into()))?;
        Ok(Folder { fd, path: path.to_path_buf() })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes a lock that lasts as long as the folder is open: shared by readers, exclusive for the
    /// one who deletes. `false` where another holds it; a file system without locks grants it.
    pub fn try_lock(&self, exclusive: bool) -> bool {
        let operation = if exclusive {
            FlockOperation::NonBlockingLockExclusive
        } else {
            FlockOperation::NonBlockingLockShared
        };
        rustix::fs::flock(&self.fd, operation) != Err(rustix::io::Errno::WOULDBLOCK)
    }

    /// Opens a regular file in it for reading.
    ///
    /// # Errors
    /// [`FormatError::Refused`] for a name with a path in it, a link or a special file;
    /// [`FormatError::Damaged`] where the file is absent.
    pub fn open_file(&self, name: &str) -> Result<File> {
        if !is_plain_name(name) {
            return Err(FormatError::refused(&self.path, format!("{name:?} is not a file name")));
        }
        let path = self.path.join(name);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = match rustix::fs::openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(rustix::io::Errno::NOENT) => {
                return Err(FormatError::damaged(&self.path, format!("{name} is missing")));
            }
            Err(rustix::io::Errno::LOOP) => {
                return Err(FormatError::refused(&path, "it is a symbolic link"));
            }
            Err(error) => return Err(FormatError::io("open", &path, error.into())),
        };
        let metadata = file.metadata().map_err(|error| FormatError::io("read", &path, error))?;
        if !metadata.is_file() {
            return Err(FormatError::refused(&path, "it is not a regular file"));
        }
        Ok(file)
    }

    /// Reads a whole file of at most `limit` bytes.
    ///
    /// # Errors
    /// As [`Folder::open_file`]; [`FormatError::Refused`] where it is larger.
    pub fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>> {
        let path = self.path.join(name);
        let mut bytes = Vec::new();
        let file = self.open_file(name)?;
        file.take(limit + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| FormatError::io("read", &path, error))?;
        if bytes.len() as u64 > limit {
            return Err(FormatError::refused(&path, format!("it is over {limit} bytes")));
        }
        Ok(bytes)
    }

    /// Whether a file of that name is there, of whatever kind.
    pub fn has(&self, name: &str) -> bool {
        rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }
}

/// The failpoints of one kind of file.
#[derive(Clone, Copy, Debug)]
pub struct Points {
    /// At each write.
    pub write: &'static str,
    /// At the fsync.
    pub fsync: &'static str,
}

/// What one thread writes of a part.
struct WriteShare<'a> {
    part: usize,
    /// Where in the file.
    at: u64,
    bytes: &'a [u8],
    checksum: OnceLock<Checksum>,
}

/// A new file that is checksummed as it is written.
#[derive(Debug)]
pub struct DurableFile {
    file: File,
    path: PathBuf,
    points: Points,
    written: u64,
    total: u64,
    checksum: Checksum,
}

impl DurableFile {
    /// Makes a file that must not exist yet. `total` is the size it will have, for messages.
    ///
    /// # Errors
    /// [`FormatError::Write`].
    pub fn create(path: &Path, total: u64, points: Points) -> Result<DurableFile> {
        let file = File::create_new(path).map_err(|error| FormatError::Write {
            path: path.to_path_buf(),
            bytes: 0,
            total,
            error,
        })?;
        let (path, checksum) = (path.to_path_buf(), Checksum::default());
        Ok(DurableFile { file, path, points, written: 0, total, checksum })
    }

    /// Appends bytes; returns their own checksum.
    ///
    /// # Errors
    /// [`FormatError::Write`].
    pub fn write(&mut self, bytes: &[u8]) -> Result<Checksum> {
        let checksums = self.write_parts(&[bytes])?;
        Ok(checksums.first().copied().unwrap_or_default())
    }

    /// Appends parts, on several threads; returns the checksum of each.
    ///
    /// # Errors
    /// [`FormatError::Write`].
    pub fn write_parts(&mut self, parts: &[&[u8]]) -> Result<Vec<Checksum>> {
        let mut shares = Vec::new();
        let mut at = self.written;
        for (part, bytes) in parts.iter().enumerate() {
            for bytes in bytes.chunks(SHARE) {
                shares.push(WriteShare { part, at, bytes, checksum: OnceLock::new() });
                at += bytes.len() as u64;
            }
        }
        let written = AtomicU64::new(self.written);
        parallel::for_each(&shares, |share| {
            let checksum = self.write_share(share, &written);
            let checksum =
                checksum.map_err(|error| self.error(written.load(Ordering::Relaxed), error))?;
            share.checksum.get_or_init(|| checksum);
            Ok(())
        })?;
        self.written = at;
        let mut checksums = vec![Checksum::default(); parts.len()];
        for WriteShare { part, bytes, checksum, .. } in &shares {
            let (checksum, length) = (*checksum.get_or_init(Checksum::default), bytes.len() as u64);
            checksums[*part] = checksums[*part].then(checksum, length);
            self.checksum = self.checksum.then(checksum, length);
        }
        Ok(checksums)
    }

    fn write_share(&self, share: &WriteShare<'_>, written: &AtomicU64) -> io::Result<Checksum> {
        let (mut checksum, mut at) = (Checksum::default(), share.at);
        for piece in share.bytes.chunks(PIECE) {
            checksum = checksum.append(piece);
            match failpoint::check(self.points.write) {
                None => self.file.write_all_at(piece, at)?,
                Some(fault) => self.torn_write(piece, at, fault)?,
            }
            at += piece.len() as u64;
            written.fetch_add(piece.len() as u64, Ordering::Relaxed);
        }
        Ok(checksum)
    }

    /// A fault in the middle of a write leaves half of it.
    fn torn_write(&self, piece: &[u8], at: u64, fault: Fault) -> io::Result<()> {
        self.file.write_all_at(&piece[..piece.len() / 2], at)?;
        match fault {
            Fault::Abort => std::process::abort(),
            Fault::Error(error) => Err(error),
        }
    }

    /// Puts the file on disk; returns its size and checksum.
    ///
    /// # Errors
    /// [`FormatError::Write`].
    pub fn finish(&self) -> Result<(u64, Checksum)> {
        let synced = failpoint::hit(self.points.fsync).and_then(|()| self.file.sync_all());
        synced.map_err(|error| self.error(self.written, error))?;
        Ok((self.written, self.checksum))
    }

    fn error(&self, bytes: u64, error: io::Error) -> FormatError {
        FormatError::Write { path: self.path.clone(), bytes, total: self.total, error }
    }
}

/// Writes a small file whole and puts it on disk.
///
/// # Errors
/// [`FormatError::Write`].
pub fn write_file(path: &Path, bytes: &[u8], points: Points) -> Result<(u64, Checksum)> {
    let mut file = DurableFile::create(path, bytes.len() as u64, points)?;
    file.write(bytes)?;
    file.finish()
}

/// Renames, passing a failpoint before.
///
/// # Errors
/// [`FormatError::Io`].
pub fn rename(from: &Path, to: &Path, point: &'static str) -> Result<()> {
    failpoint::hit(point)
        .and_then(|()| std::fs::rename(from, to))
        .map_err(|error| FormatError::io("rename", from, error))
}

/// Puts a folder's entries on disk, passing a failpoint before.
///
/// # Errors
/// [`FormatError::Io`].
pub fn sync_folder(path: &Path, point: &'static str) -> Result<()> {
    failpoint::hit(point)
        .and_then(|()| File::open(path)?.sync_all())
        .map_err(|error| FormatError::io("flush", path, error))
}

/// Bytes free in the file system of `path` for this user; `None` where it does not say.
pub fn free_bytes(path: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(path).ok()?;
    stat.f_bavail.checked_mul(stat.f_frsize)
}
