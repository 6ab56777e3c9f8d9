//! Which checkpoint a generation continues from.

use crate::remote::access::RemoteError;
use crate::remote::transfer::Width;
use crate::remote::{self, Place};
use checkpoint_format::fence::Fence;
use checkpoint_format::scan::{Damaged, Found, scan};
use checkpoint_format::{Checkpoint, names};
use rank_protocol::RollBack;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often the object store is asked for one thing.
const ATTEMPTS: u32 = 3;
/// The pause between.
const PAUSE: Duration = Duration::from_secs(2);

/// Bytes of a checkpoint that one machine reads before ranks do: a few seconds of a fast disk.
pub const READ_UP_TO: u64 = 16 << 30;

/// Of which checkpoints on disk every byte is read in the search. The ranks check what they load,
/// all of it together, each its own part: a large checkpoint is only read whole once they have
/// found one that is damaged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reads {
    /// Of all.
    #[default]
    All,
    /// Of those of at most so many bytes; of others only that all files are there, of their sizes.
    UpTo(u64),
}

/// The most generations whose beginnings are kept in mind.
const MAX_RESUMES: usize = 100;

/// Where a checkpoint was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// The memory of this machine, or of the run's nodes.
    Memory,
    /// The run's folder.
    Local,
    /// The object store.
    Remote,
}

impl Tier {
    /// In words; of a run on several nodes or on this machine alone.
    pub fn describe(self, is_on_nodes: bool) -> &'static str {
        match self {
            Tier::Memory if is_on_nodes => "the nodes' memories",
            Tier::Memory => "this machine's memory",
            Tier::Local => "the run's folder",
            Tier::Remote => "the object store",
        }
    }
}

/// A resume at an earlier step than the newest: what older generations saved beyond it is another
/// future of the run, and no longer counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Branch {
    /// Step that was gone back to.
    pub step: u64,
    /// First generation after it.
    pub generation: u64,
}

/// A checkpoint of which the run's nodes have the parts in their memories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Its step.
    pub step: u64,
    /// The generation that wrote it.
    pub generation: u64,
}

/// What is looked for, and where.
#[derive(Clone, Debug, Default)]
pub struct Search {
    /// The run's folder of checkpoints.
    pub dir: PathBuf,
    /// The one in memory.
    pub memory: Option<PathBuf>,
    /// The newest that is whole in the nodes' memories.
    pub kept: Option<Kept>,
    /// Earlier resumes at a step that was not the newest.
    pub branches: Vec<Branch>,
    /// The step that was asked for; `None`: the newest.
    pub only: Option<u64>,
    /// The newest step that is known to have been committed.
    pub committed: Option<u64>,
    /// Which checkpoints are read whole.
    pub reads: Reads,
    /// The run's last generation: what lies elsewhere and is of a later one is none of its own.
    pub generation: u64,
    /// Where else to look, if something is missing or damaged here.
    pub remote: Option<Place>,
}

/// What a search found.
#[derive(Clone, Debug, Default)]
pub struct Restored {
    /// The newest good checkpoint.
    pub found: Option<Found>,
    /// Where it was.
    pub tier: Option<Tier>,
    /// Newer ones that were passed over because they are damaged.
    pub damaged: Vec<Damaged>,
    /// Steps that the run had gone back behind when it was saved.
    pub roll_backs: Vec<RollBack>,
    /// How long it took to come from the object store, where it did.
    pub fetched: Option<Duration>,
    /// What went wrong with the object store.
    pub troubles: Vec<String>,
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

/// Notes what a generation goes on from. Of the earlier ones those alone are kept that still say
/// something.
pub fn went_back(resumes: &mut Vec<Branch>, to: Branch) {
    resumes.retain(|before| before.step < to.step);
    resumes.push(to);
    let old = resumes.len().saturating_sub(MAX_RESUMES);
    resumes.drain(..old);
}

/// The newest good checkpoint (or the one asked for) over all tiers, its bytes checked (see
/// [`Reads`]); older ones are read only where a newer one is damaged. The object store is asked
/// only where what was committed is not here, so that a restart does not wait for it.
///
/// # Errors
/// A message where the folder cannot be listed.
pub fn newest(search: &Search) -> Result<Restored, String> {
    let mut restored = newest_here(search)?;
    let here = restored.found.as_ref().map(|found| found.step);
    let is_here = match search.only {
        Some(_) => here.is_some(),
        None => here >= search.committed,
    };
    let Some(place) = search.remote.as_ref().filter(|_| !is_here) else { return Ok(restored) };
    let began = Instant::now();
    if let Some((found, roll_backs)) = fetch_newer(search, place, here, &mut restored.troubles) {
        restored.damaged.retain(|damaged| damaged.step > found.step);
        (restored.tier, restored.fetched) = (Some(Tier::Remote), Some(began.elapsed()));
        (restored.found, restored.roll_backs) = (Some(found), roll_backs);
    }
    Ok(restored)
}

/// Copies the newest checkpoint of the object store here that is newer than what is `here`, and
/// returns it with the steps that the run had gone back behind; `None`: there is none that is good.
/// An older one is taken only where a newer one is damaged, or does not come in several attempts.
fn fetch_newer(
    search: &Search,
    place: &Place,
    here: Option<u64>,
    troubles: &mut Vec<String>,
) -> Option<(Found, Vec<RollBack>)> {
    let listed = tried(|_| remote::list(place)).map_err(|error| troubles.push(error.to_string()));
    let mut stored = listed.ok()?;
    stored.retain(|stored| {
        let (step, generation) = (stored.target.step, stored.target.generation);
        let is_wanted = match search.only {
            Some(only) => step == only,
            None => Some(step) > here && is_current(step, generation, &search.branches),
        };
        is_wanted && generation <= search.generation
    });
    stored.sort_by_key(|stored| (stored.target.step, stored.target.generation));
    for stored in stored.iter().rev() {
        let (step, generation) = (stored.target.step, stored.target.generation);
        let path = search.dir.join(names::step_folder(step));
        let fetched = tried(|width| remote::fetch(place, stored.target, &search.dir, width));
        let opened = fetched.and_then(|bytes| {
            let opened = Checkpoint::open(&path);
            let opened = opened.map_err(|error| RemoteError::Local(error.to_string()));
            opened.map(|checkpoint| (bytes, roll_backs(&checkpoint)))
        });
        match opened {
            Ok((bytes, roll_backs)) => {
                return Some((Found { step, path, generation, bytes }, roll_backs));
            }
            Err(error) => troubles.push(format!("step {step}: {error}")),
        }
    }
    None
}

/// Asks again where that may be of use, for less at once.
fn tried<T>(ask: impl Fn(Width) -> Result<T, RemoteError>) -> Result<T, RemoteError> {
    let mut width = Width::FULL;
    for _ in 1..ATTEMPTS {
        match ask(width) {
            Err(RemoteError::Remote(reason)) => {
                tracing::debug!("asking again: {reason}");
                std::thread::sleep(PAUSE);
                width = width.narrower();
            }
            outcome => return outcome,
        }
    }
    ask(width)
}

/// Of those in memory and on disk; of equal ones that in memory.
fn newest_here(search: &Search) -> Result<Restored, String> {
    let kept = search.kept.filter(|_| search.only.is_none());
    if let Some(Kept { step, generation }) = kept {
        let on_disk = newest_in(&search.dir, Some(step), search)?;
        // It has no folder before the nodes put it together.
        let (path, bytes) = (PathBuf::new(), 0);
        return Ok(match on_disk.found {
            Some(_) => Restored { tier: Some(Tier::Local), ..on_disk },
            None => {
                let found = Some(Found { step, path, generation, bytes });
                Restored { found, tier: Some(Tier::Memory), ..on_disk }
            }
        });
    }
    let memory = search.memory.as_ref().filter(|_| search.only.is_none());
    let kept = memory.map(|dir| newest_in(dir, None, search)).transpose()?;
    let step = kept.as_ref().and_then(|kept| Some(kept.found.as_ref()?.step));
    let mut on_disk = newest_in(&search.dir, step, search)?;
    on_disk.tier = on_disk.found.is_some().then_some(Tier::Local);
    let Some(mut kept) = kept else { return Ok(on_disk) };
    if on_disk.found.is_some() || kept.found.is_none() {
        on_disk.damaged.extend(kept.damaged);
        return Ok(on_disk);
    }
    kept.tier = Some(Tier::Memory);
    kept.damaged.extend(on_disk.damaged);
    Ok(kept)
}

/// The newest good one in a folder, of steps above `above`.
fn newest_in(dir: &Path, above: Option<u64>, search: &Search) -> Result<Restored, String> {
    let mut scan = scan(dir).map_err(|error| error.to_string())?;
    scan.committed.retain(|found| Some(found.step) > above);
    scan.damaged.retain(|damaged| Some(damaged.step) > above);
    let is_asked_for = |step: u64| search.only.is_none_or(|only| only == step);
    let mut damaged: Vec<Damaged> =
        scan.damaged.into_iter().filter(|damaged| is_asked_for(damaged.step)).collect();
    while let Some(found) = scan.committed.pop() {
        let is_current =
            search.only.is_some() || is_current(found.step, found.generation, &search.branches);
        if !is_current || !is_asked_for(found.step) {
            continue;
        }
        let verified = Checkpoint::open(&found.path).and_then(|checkpoint| {
            match search.reads {
                Reads::UpTo(bytes) if found.bytes > bytes => {}
                _ => {
                    checkpoint.verify()?;
                }
            }
            Ok(roll_backs(&checkpoint))
        });
        match verified {
            Ok(roll_backs) => {
                damaged.retain(|damaged| damaged.step > found.step);
                let found = Some(found);
                return Ok(Restored { found, damaged, roll_backs, ..Restored::default() });
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
    use checkpoint_format::{Dtype, Piece, Save, TensorBox, TrainState};

    /// Checkpoints of these steps.
    fn saved(steps: &[u64]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for step in steps {
            let save = Save::new(folder.path(), *step, 1);
            save.begin(0).unwrap();
            let region = TensorBox::whole(&[64]);
            let (name, shape, data) = ("x".into(), vec![64], vec![7; 64 * 8]);
            let piece = Piece { name, dtype: Dtype::I64, shape, region, data: &data };
            save.write_rank(0, &[piece]).unwrap();
            save.commit(1, &TrainState { generation: 1, ..TrainState::at(*step) }).unwrap();
        }
        folder
    }

    /// The last of them has one wrong bit in a tensor.
    fn damaged_last(steps: &[u64]) -> tempfile::TempDir {
        let folder = saved(steps);
        let last = names::step_folder(*steps.last().unwrap());
        let path = folder.path().join(last).join(names::tensor_file(0, 0));
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(path, bytes).unwrap();
        folder
    }

    #[test]
    fn the_newest_of_memory_and_disk_is_taken() {
        let check = |memory: &[u64], disk: &[u64], expected: (Option<u64>, Option<Tier>)| {
            let (memory, disk) = (saved(memory), saved(disk));
            let search = Search {
                dir: disk.path().into(),
                memory: Some(memory.path().into()),
                ..Search::default()
            };
            let restored = newest(&search).unwrap();
            assert_eq!((restored.found.map(|found| found.step), restored.tier), expected);
        };
        check(&[], &[], (None, None));
        check(&[30], &[], (Some(30), Some(Tier::Memory)));
        check(&[30], &[20], (Some(30), Some(Tier::Memory)));
        check(&[30], &[20, 30], (Some(30), Some(Tier::Memory)));
        check(&[30], &[40], (Some(40), Some(Tier::Local)));
        check(&[], &[40], (Some(40), Some(Tier::Local)));
        // The one in memory is damaged; one that was asked for is not looked for there.
        let (memory, disk) = (damaged_last(&[30]), saved(&[20, 30]));
        let (dir, memory) = (disk.path().into(), Some(memory.path().into()));
        let search = Search { dir, memory, ..Search::default() };
        let restored = newest(&search).unwrap();
        assert_eq!((restored.found.unwrap().step, restored.tier), (30, Some(Tier::Local)));
        let restored = newest(&Search { only: Some(20), ..search }).unwrap();
        assert_eq!((restored.found.unwrap().step, restored.tier), (20, Some(Tier::Local)));
    }

    /// What several nodes keep has no folder.
    #[test]
    fn the_newest_of_the_nodes_memories_and_disk_is_taken() {
        let check = |kept: Option<u64>, disk: &[u64], expected: (Option<u64>, Option<Tier>)| {
            let disk = saved(disk);
            let kept = kept.map(|step| Kept { step, generation: 1 });
            let search = Search { dir: disk.path().into(), kept, ..Search::default() };
            let restored = newest(&search).unwrap();
            assert_eq!((restored.found.map(|found| found.step), restored.tier), expected);
        };
        check(None, &[20], (Some(20), Some(Tier::Local)));
        check(Some(30), &[], (Some(30), Some(Tier::Memory)));
        check(Some(30), &[20, 30], (Some(30), Some(Tier::Memory)));
        check(Some(30), &[20, 40], (Some(40), Some(Tier::Local)));
        let disk = saved(&[20, 30]);
        let kept = Some(Kept { step: 40, generation: 1 });
        let search = Search { dir: disk.path().into(), kept, only: Some(20), ..Search::default() };
        let restored = newest(&search).unwrap();
        assert_eq!((restored.found.unwrap().step, restored.tier), (20, Some(Tier::Local)));
    }

    #[test]
    fn what_a_generation_did_not_go_on_from_is_given_up() {
        let mut resumes = Vec::new();
        // From the start; from step 30; from step 30 once more; from step 10, as of a disk.
        for (generation, step) in [(1, 0), (2, 30), (3, 30), (4, 10)] {
            went_back(&mut resumes, Branch { step, generation });
        }
        assert_eq!(resumes.len(), 2, "{resumes:?}");
        let counts = |generation, step| is_current(step, generation, &resumes);
        assert!(counts(4, 40) && counts(3, 10) && counts(1, 5));
        assert!(!counts(3, 30) && !counts(2, 20) && !counts(1, 35));
        // Back behind numeric trouble: nothing of before counts.
        went_back(&mut resumes, Branch { step: 0, generation: 5 });
        assert!(!is_current(10, 4, &resumes) && is_current(10, 5, &resumes));
    }

    #[test]
    fn large_checkpoints_are_left_to_the_ranks_until_they_find_one_damaged() {
        let folder = damaged_last(&[10, 20]);
        let found = |reads: Reads| {
            let search = Search { dir: folder.path().into(), reads, ..Search::default() };
            let restored = newest(&search).unwrap();
            (restored.found.map(|found| found.step), restored.damaged.len())
        };
        assert_eq!(found(Reads::UpTo(READ_UP_TO)), (Some(10), 1));
        assert_eq!(found(Reads::UpTo(100)), (Some(20), 0));
        assert_eq!(found(Reads::All), (Some(10), 1));
    }

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
