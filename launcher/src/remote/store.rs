//! Checkpoints in an object store: listed, copied there, fetched, removed.
//!
//! Requests that fail for the server's sake are tried again for a few seconds by the client itself;
//! what fails for longer is the caller's to try again. No request takes more than [`REQUEST_S`].

use super::Place;
use super::uploads::Target;
use bytes::{Bytes, BytesMut};
use checkpoint_format::checksum::Checksum;
use checkpoint_format::manifest::FileEntry;
use checkpoint_format::{Arrival, Checkpoint, FormatError, names};
use futures::stream::FuturesUnordered;
use futures::{StreamExt, TryStreamExt};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::local::LocalFileSystem;
use object_store::path::Path as Key;
use object_store::{
    BackoffConfig, ClientConfigKey, Error as StoreError, MultipartUpload, ObjectStore,
    ObjectStoreExt, PutMode, PutPayload, RetryConfig, UploadPart,
};
use std::collections::BTreeMap;
use std::fs::File;
use std::future::Future;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncReadExt;

/// Longest time of one request, in seconds.
pub const REQUEST_S: u64 = 12;
/// Time for which the client tries a request again by itself. With [`REQUEST_S`] it bounds the time
/// until a failure is known: 20 s.
const RETRY_FOR: Duration = Duration::from_secs(8);
/// Bytes of a request: larger files are sent and fetched in parts of it.
const PART: u64 = 8 << 20;
/// Files under way at once.
const FILES_AT_ONCE: usize = 4;
/// Parts of one file under way at once.
const PARTS_AT_ONCE: usize = 4;
/// Name of the object that says whose checkpoints these are.
const OWNER: &str = "RUN";
/// Largest of the small objects that are read whole, the manifest apart.
const MAX_SMALL: u64 = 4096;

/// Why something could not be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RemoteError {
    /// The object store, or what lies there.
    Remote(String),
    /// This machine's files.
    Local(String),
    /// The folder is another run's.
    Foreign(String),
}

impl std::fmt::Display for RemoteError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            RemoteError::Remote(reason)
            | RemoteError::Local(reason)
            | RemoteError::Foreign(reason) => f.write_str(reason),
        }
    }
}

type Result<T> = std::result::Result<T, RemoteError>;

fn local(error: FormatError) -> RemoteError {
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
    store: Arc<dyn ObjectStore>,
    root: Key,
    place: Place,
}

impl Remote {
    /// Reads the credentials from the environment; sends nothing.
    ///
    /// # Errors
    /// Where the URL or the environment is not usable.
    pub fn open(place: &Place) -> Result<Remote> {
        let (store, prefix) = open_store(&place.url).map_err(|error| failed(&place.url, &error))?;
        let root = prefix.split('/').filter(|part| !part.is_empty()).chain([place.name.as_str()]);
        let root = Key::from_iter(root);
        Ok(Remote { store, root, place: place.clone() })
    }

    fn folder(&self, target: Target) -> Key {
        self.root.clone().join(names::remote_folder(target.step, target.generation))
    }

    fn failed(&self, key: &Key, error: &StoreError) -> RemoteError {
        failed(&format!("{} ({key})", self.place.url), error)
    }

    /// Makes the folder this run's, where it is nobody's.
    ///
    /// # Errors
    /// Where it is another run's, or cannot be reached.
    pub async fn own(&self) -> Result<()> {
        let Some(run_id) = &self.place.run_id else { return Ok(()) };
        match self.create(&self.root.clone().join(OWNER), run_id.clone().into()).await? {
            true => Ok(()),
            false => self.check_owner().await,
        }
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
                String::from_utf8_lossy(&found)
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

    /// Copies the checkpoint in the folder `from`, but for what is there already, and commits it.
    /// Its bytes.
    ///
    /// # Errors
    /// Where the object store refuses, or the checkpoint is damaged here.
    pub async fn upload(&self, from: &Path, target: Target) -> Result<u64> {
        // As long as it is open, nobody removes it.
        let checkpoint = Checkpoint::open(from).map_err(local)?;
        let manifest = checkpoint.manifest();
        if (manifest.step, manifest.generation) != (target.step, target.generation) {
            let found = (manifest.step, manifest.generation);
            return Err(RemoteError::Local(format!(
                "{} is of step and generation {found:?} by now",
                from.display()
            )));
        }
        let folder = self.folder(target);
        let held = self.sizes(&folder).await?;
        if held.contains_key(names::COMMIT) {
            return Ok(held.values().sum());
        }
        let is_absent =
            |(name, entry): &(&String, &FileEntry)| held.get(*name) != Some(&entry.size);
        let absent = manifest.files.iter().filter(is_absent);
        let send = |(name, entry): (&String, &FileEntry)| {
            self.send(from.join(name), folder.clone().join(name.as_str()), *entry)
        };
        let sends: Vec<_> = absent.map(send).collect();
        all(sends, FILES_AT_ONCE).await?;
        let read = |name: &str| {
            let path = from.join(name);
            std::fs::read(&path).map_err(|error| local(FormatError::io("read", &path, error)))
        };
        let (bytes, commit) = (read(names::MANIFEST)?, read(names::COMMIT)?);
        let key = folder.clone().join(names::MANIFEST);
        let put = self.store.put(&key, bytes.into()).await;
        put.map_err(|error| self.failed(&key, &error))?;
        let key = folder.join(names::COMMIT);
        if !self.create(&key, commit.clone().into()).await?
            && self.small(&key, MAX_SMALL).await?.as_deref() != Some(commit.as_slice())
        {
            let what = format!("{} ({key}) is there, and another's", self.place.url);
            return Err(RemoteError::Remote(what));
        }
        Ok(manifest.files.values().map(|file| file.size).sum())
    }

    /// Names and sizes of the objects of a folder.
    async fn sizes(&self, folder: &Key) -> Result<BTreeMap<String, u64>> {
        let objects = self.store.list(Some(folder));
        let named = objects.map_ok(|object| {
            (object.location.filename().unwrap_or_default().to_owned(), object.size)
        });
        named.try_collect().await.map_err(|error| self.failed(folder, &error))
    }

    /// Sends one file, and makes sure that what was sent is what was saved.
    async fn send(&self, path: PathBuf, key: Key, entry: FileEntry) -> Result<()> {
        let unreadable = |error| local(FormatError::io("read", &path, error));
        let mut file = tokio::fs::File::open(&path).await.map_err(unreadable)?;
        if entry.size <= PART {
            let mut bytes = Vec::with_capacity(entry.size as usize);
            file.read_to_end(&mut bytes).await.map_err(unreadable)?;
            intact(&path, Checksum::of(&bytes), entry)?;
            let put = self.store.put(&key, bytes.into()).await;
            return put.map(|_| ()).map_err(|error| self.failed(&key, &error));
        }
        let begun = self.store.put_multipart(&key).await;
        let mut upload = begun.map_err(|error| self.failed(&key, &error))?;
        let sent = self.send_parts(&path, file, entry, (&key, upload.as_mut())).await;
        if sent.is_err() {
            // Its parts cost money; where that fails too, the store's own rules remove them.
            let _ = upload.abort().await;
        }
        sent
    }

    async fn send_parts(
        &self,
        path: &Path,
        mut file: tokio::fs::File,
        entry: FileEntry,
        (key, upload): (&Key, &mut dyn MultipartUpload),
    ) -> Result<()> {
        let unreadable = |error| local(FormatError::io("read", path, error));
        let refused = |error: StoreError| self.failed(key, &error);
        let mut checksum = Checksum::default();
        let mut left = entry.size;
        let mut under_way: FuturesUnordered<UploadPart> = FuturesUnordered::new();
        while left > 0 {
            let mut bytes = BytesMut::zeroed(left.min(PART) as usize);
            file.read_exact(&mut bytes).await.map_err(unreadable)?;
            left -= bytes.len() as u64;
            checksum = checksum.append(&bytes);
            if under_way.len() >= PARTS_AT_ONCE {
                under_way.try_next().await.map_err(refused)?;
            }
            under_way.push(upload.put_part(bytes.freeze().into()));
        }
        while under_way.try_next().await.map_err(refused)?.is_some() {}
        intact(path, checksum, entry)?;
        upload.complete().await.map(|_| ()).map_err(refused)
    }

    /// Copies a checkpoint into the folder of checkpoints `dir`; every byte is checked before it
    /// has its name there. Its bytes.
    ///
    /// # Errors
    /// Where the object store cannot be read, the checkpoint is damaged, or there is no room.
    pub async fn fetch(&self, target: Target, dir: &Path) -> Result<u64> {
        let folder = self.folder(target);
        let commit = self.needed(&folder, names::COMMIT, MAX_SMALL).await?;
        let manifest = self.needed(&folder, names::MANIFEST, Arrival::MAX_MANIFEST).await?;
        let arrival = Arrival::begin(dir, &commit, &manifest).map_err(local)?;
        if arrival.step() != target.step {
            let what = format!("{folder} is of step {}", arrival.step());
            return Err(RemoteError::Remote(what));
        }
        let files = arrival.files().iter();
        let fetches: Vec<_> =
            files.map(|(name, entry)| self.receive(&arrival, &folder, name, entry.size)).collect();
        all(fetches, FILES_AT_ONCE).await?;
        let finished = tokio::task::spawn_blocking(move || arrival.finish()).await;
        let finished = finished.map_err(|error| RemoteError::Local(error.to_string()))?;
        finished.map_err(local)
    }

    /// Fetches one file, in parts that come in any order.
    async fn receive(&self, arrival: &Arrival, folder: &Key, name: &str, size: u64) -> Result<()> {
        let file = Arc::new(arrival.create(name).map_err(local)?);
        let key = folder.clone().join(name);
        let part = |number: u64| {
            let start = number * PART;
            self.receive_part(&key, file.clone(), start..size.min(start + PART))
        };
        let parts: Vec<_> = (0..size.div_ceil(PART)).map(part).collect();
        all(parts, PARTS_AT_ONCE).await
    }

    async fn receive_part(&self, key: &Key, file: Arc<File>, range: Range<u64>) -> Result<()> {
        let (start, length) = (range.start, range.end - range.start);
        let bytes = self.store.get_range(key, range).await;
        let bytes = bytes.map_err(|error| self.failed(key, &error))?;
        if bytes.len() as u64 != length {
            let what = format!("{key} ends at byte {}", start + bytes.len() as u64);
            return Err(RemoteError::Remote(what));
        }
        let write = move || file.write_all_at(&bytes, start);
        let written = tokio::task::spawn_blocking(write).await;
        let written = written.map_err(|error| RemoteError::Local(error.to_string()))?;
        written.map_err(|error| RemoteError::Local(format!("cannot write {key}: {error}")))
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
            removed.map(|_| ()).or_else(gone)?;
        }
        Ok(())
    }

    /// Makes a small object where there is none; `false`: there is one.
    async fn create(&self, key: &Key, content: PutPayload) -> Result<bool> {
        match self.store.put_opts(key, content, PutMode::Create.into()).await {
            Ok(_) => Ok(true),
            Err(StoreError::AlreadyExists { .. } | StoreError::Precondition { .. }) => Ok(false),
            Err(error) => Err(self.failed(key, &error)),
        }
    }

    async fn needed(&self, folder: &Key, name: &str, limit: u64) -> Result<Bytes> {
        let key = folder.clone().join(name);
        let found = self.small(&key, limit).await?;
        found.ok_or_else(|| RemoteError::Remote(format!("{key} is missing")))
    }

    /// Reads an object of at most `limit` bytes; `None`: there is none.
    async fn small(&self, key: &Key, limit: u64) -> Result<Option<Bytes>> {
        let found = match self.store.get(key).await {
            Err(StoreError::NotFound { .. }) => return Ok(None),
            found => found.map_err(|error| self.failed(key, &error))?,
        };
        if found.meta.size > limit {
            let what = format!("{key} has {} bytes, over the limit of {limit}", found.meta.size);
            return Err(RemoteError::Remote(what));
        }
        found.bytes().await.map(Some).map_err(|error| self.failed(key, &error))
    }
}

/// Waits for all, so many at once; the first failure ends it.
async fn all<F: Future<Output = Result<()>>>(work: Vec<F>, at_once: usize) -> Result<()> {
    let mut outcomes = futures::stream::iter(work).buffer_unordered(at_once);
    while let Some(outcome) = outcomes.next().await {
        outcome?;
    }
    Ok(())
}

/// What was read is what was saved.
fn intact(path: &Path, found: Checksum, entry: FileEntry) -> Result<()> {
    checkpoint_format::checksum::expect(path, "it", found, entry.checksum).map_err(local)
}

fn failed(what: &str, error: &StoreError) -> RemoteError {
    let words = error.to_string();
    let words = words.split_whitespace().collect::<Vec<_>>().join(" ");
    RemoteError::Remote(format!("{what}: {words}"))
}

/// The store that a URL names, and the folder in it.
fn open_store(url: &str) -> std::result::Result<(Arc<dyn ObjectStore>, &str), StoreError> {
    // Two crates bring a TLS library's choice of cryptography; where one was made, it stays.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (scheme, rest) = url.split_once("://").unwrap_or_default();
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let timeout = format!("{REQUEST_S} seconds");
    let backoff = BackoffConfig {
        init_backoff: Duration::from_millis(100),
        max_backoff: Duration::from_secs(2),
        base: 2.0,
    };
    let retry = RetryConfig { backoff, max_retries: 10, retry_timeout: RETRY_FOR };
    let key = ClientConfigKey::Timeout;
    Ok(match scheme {
        "s3" => {
            let builder = AmazonS3Builder::from_env().with_bucket_name(bucket).with_retry(retry);
            let builder = builder.with_config(AmazonS3ConfigKey::Client(key), timeout);
            (Arc::new(builder.build()?), prefix)
        }
        "gs" => {
            let builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(bucket);
            let builder = builder.with_retry(retry);
            let builder = builder.with_config(GoogleConfigKey::Client(key), timeout);
            (Arc::new(builder.build()?), prefix)
        }
        "az" => {
            let builder = MicrosoftAzureBuilder::from_env().with_container_name(bucket);
            let builder = builder.with_retry(retry);
            let builder = builder.with_config(AzureConfigKey::Client(key), timeout);
            (Arc::new(builder.build()?), prefix)
        }
        _ => {
            let folder = Path::new(rest);
            let made = std::fs::create_dir_all(folder);
            made.map_err(|error| StoreError::Generic { store: "file", source: error.into() })?;
            let store = LocalFileSystem::new_with_prefix(folder)?;
            (Arc::new(store.with_automatic_cleanup(true).with_fsync(true)), "")
        }
    })
}
