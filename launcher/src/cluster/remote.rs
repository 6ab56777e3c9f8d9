//! A rank on another node, for the supervisor: what it is told goes by its agent.

use super::members::NodeId;
use rank_protocol::agent::ToAgent;
use rank_protocol::{Assignment, ToRank};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

/// What ranks elsewhere are to be told, until the loop sends it.
#[derive(Default)]
pub struct Commands {
    queue: RefCell<VecDeque<(NodeId, ToAgent)>>,
}

/// A rank on another node.
pub struct RemoteRank {
    commands: Rc<Commands>,
    node: NodeId,
    generation: Cell<u64>,
    rank: usize,
    pid: Rc<Cell<u32>>,
}

impl Commands {
    /// The next one, with the node that it is for.
    pub fn next(&self) -> Option<(NodeId, ToAgent)> {
        self.queue.borrow_mut().pop_front()
    }
}

impl RemoteRank {
    /// The rank `(generation, number)` on a node; its process id comes later.
    pub fn new(
        commands: Rc<Commands>,
        node: NodeId,
        (generation, rank): (u64, usize),
        pid: Rc<Cell<u32>>,
    ) -> Self {
        Self { commands, node, generation: Cell::new(generation), rank, pid }
    }

    /// Process id on its node; 0 where it is not yet known.
    pub fn pid(&self) -> u32 {
        self.pid.get()
    }

    /// Passes on a message.
    pub fn tell(&self, message: ToRank) {
        self.command(ToAgent::Tell { generation: self.generation.get(), rank: self.rank, message });
    }

    /// Passes on its next place; from then on it is told what concerns that generation.
    pub fn assign(&self, assignment: Assignment) {
        let next = assignment.generation;
        self.tell(ToRank::Assignment(Box::new(assignment)));
        self.generation.set(next);
    }

    /// SIGTERM to its process group.
    pub fn terminate(&self) {
        self.command(ToAgent::Terminate { generation: self.generation.get(), rank: self.rank });
    }

    /// SIGKILL to its process group.
    pub fn kill(&self) {
        self.command(ToAgent::Kill { generation: self.generation.get(), rank: self.rank });
    }

    fn command(&self, command: ToAgent) {
        self.commands.queue.borrow_mut().push_back((self.node, command));
    }
}
