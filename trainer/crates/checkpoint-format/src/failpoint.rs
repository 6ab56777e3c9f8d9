//! Faults on purpose, for tests: the process aborts, or a call fails, at a named point of a save.
//!
//! `PHALANX_FAILPOINT=NAME[:COUNT][=abort|enospc|eio|slow][@FILE]`: the COUNT-th time (default the
//! first) that this process reaches the point NAME, it aborts (the default), or the call fails with
//! that error, or takes 5 s, as on a disk that is slow. With `@FILE`, the file is created when the
//! point fires, and a point whose file exists does not fire again: a test can assert that the fault
//! happened, and a restarted process gets past it. When the variable is unset, a point costs one
//! load of a constant.

use std::io;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Name of the variable.
pub const VARIABLE: &str = "PHALANX_FAILPOINT";
/// How long a slow disk takes.
const SLOW: Duration = Duration::from_secs(5);

macro_rules! points {
    ($($constant:ident = $name:literal: $doc:literal,)*) => {
        $(#[doc = $doc] pub const $constant: &str = $name;)*
        /// Every point of a save, in the order in which one with retention passes them.
        pub const ALL: &[&str] = &[$($name),*];
    };
}

points! {
    CREATE_FOLDER = "create_folder": "The temporary folder is made.",
    WRITE_TENSORS = "write_tensors": "A write to a rank's tensor file.",
    FSYNC_TENSORS = "fsync_tensors": "A rank's tensor file goes to disk.",
    WRITE_PART = "write_part": "A rank's part of the index is written.",
    FSYNC_PART = "fsync_part": "A rank's part of the index goes to disk.",
    RENAME_PART = "rename_part": "A rank's part of the index takes its name.",
    WRITE_STATE = "write_state": "`state.json` is written.",
    FSYNC_STATE = "fsync_state": "`state.json` goes to disk.",
    WRITE_INDEX = "write_index": "`index.json` is written.",
    FSYNC_INDEX = "fsync_index": "`index.json` goes to disk.",
    WRITE_MANIFEST = "write_manifest": "`MANIFEST.json` is written.",
    FSYNC_MANIFEST = "fsync_manifest": "`MANIFEST.json` goes to disk.",
    FSYNC_FOLDER = "fsync_folder": "The temporary folder goes to disk, before `COMMIT`.",
    WRITE_COMMIT = "write_commit": "`COMMIT` is written under a temporary name.",
    FSYNC_COMMIT = "fsync_commit": "`COMMIT` goes to disk under a temporary name.",
    RENAME_COMMIT = "rename_commit": "`COMMIT` takes its name.",
    FSYNC_COMMITTED = "fsync_committed": "The temporary folder goes to disk, with `COMMIT`.",
    RENAME_STEP = "rename_step": "The folder takes its name.",
    FSYNC_PARENT = "fsync_parent": "The folder of checkpoints goes to disk.",
    RETIRE_RENAME = "retire_rename": "An old checkpoint loses its name.",
    RETIRE_REMOVE = "retire_remove": "An old checkpoint's files are removed.",
}

/// A bundle is about to be copied to another node; no save passes it.
pub const COPY_BUNDLE: &str = "copy_bundle";
/// A manifest or `COMMIT` that came from another place is written; no save passes it.
pub const WRITE_ARRIVED: &str = "write_arrived";
/// Files that came from another place go to disk; no save passes it.
pub const FSYNC_ARRIVED: &str = "fsync_arrived";

struct Armed {
    name: String,
    count: u64,
    errno: Option<i32>,
    is_slow: bool,
    once: Option<PathBuf>,
    seen: AtomicU64,
}

static ARMED: OnceLock<Option<Armed>> = OnceLock::new();

fn parse(text: &str) -> Armed {
    let (text, once) = match text.split_once('@') {
        Some((text, file)) => (text, Some(PathBuf::from(file))),
        None => (text, None),
    };
    let (text, action) = text.split_once('=').unwrap_or((text, "abort"));
    let (name, count) = text.split_once(':').unwrap_or((text, "1"));
    let errno = match action {
        "enospc" => Some(rustix::io::Errno::NOSPC.raw_os_error()),
        "eio" => Some(rustix::io::Errno::IO.raw_os_error()),
        _ => None,
    };
    let count = count.parse().unwrap_or(1);
    let is_slow = action == "slow";
    Armed { name: name.to_string(), count, errno, is_slow, once, seen: AtomicU64::new(0) }
}

/// What a point that fires does.
#[derive(Debug)]
pub enum Fault {
    /// The process aborts.
    Abort,
    /// The call fails.
    Error(io::Error),
}

/// Passes a point: `Some` where it fires.
pub fn check(name: &str) -> Option<Fault> {
    let armed = ARMED.get_or_init(|| std::env::var(VARIABLE).ok().map(|text| parse(&text)));
    let armed = armed.as_ref().filter(|armed| armed.name == name)?;
    if armed.seen.fetch_add(1, Ordering::Relaxed) + 1 != armed.count {
        return None;
    }
    if let Some(file) = &armed.once {
        // Not created (it is there, or its folder is not): the fault has been, or cannot be shown.
        std::fs::File::create_new(file).ok()?;
    }
    if armed.is_slow {
        std::thread::sleep(SLOW);
        return None;
    }
    Some(match armed.errno {
        Some(errno) => Fault::Error(io::Error::from_raw_os_error(errno)),
        None => Fault::Abort,
    })
}

/// Passes a point: aborts the process or fails where it fires.
///
/// # Errors
/// The error the variable asks for.
pub fn hit(name: &str) -> io::Result<()> {
    match check(name) {
        None => Ok(()),
        Some(Fault::Abort) => std::process::abort(),
        Some(Fault::Error(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_is_read_as_documented() {
        let armed = parse("write_part:3=enospc@/tmp/fired");
        assert_eq!(armed.name, "write_part");
        assert_eq!(armed.count, 3);
        assert_eq!(armed.errno, Some(28));
        assert_eq!(armed.once, Some(PathBuf::from("/tmp/fired")));
        assert!(!armed.is_slow && parse("fsync_part=slow").is_slow);
        let armed = parse("fsync_part");
        assert_eq!((armed.count, armed.errno, armed.once), (1, None, None));
    }

    #[test]
    fn an_unarmed_point_passes() {
        assert!(ALL.iter().all(|name| hit(name).is_ok()));
    }
}
