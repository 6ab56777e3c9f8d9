//! The memory tier: a folder in a memory file system that holds a run's newest checkpoint for as
//! long as its launcher lives. With several nodes each has one, which its agent holds in the
//! launcher's place ([`crate::cluster::depot`]).
//!
//! Ranks write and read it as they do the folder on disk; it outlives them, so that those that
//! start again find it. It goes with the launcher: removed by it at its end, and where it is killed
//! by a *keeper*, a process that waits for just that. What even the keeper did not come to is
//! removed by the next launcher here.

use crate::error::UserError;
use crate::print::err;
use checkpoint_format::names;
use run_config::RunConfig;
use rustix::fs::{Access, FlockOperation, flock};
use std::fs::{DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Begins the names of all such folders; the run's identity follows.
const PREFIX: &str = "phalanx-";
/// Locked by the launcher whose folder it is.
const HOLDER: &str = "holder";
/// Time for which a keeper looks whether a rank that is being killed makes something there again.
const PATIENCE: Duration = Duration::from_secs(1);
/// Time between two looks.
const POLL: Duration = Duration::from_millis(20);

/// The folder of one run under this launcher.
#[derive(Debug)]
pub struct MemoryTier {
    folder: PathBuf,
    keeper: Child,
    _holder: File,
}

/// Arguments of the keeper, which only the launcher starts.
#[derive(Clone, Debug, clap::Args)]
pub struct KeeperArgs {
    /// The folder.
    pub folder: PathBuf,
}

impl MemoryTier {
    /// Makes the folder of the run `run_id` in `parent`, and removes there what launchers left that
    /// are no more.
    ///
    /// # Errors
    /// Where it cannot be made, or no keeper starts.
    pub fn begin(parent: &Path, run_id: &str) -> io::Result<MemoryTier> {
        sweep(parent);
        let folder = parent.join(format!("{PREFIX}{run_id}"));
        // Nobody else reads weights that are not theirs.
        DirBuilder::new().mode(0o700).create(&folder)?;
        let begun = hold(&folder).and_then(|holder| Ok((holder, start_keeper(&folder)?)));
        match begun {
            Ok((holder, keeper)) => Ok(MemoryTier { folder, keeper, _holder: holder }),
            Err(error) => {
                let _ = std::fs::remove_dir_all(&folder);
                Err(error)
            }
        }
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The folder of checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.folder.join(names::CHECKPOINTS)
    }
}

impl Drop for MemoryTier {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}

/// Forgets all checkpoints in a folder of checkpoints.
///
/// # Errors
/// Where they cannot be removed.
pub fn forget(checkpoints: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(checkpoints) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The lock that says that the folder is in use. It has its name once it is held: a launcher that
/// sweeps in between takes no new folder for one that is left over.
fn hold(folder: &Path) -> io::Result<File> {
    let beginning = folder.join(format!("{HOLDER}.new"));
    let holder = File::create(&beginning)?;
    flock(&holder, FlockOperation::NonBlockingLockExclusive)?;
    std::fs::rename(beginning, folder.join(HOLDER))?;
    Ok(holder)
}

/// In a process group of its own, so that a terminal's signals do not reach it; unlike ranks it is
/// not killed with the launcher.
fn start_keeper(folder: &Path) -> io::Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("memory-keeper").arg(folder).process_group(0);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()
}

/// The keeper: waits until its launcher is gone, and removes the folder.
///
/// # Errors
/// Where it is none of a launcher's: nothing is removed.
pub fn keep(args: &KeeperArgs) -> Result<i32, UserError> {
    let folder = &args.folder;
    if !is_named(folder) || !folder.join(HOLDER).is_file() {
        let message = format!("{} is no folder of a launcher's", folder.display());
        return Err(UserError::usage(message).hint("only `phalanx run` has use for a keeper"));
    }
    // The end of the launcher ends its standard input.
    let _ = io::stdin().read_to_end(&mut Vec::new());
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        let _ = std::fs::remove_dir_all(folder);
        std::thread::sleep(POLL);
    }
    Ok(rank_protocol::exit_code::DONE)
}

fn is_named(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(PREFIX))
}

/// Whether ranks of this machine can keep checkpoints as `config` says.
///
/// # Errors
/// Where they cannot, with what to do.
pub fn check(config: &RunConfig) -> Result<(), UserError> {
    let memory = &config.checkpoint.memory;
    if memory.every_steps == 0 {
        return Ok(());
    }
    let folder = &memory.folder;
    let unusable = |why: &dyn std::fmt::Display| {
        let message = format!("checkpoint.memory.folder: {}: {why}", folder.display());
        let hint = "a folder of a file system in memory that you may write to, such as /dev/shm";
        Err(UserError::usage(message).hint(hint))
    };
    if !folder.is_dir() {
        return unusable(&"it is no folder");
    }
    if let Err(error) = rustix::fs::access(folder, Access::WRITE_OK | Access::EXEC_OK) {
        return unusable(&error);
    }
    if !is_in_memory(folder) {
        err!("note: checkpoint.memory.folder: {} is on a disk", folder.display());
    }
    Ok(())
}

fn is_in_memory(folder: &Path) -> bool {
    // TMPFS_MAGIC, RAMFS_MAGIC and HUGETLBFS_MAGIC of linux/magic.h.
    const KINDS: [i64; 3] = [0x0102_1994, 0x8584_58f6, 0x958d_58f6];
    rustix::fs::statfs(folder).is_ok_and(|found| KINDS.contains(&found.f_type))
}

/// Removes folders of this user whose launchers are gone.
fn sweep(parent: &Path) {
    let user = rustix::process::geteuid().as_raw();
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        // Of a link, this is what it is itself.
        let is_ours = entry.metadata().is_ok_and(|found| found.is_dir() && found.uid() == user);
        let path = entry.path();
        if !is_named(&path) || !is_ours || is_held(&path) {
            continue;
        }
        if let Err(error) = std::fs::remove_dir_all(&path) {
            err!("note: {} of a launcher that is gone stays: {error}", path.display());
        }
    }
}

/// Whether a launcher holds it, or may be about to.
fn is_held(folder: &Path) -> bool {
    match File::open(folder.join(HOLDER)) {
        Ok(holder) => flock(&holder, FlockOperation::NonBlockingLockExclusive).is_err(),
        // Just made; or another's of that name.
        Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_holds_is_removed_and_nothing_else() {
        let parent = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            std::fs::create_dir(parent.path().join(name)).unwrap();
            hold(&parent.path().join(name)).unwrap()
        };
        let _held = make("phalanx-a");
        drop(make("phalanx-b"));
        drop(make("other"));
        std::fs::create_dir(parent.path().join("phalanx-c")).unwrap();
        std::fs::write(parent.path().join("phalanx-d"), "").unwrap();
        std::os::unix::fs::symlink(parent.path().join("other"), parent.path().join("phalanx-e"))
            .unwrap();
        sweep(parent.path());
        let left = std::fs::read_dir(parent.path()).unwrap().flatten();
        let mut left: Vec<_> = left.map(|e| e.file_name().into_string().unwrap()).collect();
        left.sort();
        assert_eq!(left, ["other", "phalanx-a", "phalanx-c", "phalanx-d", "phalanx-e"]);
        assert!(parent.path().join("other/holder").exists());
    }

    #[test]
    fn what_is_forgotten_is_gone() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("phalanx-a");
        std::fs::create_dir_all(folder.join("checkpoints/step-0000001")).unwrap();
        forget(&folder.join("checkpoints")).unwrap();
        forget(&folder.join("checkpoints")).unwrap();
        assert!(folder.is_dir() && !folder.join("checkpoints").exists());
    }

    #[test]
    fn a_keeper_keeps_no_other_folder() {
        let parent = tempfile::tempdir().unwrap();
        for name in ["other", "phalanx-a"] {
            let folder = parent.path().join(name);
            std::fs::create_dir(&folder).unwrap();
            let error = keep(&KeeperArgs { folder: folder.clone() }).unwrap_err();
            assert!(error.message.contains("is no folder of a launcher's"), "{}", error.message);
            assert!(folder.is_dir());
        }
    }
}
