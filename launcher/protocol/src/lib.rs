//! What an agent and its ranks say to each other, and the files they share.
//!
//! The agent (the launcher, one per node) spawns a rank with one end of a socketpair as its
//! standard input. Both sides exchange [`message`]s in bounded [`frame`]s: the rank says hello, the
//! agent assigns it a place, and from then on the rank reports and the agent may ask it to stop.
//! The rendezvous [`store`] lives in the agent, so that it outlives every rank.
//!
//! With several nodes there is an agent on each, and a coordinator that they report to, over TLS:
//! [`agent`] holds what these two say, [`session`] how nothing of it is lost when a connection is,
//! [`bundle`] what agents have to do with each other's memories.
//!
//! The rank's side is the blocking [`client::RankClient`]; the agent's side is the launcher's
//! supervisor. [`env`] and [`exit_code`] are the only registries of their kind; [`run_dir`] and
//! [`jsonl`] say where a run's files are and how they are written; [`signals`] is what both sides
//! must know about theirs, [`gpus`] and [`libtorch`] what they must agree on about a machine.

pub mod agent;
pub mod bundle;
pub mod client;
pub mod env;
pub mod exit;
pub mod exit_code;
pub mod frame;
pub mod gpus;
pub mod jsonl;
pub mod libtorch;
pub mod message;
pub mod run_dir;
pub mod session;
pub mod signals;
pub mod store;

pub use client::{ClientError, RankClient, StoreClient};
pub use message::{
    Assignment, Event, FailureClass, FailureReport, FromRank, Phase, Position, RollBack,
    StepReport, Steps, ToRank,
};
pub use run_dir::RunDir;
pub use store::StoreError;

use std::time::Duration;

/// Longest wait of a rank for storage: its own, or that of the ranks that read and write with it.
/// Whoever watches ranks waits longer.
pub const STORAGE_TIMEOUT: Duration = Duration::from_secs(30 * 60);
