//! A checkpoint that is put together from bundles, on a node whose ranks go on from it.
//!
//! It looks whole to whoever opens it, and what its ranks do not read may be holes: their bytes do
//! not have their checksums, so that nobody ever takes them for anything.

use super::BundleManifest;
use crate::checksum::sha256_hex;
use crate::disk::{self, Points};
use crate::error::{FormatError, Result};
use crate::index::Index;
use crate::manifest::{FileEntry, MANIFEST_VERSION, Manifest};
use crate::save::json;
use crate::{Checkpoint, failpoint, names, place};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

const POINTS: Points = Points { write: failpoint::WRITE_ARRIVED, fsync: failpoint::FSYNC_ARRIVED };

/// One that is being put together; what is not finished is removed when dropped.
#[derive(Debug)]
pub struct Assembly {
    dir: PathBuf,
    step: u64,
    generation: u64,
    files: BTreeMap<String, FileEntry>,
    index: Index,
    temporary: PathBuf,
}

impl Assembly {
    /// Begins it in a folder of checkpoints (made where absent), of the bundles of all places in
    /// their order and the indexes of each, with the `state` of the first.
    ///
    /// # Errors
    /// [`FormatError::Damaged`] where they do not make a whole checkpoint; [`FormatError::Io`].
    pub fn begin(
        dir: &Path,
        bundles: Vec<(BundleManifest, Index)>,
        state: &[u8],
    ) -> Result<Assembly> {
        let damaged = |reason: String| FormatError::damaged(dir, reason);
        let manifests: Vec<&BundleManifest> =
            bundles.iter().map(|(manifest, _)| manifest).collect();
        check_places(&manifests).map_err(damaged)?;
        let Some(first) = manifests.first() else { return Err(damaged("no bundles".into())) };
        let (step, generation) = (first.step, first.generation);
        first.check(dir, names::STATE, state)?;
        let mut files = BTreeMap::new();
        let mut index = Index::default();
        for (manifest, part) in bundles {
            let tensors = manifest.files.into_iter();
            files.extend(tensors.filter(|(name, _)| names::parse_tensor_file(name).is_some()));
            index.merge(part).map_err(damaged)?;
        }
        let sizes = files.iter().map(|(name, file)| (name.clone(), file.size)).collect();
        let coverage = index.validate(&sizes).map_err(damaged)?;
        std::fs::create_dir_all(dir).map_err(|error| FormatError::io("create", dir, error))?;
        let temporary = dir.join(names::temporary_folder(step, generation));
        std::fs::create_dir(&temporary)
            .map_err(|error| FormatError::io("create", &temporary, error))?;
        let mut assembly =
            Assembly { dir: dir.to_path_buf(), step, generation, files, index, temporary };
        assembly.write(names::STATE, state)?;
        let text = json(dir, &assembly.index)?;
        assembly.write(names::INDEX, &text)?;
        let files = assembly.files.clone();
        let manifest = Manifest { version: MANIFEST_VERSION, step, generation, files, coverage };
        let text = json(dir, &manifest)?;
        let commit = format!("{}\n", sha256_hex(&text));
        for (name, bytes) in [(names::MANIFEST, &text[..]), (names::COMMIT, commit.as_bytes())] {
            disk::write_file(&assembly.temporary.join(name), bytes, POINTS)?;
        }
        Ok(assembly)
    }

    /// A small file, which becomes one of the manifest's.
    fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let (size, checksum) = disk::write_file(&self.temporary.join(name), bytes, POINTS)?;
        self.files.insert(name.to_owned(), FileEntry { size, checksum });
        Ok(())
    }

    /// The index of the whole checkpoint.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// A tensor file that is here already, of the same file system: it takes no memory once more.
    ///
    /// # Errors
    /// [`FormatError::Io`].
    pub fn link(&self, name: &str, from: &Path) -> Result<()> {
        let to = self.temporary.join(name);
        std::fs::hard_link(from, &to).map_err(|error| FormatError::io("link", from, error))
    }

    /// Makes a tensor file of its full size, all of it a hole; whoever fills some of it may do so
    /// in any order.
    ///
    /// # Errors
    /// [`FormatError::Write`]; [`FormatError::Request`] for a name that is not one of them.
    pub fn create(&self, name: &str) -> Result<File> {
        place::create_listed(&self.temporary, &self.files, name)
    }

    /// All files are there: the checkpoint takes its name. Its folder.
    ///
    /// # Errors
    /// As [`Checkpoint::open`]; [`FormatError::Io`].
    pub fn finish(self) -> Result<PathBuf> {
        drop(Checkpoint::open(&self.temporary)?);
        place::take_name(&self.dir, self.step, self.generation, &self.temporary)?;
        Ok(self.dir.join(names::step_folder(self.step)))
    }
}

impl Drop for Assembly {
    fn drop(&mut self) {
        // Where it has its name by now, there is nothing under this one.
        let _ = std::fs::remove_dir_all(&self.temporary);
    }
}

/// They are of one save, one of each place, and of each rank.
fn check_places(manifests: &[&BundleManifest]) -> std::result::Result<(), String> {
    let mut next = 0;
    for (place, manifest) in manifests.iter().enumerate() {
        let BundleManifest { step, generation, node, .. } = manifest;
        let first = manifests[0];
        let is_of_one_save = (*step, *generation) == (first.step, first.generation)
            && manifest.run == first.run
            && (node.places, node.world_size) == (manifests.len(), first.node.world_size);
        if !is_of_one_save || (node.place, node.first) != (place, next) {
            return Err(format!(
                "in place {place} is {node:?} of step {step}, generation {generation}"
            ));
        }
        next += node.count;
    }
    match manifests.first().map(|manifest| manifest.node.world_size) {
        Some(world_size) if world_size == next => Ok(()),
        world_size => Err(format!("bundles of {next} ranks, not of {world_size:?}")),
    }
}
