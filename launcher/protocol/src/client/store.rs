//! The rank's side of the rendezvous store.

use super::link::{Link, Place};
use super::lock;
use crate::message::FromRank;
use crate::store::{StoreError, StoreReply, StoreRequest};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

/// Time beyond a request's own time-out in which the agent must have answered.
const REPLY_SLACK: Duration = Duration::from_secs(30);

/// A handle on the rendezvous store of one generation; every call is bounded in time. Clones share
/// it.
#[derive(Clone)]
pub struct StoreClient {
    pub(super) link: Arc<Link>,
    pub(super) place: Arc<Place>,
}

impl StoreClient {
    /// Writes a value over whatever is there.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        let request = StoreRequest::Set { key: key.to_owned(), value: value.to_vec() };
        match self.ask(request, Duration::ZERO)? {
            StoreReply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// The value, as soon as it is there.
    pub fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>, StoreError> {
        let request = StoreRequest::Get { key: key.to_owned(), timeout_ms: millis(timeout) };
        match self.ask(request, timeout)? {
            StoreReply::Value(value) => Ok(value),
            other => Err(unexpected(&other)),
        }
    }

    /// Adds to a decimal counter, 0 where absent; returns the sum.
    pub fn add(&self, key: &str, amount: i64) -> Result<i64, StoreError> {
        match self.ask(StoreRequest::Add { key: key.to_owned(), amount }, Duration::ZERO)? {
            StoreReply::Sum(sum) => Ok(sum),
            other => Err(unexpected(&other)),
        }
    }

    /// Returns as soon as all keys are there.
    pub fn wait(&self, keys: &[String], timeout: Duration) -> Result<(), StoreError> {
        let request = StoreRequest::Wait { keys: keys.to_vec(), timeout_ms: millis(timeout) };
        match self.ask(request, timeout)? {
            StoreReply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Whether all keys are there now.
    pub fn check(&self, keys: &[String]) -> Result<bool, StoreError> {
        match self.ask(StoreRequest::Check { keys: keys.to_vec() }, Duration::ZERO)? {
            StoreReply::Bool(is_there) => Ok(is_there),
            other => Err(unexpected(&other)),
        }
    }

    /// Removes a key; whether it was there.
    pub fn delete(&self, key: &str) -> Result<bool, StoreError> {
        match self.ask(StoreRequest::Delete { key: key.to_owned() }, Duration::ZERO)? {
            StoreReply::Bool(was_there) => Ok(was_there),
            other => Err(unexpected(&other)),
        }
    }

    fn ask(&self, request: StoreRequest, timeout: Duration) -> Result<StoreReply, StoreError> {
        let id = self.link.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = sync_channel(1);
        lock(&self.place.replies).insert(id, sender);
        let lost = |reason: String| {
            lock(&self.place.replies).remove(&id);
            StoreError::Lost { reason }
        };
        // Looked at behind the insertion: what was inserted before is cleared with the end.
        self.place.alive().map_err(|error| lost(error.to_string()))?;
        let message = FromRank::Store { id, request };
        self.link.send(&self.place, &message).map_err(|error| lost(error.to_string()))?;
        let bound = timeout.saturating_add(REPLY_SLACK);
        match receiver.recv_timeout(bound) {
            Ok(StoreReply::Error(error)) => Err(error),
            Ok(reply) => Ok(reply),
            Err(error) => {
                let is_over = self.place.alive().err().map(|over| over.to_string());
                let seconds = bound.as_secs();
                Err(lost(is_over.unwrap_or_else(|| format!("{error} ({seconds} s)"))))
            }
        }
    }
}

fn unexpected(reply: &StoreReply) -> StoreError {
    StoreError::Lost { reason: format!("it sent {reply:?} to another request") }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
