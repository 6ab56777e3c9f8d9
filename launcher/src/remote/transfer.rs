//! Checkpoints on their way to an object store and back. What is committed there is there in full,
//! and what gets a checkpoint's name here has every byte as it was saved.

use super::access::RemoteError;
use super::store::{MAX_SMALL, Remote, Result, local};
use super::uploads::Target;
use bytes::BytesMut;
use checkpoint_format::checksum::{self, Checksum};
use checkpoint_format::manifest::{FileEntry, Manifest};
use checkpoint_format::{Arrival, Checkpoint, FormatError, names};
use futures::stream::{FuturesUnordered, StreamExt, TryStreamExt};
use object_store::path::Path as Key;
use object_store::{Error as StoreError, MultipartUpload, ObjectStoreExt, UploadPart};
use std::collections::BTreeMap;
use std::fs::File;
use std::future::Future;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use tokio::io::AsyncReadExt;

/// Bytes of a request: larger files are sent and fetched in parts of it.
const PART: u64 = 8 << 20;
/// Files under way at once, at most.
const MAX_FILES: usize = 4;
/// Parts of one file under way at once, at most. With [`PART`] and [`MAX_FILES`] it bounds what a
/// copy takes of memory: 128 MiB.
const MAX_PARTS: usize = 4;

/// How much is under way at once: less on a link that has shown not to carry all of it in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Width(usize);

impl Width {
    /// The most.
    pub const FULL: Width = Width(MAX_FILES * MAX_PARTS);

    /// After a request that was not answered in time, or was refused.
    #[must_use]
    pub fn narrower(self) -> Width {
        Width((self.0 / 4).max(1))
    }

    /// After a copy that went well.
    #[must_use]
    pub fn wider(self) -> Width {
        Width((self.0 + 1).min(Self::FULL.0))
    }

    fn files(self) -> usize {
        self.0.min(MAX_FILES)
    }

    fn parts(self) -> usize {
        (self.0 / self.files()).max(1)
    }
}

impl Remote {
    /// Copies the checkpoint in the folder `from`, but for what is there already, and commits it.
    /// Its bytes; `None`: all of it was there.
    ///
    /// # Errors
    /// [`RemoteError::Remote`]; [`RemoteError::Gone`] where another has taken its place here, or
    /// none; [`RemoteError::Local`] where it is damaged here.
    pub async fn upload(&self, from: &Path, target: Target, width: Width) -> Result<Option<u64>> {
        match self.try_upload(from, target, width).await {
            // It may have been removed since it was opened.
            Err(RemoteError::Local(why)) if !is_there(from, target) => Err(RemoteError::Gone(why)),
            outcome => outcome,
        }
    }

    async fn try_upload(&self, from: &Path, target: Target, width: Width) -> Result<Option<u64>> {
        // As long as it is open, nobody removes its files, whoever has its name by then.
        let checkpoint = Arc::new(Checkpoint::open(from).map_err(local)?);
        let manifest = checkpoint.manifest();
        if (manifest.step, manifest.generation) != (target.step, target.generation) {
            let found = (manifest.step, manifest.generation);
            let what = format!("{} is of step and generation {found:?} by now", from.display());
            return Err(RemoteError::Gone(what));
        }
        let (commit, manifest_bytes) = checkpoint.seal().map_err(local)?;
        let folder = self.folder(target);
        let held = self.sizes(&folder).await?;
        if held.contains_key(names::COMMIT) {
            return Ok(None);
        }
        let is_absent =
            |(name, entry): &(&String, &FileEntry)| held.get(*name) != Some(&entry.size);
        let absent = manifest.files.iter().filter(is_absent);
        let absent: Vec<_> = absent.map(|(name, entry)| (name.clone(), *entry)).collect();
        each(absent, width.files(), |(name, entry)| {
            let (remote, from) = (self.clone(), checkpoint.clone());
            let key = folder.clone().join(name.as_str());
            async move { remote.send(&from, &name, key, entry, width).await }
        })
        .await?;
        let key = folder.clone().join(names::MANIFEST);
        let put = self.hear(self.store.put(&key, manifest_bytes.into()).await);
        put.map_err(|error| self.failed(&key, &error))?;
        // Whatever else happens in that folder: what is committed is there.
        self.expect_all(&folder, &manifest.files).await.map_err(|error| match error {
            RemoteError::Damaged(what) => RemoteError::Remote(what),
            other => other,
        })?;
        let key = folder.join(names::COMMIT);
        if !self.create(&key, commit.clone().into()).await?
            && self.small(&key, MAX_SMALL).await?.as_deref() != Some(commit.as_slice())
        {
            let what = format!("{} ({key}) is there, and another's", self.place.url);
            return Err(RemoteError::Damaged(what));
        }
        Ok(Some(manifest.files.values().map(|file| file.size).sum()))
    }

    /// Every file is there, of its size.
    async fn expect_all(&self, folder: &Key, files: &BTreeMap<String, FileEntry>) -> Result<()> {
        let held = self.sizes(folder).await?;
        for (name, entry) in files {
            let size = entry.size;
            let found = match held.get(name) {
                Some(found) if *found == size => continue,
                Some(found) => format!("has {found} bytes, recorded are {size}"),
                None => "is missing".to_owned(),
            };
            return Err(RemoteError::Damaged(format!("{folder}/{name} {found}")));
        }
        Ok(())
    }

    /// Sends one file, and makes sure that what was sent is what was saved.
    async fn send(
        &self,
        from: &Checkpoint,
        name: &str,
        key: Key,
        entry: FileEntry,
        width: Width,
    ) -> Result<()> {
        let path = from.path().join(name);
        let file = from.open_file(name).map_err(local)?;
        let mut file = tokio::fs::File::from_std(file);
        if entry.size <= PART {
            let bytes = read_part(&mut file, &path, entry.size).await?;
            intact(&path, Checksum::of(&bytes), entry)?;
            let put = self.hear(self.store.put(&key, bytes.freeze().into()).await);
            return put.map(|_| ()).map_err(|error| self.failed(&key, &error));
        }
        let begun = self.store.put_multipart(&key).await;
        let mut upload = begun.map_err(|error| self.failed(&key, &error))?;
        let sent = self.send_parts((&path, file), entry, (&key, upload.as_mut()), width).await;
        if sent.is_err() {
            // Its parts cost money; where that fails too, the store's own rules remove them.
            let _ = upload.abort().await;
        }
        sent
    }

    async fn send_parts(
        &self,
        (path, mut file): (&Path, tokio::fs::File),
        entry: FileEntry,
        (key, upload): (&Key, &mut dyn MultipartUpload),
        width: Width,
    ) -> Result<()> {
        let refused = |error: StoreError| self.failed(key, &error);
        let mut checksum = Checksum::default();
        let mut left = entry.size;
        let mut under_way: FuturesUnordered<UploadPart> = FuturesUnordered::new();
        while left > 0 {
            let bytes = read_part(&mut file, path, left.min(PART)).await?;
            left -= bytes.len() as u64;
            checksum = checksum.append(&bytes);
            if under_way.len() >= width.parts() {
                self.hear(under_way.try_next().await).map_err(refused)?;
            }
            under_way.push(upload.put_part(bytes.freeze().into()));
        }
        while self.hear(under_way.try_next().await).map_err(refused)?.is_some() {}
        intact(path, checksum, entry)?;
        upload.complete().await.map(|_| ()).map_err(refused)
    }

    /// Copies a checkpoint into the folder of checkpoints `dir`; every byte is checked before it
    /// has its name there. Its bytes.
    ///
    /// # Errors
    /// [`RemoteError::Remote`]; [`RemoteError::Damaged`]; [`RemoteError::Local`] where there is no
    /// room.
    pub async fn fetch(&self, target: Target, dir: &Path, width: Width) -> Result<u64> {
        let folder = self.folder(target);
        let commit = self.needed(&folder, names::COMMIT, MAX_SMALL).await?;
        let manifest = self.needed(&folder, names::MANIFEST, Arrival::MAX_MANIFEST).await?;
        // Before anything of what it says is done.
        let path = Path::new(&folder.to_string()).join(names::MANIFEST);
        let says = Manifest::sealed(&path, &commit, &manifest).map_err(arrived)?;
        if (says.step, says.generation) != (target.step, target.generation) {
            let what = format!("is of step {}, generation {}", says.step, says.generation);
            return Err(RemoteError::Damaged(format!("{folder} {what}")));
        }
        self.expect_all(&folder, &says.files).await?;
        let arrival = Arrival::begin(dir, &commit, &manifest).map_err(arrived)?;
        let files = arrival.files().iter().map(|(name, entry)| (name.clone(), entry.size));
        let files: Vec<_> = files.collect();
        each(files, width.files(), |(name, size)| {
            let file = arrival.create(&name).map_err(local);
            let (remote, key) = (self.clone(), folder.clone().join(name.as_str()));
            async move { remote.receive(key, Arc::new(file?), size, width).await }
        })
        .await?;
        let finished = tokio::task::spawn_blocking(move || arrival.finish()).await;
        let finished = finished.map_err(|error| RemoteError::Local(error.to_string()))?;
        finished.map_err(arrived)
    }

    /// Fetches one file, in parts that come in any order.
    async fn receive(&self, key: Key, file: Arc<File>, size: u64, width: Width) -> Result<()> {
        each(0..size.div_ceil(PART), width.parts(), |number| {
            let start = number * PART;
            let range = start..size.min(start + PART);
            let (remote, key, file) = (self.clone(), key.clone(), file.clone());
            async move { remote.receive_part(&key, file, range).await }
        })
        .await
    }

    async fn receive_part(&self, key: &Key, file: Arc<File>, range: Range<u64>) -> Result<()> {
        let (start, length) = (range.start, range.end - range.start);
        let bytes = match self.store.get_range(key, range).await {
            Err(StoreError::NotFound { .. }) => {
                return Err(RemoteError::Damaged(format!("{key} is missing")));
            }
            bytes => bytes.map_err(|error| self.failed(key, &error))?,
        };
        if bytes.len() as u64 != length {
            let what = format!("{key} ends at byte {}", start + bytes.len() as u64);
            return Err(RemoteError::Damaged(what));
        }
        let write = move || file.write_all_at(&bytes, start);
        let written = tokio::task::spawn_blocking(write).await;
        let written = written.map_err(|error| RemoteError::Local(error.to_string()))?;
        written.map_err(|error| RemoteError::Local(format!("cannot write {key}: {error}")))
    }
}

/// Whether the folder holds that very checkpoint.
fn is_there(from: &Path, target: Target) -> bool {
    Checkpoint::open(from).is_ok_and(|checkpoint| {
        let manifest = checkpoint.manifest();
        (manifest.step, manifest.generation) == (target.step, target.generation)
    })
}

/// What an arrival says is about what came, but for its place here.
fn arrived(error: FormatError) -> RemoteError {
    match error {
        FormatError::Damaged { .. } | FormatError::Refused { .. } => {
            RemoteError::Damaged(error.to_string())
        }
        error => local(error),
    }
}

async fn read_part(file: &mut tokio::fs::File, path: &Path, length: u64) -> Result<BytesMut> {
    let mut bytes = BytesMut::zeroed(length as usize);
    let read = file.read_exact(&mut bytes).await;
    read.map_err(|error| local(FormatError::io("read", path, error)))?;
    Ok(bytes)
}

/// Does the work on all items, so many at once; each is taken when its turn comes, and the first
/// failure ends it.
async fn each<T, F: Future<Output = Result<()>>>(
    items: impl IntoIterator<Item = T>,
    at_once: usize,
    work: impl FnMut(T) -> F,
) -> Result<()> {
    let work = futures::stream::iter(items.into_iter().map(work));
    let mut outcomes = work.buffer_unordered(at_once);
    while let Some(outcome) = outcomes.next().await {
        outcome?;
    }
    Ok(())
}

/// What was read is what was saved.
fn intact(path: &Path, found: Checksum, entry: FileEntry) -> Result<()> {
    checksum::expect(path, "it", found, entry.checksum).map_err(local)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_width_falls_fast_and_rises_slowly() {
        let narrow = Width::FULL.narrower();
        let all = [Width::FULL, narrow, narrow.narrower(), narrow.narrower().narrower()];
        assert_eq!(
            all.map(|width| (width.files(), width.parts())),
            [(4, 4), (4, 1), (1, 1), (1, 1)]
        );
        assert_eq!((Width(1).wider(), Width::FULL.wider()), (Width(2), Width::FULL));
        assert_eq!((Width(9).files(), Width(9).parts()), (4, 2));
    }

    #[tokio::test]
    async fn items_are_taken_when_their_turn_comes() {
        let mut taken = 0;
        let outcome = each(0..u64::MAX, 3, |item| {
            taken += 1;
            async move {
                match item {
                    7 => Err(RemoteError::Local("the eighth".into())),
                    _ => Ok(()),
                }
            }
        });
        assert_eq!(outcome.await, Err(RemoteError::Local("the eighth".into())));
        assert!(taken <= 11, "{taken}");
    }
}
