//! A run on several nodes: one coordinator, and an agent on each node that starts its ranks.
//!
//! The coordinator is the supervisor with ranks that are elsewhere. [`members`] is pure and says
//! which nodes belong to the run and which are dead; [`server`] lets agents in over TLS
//! ([`secrets`]); [`nodes`] holds the conversation with each
//! ([`remote`] is one of its ranks). [`agent`] is the other side, and
//! keeps a [`journal`] for a coordinator that begins anew; [`wire`] frames what both say; [`store`]
//! is where a coordinator on another machine finds what it needs to take over. [`sizes`] says with
//! how many fewer nodes a run can go on. [`role`] tells a node of `phalanx run` its part, and
//! [`companion`] is the agent of the first. [`depot`] keeps checkpoints in a node's memory, its own
//! ranks' and another's; [`complete`] says which are whole.

pub mod agent;
pub mod companion;
pub mod complete;
pub mod depot;
pub mod journal;
pub mod members;
pub mod nodes;
pub mod remote;
pub mod role;
pub mod secrets;
pub mod server;
mod simulation;
pub mod sizes;
pub mod store;
pub mod wire;
