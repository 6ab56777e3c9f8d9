//! What a coordinator leaves for its successor, and what keeps two from acting at once, where
//! `restart.store` is etcd. With `file` the run's folder is all that: its lock and its events.
//!
//! [`StateStore`] is the seam: whoever holds the lease writes, and is known by an *epoch* that
//! grows with every holder. [`tenure`] is pure and says how long a holder may be sure of itself;
//! [`keeper`] renews and writes on a thread of its own; [`etcd`] speaks to etcd, over [`http`];
//! [`held`] is a run that is held so.

pub mod etcd;
pub mod held;
pub mod http;
pub mod keeper;
pub mod tenure;

use super::nodes::Address;
use crate::runs::History;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// How long a lease holds without being renewed.
pub const TTL: Duration = Duration::from_secs(5);

/// The coordinator of a run, as others find it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Its machine.
    pub host: String,
    /// Its process id.
    pub pid: u32,
    /// When it became the coordinator.
    pub since: String,
    /// The run, by the identity in [`rank_protocol::RunDir::identity`]; empty before there is one.
    #[serde(default)]
    pub run_id: String,
    /// Where agents reach it; `None` while it does not listen.
    #[serde(default)]
    pub address: Option<Address>,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Holder { host, pid, since, .. } = self;
        write!(f, "the coordinator on {host} (process {pid}, since {since})")
    }
}

/// What a successor must know.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Epoch of the coordinator that wrote it.
    pub epoch: u64,
    /// Where the run's folder was, for messages.
    pub run_dir: PathBuf,
    /// The machine of the coordinator that began the run, for messages.
    pub host: String,
    /// What has happened.
    pub history: History,
}

/// The store gives no answer: nothing is known, neither that it has done what was asked for nor
/// that it has not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Away(pub String);

impl fmt::Display for Away {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What became of an attempt to hold a run.
#[derive(Clone, Debug, PartialEq)]
pub enum Acquired {
    /// It is held, from now on for [`TTL`].
    Yes {
        /// Greater than that of every holder before.
        epoch: u64,
        /// What the last holder left.
        record: Option<Box<Record>>,
    },
    /// Another holds it.
    Held(Box<Holder>),
}

/// A store in which one coordinator at a time may write. Every call is bounded in time.
pub trait StateStore: Send {
    /// Tries to become the holder.
    ///
    /// # Errors
    /// [`Away`]; so for all calls.
    fn acquire(&mut self, holder: &Holder) -> Result<Acquired, Away>;

    /// Renews the lease; `false`: there is none any more.
    ///
    /// # Errors
    /// [`Away`].
    fn renew(&mut self) -> Result<bool, Away>;

    /// Writes, in this holder's epoch alone; `false`: that is over, and nothing was written.
    ///
    /// # Errors
    /// [`Away`].
    fn write(&mut self, record: &Record) -> Result<bool, Away>;

    /// Tells agents where they reach the holder; else as [`StateStore::write`].
    ///
    /// # Errors
    /// [`Away`].
    fn announce(&mut self, holder: &Holder) -> Result<bool, Away>;

    /// Gives the lease up. If that fails it ends by itself.
    fn release(&mut self);
}
