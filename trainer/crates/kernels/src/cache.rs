//! Compiled kernels on disk. A file is written under a name of its own and renamed, and what is
//! read is checked: ranks that compile at once, and writers that were killed, do no harm.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};

use crate::error::Result;

/// The first bytes of a file; the last is the format's number.
const MAGIC: [u8; 8] = *b"phxkern\x01";
const HASH_BYTES: usize = 32;
/// No file of ours is larger.
const MAX_BYTES: u64 = 64 << 20;

/// What a compilation depends on, as a hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key([u8; HASH_BYTES]);

impl Key {
    /// The key of these parts; their lengths count too.
    pub fn of(parts: &[&str]) -> Key {
        let mut hash = Sha256::new();
        for part in parts {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Key(hash.finalize().into())
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A folder of compiled kernels.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: Option<PathBuf>,
}

impl Cache {
    /// A cache in `folder`, which need not exist; without one, nothing is kept.
    pub fn new(folder: Option<PathBuf>) -> Cache {
        Cache { folder }
    }

    /// What is kept under `key`, or else what `make` makes, which is kept then. Where it cannot be
    /// written, a warning says so.
    ///
    /// # Errors
    /// What `make` fails with.
    pub fn get(&self, key: &Key, make: impl FnOnce() -> Result<Vec<u8>>) -> Result<Vec<u8>> {
        let Some(folder) = &self.folder else { return make() };
        let path = folder.join(format!("{key}.cubin"));
        match read(&path) {
            Ok(bytes) => return Ok(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                tracing::warn!("{}: {error}: the kernel is compiled again", path.display());
            }
        }
        let bytes = make()?;
        if let Err(error) = write(folder, &path, &bytes) {
            let folder = folder.display();
            tracing::warn!("{folder}: {error}: compiled kernels are not kept there");
        }
        Ok(bytes)
    }
}

/// The contents of a file, which are those that were written.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let damaged = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_string());
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    let head = MAGIC.len() + HASH_BYTES;
    if bytes.len() as u64 > MAX_BYTES || bytes.len() < head || bytes[..MAGIC.len()] != MAGIC {
        return Err(damaged("this is no compiled kernel of this version"));
    }
    let contents = bytes.split_off(head);
    if bytes[MAGIC.len()..] != Sha256::digest(&contents)[..] {
        return Err(damaged("its contents are not those that were written"));
    }
    Ok(contents)
}

fn write(folder: &Path, path: &Path, contents: &[u8]) -> io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    fs::create_dir_all(folder)?;
    let (process, count) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    // Nodes that share a folder may have equal process numbers: the time tells them apart.
    let time = std::time::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_nanos());
    let temporary = folder.join(format!(".{process}-{count}-{time:x}.tmp"));
    let fill = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).open(&temporary)?;
        file.write_all(&MAGIC)?;
        file.write_all(&Sha256::digest(contents))?;
        file.write_all(contents)?;
        drop(file);
        fs::rename(&temporary, path)
    };
    fill().inspect_err(|_| {
        // There may be none; and nothing reads it.
        let _ = fs::remove_file(&temporary);
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::KernelError;

    fn never() -> Result<Vec<u8>> {
        panic!("compiled where a file is kept")
    }

    #[test]
    fn a_key_depends_on_every_part_and_its_place() {
        let keys = [
            Key::of(&["ab", "c"]),
            Key::of(&["a", "bc"]),
            Key::of(&["abc"]),
            Key::of(&["c", "ab"]),
            Key::of(&["ab", "c", ""]),
        ];
        for (index, key) in keys.iter().enumerate() {
            assert!(!keys[..index].contains(key));
        }
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Key::of(&[]).to_string(), empty);
    }

    #[test]
    fn a_kernel_is_compiled_once() {
        let folder = tempfile::TempDir::new().unwrap();
        let cache = Cache::new(Some(folder.path().join("a/b")));
        let key = Key::of(&["x"]);
        assert_eq!(cache.get(&key, || Ok(vec![1, 2, 3])).unwrap(), [1, 2, 3]);
        assert_eq!(cache.get(&key, never).unwrap(), [1, 2, 3]);
        assert_eq!(Cache::new(None).get(&key, || Ok(vec![4])).unwrap(), [4]);
        let names: Vec<_> = fs::read_dir(folder.path().join("a/b")).unwrap().collect();
        assert_eq!(names.len(), 1);
    }

    #[test]
    fn a_failed_compilation_leaves_nothing() {
        let folder = tempfile::TempDir::new().unwrap();
        let cache = Cache::new(Some(folder.path().to_owned()));
        let key = Key::of(&["x"]);
        let fail = || {
            let tried = Vec::new();
            Err(KernelError::Absent { name: "x", tried, hint: "y" })
        };
        assert!(cache.get(&key, fail).is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_damaged_file_is_compiled_again() {
        let folder = tempfile::TempDir::new().unwrap();
        let cache = Cache::new(Some(folder.path().to_owned()));
        let key = Key::of(&["x"]);
        let path = folder.path().join(format!("{key}.cubin"));
        cache.get(&key, || Ok(vec![7; 100])).unwrap();
        let whole = fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        flipped[60] ^= 1;
        let mut other_version = whole.clone();
        other_version[7] = 2;
        for damage in [&flipped[..], &other_version, &whole[..139], &whole[..20], &[]] {
            fs::write(&path, damage).unwrap();
            assert_eq!(cache.get(&key, || Ok(vec![8; 100])).unwrap(), [8; 100]);
            assert_eq!(cache.get(&key, never).unwrap(), [8; 100]);
        }
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_no_failure() {
        let folder = tempfile::TempDir::new().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "x").unwrap();
        let cache = Cache::new(Some(file));
        assert_eq!(cache.get(&Key::of(&["x"]), || Ok(vec![1])).unwrap(), [1]);
    }

    /// Many at once: each gets the whole, and one file is left.
    #[test]
    fn ranks_that_compile_at_once_do_no_harm() {
        let folder = tempfile::TempDir::new().unwrap();
        let cache = Cache::new(Some(folder.path().to_owned()));
        let contents: Vec<u8> = (0..1_000_000_u32).map(|i| (i % 251) as u8).collect();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for round in 0..10 {
                        let key = Key::of(&["x", &round.to_string()]);
                        assert!(cache.get(&key, || Ok(contents.clone())).unwrap() == contents);
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 10);
    }
}
