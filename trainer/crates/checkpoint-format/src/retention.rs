//! Which checkpoints stay: the newest few, every so many steps, never the newest committed, never
//! one being read or written.

use crate::disk::{self, Folder};
use crate::error::{FormatError, Result};
use crate::{failpoint, names, scan};
use std::collections::BTreeSet;
use std::path::Path;

/// The steps to remove, of those committed (in that order): all but the newest `keep_last` (at
/// least 1) and the multiples of `keep_every_steps` (0: none are kept for that). Pure.
pub fn steps_to_remove(committed: &[u64], keep_last: usize, keep_every_steps: u64) -> Vec<u64> {
    let old = committed.len().saturating_sub(keep_last.max(1));
    let is_kept = |step: &u64| is_milestone(*step, keep_every_steps);
    committed[..old].iter().copied().filter(|step| !is_kept(step)).collect()
}

/// Whether a checkpoint is kept for good: its step is a multiple of `keep_every_steps` (0: none
/// is).
pub fn is_milestone(step: u64, keep_every_steps: u64) -> bool {
    keep_every_steps > 0 && step.is_multiple_of(keep_every_steps)
}

/// Removes old checkpoints, and damaged ones that are older than all that are kept by number.
/// Returns the steps removed.
///
/// # Errors
/// [`FormatError::Io`].
pub fn apply(checkpoints_dir: &Path, keep_last: usize, keep_every_steps: u64) -> Result<Vec<u64>> {
    let found = scan::scan(checkpoints_dir)?;
    // In the order of their commits: a run that went back to an earlier step has newer checkpoints
    // of lower steps.
    let mut committed: Vec<_> = found.committed.iter().map(|f| (f.generation, f.step)).collect();
    committed.sort_unstable();
    let committed: Vec<u64> = committed.into_iter().map(|(_, step)| step).collect();
    let mut remove: BTreeSet<u64> =
        steps_to_remove(&committed, keep_last, keep_every_steps).into_iter().collect();
    let kept = committed.len().saturating_sub(keep_last.max(1));
    let oldest_kept = committed[kept..].iter().min();
    if committed.len() > keep_last.max(1) {
        let damaged = found.damaged.iter().filter(|damaged| !damaged.is_link).map(|d| d.step);
        remove.extend(damaged.filter(|step| Some(step) < oldest_kept));
    }
    let mut removed = Vec::new();
    for step in remove {
        let folder = checkpoints_dir.join(names::step_folder(step));
        if !Folder::open(&folder)?.try_lock(true) {
            continue;
        }
        let generation = crate::fence::newest_generation(checkpoints_dir)?;
        let retired = checkpoints_dir.join(names::retired_folder(step, generation));
        disk::rename(&folder, &retired, failpoint::RETIRE_RENAME)?;
        remove_unless_read(&retired)?;
        removed.push(step);
    }
    Ok(removed)
}

/// Removes the folders that saves of this generation or older ones left unfinished. Only the run's
/// own writer calls it.
///
/// # Errors
/// [`FormatError::Io`].
pub fn remove_temporaries(checkpoints_dir: &Path, generation: u64) -> Result<()> {
    let entries = std::fs::read_dir(checkpoints_dir)
        .map_err(|error| FormatError::io("list", checkpoints_dir, error))?;
    for entry in entries {
        let entry = entry.map_err(|error| FormatError::io("list", checkpoints_dir, error))?;
        let name = entry.file_name();
        let found = name.to_str().and_then(names::parse_temporary_folder);
        if found.is_some_and(|found| found <= generation) {
            remove_unless_read(&entry.path())?;
        }
    }
    Ok(())
}

/// Removes a folder that no longer has a checkpoint's name, unless someone still reads it: the next
/// save tries again.
pub(crate) fn remove_unless_read(folder: &Path) -> Result<()> {
    let Ok(open) = Folder::open(folder) else { return Ok(()) };
    if !open.try_lock(true) {
        return Ok(());
    }
    failpoint::hit(failpoint::RETIRE_REMOVE)
        .and_then(|()| std::fs::remove_dir_all(folder))
        .map_err(|error| FormatError::io("remove", folder, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(committed: &[u64], keep_last: usize, keep_every: u64, expected: &[u64]) {
        assert_eq!(steps_to_remove(committed, keep_last, keep_every), expected);
    }

    #[test]
    fn the_newest_and_the_milestones_stay() {
        check(&[10, 20, 30, 40, 50], 2, 0, &[10, 20, 30]);
        check(&[10, 20, 30, 40, 50], 2, 20, &[10, 30]);
        check(&[10, 20], 3, 0, &[]);
        check(&[10, 20], 0, 0, &[10]);
        check(&[], 1, 5, &[]);
        check(&[0, 10], 1, 5, &[]);
        // Gone back from 30 to 10, and on to 15.
        check(&[10, 20, 30, 15], 2, 0, &[10, 20]);
    }
}
