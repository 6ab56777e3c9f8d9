//! Do the ranks issue the same operation? Compared through the store, so that a mismatch is an
//! error and not a hang.
//!
//! An operation of a dtype and shape is compared before its first use. Later ones go on without,
//! and those that differ then find no message of each other's: where an operation takes long, each
//! rank says in the store at which one it is.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use torch_shim::gloo::Store;
use torch_shim::tch::Tensor;

use crate::error::{CommError, Members, Result};
use crate::whereabouts::messages_key;

/// The longest wait for the store before the group's own state is looked at.
const SLICE: Duration = Duration::from_millis(100);

/// What was not there is looked for again after so long.
const AGAIN: Duration = Duration::from_secs(1);

/// In a larger group each rank compares with one other, because all pairs would ask too much of
/// the store.
const ALL_PAIRS: usize = 64;

/// Which operations the ranks compare before they start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Check {
    /// The first use of each operation, dtype and shape.
    #[default]
    FirstUse,
    /// Every operation: for debugging. It is slow, and the store keeps what was compared.
    All,
    /// None.
    Off,
}

/// A rank among those of its group, and the store in which they compare.
#[derive(Clone)]
pub(crate) struct Voice {
    pub(crate) store: Store,
    pub(crate) members: Arc<Members>,
    pub(crate) rank: usize,
    pub(crate) size: usize,
}

impl Voice {
    /// The members with which this one compares.
    fn others(&self) -> Vec<usize> {
        match (self.size <= ALL_PAIRS, self.rank) {
            (true, _) => (0..self.size).filter(|&rank| rank != self.rank).collect(),
            (false, 0) => vec![1],
            (false, _) => vec![0],
        }
    }

    /// What a member issues, in words.
    fn issues(&self, member: usize, what: &str) -> String {
        format!("rank {} issues {what}", self.members.in_run(member))
    }

    fn mismatch(&self, operation: String, detail: String) -> CommError {
        CommError::Mismatch { group: self.members.group.clone(), operation, detail }
    }

    /// Says that this rank has found the ranks to disagree, for those that lose it now.
    pub(crate) fn tell(&self, verdict: &CommError) {
        let CommError::Mismatch { group, operation, detail } = verdict else { return };
        let text = format!("{group}\n{operation}\n{detail}");
        if let Err(error) = self.store.set(&verdict_key(self.rank), text.as_bytes()) {
            tracing::debug!("{}: {error}", self.members.group);
        }
    }

    /// What a member has found so, if it has.
    pub(crate) fn verdict_of(&self, member: usize) -> Option<CommError> {
        let text = self.store.find(&verdict_key(member)).ok()??;
        let text = String::from_utf8(text).ok()?;
        let mut parts = text.splitn(3, '\n').map(str::to_string);
        let (group, operation, detail) = (parts.next()?, parts.next()?, parts.next()?);
        Some(CommError::Mismatch { group, operation, detail })
    }

    /// Says at which operation this rank is, which takes long or has failed, and compares with the
    /// others that say so.
    ///
    /// # Errors
    /// Where another is at the operation of this number too, but at another one.
    pub(crate) fn stalls(&self, what: &str) -> Result<()> {
        let key = |rank: usize| format!("stalls/{rank}");
        self.store.set(&key(self.rank), what.as_bytes())?;
        let Some((number, own)) = parts(what) else { return Ok(()) };
        let mut differing = Vec::new();
        for rank in self.others() {
            let Some(theirs) = self.store.find(&key(rank))? else { continue };
            let theirs = String::from_utf8_lossy(&theirs);
            match parts(&theirs) {
                Some((theirs, other)) if theirs == number && other != own => {
                    differing.push(self.issues(rank, other));
                }
                _ => {}
            }
        }
        if differing.is_empty() {
            return Ok(());
        }
        let detail = format!("{}, {}", self.issues(self.rank, own), differing.join(", "));
        Err(self.mismatch(number.to_string(), detail))
    }
}

fn verdict_key(member: usize) -> String {
    format!("verdict/{member}")
}

/// `operation 7 (barrier)` in two.
fn parts(what: &str) -> Option<(&str, &str)> {
    what.strip_suffix(')')?.split_once(" (")
}

/// Compares what the ranks of one group are about to do.
pub(crate) struct Agreement {
    pub(crate) voice: Voice,
    pub(crate) check: Check,
    pub(crate) timeout: Duration,
    pub(crate) seen: HashSet<String>,
}

impl Agreement {
    /// Whether the ranks compare anything.
    pub(crate) fn is_on(&self) -> bool {
        self.voice.size > 1 && self.check != Check::Off
    }

    /// Announces operation `sequence` and compares it with what the other ranks announce.
    ///
    /// `alive` says whether a rank can still announce anything; it is asked all along, so that a
    /// dead peer or an abort ends the wait.
    pub(crate) fn compare(
        &mut self,
        sequence: u64,
        operation: &str,
        alive: &dyn Fn(usize) -> Result<()>,
    ) -> Result<()> {
        let known = !self.seen.insert(operation.to_string());
        let voice = &self.voice;
        if !self.is_on() || (known && self.check == Check::FirstUse) {
            return Ok(());
        }
        let key = |rank: usize| format!("agree/{sequence}/{rank}");
        voice.store.set(&key(voice.rank), operation.as_bytes())?;
        let mut differing = Vec::new();
        for rank in voice.others() {
            let theirs = self.announced(&key(rank), sequence, operation, rank, alive)?;
            if theirs != operation.as_bytes() {
                differing.push(voice.issues(rank, &String::from_utf8_lossy(&theirs)));
            }
        }
        if differing.is_empty() {
            return Ok(());
        }
        let detail = format!("{}, {}", voice.issues(voice.rank, operation), differing.join(", "));
        Err(voice.mismatch(format!("operation {sequence}"), detail))
    }

    /// What `rank` announces, waited for in slices.
    fn announced(
        &self,
        key: &str,
        sequence: u64,
        operation: &str,
        rank: usize,
        alive: &dyn Fn(usize) -> Result<()>,
    ) -> Result<Vec<u8>> {
        let (start, voice) = (Instant::now(), &self.voice);
        let mut look = AGAIN;
        loop {
            let error = match voice.store.get(key, SLICE) {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            alive(rank)?;
            if start.elapsed() >= look {
                look += AGAIN;
                voice.verdict_of(rank).map_or(Ok(()), Err)?;
            }
            if start.elapsed() >= self.timeout {
                let own = voice.issues(voice.rank, operation);
                let silent = voice.members.in_run(rank);
                let detail = format!("{own}, rank {silent} announced nothing ({error})");
                return Err(voice.mismatch(format!("operation {sequence}"), detail));
            }
            // A store that fails at once must not be asked in a tight loop.
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Compares the single messages between two ranks, at the first of each dtype and shape, or all.
///
/// Neither waits for the other: whoever comes second sees what the first said, and the first looks
/// again later.
pub(crate) struct MessageAgreement {
    voice: Voice,
    check: Check,
    /// By peer, tag and direction.
    known: Mutex<HashMap<(usize, u32, bool), Known>>,
    /// Of which the other has not said anything yet.
    open: Mutex<Vec<Open>>,
}

/// One end of a message, of which the other end was not known.
#[derive(Clone)]
struct Open {
    is_sent: bool,
    /// The sender's and the receiver's number in the group.
    between: (usize, usize),
    what: String,
    /// Where the other end says what it does.
    key: String,
    since: Instant,
    /// When it is looked at next.
    next: Duration,
}

/// What went one way.
#[derive(Default)]
struct Known {
    /// Dtypes and shapes, in the order of first use; none where all messages are compared.
    list: Vec<String>,
    count: u64,
}

impl MessageAgreement {
    pub(crate) fn new(voice: Voice, check: Check) -> Self {
        Self { voice, check, known: Mutex::default(), open: Mutex::default() }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<(usize, u32, bool), Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds how many messages went each way.
    pub(crate) fn count(&self, counts: &mut BTreeMap<String, u64>) {
        let (group, own) = (&self.voice.members.group, self.voice.rank);
        for (&(peer, tag, is_sent), known) in self.known().iter() {
            let (from, to) = if is_sent { (own, peer) } else { (peer, own) };
            counts.insert(messages_key(group, from, to, tag, is_sent), known.count);
        }
    }

    /// Compares a message to (or from) `peer`; returns how many came before it.
    ///
    /// # Errors
    /// Where the peer said that it takes (or sends) something else.
    pub(crate) fn compare(
        &self,
        peer: usize,
        tag: u32,
        is_sent: bool,
        tensor: &Tensor,
    ) -> Result<u64> {
        if self.check == Check::Off {
            return Ok(0);
        }
        let what = format!("{:?} {:?}", tensor.kind(), tensor.size());
        let mut all = self.known();
        let known = all.entry((peer, tag, is_sent)).or_default();
        let before = known.count;
        known.count += 1;
        let index = match self.check {
            Check::All => before,
            _ if known.list.contains(&what) => return Ok(before),
            _ => {
                known.list.push(what.clone());
                known.list.len() as u64 - 1
            }
        };
        drop(all);
        let voice = &self.voice;
        let (from, to) = if is_sent { (voice.rank, peer) } else { (peer, voice.rank) };
        let side = |sent: bool| if sent { "sent" } else { "taken" };
        let key = |sent: bool| format!("message/{from}/{to}/{tag}/{index}/{}", side(sent));
        voice.store.set(&key(is_sent), what.as_bytes())?;
        let (since, next) = (Instant::now(), AGAIN);
        let open = Open { is_sent, between: (from, to), what, key: key(!is_sent), since, next };
        if !self.is_known(&open)? {
            self.open().push(open);
        }
        Ok(before)
    }

    fn open(&self) -> MutexGuard<'_, Vec<Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the other end has said what it does.
    ///
    /// # Errors
    /// Where that is something else.
    fn is_known(&self, open: &Open) -> Result<bool> {
        let voice = &self.voice;
        let Some(theirs) = voice.store.find(&open.key)? else { return Ok(false) };
        if theirs == open.what.as_bytes() {
            return Ok(true);
        }
        let (own, theirs) = (open.what.clone(), String::from_utf8_lossy(&theirs).into_owned());
        let (sent, taken) = if open.is_sent { (own, theirs) } else { (theirs, own) };
        let (from, to) = open.between;
        let (from, to) = (voice.members.in_run(from), voice.members.in_run(to));
        let detail = format!("rank {from} sends {sent}, rank {to} takes {taken}");
        let operation = format!("message from rank {from} to rank {to}");
        Err(voice.mismatch(operation, detail))
    }

    /// Looks again at what the other ends had not said, less and less often.
    ///
    /// # Errors
    /// As [`MessageAgreement::compare`].
    pub(crate) fn look_again(&self) -> Result<()> {
        let is_due = |open: &Open| open.since.elapsed() >= open.next;
        let due: Vec<Open> = self.open().iter().filter(|open| is_due(open)).cloned().collect();
        for seen in due {
            let is_known = self.is_known(&seen)?;
            let mut all = self.open();
            let Some(at) = all.iter().position(|open| open.key == seen.key) else { continue };
            if is_known {
                all.remove(at);
            } else {
                all[at].next *= 2;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local::MemoryStore;
    use crate::whereabouts::{Awaited, What};
    use torch_shim::gloo::StoreBackend;
    use torch_shim::tch::{Device, Kind};

    /// Two ends of messages that share a store.
    fn ends(check: Check) -> [MessageAgreement; 2] {
        let store = Store::new(Arc::new(MemoryStore::default()) as Arc<dyn StoreBackend>);
        let members = Arc::new(Members { group: "pipeline".to_string(), ranks: vec![4, 9] });
        [0, 1].map(|rank| {
            let (store, members) = (store.clone(), members.clone());
            let voice = Voice { store, members, rank, size: 2 };
            MessageAgreement::new(voice, check)
        })
    }

    fn tensor(count: i64) -> Tensor {
        Tensor::zeros([count], (Kind::Float, Device::Cpu))
    }

    /// Each end counts what the other's wait needs.
    #[test]
    fn messages_are_counted_at_both_ends() {
        let [sender, taker] = ends(Check::FirstUse);
        let send = |count: i64| sender.compare(1, 7, true, &tensor(count)).unwrap();
        assert_eq!([send(4), send(4), send(5)], [0, 1, 2]);
        assert_eq!(taker.compare(0, 7, false, &tensor(4)).unwrap(), 0);
        let counted = |end: &MessageAgreement, own: usize, is_sent: bool| {
            let what = What::Message { peer: 1 - own, tag: 7, index: 0, is_sent };
            let members = sender.voice.members.clone();
            let needed = Awaited { members, own, size: 2, what }.position(None);
            assert_eq!(needed.of, [[9, 4][own]]);
            let mut counts = BTreeMap::new();
            end.count(&mut counts);
            counts.get(&needed.key).copied()
        };
        assert_eq!(counted(&sender, 1, false), Some(3), "what a receiver waits for");
        assert_eq!(counted(&taker, 0, true), Some(1), "what a sender waits for");
        assert_eq!(counted(&taker, 1, false), None);
    }

    /// A dtype and shape that both know is compared again where all messages are.
    #[test]
    fn messages_that_differ_after_their_first_use() {
        for check in [Check::FirstUse, Check::All] {
            let [sender, taker] = ends(check);
            for count in [4, 5] {
                sender.compare(1, 7, true, &tensor(count)).unwrap();
                taker.compare(0, 7, false, &tensor(count)).unwrap();
            }
            sender.compare(1, 7, true, &tensor(4)).unwrap();
            let found = taker.compare(0, 7, false, &tensor(5));
            assert_eq!(found.is_err(), check == Check::All, "{found:?}");
        }
    }

    #[test]
    fn who_came_first_looks_again() {
        let [sender, taker] = ends(Check::FirstUse);
        sender.compare(1, 7, true, &tensor(4)).unwrap();
        let seen = taker.compare(0, 7, false, &tensor(5)).unwrap_err().to_string();
        assert!(seen.contains("rank 4 sends Float [4], rank 9 takes Float [5]"), "{seen}");
        sender.look_again().unwrap();
        std::thread::sleep(AGAIN);
        assert_eq!(sender.look_again().unwrap_err().to_string(), seen);
    }
}
