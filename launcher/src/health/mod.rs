//! Whether a machine is fit to run ranks: a known product on each core, memory that keeps what is
//! written to it, a disk that gives back what it was given, a link that passes on what is sent, and
//! what the driver says of its GPUs. A rank on a machine that is not would fail, or worse, compute
//! something else.
//!
//! The checks run side by side, each within [`LIMIT`]; one that takes longer has failed. They are
//! small, and find what is broken, not what is a little slow.

mod checks;
pub(crate) mod gpus;
mod nvml;
mod xid;

use crate::error::UserError;
use rank_protocol::agent::Health;
use rank_protocol::exit_code;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

/// Longest time of a check.
pub const LIMIT: Duration = Duration::from_secs(1);
/// Longest time of the disk's: on a file system that thousands of nodes share, all look at once.
pub const DISK_LIMIT: Duration = Duration::from_secs(3);
/// Names the checks to fail, separated by `,`, for tests.
const FAULTS: &str = "PHALANX_HEALTH_FAULTS";
/// The most characters of a problem; all of them travel in the first message of an agent.
const MAX_CHARS: usize = 400;

/// How much is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// A few milliseconds: before ranks are started on this machine.
    Quick,
    /// Up to a second: before a node joins a run.
    Full,
}

/// What a check found: what it measured, or what is wrong.
type Found = Result<String, String>;

/// A check, by its name.
type Check = (&'static str, Duration, Box<dyn FnOnce() -> Found + Send>);

/// Looks at this machine; `dir` is a folder on the disk that counts.
pub fn check(dir: &Path, depth: Depth) -> Health {
    let faults = std::env::var(FAULTS).unwrap_or_default();
    let is_planted = |name: &str| faults.split(',').any(|fault| fault == name);
    let has_fault = ["compute", "memory", "disk", "link"].map(is_planted);
    let [compute, memory, disk, link] = has_fault;
    let dir: PathBuf = dir.to_owned();
    let mut asked: Vec<Check> = vec![
        ("compute", LIMIT, Box::new(move || checks::compute(compute))),
        ("memory", LIMIT, Box::new(move || checks::memory(depth, memory))),
        ("disk", DISK_LIMIT, Box::new(move || checks::disk(&dir, disk))),
    ];
    if depth == Depth::Full {
        asked.push(("link", LIMIT, Box::new(move || checks::link(link))));
        asked.push(("gpus", LIMIT, Box::new(gpus::check)));
    }
    let running: Vec<_> = asked.into_iter().map(start).collect();
    let mut health = Health::default();
    for (name, limit, found) in running {
        let late = || Err(format!("nothing within {} s", limit.as_secs()));
        match found.recv_timeout(limit).unwrap_or_else(|_| late()) {
            Ok(note) if note.is_empty() => {}
            Ok(note) => health.notes.push(format!("{name}: {note}")),
            Err(problem) => {
                let problem: String = problem.chars().take(MAX_CHARS).collect();
                health.problems.push(format!("{name}: {problem}"));
            }
        }
    }
    health
}

/// Refuses to start ranks on this machine where it is not well; `dir` is where runs will be.
///
/// # Errors
/// What is wrong, with the exit code of an unhealthy node.
pub fn require(dir: &Path) -> Result<(), UserError> {
    let absolute = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
    let there = absolute.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("/"));
    let health = check(there, Depth::Quick);
    if health.problems.is_empty() {
        return Ok(());
    }
    let message = format!("this machine is not well: {}", health.problems.join("; "));
    let error = UserError { code: exit_code::NODE_UNHEALTHY, ..UserError::failed(message) };
    Err(error.hint("use another, or `--set restart.health_check=false`"))
}

/// On a thread of its own, which is left behind where it does not come to an end.
fn start((name, limit, check): Check) -> (&'static str, Duration, mpsc::Receiver<Found>) {
    let (sender, found) = mpsc::channel();
    let failed = sender.clone();
    let started = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        let _ = sender.send(check());
    });
    if let Err(error) = started {
        let _ = failed.send(Err(format!("a thread cannot start: {error}")));
    }
    (name, limit, found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn a_machine_that_runs_tests_is_well() {
        let folder = tempfile::tempdir().unwrap();
        for depth in [Depth::Quick, Depth::Full] {
            let since = Instant::now();
            let health = check(folder.path(), depth);
            assert_eq!(health.problems, [""; 0], "{:?}", since.elapsed());
            assert!(health.notes.len() >= 3, "{:?}", health.notes);
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left");
    }

    #[test]
    fn a_check_that_hangs_has_failed() {
        let hangs: Check = (
            "disk",
            Duration::from_millis(20),
            Box::new(|| {
                std::thread::sleep(Duration::from_secs(5));
                Ok(String::new())
            }),
        );
        let (_, limit, found) = start(hangs);
        assert!(found.recv_timeout(limit).is_err());
    }
}
