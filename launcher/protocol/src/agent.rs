//! The messages between the coordinator of a run and the agents, one on each node.
//!
//! An agent connects over TLS and says [`Join`]; the coordinator answers [`Answer`]. From then on
//! both send [`Numbered`](crate::session::Numbered) messages: [`FromAgent`] and [`ToAgent`]. Every
//! message about a rank carries its generation, and one of another generation is dropped.

use crate::bundle::{Door, Holding, MemoryPlan};
use crate::exit::Exit;
use crate::message::{Assignment, FromRank, ToRank};
use crate::store::StoreRequest;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The most bytes of a frame before a connection has shown the run's token.
pub const MAX_JOIN_BYTES: usize = 16 << 10;
/// Time between two signs of life, in milliseconds.
pub const ALIVE_EVERY_MS: u64 = 1000;

/// The first message of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Join {
    /// The run's token: who knows it may join.
    pub token: String,
    /// What the node is.
    pub node: NodeInfo,
    /// The conversation that this connection goes on with; 0: there was none.
    pub conversation: u64,
    /// Newest message of the coordinator that was taken in over its earlier connections.
    pub taken: u64,
    /// The ranks that run here, where any do.
    #[serde(default)]
    pub running: Option<Running>,
    /// Where this agent takes in copies of other nodes' checkpoints, where it keeps any in memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub door: Option<Door>,
    /// What it has of them, its own and others'.
    #[serde(default, skip_serializing_if = "Holding::is_empty")]
    pub bundles: Holding,
}

/// A node, as its agent describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// Its name, unique in the run: the host's, where the agent was given none.
    pub name: String,
    /// Its place in the infrastructure's order, where that is known: Slurm's node number, say.
    #[serde(default)]
    pub index: Option<u64>,
    /// Identity of this start of the machine.
    pub boot_id: String,
    /// Identity of this agent: its process id and when it started.
    pub agent: String,
    /// Address at which the ranks of other nodes reach those of this one.
    pub address: String,
    /// CPU cores.
    pub cores: usize,
    /// GPUs.
    pub gpus: usize,
    /// Version of the launcher's build.
    pub build: String,
    /// What a look at the node found; `None`: nobody looked (`restart.health_check: false`).
    #[serde(default)]
    pub health: Option<Health>,
}

/// What a look at a node found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// What is wrong; empty: nothing.
    pub problems: Vec<String>,
    /// What was measured, in words.
    pub notes: Vec<String>,
}

/// The ranks of a generation that were started on a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// Generation.
    pub generation: u64,
    /// Ranks that run, with their process ids.
    pub ranks: Vec<(usize, u32)>,
    /// Ranks that have ended; what they said last, and how they ended, is told again.
    pub exited: Vec<usize>,
}

/// The coordinator's answer to [`Join`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// The node belongs to the run from now on.
    Welcome {
        /// The conversation. Where it is another than before, the coordinator has taken in nothing.
        conversation: u64,
        /// Newest message of the agent that was taken in over its earlier connections.
        taken: u64,
        /// The coordinator's, where it holds the run by a lease: it grows with every coordinator,
        /// and an agent that has heard of a later one obeys no earlier one. 0: there is no lease.
        #[serde(default)]
        epoch: u64,
    },
    /// It does not, and why.
    Refused {
        /// Why.
        reason: String,
    },
    /// It does not, because the node is not well.
    Unhealthy {
        /// What is wrong with it.
        reason: String,
    },
}

/// From the coordinator to an agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToAgent {
    /// Start these ranks; those of an earlier generation, where any are left and are not meant to
    /// go on, are killed first.
    Start(Box<Start>),
    /// Pass a message on to a rank.
    Tell {
        /// Generation.
        generation: u64,
        /// Rank.
        rank: usize,
        /// What it is told.
        message: ToRank,
    },
    /// SIGTERM to a rank's process group.
    Terminate {
        /// Generation.
        generation: u64,
        /// Rank.
        rank: usize,
    },
    /// SIGKILL to a rank's process group.
    Kill {
        /// Generation.
        generation: u64,
        /// Rank.
        rank: usize,
    },
    /// Forget what is in memory of checkpoints, but for this one, of a step and a generation.
    Forget {
        /// (generation, step).
        but: Option<(u64, u64)>,
    },
    /// The run is over: kill what is left and end with this code.
    Over {
        /// Exit code.
        code: i32,
        /// Why.
        reason: String,
    },
}

/// What an agent needs to start ranks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// Generation.
    pub generation: u64,
    /// The run's folder, as all nodes see it.
    pub run_dir: PathBuf,
    /// The ranks' places.
    pub ranks: Vec<Assignment>,
    /// Ranks that go on in the processes that they had, where these have let go and still run.
    #[serde(default)]
    pub kept: Vec<usize>,
    /// Set where checkpoints are kept in the nodes' memories.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryPlan>,
}

/// From an agent to the coordinator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromAgent {
    /// What the ranks of this node have written into the rendezvous store, for a coordinator that
    /// began anew. There are no replies.
    Store {
        /// Generation.
        generation: u64,
        /// In this order.
        requests: Vec<StoreRequest>,
    },
    /// What is in this node's memory of checkpoints, from now on.
    Holds(Holding),
    /// This node was asked to stop: the run must.
    StopRequested {
        /// Name of the signal.
        signal: String,
    },
    /// A rank's process runs, or goes on.
    Started {
        /// Generation.
        generation: u64,
        /// Rank.
        rank: usize,
        /// Process id.
        pid: u32,
    },
    /// A rank said something.
    Said {
        /// Generation.
        generation: u64,
        /// Rank.
        rank: usize,
        /// What.
        message: FromRank,
    },
    /// A rank said something that is no message.
    Garbled {
        /// Generation.
        generation: u64,
        /// Rank.
        rank: usize,
        /// Why it is none.
        error: String,
    },
    /// A rank's process ended, and everything it said before has been passed on.
    Exited {
        /// Generation.
        generation: u64,
        /// Rank.
        rank: usize,
        /// How.
        exit: Exit,
        /// What it wrote last.
        last_lines: Vec<String>,
    },
}
