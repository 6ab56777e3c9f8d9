//! What lies between agents and the coordinator: connections whose messages take time, in order as
//! TCP has them, and what faults do to them.
#![cfg(test)]

use crate::cluster::members::NodeId;
use crate::cluster::nodes::Happening;
use crate::cluster::server::Door;
use fastrand::Rng;
use rank_protocol::agent::{Answer, FromAgent, Join, ToAgent};
use rank_protocol::exit_code;
use rank_protocol::session::Numbered;
use std::cell::RefCell;
use std::net::IpAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Messages of a queue; as in production.
const NUM_QUEUED: usize = 4096;

/// The way between a host and the coordinator.
#[derive(Clone, Debug)]
pub struct Way {
    /// Until when nothing gets to the coordinator, and to the agent.
    pub cut: [Instant; 2],
    /// Until when messages take so much longer.
    pub slow: (Instant, Duration),
    /// Messages that will come twice.
    pub duplicate: u32,
    /// Messages that will be overtaken.
    pub reorder: u32,
}

impl Way {
    /// Nothing is wrong with it.
    pub fn new(now: Instant) -> Self {
        Self { cut: [now; 2], slow: (now, Duration::ZERO), duplicate: 0, reorder: 0 }
    }

    /// When a message that is sent now arrives; what is sent into a cut arrives after it.
    pub fn arrival(&self, side: Side, now: Instant, random: &mut Rng) -> Instant {
        let (slow_until, extra) = self.slow;
        let delay = Duration::from_micros(random.u64(200..20_000));
        let delay = if now < slow_until { delay + extra.mul_f64(random.f64()) } else { delay };
        now.max(self.cut[side as usize]) + delay
    }

    /// Whether nothing gets through now.
    pub fn is_cut(&self, side: Side, now: Instant) -> bool {
        now < self.cut[side as usize]
    }
}

/// Whom a message goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// The coordinator.
    Head = 0,
    /// The agent.
    Agent = 1,
}

/// One direction of a connection.
pub struct Direction<M> {
    /// What its sender has queued; `None` once its end is known.
    pub queue: Option<mpsc::Receiver<Numbered<M>>>,
    /// When the last message arrives.
    pub last: Instant,
    /// A message that is to be overtaken arrives then.
    pub held: Option<Instant>,
}

impl<M> Direction<M> {
    /// With a queue and who fills it.
    pub fn new(now: Instant) -> (mpsc::Sender<Numbered<M>>, Self) {
        let (sender, queue) = mpsc::channel(NUM_QUEUED);
        (sender, Self { queue: Some(queue), last: now, held: None })
    }
}

/// A connection.
pub struct Wire {
    pub host: usize,
    pub agent: u64,
    pub epoch: u64,
    /// The member and connection that the coordinator knows it as.
    pub which: (NodeId, u64),
    /// The number that the agent knows it by; 0 before its answer has come.
    pub number: u64,
    /// Set once it has been reset: what is under way is lost.
    pub is_reset: bool,
    pub up: Option<Direction<FromAgent>>,
    pub down: Direction<ToAgent>,
    /// Whether an end has been told of, at either side.
    pub is_told: [bool; 2],
}

/// What the coordinator answered at its door.
pub enum Answered {
    Open { answer: Answer, which: (NodeId, u64), down: Direction<ToAgent> },
    Refused { code: i32, reason: String },
}

/// The coordinator's end of a connection that is simulated.
pub struct SimulatedDoor {
    pub now: Instant,
    pub answer: Rc<RefCell<Option<Answered>>>,
}

impl Door for SimulatedDoor {
    fn open(
        self: Box<Self>,
        (answer, again): (Answer, Vec<Numbered<ToAgent>>),
        which: (NodeId, u64),
        _happenings: mpsc::Sender<Happening>,
    ) -> mpsc::Sender<Numbered<ToAgent>> {
        let (sender, down) = Direction::new(self.now);
        for frame in again {
            sender.try_send(frame).unwrap();
        }
        *self.answer.borrow_mut() = Some(Answered::Open { answer, which, down });
        sender
    }

    fn local_address(&self) -> Option<IpAddr> {
        None
    }

    fn close(self: Box<Self>, answer: Answer) {
        let (code, reason) = match answer {
            Answer::Welcome { .. } => return,
            Answer::Refused { reason } => (exit_code::CONFIG, reason),
            Answer::Unhealthy { reason } => (exit_code::NODE_UNHEALTHY, reason),
        };
        *self.answer.borrow_mut() = Some(Answered::Refused { code, reason });
    }
}

/// An attempt to connect.
pub struct Dial {
    pub agent: u64,
    pub host: usize,
    pub join: Option<Join>,
}
