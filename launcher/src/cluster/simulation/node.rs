//! Agents: the production's, with a desk on which they leave what they want done.
#![cfg(test)]

use crate::cluster::agent::Agent;
use crate::cluster::agent::outside::Outside;
use crate::cluster::depot::{Command, News};
use crate::cluster::remote::{Commands, RemoteRank};
use crate::supervisor::rank::RankHandle;
use rank_protocol::Assignment;
use rank_protocol::agent::{Join, NodeInfo};
use rank_protocol::bundle::Door;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Instant;

/// What an agent wants done, and what it may know of the run.
#[derive(Default)]
pub struct Desk {
    pub joins: Vec<Join>,
    pub starts: Vec<Assignment>,
    pub has_coordinator: bool,
    pub end: Option<(i32, String)>,
    /// Whether the next rank cannot be started.
    pub fails_to_start: bool,
    pub has_failed_to_start: bool,
    pub num_started: u32,
}

/// An agent's desk, and what its ranks are told.
#[derive(Clone, Default)]
pub struct Place {
    pub desk: Rc<RefCell<Desk>>,
    pub commands: Rc<Commands>,
}

impl Outside for Place {
    fn connect(&self, join: Join, _least_epoch: u64) {
        self.desk.borrow_mut().joins.push(join);
    }

    fn asks_a_store(&self) -> bool {
        false
    }

    fn look_for_another(&self) {}

    fn start(&self, assignment: Assignment) -> Result<RankHandle, String> {
        let mut desk = self.desk.borrow_mut();
        if std::mem::take(&mut desk.fails_to_start) {
            desk.has_failed_to_start = true;
            return Err("no memory".into());
        }
        desk.num_started += 1;
        let pid = Rc::new(Cell::new(desk.num_started));
        let place = (assignment.generation, assignment.rank);
        desk.starts.push(assignment);
        let rank = RemoteRank::new(Rc::clone(&self.commands), 0, place, pid);
        Ok(RankHandle::Remote(rank))
    }

    fn num_spares(&self) -> usize {
        0
    }

    fn warm_up(&self, _local_rank: usize) -> Result<RankHandle, String> {
        Err("none is wanted".into())
    }

    fn door(&self) -> Option<Door> {
        None
    }

    fn memory_dir(&self) -> Option<std::path::PathBuf> {
        None
    }

    fn order(&self, _command: Command) -> Option<News> {
        None
    }

    fn has_coordinator(&self) -> bool {
        self.desk.borrow().has_coordinator
    }

    fn end_of_run(&self) -> Option<(i32, String)> {
        self.desk.borrow().end.clone()
    }
}

/// An agent's process.
pub struct AgentProcess {
    pub host: usize,
    pub agent: Agent,
    pub place: Place,
    /// The next time at which it wakes up.
    pub wake_at: Option<Instant>,
    /// It does not run until then.
    pub paused_until: Instant,
}

impl AgentProcess {
    /// Starts the agent `id` on a host.
    pub fn new(id: u64, host: usize, now: Instant) -> Self {
        let place = Place::default();
        let info = NodeInfo {
            name: format!("node-{host}"),
            index: Some(host as u64),
            agent: format!("agent-{id}"),
            build: env!("CARGO_PKG_VERSION").to_owned(),
            ..NodeInfo::default()
        };
        let agent = Agent::new(Box::new(place.clone()), info, now);
        Self { host, agent, place, wake_at: None, paused_until: now }
    }
}
