//! A run's folder in an object store: whose it is, what checkpoints it holds, and their removal.

use super::Place;
use super::access::{Access, RemoteError, failed, printable};
use super::uploads::Target;
use bytes::Bytes;
use checkpoint_format::{FormatError, names};
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path as Key;
use object_store::{Error as StoreError, ObjectStore, ObjectStoreExt, PutMode, PutPayload};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Name of the object that says whose checkpoints these are.
const OWNER: &str = "RUN";
/// Largest of the small objects that are read whole, the manifest apart.
pub(super) const MAX_SMALL: u64 = 4096;

pub(super) type Result<T> = std::result::Result<T, RemoteError>;

pub(super) fn local(error: FormatError) -> RemoteError {
    RemoteError::Local(error.to_string())
}

/// A checkpoint in the object store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Which.
    pub target: Target,
    /// Whether it has its `COMMIT`.
    pub is_complete: bool,
    /// Bytes of all its objects.
    pub bytes: u64,
}

/// A run's folder in an object store.
#[derive(Clone, Debug)]
pub struct Remote {
    pub(super) store: Arc<dyn ObjectStore>,
    root: Key,
    pub(super) place: Place,
    /// Where it is a folder of this machine.
    folder: Option<PathBuf>,
    /// Requests that were answered.
    answered: Arc<AtomicU64>,
}

impl Remote {
    /// For reading and writing. Reads the credentials from the environment; sends nothing.
    ///
    /// # Errors
    /// Where the URL or the environment is not usable.
    pub fn open(place: &Place) -> Result<Remote> {
        Ok(Self::new(place, Access::open(&place.url, true)?))
    }

    /// As [`Remote::open`], to read what is there: a folder of this machine must be.
    ///
    /// # Errors
    /// As there.
    pub fn open_to_read(place: &Place) -> Result<Remote> {
        Ok(Self::new(place, Access::open(&place.url, false)?))
    }

    fn new(place: &Place, access: Access) -> Remote {
        let parts = access.prefix.split('/').filter(|part| !part.is_empty());
        let root = Key::from_iter(parts.chain([place.name.as_str()]));
        let folder = access.folder.map(|folder| folder.join(&place.name));
        let answered = Arc::new(AtomicU64::new(0));
        Remote { store: access.store, root, place: place.clone(), folder, answered }
    }

    /// How many requests were answered so far: it stands still while the object store is silent.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// A request was answered, well or not.
    pub(super) fn hear<T>(&self, answer: T) -> T {
        self.answered.fetch_add(1, Ordering::Relaxed);
        answer
    }

    pub(super) fn folder(&self, target: Target) -> Key {
        self.root.clone().join(names::remote_folder(target.step, target.generation))
    }

    pub(super) fn failed(&self, key: &Key, error: &StoreError) -> RemoteError {
        failed(&format!("{} ({key})", self.place.url), &self.place.url, error)
    }

    /// Makes the folder this run's, where it is nobody's.
    ///
    /// # Errors
    /// Where it is another run's, or cannot be reached.
    pub async fn own(&self) -> Result<()> {
        let Some(run_id) = &self.place.run_id else { return Ok(()) };
        if !self.create(&self.root.clone().join(OWNER), run_id.clone().into()).await? {
            self.check_owner().await?;
        }
        if let Some(folder) = &self.folder {
            remove_staged(folder);
        }
        Ok(())
    }

    /// Refuses another run's folder; one that is nobody's holds nothing.
    ///
    /// # Errors
    /// As [`Remote::own`].
    pub async fn check_owner(&self) -> Result<()> {
        let Some(ours) = &self.place.run_id else { return Ok(()) };
        let key = self.root.clone().join(OWNER);
        match self.small(&key, MAX_SMALL).await? {
            Some(found) if found != ours.as_bytes() => Err(RemoteError::Foreign(format!(
                "{} holds the checkpoints of another run ({}); give this one another name, or \
                 another checkpoint.remote",
                self.place.describe(),
                printable(&String::from_utf8_lossy(&found))
            ))),
            _ => Ok(()),
        }
    }

    /// All checkpoints, complete or not, in the order of their commits.
    ///
    /// # Errors
    /// Where the object store cannot be read.
    pub async fn list(&self) -> Result<Vec<Stored>> {
        let mut found: BTreeMap<Target, Stored> = BTreeMap::new();
        let mut objects = self.store.list(Some(&self.root));
        let listed = |error| self.failed(&self.root, &error);
        while let Some(object) = objects.try_next().await.map_err(listed)? {
            let Some(mut parts) = object.location.prefix_match(&self.root) else { continue };
            let (folder, name) = (parts.next(), parts.next());
            let parsed = folder.and_then(|folder| names::parse_remote_folder(folder.as_ref()));
            let (Some((step, generation)), Some(name)) = (parsed, name) else { continue };
            let target = Target { generation, step };
            let new = Stored { target, is_complete: false, bytes: 0 };
            let stored = found.entry(target).or_insert(new);
            stored.is_complete |= name.as_ref() == names::COMMIT;
            stored.bytes = stored.bytes.saturating_add(object.size);
        }
        Ok(found.into_values().collect())
    }

    /// Names and sizes of the objects of a folder.
    pub(super) async fn sizes(&self, folder: &Key) -> Result<BTreeMap<String, u64>> {
        let objects = self.store.list(Some(folder));
        let named = objects.map_ok(|object| {
            (object.location.filename().unwrap_or_default().to_owned(), object.size)
        });
        let all = self.hear(named.try_collect().await);
        all.map_err(|error| self.failed(folder, &error))
    }

    /// Removes a checkpoint; `COMMIT` first, so that what is left of one is none.
    ///
    /// # Errors
    /// Where the object store refuses.
    pub async fn remove(&self, target: Target) -> Result<()> {
        let folder = self.folder(target);
        let commit = folder.clone().join(names::COMMIT);
        let gone = |error: StoreError| match error {
            StoreError::NotFound { .. } => Ok(()),
            error => Err(self.failed(&folder, &error)),
        };
        self.store.delete(&commit).await.or_else(gone)?;
        let objects = self.store.list(Some(&folder)).map_ok(|object| object.location).boxed();
        let mut removals = self.store.delete_stream(objects);
        while let Some(removed) = removals.next().await {
            self.hear(removed).map(|_| ()).or_else(gone)?;
        }
        Ok(())
    }

    /// Makes a small object where there is none; `false`: there is one.
    pub(super) async fn create(&self, key: &Key, content: PutPayload) -> Result<bool> {
        let created = self.store.put_opts(key, content.clone(), PutMode::Create.into()).await;
        match self.hear(created) {
            Ok(_) => Ok(true),
            Err(StoreError::AlreadyExists { .. } | StoreError::Precondition { .. }) => Ok(false),
            // AWS_CONDITIONAL_PUT=disabled: another run's of the same moment is not seen.
            Err(StoreError::NotImplemented { .. }) => match self.store.head(key).await {
                Ok(_) => Ok(false),
                Err(StoreError::NotFound { .. }) => {
                    let put = self.store.put(key, content).await;
                    put.map(|_| true).map_err(|error| self.failed(key, &error))
                }
                Err(error) => Err(self.failed(key, &error)),
            },
            Err(error) => Err(self.failed(key, &error)),
        }
    }

    pub(super) async fn needed(&self, folder: &Key, name: &str, limit: u64) -> Result<Bytes> {
        let key = folder.clone().join(name);
        let found = self.small(&key, limit).await?;
        found.ok_or_else(|| RemoteError::Damaged(format!("{key} is missing")))
    }

    /// Reads an object of at most `limit` bytes; `None`: there is none.
    pub(super) async fn small(&self, key: &Key, limit: u64) -> Result<Option<Bytes>> {
        let found = match self.store.get(key).await {
            Err(StoreError::NotFound { .. }) => return Ok(None),
            found => found.map_err(|error| self.failed(key, &error))?,
        };
        if found.meta.size > limit {
            let what = format!("{key} has {} bytes, over the limit of {limit}", found.meta.size);
            return Err(RemoteError::Damaged(what));
        }
        found.bytes().await.map(Some).map_err(|error| self.failed(key, &error))
    }
}

/// What a launcher that was killed in the middle of a copy left of files in a folder, as
/// `NAME#NUMBER`, which nobody lists. Where it cannot be removed, it only takes room.
fn remove_staged(folder: &Path) {
    let entries = |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().flatten();
    let is_checkpoint = |path: &Path| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| names::parse_remote_folder(name).is_some())
    };
    let checkpoints = entries(folder).map(|entry| entry.path()).filter(|path| is_checkpoint(path));
    for entry in entries(folder).chain(checkpoints.flat_map(|path| entries(&path))) {
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| Some(name.rsplit_once('#')?.1));
        if number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit())) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}
