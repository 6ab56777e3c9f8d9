//! What one rank does in all of its groups, said to the others where it waits for long: so that
//! ranks which wait for each other in different groups are told so in seconds ([`crate::circle`]),
//! and a time-out says who holds up a rank that did nothing.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use torch_shim::gloo::Store;

use crate::circle::{self, MOST_READ, Position};
use crate::error::{CommError, Members, Result};
use crate::group::{LONG, Shared};

/// How often it is looked whether the rank waits for long.
const LOOK: Duration = Duration::from_millis(250);

/// What one rank has issued in its groups, and what it waits for. Clones share it.
///
/// It belongs to groups that one thread uses at a time: while a [`crate::Work`] of one of them is
/// waited for, nothing is issued in any. A group that another thread uses meanwhile must not enter.
#[derive(Clone)]
pub struct Whereabouts(Arc<Inner>);

struct Inner {
    store: Store,
    rank: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    groups: Vec<Weak<Shared>>,
    waiting: Option<Waiting>,
    num_waits: u64,
    /// The last wait that failed.
    failed: Option<u64>,
}

/// A wait under way.
#[derive(Clone)]
struct Waiting {
    number: u64,
    since: Instant,
    awaited: Awaited,
}

/// What is waited for.
#[derive(Clone, Debug)]
pub(crate) struct Awaited {
    pub(crate) members: Arc<Members>,
    /// The waiting rank's number in the group.
    pub(crate) own: usize,
    /// The group's size.
    pub(crate) size: usize,
    pub(crate) what: What,
}

/// Which of a group's operations, or messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// The `index`-th collective, from 0.
    Operation { index: u64, needs: Needs },
    /// The `index`-th message with a tag from or to a peer.
    Message { peer: usize, tag: u32, index: u64, is_sent: bool },
}

/// Who else must have issued a collective before it can end here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Needs {
    All,
    /// This member.
    Root(usize),
    Nobody,
}

/// The name of a group's messages from one member to another, as one end of them counts.
pub(crate) fn messages_key(group: &str, from: usize, to: usize, tag: u32, is_sent: bool) -> String {
    let way = if is_sent { '>' } else { '<' };
    format!("{group} {from}{way}{to} {tag}")
}

impl Awaited {
    /// The need, without what the rank had issued; `under_way` is what the group is at.
    pub(crate) fn position(&self, under_way: Option<&str>) -> Position {
        let (group, own) = (&self.members.group, self.own);
        let (key, index, words, of) = match self.what {
            What::Operation { index, needs } => {
                let of = match needs {
                    // The nearest first, and not too many.
                    Needs::All => (1..self.size).map(|by| (own + by) % self.size).collect(),
                    Needs::Root(root) if root != own => vec![root],
                    Needs::Root(_) | Needs::Nobody => Vec::new(),
                };
                let own_name = format!("operation {index}");
                let words = match under_way {
                    Some(what) if what.starts_with(&format!("{own_name} ")) => what.to_string(),
                    Some(what) => format!("{own_name}, behind {what}"),
                    None => own_name,
                };
                (group.clone(), index, words, of)
            }
            What::Message { peer, tag, index, is_sent } => {
                let (from, to) = if is_sent { (own, peer) } else { (peer, own) };
                let (verb, way) = if is_sent { ("send", "to") } else { ("receive", "from") };
                let other = self.members.in_run(peer);
                let words =
                    format!("the {verb} of message {index} with tag {tag} {way} rank {other}");
                (messages_key(group, from, to, tag, !is_sent), index, words, vec![peer])
            }
        };
        let of = of.into_iter().take(MOST_READ).map(|member| self.members.in_run(member));
        let words = format!("{words} of group {group}");
        Position { words, key, index, of: of.collect(), ..Position::default() }
    }
}

/// A wait that has begun.
pub(crate) struct Standing {
    whereabouts: Whereabouts,
    number: u64,
}

impl Standing {
    /// The wait is over, well or not.
    pub(crate) fn over(self, is_well: bool) {
        let mut state = self.whereabouts.0.state();
        if !is_well {
            state.failed = Some(self.number);
        }
        if state.waiting.as_ref().is_some_and(|waiting| waiting.number == self.number) {
            state.waiting = None;
        }
    }
}

impl Whereabouts {
    /// Those of `rank` of the run, in a store that all ranks share. Nothing of an older generation
    /// is ever read.
    ///
    /// # Errors
    /// Where no thread can be started.
    pub fn new(store: &Store, generation: u64, rank: usize) -> Result<Whereabouts> {
        let store = store.with_prefix(&format!("generation-{generation}/whereabouts"));
        let inner = Arc::new(Inner { store, rank, state: Mutex::default() });
        let weak = Arc::downgrade(&inner);
        let thread = std::thread::Builder::new().name("whereabouts".into());
        thread
            .spawn(move || watch(&weak))
            .map_err(|error| CommError::Backend(format!("no thread for whereabouts: {error}")))?;
        Ok(Whereabouts(inner))
    }

    /// From now on this group's operations count.
    pub(crate) fn enter(&self, group: Weak<Shared>) {
        self.0.state().groups.push(group);
    }

    /// The ranks do not agree: none of this one's groups can go on, and whoever waits for it in
    /// one of them is told.
    pub(crate) fn give_up(&self, error: &CommError) {
        self.0.give_up(error);
    }

    /// Why a rank of the run does nothing, as far as it is known; nothing where it is not.
    pub(crate) fn held_up(&self, rank: usize) -> String {
        circle::held_up(rank, &mut |rank| self.0.read(rank).ok().flatten())
    }

    /// The rank begins to wait.
    pub(crate) fn stand(self, awaited: Awaited) -> Standing {
        let mut state = self.0.state();
        state.num_waits += 1;
        let (number, since) = (state.num_waits, Instant::now());
        state.waiting = Some(Waiting { number, since, awaited });
        drop(state);
        Standing { whereabouts: self, number }
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn groups(&self) -> Vec<Arc<Shared>> {
        self.state().groups.iter().filter_map(Weak::upgrade).collect()
    }

    /// What this wait needs, if anything, and what was issued. The counts are read after the wait
    /// has begun, as a circle's proof wants it.
    fn position(&self, awaited: &Awaited) -> Option<Position> {
        let groups = self.groups();
        let own_group = groups.iter().find(|group| Arc::ptr_eq(group.members(), &awaited.members));
        let under_way = own_group.and_then(|group| group.under_way()).map(|(what, _)| what);
        let mut position = awaited.position(under_way.as_deref());
        groups.iter().for_each(|group| group.count(&mut position.issued));
        Some(position).filter(|position| !position.of.is_empty())
    }

    /// Says what a wait needs, and looks whether it is part of a circle. Whoever of a circle says
    /// it last, sees all others.
    fn look(&self, position: &Position) -> Result<Option<String>> {
        self.store.set(&self.rank.to_string(), &position.encode())?;
        let mut failure = Ok(());
        let mut read = |rank: usize| match self.read(rank) {
            Ok(position) => position,
            Err(error) => {
                failure = Err(error);
                None
            }
        };
        match circle::find(self.rank, position, &mut read) {
            Some(circle) => Ok(Some(circle::describe(&circle))),
            None => failure.map(|()| None),
        }
    }

    /// What a rank has said last; nothing where it has taken that back.
    fn read(&self, rank: usize) -> Result<Option<Position>> {
        let said = self.store.find(&rank.to_string())?;
        Ok(said.and_then(|bytes| Position::decode(&bytes)))
    }

    /// The rank has failed in a wait that it told of, or goes on: what it said is no longer so.
    fn take_back(&self, position: Position, has_failed: bool) {
        let text = match has_failed {
            true => Position { is_over: true, ..position }.encode(),
            false => Vec::new(),
        };
        if let Err(error) = self.store.set(&self.rank.to_string(), &text) {
            tracing::debug!("whereabouts of rank {}: {error}", self.rank);
        }
    }

    /// Ends all groups that are not dead yet.
    fn give_up(&self, error: &CommError) {
        let groups = self.groups();
        let alive = groups.iter().filter(|group| group.alive().is_ok());
        alive.for_each(|group| drop(group.fail_alone(error)));
    }
}

/// That this wait is part of a circle.
fn mismatch(awaited: &Awaited, detail: String) -> CommError {
    let operation = match awaited.what {
        What::Operation { index, .. } => format!("operation {index}"),
        What::Message { .. } => "a message".to_string(),
    };
    CommError::Mismatch { group: awaited.members.group.clone(), operation, detail }
}

/// Looks after the rank's waits, until its whereabouts are gone.
fn watch(whereabouts: &Weak<Inner>) {
    let (mut at, mut next) = (0, LONG);
    // The wait that was told of, and what.
    let mut told: Option<(u64, Position)> = None;
    loop {
        std::thread::sleep(LOOK);
        let Some(inner) = whereabouts.upgrade() else { return };
        let (waiting, failed) = {
            let state = inner.state();
            (state.waiting.clone(), state.failed)
        };
        let now = waiting.as_ref().map(|waiting| waiting.number);
        if let Some((number, position)) = told.take_if(|(number, _)| now != Some(*number)) {
            inner.take_back(position, failed == Some(number));
        }
        let Some(waiting) = waiting else { continue };
        if waiting.number != at {
            (at, next) = (waiting.number, LONG);
        }
        if waiting.since.elapsed() < next {
            continue;
        }
        // Less and less often, for the sake of the store.
        next *= 2;
        let Some(position) = inner.position(&waiting.awaited) else { continue };
        let found = inner.look(&position);
        told = Some((waiting.number, position));
        match found {
            Ok(None) => {}
            Ok(Some(detail)) => inner.give_up(&mismatch(&waiting.awaited, detail)),
            Err(error) => tracing::debug!("whereabouts of rank {}: {error}", inner.rank),
        }
    }
}
