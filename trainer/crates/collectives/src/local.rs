//! The backend for tests and for one process: ranks are threads, messages are copies in memory.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use torch_shim::gloo::{Store, StoreBackend};
use torch_shim::tch::Tensor;
use torch_shim::{ShimError, reduce};

use crate::error::{CommError, Result};
use crate::group::{Group, GroupOptions};
use crate::transport::{Pending, Transport};

/// Makes a group of `size` ranks in this process; each goes to its own thread. Dropping one is its
/// death: others that wait for its messages get an error.
///
/// # Errors
/// When no thread can be started.
pub fn group(size: usize, options: &GroupOptions) -> Result<Vec<Group>> {
    let post = Arc::new(Post::default());
    let store = Store::new(Arc::new(MemoryStore::default()) as Arc<dyn StoreBackend>);
    let rank = |rank| {
        let transport = LocalTransport { post: post.clone(), rank, timeout: options.timeout };
        Group::new(Box::new(transport), store.clone(), rank, size, options)
    };
    (0..size).map(rank).collect()
}

/// Messages under way, by sender, receiver and tag.
#[derive(Default)]
struct Post {
    state: Mutex<PostState>,
    changed: Condvar,
}

#[derive(Default)]
struct PostState {
    boxes: HashMap<(usize, usize, u32), VecDeque<Tensor>>,
    dead: HashMap<usize, String>,
}

impl Post {
    fn lock(&self) -> MutexGuard<'_, PostState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bury(&self, rank: usize, cause: &str) {
        self.lock().dead.entry(rank).or_insert_with(|| cause.to_string());
        self.changed.notify_all();
    }
}

struct LocalTransport {
    post: Arc<Post>,
    rank: usize,
    timeout: Duration,
}

impl Drop for LocalTransport {
    fn drop(&mut self) {
        self.post.bury(self.rank, "it left the group");
    }
}

impl Transport for LocalTransport {
    fn send(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Box<dyn Pending>> {
        let copy = tensor.f_empty_like()?;
        reduce::copy(&copy, tensor)?;
        let mut state = self.post.lock();
        for rank in [self.rank, peer] {
            if let Some(cause) = state.dead.get(&rank) {
                return Err(CommError::lost(rank, cause.clone()));
            }
        }
        state.boxes.entry((self.rank, peer, tag)).or_default().push_back(copy);
        self.post.changed.notify_all();
        Ok(Box::new(Sent))
    }

    fn recv(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Box<dyn Pending>> {
        let (post, tensor) = (self.post.clone(), tensor.shallow_clone());
        let key = (peer, self.rank, tag);
        Ok(Box::new(Expected { post, key, tensor, timeout: self.timeout }))
    }

    fn reachable(&self, peer: usize) -> Result<()> {
        match self.post.lock().dead.get(&peer) {
            None => Ok(()),
            Some(cause) => Err(CommError::lost(peer, cause.clone())),
        }
    }

    fn abort(&self, cause: &str) {
        self.post.bury(self.rank, cause);
    }
}

struct Sent;

impl Pending for Sent {
    fn wait(self: Box<Self>) -> Result<()> {
        Ok(())
    }

    fn is_done(&self) -> bool {
        true
    }
}

struct Expected {
    post: Arc<Post>,
    key: (usize, usize, u32),
    tensor: Tensor,
    timeout: Duration,
}

impl Pending for Expected {
    fn wait(self: Box<Self>) -> Result<()> {
        let end = Instant::now() + self.timeout;
        let (peer, rank, _) = self.key;
        let mut state = self.post.lock();
        loop {
            if let Some(message) = state.boxes.get_mut(&self.key).and_then(VecDeque::pop_front) {
                drop(state);
                return Ok(reduce::copy(&self.tensor, &message)?);
            }
            for dead in [rank, peer] {
                if let Some(cause) = state.dead.get(&dead) {
                    return Err(CommError::lost(dead, cause.clone()));
                }
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CommError::late(peer, false, self.timeout));
            }
            state = self
                .post
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn is_done(&self) -> bool {
        self.post.lock().boxes.get(&self.key).is_some_and(|messages| !messages.is_empty())
    }
}

/// A store in memory, for the ranks of one process.
#[derive(Default)]
pub struct MemoryStore {
    values: Mutex<HashMap<String, Vec<u8>>>,
    changed: Condvar,
}

impl MemoryStore {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Vec<u8>>> {
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StoreBackend for MemoryStore {
    fn set(&self, key: &str, value: &[u8]) -> torch_shim::Result<()> {
        self.lock().insert(key.to_string(), value.to_vec());
        self.changed.notify_all();
        Ok(())
    }

    fn get(&self, key: &str, timeout: Duration) -> torch_shim::Result<Vec<u8>> {
        self.wait(&[key.to_string()], timeout)?;
        let value = self.lock().get(key).cloned();
        value.ok_or_else(|| ShimError::Store(format!("{key} was deleted")))
    }

    fn add(&self, key: &str, delta: i64) -> torch_shim::Result<i64> {
        let mut values = self.lock();
        let text = values.get(key).map(|value| String::from_utf8_lossy(value).into_owned());
        let old: i64 = match text {
            None => 0,
            Some(text) => {
                text.parse().map_err(|_| ShimError::Store(format!("{key} is no number: {text}")))?
            }
        };
        let sum = old.wrapping_add(delta);
        values.insert(key.to_string(), sum.to_string().into_bytes());
        self.changed.notify_all();
        Ok(sum)
    }

    fn wait(&self, keys: &[String], timeout: Duration) -> torch_shim::Result<()> {
        let end = Instant::now() + timeout;
        let mut values = self.lock();
        loop {
            let Some(missing) = keys.iter().find(|key| !values.contains_key(*key)) else {
                return Ok(());
            };
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ShimError::Store(format!(
                    "no {missing} in {} ms",
                    timeout.as_millis()
                )));
            }
            values =
                self.changed.wait_timeout(values, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn check(&self, keys: &[String]) -> torch_shim::Result<bool> {
        let values = self.lock();
        Ok(keys.iter().all(|key| values.contains_key(key)))
    }

    fn delete(&self, key: &str) -> torch_shim::Result<bool> {
        Ok(self.lock().remove(key).is_some())
    }
}
