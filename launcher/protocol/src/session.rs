//! Numbered messages: what one side sent and the other has not taken in is sent again over the next
//! connection, so that a lost connection loses no message and repeats none.
//!
//! Pure: it owns no socket. Each frame says how far its sender has taken in what came the other
//! way; a frame without a message is a sign of life.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// A message with its number, and the newest number taken in from the other side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numbered<M> {
    /// From 1, without gaps; 0 where there is no message.
    #[serde(default)]
    pub seq: u64,
    /// Newest number taken in.
    pub ack: u64,
    /// The message.
    #[serde(default = "none", skip_serializing_if = "Option::is_none")]
    pub m: Option<M>,
}

fn none<M>() -> Option<M> {
    None
}

/// Why a session cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The other side takes nothing in.
    #[error("{limit} messages wait for the other side to take them in")]
    Full {
        /// The most that may wait.
        limit: usize,
    },
    /// A message is missing.
    #[error("message {found} came where {expected} was next: one was lost")]
    Gap {
        /// What was next.
        expected: u64,
        /// What came.
        found: u64,
    },
    /// The other side has taken in what was never sent.
    #[error("the other side has taken in message {ack}, and {sent} were sent")]
    Ahead {
        /// What it says.
        ack: u64,
        /// How many there were.
        sent: u64,
    },
}

/// One side of a conversation that outlives its connections: sends `Out`, takes in anything.
#[derive(Clone, Debug)]
pub struct Session<Out> {
    sent: u64,
    taken: u64,
    unacked: VecDeque<(u64, Out)>,
    limit: usize,
}

impl<Out: Clone> Session<Out> {
    /// A new conversation in which at most `limit` messages wait to be taken in.
    pub fn new(limit: usize) -> Self {
        Self { sent: 0, taken: 0, unacked: VecDeque::new(), limit }
    }

    /// Newest number taken in: what the other side is told when it connects again.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// Messages that the other side has not taken in.
    pub fn num_waiting(&self) -> usize {
        self.unacked.len()
    }

    /// Numbers a message and keeps it until it has been taken in.
    ///
    /// # Errors
    /// Where too many wait already; then it is not kept.
    pub fn push(&mut self, message: Out) -> Result<Numbered<Out>, SessionError> {
        if self.unacked.len() >= self.limit {
            return Err(SessionError::Full { limit: self.limit });
        }
        self.sent += 1;
        self.unacked.push_back((self.sent, message.clone()));
        Ok(Numbered { seq: self.sent, ack: self.taken, m: Some(message) })
    }

    /// A sign of life.
    pub fn alive(&self) -> Numbered<Out> {
        Numbered { seq: 0, ack: self.taken, m: None }
    }

    /// Takes in what came; `None` for a sign of life, and for a message that came before.
    ///
    /// # Errors
    /// Where a message is missing, or more was taken in than was sent.
    pub fn take<In>(&mut self, numbered: Numbered<In>) -> Result<Option<In>, SessionError> {
        self.acknowledged(numbered.ack)?;
        let Some(message) = numbered.m else { return Ok(None) };
        if numbered.seq <= self.taken {
            return Ok(None);
        }
        let expected = self.taken + 1;
        if numbered.seq != expected {
            return Err(SessionError::Gap { expected, found: numbered.seq });
        }
        self.taken = expected;
        Ok(Some(message))
    }

    /// What must be sent over a new connection, of which the other side says that it has taken in
    /// everything up to `ack`.
    ///
    /// # Errors
    /// Where it has taken in more than was sent.
    pub fn resume(&mut self, ack: u64) -> Result<Vec<Numbered<Out>>, SessionError> {
        self.acknowledged(ack)?;
        let again = |(seq, message): &(u64, Out)| Numbered {
            seq: *seq,
            ack: self.taken,
            m: Some(message.clone()),
        };
        Ok(self.unacked.iter().map(again).collect())
    }

    /// The other side began anew: what it sends is numbered from 1 again, and what the one before
    /// had not taken in is sent to it from 1 on, where `is_wanted` says so.
    pub fn other_side_is_new(&mut self, is_wanted: impl Fn(&Out) -> bool) {
        self.taken = 0;
        self.unacked.retain(|(_, message)| is_wanted(message));
        for (number, (seq, _)) in (1..).zip(&mut self.unacked) {
            *seq = number;
        }
        self.sent = self.unacked.len() as u64;
    }

    fn acknowledged(&mut self, ack: u64) -> Result<(), SessionError> {
        if ack > self.sent {
            return Err(SessionError::Ahead { ack, sent: self.sent });
        }
        while self.unacked.front().is_some_and(|(seq, _)| *seq <= ack) {
            self.unacked.pop_front();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_full_session_takes_no_more_until_some_are_taken_in() {
        let mut session = Session::new(2);
        session.push("a").unwrap();
        session.push("b").unwrap();
        assert_eq!(session.push("c"), Err(SessionError::Full { limit: 2 }));
        session.take::<()>(Numbered { seq: 0, ack: 1, m: None }).unwrap();
        assert_eq!(session.push("c").unwrap().seq, 3);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let mut session = Session::<u8>::new(9);
        session.push(1).unwrap();
        let found = session.take(Numbered { seq: 2, ack: 0, m: Some('x') });
        assert_eq!(found, Err(SessionError::Gap { expected: 1, found: 2 }));
        assert_eq!(session.resume(2), Err(SessionError::Ahead { ack: 2, sent: 1 }));
    }

    #[test]
    fn a_new_other_side_is_told_what_the_old_one_had_not_taken_in() {
        let mut session = Session::new(9);
        for message in ["a", "b", "c", "x"] {
            session.push(message).unwrap();
        }
        session.take(Numbered { seq: 1, ack: 2, m: Some(()) }).unwrap();
        session.other_side_is_new(|message| *message != "x");
        let again = session.resume(0).unwrap();
        assert_eq!(again, [Numbered { seq: 1, ack: 0, m: Some("c") }]);
        assert_eq!(session.push("d").unwrap().seq, 2);
    }

    proptest! {
        /// Connections end at any moment, with any number of frames under way: each side takes in
        /// every message of the other once, in order.
        #[test]
        fn no_message_is_lost_or_repeated(
            lengths in prop::collection::vec((0_usize..6, 0_usize..6, 0_usize..6), 1..20),
        ) {
            let mut sides = [Session::<u64>::new(1000), Session::<u64>::new(1000)];
            let mut taken = [Vec::new(), Vec::new()];
            let mut next = 0;
            for (ours, theirs, arriving) in lengths {
                let acks = [sides[0].taken(), sides[1].taken()];
                let mut wire = [
                    sides[0].resume(acks[1]).unwrap(),
                    sides[1].resume(acks[0]).unwrap(),
                ];
                for (side, count) in [ours, theirs].into_iter().enumerate() {
                    for _ in 0..count {
                        next += 1;
                        let frame = sides[side].push(next).unwrap();
                        wire[side].push(frame);
                    }
                }
                // Of each direction, some frames arrive before the connection ends.
                for side in 0..2 {
                    for frame in wire[side].drain(..).take(arriving + side) {
                        let message = sides[1 - side].take(frame).unwrap();
                        taken[1 - side].extend(message);
                    }
                }
            }
            for side in 0..2 {
                let ack = sides[1 - side].taken();
                for frame in sides[side].resume(ack).unwrap() {
                    let message = sides[1 - side].take(frame).unwrap();
                    taken[1 - side].extend(message);
                }
            }
            let mut all: Vec<u64> = taken.concat();
            prop_assert!(taken.iter().all(|one| one.is_sorted()));
            all.sort_unstable();
            prop_assert_eq!(all, (1..=next).collect::<Vec<u64>>());
        }
    }
}
