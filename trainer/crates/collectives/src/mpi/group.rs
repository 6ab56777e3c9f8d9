//! What a group knows of its peers, and the outcome of one message: shared between the threads
//! that wait and the one that speaks MPI.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::raw::Private;
use crate::error::{CommError, Result};

/// What a peer that left had sent before is still taken for this long.
const GRACE: Duration = Duration::from_millis(50);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The state of one group in this process.
#[derive(Default)]
pub(super) struct GroupState {
    /// The number that messages to this process carry in their tags; no other group here has it.
    pub(super) number: u32,
    ended: Mutex<Ended>,
}

#[derive(Default)]
struct Ended {
    /// Why all is over: for the peer that said so, or for whichever one waits for.
    all: Option<(Option<usize>, String)>,
    /// Peers that left, and when.
    left: HashMap<usize, Instant>,
}

impl GroupState {
    pub(super) fn new(number: u32) -> Self {
        GroupState { number, ..GroupState::default() }
    }

    /// Nothing more is sent or received here.
    pub(super) fn abort(&self, cause: &str) {
        lock(&self.ended).all.get_or_insert_with(|| (None, cause.to_string()));
    }

    /// `peer` says that all is over.
    pub(super) fn aborted_by(&self, peer: usize, cause: &str) {
        lock(&self.ended).all.get_or_insert_with(|| (Some(peer), cause.to_string()));
    }

    /// `peer` left, after it had sent all that it had to.
    pub(super) fn left_by(&self, peer: usize) {
        lock(&self.ended).left.entry(peer).or_insert_with(Instant::now);
    }

    /// Why no message can be exchanged with `peer`, if so. One that it sent before it left may
    /// still be on the way.
    pub(super) fn reachable(&self, peer: usize) -> Result<()> {
        let ended = lock(&self.ended);
        if let Some((by, cause)) = &ended.all {
            return Err(CommError::lost(by.unwrap_or(peer), cause.clone()));
        }
        match ended.left.get(&peer) {
            Some(at) if at.elapsed() >= GRACE => Err(CommError::lost(peer, "it left the group")),
            _ => Ok(()),
        }
    }
}

/// Where the outcome of one message is left: the memory, when MPI is done with it.
#[derive(Default)]
pub(super) struct Outcome {
    result: Mutex<Option<Result<Private>>>,
    changed: Condvar,
    is_unwanted: AtomicBool,
}

impl Outcome {
    pub(super) fn finish(&self, result: Result<Private>) {
        lock(&self.result).get_or_insert(result);
        self.changed.notify_all();
    }

    pub(super) fn is_finished(&self) -> bool {
        lock(&self.result).is_some()
    }

    /// Nobody waits any more.
    pub(super) fn is_unwanted(&self) -> bool {
        self.is_unwanted.load(Ordering::Relaxed)
    }

    /// Nobody will ask any more: a message that is to be received is given up.
    pub(super) fn give_up(&self) {
        self.is_unwanted.store(true, Ordering::Relaxed);
    }

    /// The outcome; `None` when the time is up.
    pub(super) fn wait(&self, timeout: Duration) -> Option<Result<Private>> {
        let end = Instant::now() + timeout;
        let mut result = lock(&self.result);
        loop {
            if let Some(result) = result.take() {
                return Some(result);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            result =
                self.changed.wait_timeout(result, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
