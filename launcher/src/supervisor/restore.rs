//! Which checkpoint a generation continues from.

use checkpoint_format::Checkpoint;
use checkpoint_format::fence::Fence;
use checkpoint_format::scan::{Damaged, Found, scan};
use rank_protocol::RollBack;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// A resume at an earlier step than the newest: what older generations saved beyond it is another
/// future of the run, and no longer counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Branch {
    /// Step that was gone back to.
    pub step: u64,
    /// First generation after it.
    pub generation: u64,
}

/// What a search found.
#[derive(Clone, Debug, Default)]
pub struct Restored {
    /// The newest good checkpoint.
    pub found: Option<Found>,
    /// Newer ones that were passed over because they are damaged.
    pub damaged: Vec<Damaged>,
    /// Steps that the run had gone back behind when it was saved.
    pub roll_backs: Vec<RollBack>,
}

/// The steps that a run had gone back behind, as the trainer wrote them into a checkpoint.
fn roll_backs(checkpoint: &Checkpoint) -> Vec<RollBack> {
    let saved = checkpoint.state().extra["numeric"]["roll_backs"].clone();
    serde_json::from_value(saved).unwrap_or_default()
}

/// Whether a checkpoint belongs to the run as it went on after `branches`.
pub fn is_current(step: u64, generation: u64, branches: &[Branch]) -> bool {
    branches.iter().all(|branch| generation >= branch.generation || step <= branch.step)
}

/// The newest good checkpoint (or that of step `only`), all its bytes checked; older ones are read
/// only where a newer one is damaged.
///
/// # Errors
/// A message where the folder cannot be listed.
pub fn newest(dir: &Path, branches: &[Branch], only: Option<u64>) -> Result<Restored, String> {
    let mut scan = scan(dir).map_err(|error| error.to_string())?;
    let is_asked_for = |step: u64| only.is_none_or(|only| only == step);
    let mut damaged: Vec<Damaged> =
        scan.damaged.into_iter().filter(|damaged| is_asked_for(damaged.step)).collect();
    while let Some(found) = scan.committed.pop() {
        let is_current = only.is_some() || is_current(found.step, found.generation, branches);
        if !is_current || !is_asked_for(found.step) {
            continue;
        }
        let verified = Checkpoint::open(&found.path)
            .and_then(|checkpoint| checkpoint.verify().map(|_| roll_backs(&checkpoint)));
        match verified {
            Ok(roll_backs) => {
                damaged.retain(|damaged| damaged.step > found.step);
                return Ok(Restored { found: Some(found), damaged, roll_backs });
            }
            Err(error) => damaged.push(Damaged {
                step: found.step,
                path: found.path,
                reason: error.to_string(),
                is_link: false,
            }),
        }
    }
    Ok(Restored { damaged, ..Restored::default() })
}

/// Ranks of generations before `next` can save nothing from now on.
///
/// # Errors
/// A message where the folder cannot be written.
pub fn raise_fence(dir: &Path, next: u64) -> Result<(), String> {
    std::fs::create_dir_all(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    Fence::raise(dir, next).map(drop).map_err(|error| error.to_string())
}

/// Removes what saves of this generation and older ones left unfinished; their ranks are gone. The
/// next save would too, but there may be none.
pub fn remove_unfinished(dir: &Path, generation: u64) {
    if !dir.is_dir() {
        return;
    }
    if let Err(error) = checkpoint_format::retention::remove_temporaries(dir, generation) {
        tracing::warn!("unfinished checkpoints stay behind: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(step: u64, generation: u64, expected: bool) {
        let branches = [Branch { step: 100, generation: 3 }, Branch { step: 50, generation: 5 }];
        assert_eq!(is_current(step, generation, &branches), expected, "{step} of {generation}");
    }

    #[test]
    fn what_was_gone_back_behind_no_longer_counts() {
        check(50, 1, true);
        check(60, 1, false);
        check(300, 2, false);
        check(60, 4, false);
        check(60, 5, true);
    }
}
