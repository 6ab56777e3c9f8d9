//! What the ranks of a node wrote into the rendezvous store, for a coordinator that begins anew:
//! its store is empty, and ranks that wait for an answer wait for one from it.

use rank_protocol::ToRank;
use rank_protocol::message::FromRank;
use rank_protocol::store::{StoreReply, StoreRequest};
use std::collections::BTreeMap;

/// Bytes of keys and values in one message, at most.
const CHUNK_BYTES: usize = 256 << 10;

/// The requests of a generation.
#[derive(Debug, Default)]
pub struct Journal {
    /// Unanswered, by rank and id.
    asked: BTreeMap<(usize, u64), StoreRequest>,
    /// Answered, in the order of the answers; those alone that change the store.
    done: Vec<StoreRequest>,
}

impl Journal {
    /// A rank said something.
    pub fn said(&mut self, rank: usize, message: &FromRank) {
        if let FromRank::Store { id, request } = message {
            self.asked.insert((rank, *id), request.clone());
        }
    }

    /// A rank is told something.
    pub fn told(&mut self, rank: usize, message: &ToRank) {
        let ToRank::Store { id, reply } = message else { return };
        let Some(request) = self.asked.remove(&(rank, *id)) else { return };
        let has_changed = match &request {
            StoreRequest::Set { .. } | StoreRequest::Add { .. } | StoreRequest::Delete { .. } => {
                !matches!(reply, StoreReply::Error(_))
            }
            StoreRequest::Get { .. } | StoreRequest::Wait { .. } | StoreRequest::Check { .. } => {
                false
            }
        };
        if has_changed {
            self.done.push(request);
        }
    }

    /// What brings an empty store to where it was, in pieces that fit in a message.
    pub fn done(&self) -> Vec<Vec<StoreRequest>> {
        let mut pieces: Vec<Vec<StoreRequest>> = Vec::new();
        let mut left = 0;
        for request in &self.done {
            let bytes = size_of_request(request);
            if pieces.is_empty() || bytes > left {
                pieces.push(Vec::new());
                left = CHUNK_BYTES;
            }
            left = left.saturating_sub(bytes);
            if let Some(piece) = pieces.last_mut() {
                piece.push(request.clone());
            }
        }
        pieces
    }

    /// What still waits for an answer, with the ranks that asked.
    pub fn asked(&self) -> Vec<(usize, FromRank)> {
        let again = |(&(rank, id), request): (&(usize, u64), &StoreRequest)| {
            (rank, FromRank::Store { id, request: request.clone() })
        };
        self.asked.iter().map(again).collect()
    }
}

/// Bytes of a request in a message, roughly; values are hexadecimal there.
fn size_of_request(request: &StoreRequest) -> usize {
    let bytes = match request {
        StoreRequest::Set { key, value } => key.len() + 2 * value.len(),
        StoreRequest::Get { key, .. } => key.len(),
        StoreRequest::Add { key, .. } | StoreRequest::Delete { key } => key.len(),
        StoreRequest::Wait { keys, .. } | StoreRequest::Check { keys } => {
            keys.iter().map(String::len).sum()
        }
    };
    bytes + 64
}

#[cfg(test)]
mod tests {
    use super::*;
    use rank_protocol::store::{Requester, Store};
    use std::time::Instant;

    /// Passes a request on to `store` by way of the journal, as an agent does.
    fn ask(journal: &mut Journal, store: &mut Store, rank: usize, id: u64, request: StoreRequest) {
        journal.said(rank, &FromRank::Store { id, request: request.clone() });
        for (to, reply) in store.handle(Requester { rank, id }, request, Instant::now()) {
            journal.told(to.rank, &ToRank::Store { id: to.id, reply });
        }
    }

    fn replayed(journal: &Journal) -> Store {
        let mut store = Store::default();
        for request in journal.done().concat() {
            store.handle(Requester { rank: usize::MAX, id: 0 }, request, Instant::now());
        }
        store
    }

    fn get(store: &mut Store, key: &str) -> Vec<StoreReply> {
        let request = StoreRequest::Get { key: key.into(), timeout_ms: 1000 };
        let replies = store.handle(Requester { rank: 9, id: 9 }, request, Instant::now());
        replies.into_iter().map(|(_, reply)| reply).collect()
    }

    #[test]
    fn an_empty_store_comes_to_where_it_was() {
        let (mut journal, mut store) = (Journal::default(), Store::default());
        let add = |amount| StoreRequest::Add { key: "count".into(), amount };
        let set = |key: &str| StoreRequest::Set { key: key.into(), value: key.into() };
        ask(&mut journal, &mut store, 0, 1, add(2));
        ask(&mut journal, &mut store, 1, 1, add(3));
        ask(&mut journal, &mut store, 0, 2, set("a"));
        ask(&mut journal, &mut store, 0, 3, set("b"));
        ask(&mut journal, &mut store, 0, 4, StoreRequest::Delete { key: "a".into() });
        let waiting = StoreRequest::Get { key: "later".into(), timeout_ms: 1000 };
        ask(&mut journal, &mut store, 1, 2, waiting.clone());
        let mut again = replayed(&journal);
        assert_eq!(get(&mut again, "count"), [StoreReply::Value(b"5".to_vec())]);
        assert_eq!(get(&mut again, "b"), [StoreReply::Value(b"b".to_vec())]);
        assert_eq!(get(&mut again, "a"), []);
        let expected = FromRank::Store { id: 2, request: waiting };
        assert_eq!(journal.asked(), [(1, expected)]);
    }

    #[test]
    fn long_journals_are_cut_into_messages() {
        let (mut journal, mut store) = (Journal::default(), Store::default());
        for id in 0..10 {
            let value = vec![0; 60 << 10];
            let request = StoreRequest::Set { key: id.to_string(), value };
            ask(&mut journal, &mut store, 0, id, request);
        }
        let pieces = journal.done();
        assert_eq!(pieces.concat().len(), 10);
        assert!(pieces.iter().all(|piece| piece.len() <= 2), "{}", pieces.len());
    }
}
