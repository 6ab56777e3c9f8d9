//! The rendezvous store: a small key-value store that lives in the agent.
//!
//! Pure: the agent hands in requests with the time and gets back the replies that are due, so that
//! a blocking `get` or `wait` costs no thread. One store serves one generation and is dropped with
//! it, which is why no key of an earlier generation can be seen.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

/// Most bytes in one value; its hexadecimal form fits in a frame.
pub const MAX_VALUE_BYTES: usize = 256 << 10;
/// Most bytes in one key.
pub const MAX_KEY_BYTES: usize = 4 << 10;
/// Most bytes in the whole store.
pub const MAX_STORE_BYTES: usize = 256 << 20;
/// Most keys in one `wait` or `check`.
pub const MAX_KEYS_PER_REQUEST: usize = 64;

/// What a rank asks of the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoreRequest {
    /// Write a value over whatever is there.
    Set {
        /// Key.
        key: String,
        /// Value.
        #[serde(with = "hex")]
        value: Vec<u8>,
    },
    /// The value, once it is there.
    Get {
        /// Key.
        key: String,
        /// Longest wait, in milliseconds.
        timeout_ms: u64,
    },
    /// Add to a decimal counter, 0 where absent, and give the sum.
    Add {
        /// Key.
        key: String,
        /// Amount.
        amount: i64,
    },
    /// Answer once all keys are there.
    Wait {
        /// Keys.
        keys: Vec<String>,
        /// Longest wait, in milliseconds.
        timeout_ms: u64,
    },
    /// Whether all keys are there now.
    Check {
        /// Keys.
        keys: Vec<String>,
    },
    /// Remove a key; whether it was there.
    Delete {
        /// Key.
        key: String,
    },
}

/// What came of a [`StoreRequest`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoreReply {
    /// Of `set` and `wait`.
    Done,
    /// Of `get`.
    Value(#[serde(with = "hex")] Vec<u8>),
    /// Of `add`.
    Sum(i64),
    /// Of `check` and `delete`.
    Bool(bool),
    /// It failed.
    Error(StoreError),
}

/// Why a store operation failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum StoreError {
    /// A key did not come in time.
    #[error("the rendezvous store had no key {key:?} after {waited_ms} ms")]
    Timeout {
        /// The first key that was missing.
        key: String,
        /// Time waited, in milliseconds.
        waited_ms: u64,
    },
    /// A key, a value, the number of keys or the whole store is over its limit.
    #[error("the rendezvous store refused {what} of {size}: the limit is {limit}")]
    TooLarge {
        /// What is too large.
        what: String,
        /// Its size.
        size: usize,
        /// Its limit.
        limit: usize,
    },
    /// `add` on a value that is no decimal number, or a sum out of range.
    #[error("the value of {key:?} in the rendezvous store is no counter")]
    NotANumber {
        /// Key.
        key: String,
    },
    /// The agent is gone, or did not answer.
    #[error("the agent's rendezvous store did not answer: {reason}")]
    Lost {
        /// What is known.
        reason: String,
    },
}

/// Who asked: the agent's own handle for a rank, and the request's id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Requester {
    /// The rank's index on this agent.
    pub rank: usize,
    /// The request's id.
    pub id: u64,
}

#[derive(Debug)]
struct Waiter {
    requester: Requester,
    keys: Vec<String>,
    /// Which of them it waits for now.
    waits_for: String,
    wants_value: bool,
    since: Instant,
    deadline: Instant,
}

/// The store of one generation.
#[derive(Debug, Default)]
pub struct Store {
    values: HashMap<String, Vec<u8>>,
    num_bytes: usize,
    /// By the order of asking.
    waiters: BTreeMap<u64, Waiter>,
    /// The waiters of a key that is not there. Each waits for one of its keys at a time, the last
    /// that is missing: thousands of ranks that meet would else look at each key of each other.
    missing: HashMap<String, Vec<u64>>,
    deadlines: BTreeSet<(Instant, u64)>,
    num_waited: u64,
}

impl Store {
    /// Takes one request in; returns every reply that is due because of it, in order.
    pub fn handle(
        &mut self,
        requester: Requester,
        request: StoreRequest,
        now: Instant,
    ) -> Vec<(Requester, StoreReply)> {
        if let Err(error) = within_limits(&request) {
            return vec![(requester, StoreReply::Error(error))];
        }
        let (reply, written) = match request {
            StoreRequest::Set { key, value } => (self.put(key.clone(), value).into(), Some(key)),
            StoreRequest::Add { key, amount } => (self.add(key.clone(), amount), Some(key)),
            StoreRequest::Check { keys } => {
                (StoreReply::Bool(self.last_missing(&keys).is_none()), None)
            }
            StoreRequest::Delete { key } => (StoreReply::Bool(self.delete(&key)), None),
            StoreRequest::Get { key, timeout_ms } => {
                return self.enqueue(requester, vec![key], true, timeout_ms, now);
            }
            StoreRequest::Wait { keys, timeout_ms } => {
                return self.enqueue(requester, keys, false, timeout_ms, now);
            }
        };
        let mut replies = vec![(requester, reply)];
        if let Some(key) = written {
            self.release(&key, &mut replies);
        }
        replies
    }

    /// Answers the waits whose time is over.
    pub fn expire(&mut self, now: Instant) -> Vec<(Requester, StoreReply)> {
        let mut replies = Vec::new();
        while let Some(&(deadline, ticket)) = self.deadlines.first() {
            if now < deadline {
                break;
            }
            self.deadlines.pop_first();
            let Some(waiter) = self.waiters.remove(&ticket) else { continue };
            let is_missing = |key: &&String| !self.values.contains_key(*key);
            let missing = waiter.keys.iter().find(is_missing).cloned();
            if let Some(tickets) = self.missing.get_mut(&waiter.waits_for) {
                tickets.retain(|other| *other != ticket);
                if tickets.is_empty() {
                    self.missing.remove(&waiter.waits_for);
                }
            }
            let error = StoreError::Timeout {
                key: missing.unwrap_or_default(),
                waited_ms: millis(now.duration_since(waiter.since)),
            };
            replies.push((waiter.requester, StoreReply::Error(error)));
        }
        replies
    }

    /// When [`Store::expire`] next has something to do.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    fn enqueue(
        &mut self,
        requester: Requester,
        keys: Vec<String>,
        wants_value: bool,
        timeout_ms: u64,
        now: Instant,
    ) -> Vec<(Requester, StoreReply)> {
        // A day bounds what a hostile time-out could overflow.
        let timeout = Duration::from_millis(timeout_ms.min(86_400_000));
        let deadline = now + timeout;
        let waits_for = String::new();
        let waiter = Waiter { requester, keys, waits_for, wants_value, since: now, deadline };
        if let Some(reply) = self.answer(&waiter) {
            return vec![(requester, reply)];
        }
        let ticket = self.num_waited;
        self.num_waited += 1;
        self.deadlines.insert((deadline, ticket));
        self.wait(ticket, waiter);
        Vec::new()
    }

    fn wait(&mut self, ticket: u64, mut waiter: Waiter) {
        waiter.waits_for = self.last_missing(&waiter.keys).cloned().unwrap_or_default();
        self.missing.entry(waiter.waits_for.clone()).or_default().push(ticket);
        self.waiters.insert(ticket, waiter);
    }

    /// Answers those that waited for this key alone; the others wait for another.
    fn release(&mut self, key: &str, replies: &mut Vec<(Requester, StoreReply)>) {
        if !self.values.contains_key(key) {
            return;
        }
        let mut tickets = self.missing.remove(key).unwrap_or_default();
        tickets.sort_unstable();
        for ticket in tickets {
            let Some(waiter) = self.waiters.remove(&ticket) else { continue };
            match self.answer(&waiter) {
                Some(reply) => {
                    self.deadlines.remove(&(waiter.deadline, ticket));
                    replies.push((waiter.requester, reply));
                }
                None => self.wait(ticket, waiter),
            }
        }
    }

    fn answer(&self, waiter: &Waiter) -> Option<StoreReply> {
        if self.last_missing(&waiter.keys).is_some() {
            return None;
        }
        match waiter.keys.first().and_then(|key| self.values.get(key)) {
            Some(value) if waiter.wants_value => Some(StoreReply::Value(value.clone())),
            _ => Some(StoreReply::Done),
        }
    }

    fn last_missing<'a>(&self, keys: &'a [String]) -> Option<&'a String> {
        keys.iter().rev().find(|key| !self.values.contains_key(*key))
    }

    fn put(&mut self, key: String, value: Vec<u8>) -> Result<(), StoreError> {
        let old = self.values.get(&key).map_or(0, |old| key.len() + old.len());
        let size = self.num_bytes - old + key.len() + value.len();
        limit("values and keys together", size, MAX_STORE_BYTES)?;
        self.num_bytes = size;
        self.values.insert(key, value);
        Ok(())
    }

    fn add(&mut self, key: String, amount: i64) -> StoreReply {
        let old = match self.values.get(&key) {
            None => Some(0),
            Some(value) => std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()),
        };
        let Some(sum) = old.and_then(|old: i64| old.checked_add(amount)) else {
            return StoreReply::Error(StoreError::NotANumber { key });
        };
        match self.put(key, sum.to_string().into_bytes()) {
            Ok(()) => StoreReply::Sum(sum),
            Err(error) => StoreReply::Error(error),
        }
    }

    fn delete(&mut self, key: &str) -> bool {
        let Some(value) = self.values.remove(key) else { return false };
        self.num_bytes -= key.len() + value.len();
        true
    }
}

impl From<Result<(), StoreError>> for StoreReply {
    fn from(result: Result<(), StoreError>) -> Self {
        result.map_or_else(StoreReply::Error, |()| StoreReply::Done)
    }
}

fn within_limits(request: &StoreRequest) -> Result<(), StoreError> {
    let keys = match request {
        StoreRequest::Set { key, value } => {
            limit("a value (bytes)", value.len(), MAX_VALUE_BYTES)?;
            std::slice::from_ref(key)
        }
        StoreRequest::Get { key, .. }
        | StoreRequest::Add { key, .. }
        | StoreRequest::Delete { key } => std::slice::from_ref(key),
        StoreRequest::Wait { keys, .. } | StoreRequest::Check { keys } => keys,
    };
    limit("a list of keys (number)", keys.len(), MAX_KEYS_PER_REQUEST)?;
    keys.iter().try_for_each(|key| limit("a key (bytes)", key.len(), MAX_KEY_BYTES))
}

fn limit(what: &str, size: usize, limit: usize) -> Result<(), StoreError> {
    if size > limit {
        return Err(StoreError::TooLarge { what: what.to_owned(), size, limit });
    }
    Ok(())
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Bytes as a hexadecimal string: twice the size, where a JSON list of numbers takes four times.
mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut text = String::with_capacity(bytes.len() * 2);
        for byte in bytes {
            text.push(char::from(DIGITS[usize::from(byte >> 4)]));
            text.push(char::from(DIGITS[usize::from(byte & 15)]));
        }
        serializer.serialize_str(&text)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        let digit = |byte: u8| char::from(byte).to_digit(16);
        let bytes: Option<Vec<u8>> = pairs
            .iter()
            .map(|[high, low]| u8::try_from(digit(*high)? << 4 | digit(*low)?).ok())
            .collect();
        match bytes {
            Some(bytes) if rest.is_empty() => Ok(bytes),
            _ => Err(D::Error::custom("a value is not hexadecimal")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn asker(rank: usize) -> Requester {
        Requester { rank, id: 1 }
    }

    fn key(name: &str) -> String {
        name.to_owned()
    }

    /// Each step: (rank, request, seconds after the start) and the replies it must bring about.
    fn check(script: &[(usize, StoreRequest, u64)], expected: &[&[(usize, StoreReply)]]) {
        let start = Instant::now();
        let mut store = Store::default();
        for ((rank, request, at_s), expected) in script.iter().zip(expected) {
            let now = start + Duration::from_secs(*at_s);
            let replies = store.handle(asker(*rank), request.clone(), now);
            let replies: Vec<_> =
                replies.into_iter().map(|(who, reply)| (who.rank, reply)).collect();
            assert_eq!(replies, *expected, "{request:?}");
        }
    }

    fn set(name: &str, value: &[u8]) -> StoreRequest {
        StoreRequest::Set { key: key(name), value: value.to_vec() }
    }

    fn get(name: &str) -> StoreRequest {
        StoreRequest::Get { key: key(name), timeout_ms: 1000 }
    }

    #[test]
    fn a_get_is_answered_by_the_set_that_follows() {
        check(
            &[(0, get("a"), 0), (1, get("a"), 0), (2, set("a", b"x"), 0), (0, get("a"), 0)],
            &[
                &[],
                &[],
                &[
                    (2, StoreReply::Done),
                    (0, StoreReply::Value(b"x".to_vec())),
                    (1, StoreReply::Value(b"x".to_vec())),
                ],
                &[(0, StoreReply::Value(b"x".to_vec()))],
            ],
        );
    }

    #[test]
    fn a_wait_needs_all_its_keys() {
        let wait = StoreRequest::Wait { keys: vec![key("a"), key("b")], timeout_ms: 1000 };
        check(
            &[(0, wait, 0), (1, set("a", b""), 0), (1, set("b", b""), 0)],
            &[&[], &[(1, StoreReply::Done)], &[(1, StoreReply::Done), (0, StoreReply::Done)]],
        );
    }

    #[test]
    fn counters_add_up_and_refuse_other_values() {
        let add = |amount| StoreRequest::Add { key: key("n"), amount };
        let not_a_number = StoreReply::Error(StoreError::NotANumber { key: key("n") });
        check(
            &[
                (0, add(2), 0),
                (0, add(-5), 0),
                (0, get("n"), 0),
                (0, add(i64::MIN), 0),
                (0, set("n", b"x"), 0),
                (0, add(1), 0),
            ],
            &[
                &[(0, StoreReply::Sum(2))],
                &[(0, StoreReply::Sum(-3))],
                &[(0, StoreReply::Value(b"-3".to_vec()))],
                &[(0, not_a_number.clone())],
                &[(0, StoreReply::Done)],
                &[(0, not_a_number)],
            ],
        );
    }

    #[test]
    fn check_and_delete_say_what_was_there() {
        let check_a = StoreRequest::Check { keys: vec![key("a")] };
        let delete_a = StoreRequest::Delete { key: key("a") };
        check(
            &[
                (0, check_a.clone(), 0),
                (0, set("a", b"x"), 0),
                (0, check_a.clone(), 0),
                (0, delete_a.clone(), 0),
                (0, delete_a, 0),
                (0, check_a, 0),
            ],
            &[
                &[(0, StoreReply::Bool(false))],
                &[(0, StoreReply::Done)],
                &[(0, StoreReply::Bool(true))],
                &[(0, StoreReply::Bool(true))],
                &[(0, StoreReply::Bool(false))],
                &[(0, StoreReply::Bool(false))],
            ],
        );
    }

    #[test]
    fn a_wait_expires_at_its_deadline_and_names_the_missing_key() {
        let start = Instant::now();
        let mut store = Store::default();
        assert!(store.handle(asker(3), get("peer"), start).is_empty());
        let deadline = store.next_deadline().unwrap();
        assert_eq!(deadline, start + Duration::from_secs(1));
        assert!(store.expire(deadline - Duration::from_millis(1)).is_empty());
        let error = StoreError::Timeout { key: key("peer"), waited_ms: 1000 };
        assert_eq!(store.expire(deadline), vec![(asker(3), StoreReply::Error(error))]);
        assert_eq!(store.next_deadline(), None);
    }

    #[test]
    fn limits_hold() {
        let mut store = Store::default();
        let long_value = set("a", &vec![0; MAX_VALUE_BYTES + 1]);
        let long_key = get(&"k".repeat(MAX_KEY_BYTES + 1));
        let keys = vec![key("a"); MAX_KEYS_PER_REQUEST + 1];
        for request in [long_value, long_key, StoreRequest::Check { keys }] {
            let replies = store.handle(asker(0), request, Instant::now());
            assert!(
                matches!(replies[..], [(_, StoreReply::Error(StoreError::TooLarge { .. }))]),
                "{replies:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn bytes_survive_the_wire(value in prop::collection::vec(any::<u8>(), 0..64)) {
            let text = serde_json::to_string(&StoreReply::Value(value.clone())).unwrap();
            prop_assert_eq!(
                serde_json::from_str::<StoreReply>(&text).unwrap(),
                StoreReply::Value(value)
            );
        }

        #[test]
        fn the_size_is_the_sum_of_what_is_held(
            ops in prop::collection::vec((0_u8..4, prop::collection::vec(any::<u8>(), 0..9)), 0..50)
        ) {
            let mut store = Store::default();
            for (name, value) in ops {
                let key = format!("k{name}");
                let request = match value.len() {
                    0 => StoreRequest::Delete { key },
                    _ => StoreRequest::Set { key, value },
                };
                store.handle(asker(0), request, Instant::now());
            }
            let sum: usize = store.values.iter().map(|(k, v)| k.len() + v.len()).sum();
            prop_assert_eq!(store.num_bytes, sum);
        }
    }
}
