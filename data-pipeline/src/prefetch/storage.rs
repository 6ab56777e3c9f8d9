//! Reading ranges of shards: local files, or whatever a test puts in their place; with time-outs
//! and a bounded number of attempts.

use crate::error::{DataError, Result};
use crate::recycled::Pool;
use bytes::Bytes;
use futures::future::BoxFuture;
use std::collections::BTreeMap;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Memory that is kept for the next reads, at the most.
const KEPT_BYTES: usize = 32 << 20;

/// Where ranges of shards are read from.
pub trait Storage: Send + Sync + 'static {
    /// Reads `range` of the file `path`, whole or not at all.
    fn read(&self, path: &Path, range: Range<u64>) -> BoxFuture<'static, io::Result<Bytes>>;
}

/// Local files.
#[derive(Clone, Debug)]
pub struct LocalFiles {
    buffers: Pool<u8>,
}

impl Default for LocalFiles {
    fn default() -> Self {
        LocalFiles { buffers: Pool::new(KEPT_BYTES) }
    }
}

impl Storage for LocalFiles {
    fn read(&self, path: &Path, range: Range<u64>) -> BoxFuture<'static, io::Result<Bytes>> {
        let path = path.to_path_buf();
        let size = (range.end - range.start) as usize;
        let mut bytes = self.buffers.lend(size);
        Box::pin(async move {
            let read = tokio::task::spawn_blocking(move || {
                let mut file = std::fs::File::open(&path)?;
                file.seek(SeekFrom::Start(range.start))?;
                // Unlike `read_exact`, this does not need the memory to be cleared first.
                match file.take(size as u64).read_to_end(&mut bytes)? {
                    read if read == size => Ok(Bytes::from_owner(bytes)),
                    _ => Err(io::ErrorKind::UnexpectedEof.into()),
                }
            });
            read.await.map_err(io::Error::other)?
        })
    }
}

/// How long reads may take, and how often they are tried.
#[derive(Clone, Copy, Debug)]
pub struct RetryPolicy {
    /// Limit of one attempt.
    pub timeout: Duration,
    /// Attempts, at least 1.
    pub attempts: u32,
    /// Pause after the first failure; doubled after each further one.
    pub backoff: Duration,
}

impl RetryPolicy {
    /// The longest that a read takes, failures included.
    pub fn longest(&self) -> Duration {
        self.timeout * self.attempts + self.backoff * (1 << self.attempts.min(16))
    }
}

/// What is being read at the moment, so that a time-out can name it.
#[derive(Clone, Debug, Default)]
pub struct Activity {
    reads: Arc<Mutex<BTreeMap<u64, (String, Instant)>>>,
}

impl Activity {
    /// The oldest read under way, in words.
    pub fn describe(&self) -> String {
        let reads = self.reads.lock().unwrap_or_else(PoisonError::into_inner);
        match reads.values().next() {
            Some((what, since)) => {
                format!("reading {what} for {:.1} s", since.elapsed().as_secs_f64())
            }
            None => "no read is under way, so decoding is slow or stuck".into(),
        }
    }

    /// Notes a read until the guard is dropped.
    fn begin(&self, what: String) -> ActivityGuard {
        let mut reads = self.reads.lock().unwrap_or_else(PoisonError::into_inner);
        let id = reads.last_key_value().map_or(0, |(id, _)| id + 1);
        reads.insert(id, (what, Instant::now()));
        ActivityGuard { activity: self.clone(), id }
    }
}

struct ActivityGuard {
    activity: Activity,
    id: u64,
}

impl Drop for ActivityGuard {
    fn drop(&mut self) {
        let reads = &self.activity.reads;
        reads.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

/// Reads with time-outs, attempts and a note of what is under way.
#[derive(Clone)]
pub struct RangeReader {
    /// Where the ranges come from.
    pub storage: Arc<dyn Storage>,
    /// Limits.
    pub policy: RetryPolicy,
    /// What is under way.
    pub activity: Activity,
    /// Memory for what is decoded of a range.
    pub decoded: Pool<i32>,
}

impl RangeReader {
    /// Reads a range; `what` says in an error what it holds.
    pub async fn read(&self, path: &Path, range: Range<u64>, what: &str) -> Result<Bytes> {
        let started = Instant::now();
        let described = format!("{what} of shard `{}`", path.display());
        let _guard = self.activity.begin(described.clone());
        let mut pause = self.policy.backoff;
        let mut attempt = 1;
        loop {
            let read = self.storage.read(path, range.clone());
            let last = attempt >= self.policy.attempts;
            match tokio::time::timeout(self.policy.timeout, read).await {
                Ok(Ok(bytes)) => return Ok(bytes),
                Ok(Err(error)) if last || is_final(&error) => {
                    return Err(DataError::io("read", path, error));
                }
                Err(_) if last => {
                    let waited_s = started.elapsed().as_secs_f64();
                    return Err(DataError::Timeout {
                        waited_s,
                        doing: format!("reading {described}, attempt {attempt} of {attempt}"),
                    });
                }
                Ok(Err(error)) => {
                    tracing::warn!(%error, attempt, "reading {described} failed, trying again");
                }
                Err(_) => tracing::warn!(attempt, "reading {described} timed out, trying again"),
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
            attempt += 1;
        }
    }
}

/// Whether trying again cannot help.
fn is_final(error: &io::Error) -> bool {
    use io::ErrorKind::{NotFound, PermissionDenied, UnexpectedEof};
    matches!(error.kind(), NotFound | PermissionDenied | UnexpectedEof)
}
