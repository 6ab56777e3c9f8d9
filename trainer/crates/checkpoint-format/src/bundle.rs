//! What the ranks of one node wrote of a checkpoint, where no folder is shared: in the nodes'
//! memories. The bundles of all nodes make the checkpoint; each can be copied by itself.
//!
//! ```text
//! step-0001200.g0003.p00002/
//!   rank-00004-000.safetensors …   the shares of this node's ranks
//!   index.json                     their boxes alone
//!   state.json                     as in a checkpoint
//!   MANIFEST.json                  whose it is; every file: size, checksum
//!   COMMIT                         SHA-256 of MANIFEST.json, written last
//! ```
//! The step, the generation and the node's place are in the name: a bundle of a generation is never
//! taken for another's, and nothing is ever written twice.

mod arrival;
mod assembly;
mod joint;

pub use arrival::BundleArrival;
pub use assembly::Assembly;
pub use joint::{BundleReport, HandOver, JointBundle, Meeting};

use crate::checksum::{self, Checksum, sha256_hex};
use crate::disk::{self, Folder, is_plain_name};
use crate::error::{FormatError, Result};
use crate::failpoint;
use crate::manifest::{FileEntry, TrainState};
use crate::names;
use crate::read::{MAX_INDEX, MAX_STATE};
use crate::save::{COMMIT, INDEX, MANIFEST, STATE, Save, json, pretty_json};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Version of a bundle's `MANIFEST.json`.
pub const BUNDLE_VERSION: u32 = 1;
/// Largest manifest of a bundle that is read.
pub const MAX_BUNDLE_MANIFEST: u64 = 256 << 10;
/// Largest `COMMIT` that is read.
const MAX_COMMIT: u64 = 1024;

/// Which of the ranks that save together are on one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeRanks {
    /// The node's place.
    pub place: usize,
    /// Places of all nodes.
    pub places: usize,
    /// Its first rank.
    pub first: usize,
    /// How many it has.
    pub count: usize,
    /// Ranks of all nodes.
    pub world_size: usize,
}

impl NodeRanks {
    /// The ranks.
    pub fn ranks(&self) -> Range<usize> {
        self.first..self.first.saturating_add(self.count)
    }

    fn are_possible(&self) -> bool {
        let is_inside = self.first.checked_add(self.count).is_some_and(|n| n <= self.world_size);
        self.place < self.places && self.count > 0 && is_inside
    }
}

/// The files of a bundle, and whose they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BundleManifest {
    /// [`BUNDLE_VERSION`].
    pub version: u32,
    /// Identity of the run: steps and generations of another mean nothing.
    pub run: String,
    /// The step.
    pub step: u64,
    /// The generation of the run that wrote it.
    pub generation: u64,
    /// The ranks that did.
    pub node: NodeRanks,
    /// Files by name; all but `MANIFEST.json` and `COMMIT`.
    pub files: BTreeMap<String, FileEntry>,
}

impl BundleManifest {
    /// From the bytes of a `MANIFEST.json` and of its `COMMIT`, wherever they come from. `path` is
    /// the bundle's, for messages.
    ///
    /// # Errors
    /// [`FormatError::Damaged`] where `commit` is not its hash; [`FormatError::Refused`] where it
    /// is no manifest, or names a file that no rank of its node writes.
    pub fn sealed(path: &Path, commit: &[u8], bytes: &[u8]) -> Result<BundleManifest> {
        if commit != format!("{}\n", sha256_hex(bytes)).as_bytes() {
            return Err(FormatError::damaged(path, "COMMIT is not the SHA-256 of MANIFEST.json"));
        }
        let refused = |reason: String| Err(FormatError::refused(path, reason));
        let manifest: BundleManifest = match serde_json::from_slice(bytes) {
            Ok(manifest) => manifest,
            Err(error) => return refused(error.to_string()),
        };
        if manifest.version != BUNDLE_VERSION {
            return refused(format!("version {} is not {BUNDLE_VERSION}", manifest.version));
        }
        if !manifest.node.are_possible() {
            return refused(format!("{:?} are no ranks of a node", manifest.node));
        }
        let ranks = manifest.node.ranks();
        let is_its_own = |name: &&String| {
            let rank = names::parse_tensor_file(name).map(|(rank, _)| rank);
            let is_of_all = [names::INDEX, names::STATE].contains(&name.as_str());
            is_plain_name(name) && (is_of_all || rank.is_some_and(|rank| ranks.contains(&rank)))
        };
        if let Some(name) = manifest.files.keys().find(|name| !is_its_own(name)) {
            return refused(format!("{name:?} is no file of its ranks"));
        }
        let is_missing = |name: &&str| !manifest.files.contains_key(*name);
        if let Some(name) = [names::INDEX, names::STATE].into_iter().find(is_missing) {
            return refused(format!("it lacks {name}"));
        }
        Ok(manifest)
    }

    /// The name of its folder.
    pub fn folder(&self) -> String {
        names::bundle_folder(self.step, self.generation, self.node.place)
    }

    /// Bytes of its files; a sum that no number holds is the most.
    pub fn bytes(&self) -> u64 {
        self.files.values().fold(0, |sum, file| sum.saturating_add(file.size))
    }

    /// Checks the bytes of one of its files.
    ///
    /// # Errors
    /// [`FormatError::Damaged`]; [`FormatError::Request`] for a name that is not one of them.
    pub fn check(&self, path: &Path, name: &str, bytes: &[u8]) -> Result<()> {
        let Some(entry) = self.files.get(name) else {
            return Err(FormatError::Request(format!("{name} is no file of the bundle")));
        };
        checksum::expect(&path.join(name), "it", Checksum::of(bytes), entry.checksum)
    }
}

/// An open bundle.
#[derive(Debug)]
pub struct Bundle {
    folder: Folder,
    manifest: BundleManifest,
}

impl Bundle {
    /// Opens the bundle in a folder: `COMMIT`, the manifest, and the sizes of all files.
    ///
    /// # Errors
    /// [`FormatError::Damaged`], [`FormatError::Refused`], [`FormatError::Io`].
    pub fn open(path: &Path) -> Result<Bundle> {
        let folder = Folder::open(path)?;
        let commit = folder.read(names::COMMIT, MAX_COMMIT)?;
        let bytes = folder.read(names::MANIFEST, MAX_BUNDLE_MANIFEST)?;
        let manifest = BundleManifest::sealed(path, &commit, &bytes)?;
        for (name, entry) in &manifest.files {
            let found = folder.open_file(name)?.metadata();
            let size =
                found.map_err(|error| FormatError::io("read", &path.join(name), error))?.len();
            if size != entry.size {
                let reason = format!("{name} has {size} bytes, recorded are {}", entry.size);
                return Err(FormatError::damaged(path, reason));
            }
        }
        Ok(Bundle { folder, manifest })
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Its manifest.
    pub fn manifest(&self) -> &BundleManifest {
        &self.manifest
    }

    /// The bytes of `COMMIT` and of the manifest.
    ///
    /// # Errors
    /// As [`Bundle::open`].
    pub fn seal(&self) -> Result<(Vec<u8>, Vec<u8>)> {
        let commit = self.folder.read(names::COMMIT, MAX_COMMIT)?;
        Ok((commit, self.folder.read(names::MANIFEST, MAX_BUNDLE_MANIFEST)?))
    }

    /// One of its files.
    ///
    /// # Errors
    /// [`FormatError::Request`] for another name; else as [`Folder::open_file`].
    pub fn open_file(&self, name: &str) -> Result<File> {
        if !self.manifest.files.contains_key(name) {
            return Err(FormatError::Request(format!("{name} is no file of the bundle")));
        }
        self.folder.open_file(name)
    }

    /// The whole of `index.json` or `state.json`, with its checksum.
    ///
    /// # Errors
    /// [`FormatError::Damaged`]; else as [`Folder::read`].
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let bytes =
            self.folder.read(name, if name == names::INDEX { MAX_INDEX } else { MAX_STATE })?;
        self.manifest.check(self.path(), name, &bytes)?;
        Ok(bytes)
    }
}

/// The bundles of a folder of bundles that are whole, with their folders; what is damaged or
/// unfinished is passed over.
pub fn list(dir: &Path) -> Vec<BundleManifest> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path()).filter(|path| parsed(path).is_some());
    let mut found: Vec<BundleManifest> =
        paths.filter_map(|path| Bundle::open(&path).ok().map(|bundle| bundle.manifest)).collect();
    found.sort_by_key(|manifest| (manifest.generation, manifest.step, manifest.node.place));
    found
}

/// The folders of the bundles whose (generation, step) is not `kept`.
pub fn unwanted(dir: &Path, kept: impl Fn(u64, u64) -> bool) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let is_unwanted =
        |path: &PathBuf| parsed(path).is_some_and(|(step, generation, _)| !kept(generation, step));
    entries.map(|entry| entry.path()).filter(is_unwanted).collect()
}

fn parsed(path: &Path) -> Option<(u64, u64, usize)> {
    names::parse_bundle_folder(path.file_name()?.to_str()?)
}

impl Save {
    /// The folder of the bundle that the ranks of a place write.
    pub fn bundle(&self, place: usize) -> PathBuf {
        let name = names::bundle_folder(self.step, self.generation, place);
        self.checkpoints_dir().join(name)
    }

    /// The first rank of a node, when all of its ranks have written: merges their parts and gives
    /// the bundle, which is of this run, its name. Its bytes.
    ///
    /// # Errors
    /// As [`Save::commit`]; nothing is committed then.
    pub fn commit_bundle(&self, run: &str, node: &NodeRanks, state: &TrainState) -> Result<u64> {
        let temporary = self.temporary();
        let (mut files, index) = self.merge(node.ranks())?;
        let small = [
            (names::STATE, pretty_json(&temporary, state)?, STATE),
            (names::INDEX, json(&temporary, &index)?, INDEX),
        ];
        for (name, bytes, points) in small {
            let (size, checksum) = disk::write_file(&temporary.join(name), &bytes, points)?;
            files.insert(name.to_owned(), FileEntry { size, checksum });
        }
        let manifest = BundleManifest {
            version: BUNDLE_VERSION,
            run: run.to_owned(),
            step: self.step,
            generation: self.generation,
            node: *node,
            files,
        };
        let bytes = pretty_json(&temporary, &manifest)?;
        disk::write_file(&temporary.join(names::MANIFEST), &bytes, MANIFEST)?;
        let commit = format!("{}\n", sha256_hex(&bytes));
        disk::write_file(&temporary.join(names::COMMIT), commit.as_bytes(), COMMIT)?;
        disk::rename(&temporary, &self.bundle(node.place), failpoint::RENAME_STEP)?;
        Ok(manifest.bytes())
    }

    /// The first rank of a node, where another node failed: of this one nothing is to stay.
    pub fn abandon_bundle(&self, place: usize) {
        self.abandon();
        let _ = std::fs::remove_dir_all(self.bundle(place));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node() -> NodeRanks {
        NodeRanks { place: 1, places: 2, first: 2, count: 2, world_size: 4 }
    }

    /// What is said of a manifest of the ranks 2 and 3 with one more file, or other ranks.
    fn said(file: Option<&str>, node: NodeRanks) -> String {
        let entry = FileEntry { size: 1, checksum: Checksum::of(b"x") };
        let names = [names::INDEX, names::STATE, "rank-00002-000.safetensors"];
        let files = names.into_iter().chain(file).map(|name| (name.to_owned(), entry)).collect();
        let (version, run) = (BUNDLE_VERSION, "run-1".to_owned());
        let manifest = BundleManifest { version, run, step: 5, generation: 3, node, files };
        let bytes = serde_json::to_vec(&manifest).unwrap();
        let commit = format!("{}\n", sha256_hex(&bytes));
        let sealed = BundleManifest::sealed(Path::new("x"), commit.as_bytes(), &bytes);
        sealed.map_or_else(|error| error.to_string(), |_| String::new())
    }

    #[test]
    fn only_files_of_its_own_ranks_are_let_in() {
        assert_eq!(said(None, node()), "");
        assert_eq!(said(Some("rank-00003-012.safetensors"), node()), "");
        for name in [
            "rank-00001-000.safetensors",
            "rank-00004-000.safetensors",
            "../rank-00002-000.safetensors",
            "/etc/passwd",
            "COMMIT",
            "MANIFEST.json",
            "rank-00002.part.json",
            "holder",
        ] {
            assert!(said(Some(name), node()).contains("is no file of its ranks"), "{name}");
        }
    }

    #[test]
    fn ranks_that_cannot_be_are_refused() {
        for wrong in [
            NodeRanks { place: 2, ..node() },
            NodeRanks { count: 0, ..node() },
            NodeRanks { count: 3, ..node() },
            NodeRanks { first: usize::MAX, ..node() },
        ] {
            assert!(said(None, wrong).contains("are no ranks of a node"), "{wrong:?}");
        }
    }
}
