//! The remote tier: a run's checkpoints in an object store.
//!
//! ```text
//! checkpoint.remote/NAME/
//!   RUN                      identity of the run whose checkpoints these are
//!   step-0001200.g0003/      files as on disk; COMMIT last, and only where there is none
//! ```
//! Nothing is ever written twice under one name: a checkpoint's folder has its generation. The
//! launcher copies, once a checkpoint is committed on disk ([`upload`], as [`uploads`] decides),
//! and fetches what is missing or damaged here ([`store`]).

pub mod store;
pub mod upload;
pub mod uploads;

use crate::print::err;
use run_config::RunConfig;
use std::future::Future;
use store::{Remote, Stored};

/// Where a run's checkpoints are in an object store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// `checkpoint.remote`.
    pub url: String,
    /// Name of the run.
    pub name: String,
    /// Identity of the run; `None`: whatever run it is.
    pub run_id: Option<String>,
}

impl Place {
    /// Those of the run with this config and identity; `None`: it has no object store.
    pub fn of(config: &RunConfig, run_id: Option<String>) -> Option<Place> {
        let url = config.checkpoint.remote.clone()?;
        Some(Place { url, name: config.name.clone(), run_id })
    }

    /// In words, and for messages.
    pub fn describe(&self) -> String {
        format!("{}/{}", self.url, self.name)
    }
}

/// The complete checkpoints of a run, in the order of their commits. Waits for the object store.
///
/// # Errors
/// A message where it cannot be read, or holds another run's.
pub fn list(place: &Place) -> Result<Vec<Stored>, String> {
    wait_for(async {
        let remote = Remote::open(place).map_err(|error| error.to_string())?;
        remote.check_owner().await.map_err(|error| error.to_string())?;
        let mut stored = remote.list().await.map_err(|error| error.to_string())?;
        stored.retain(|stored| stored.is_complete);
        Ok(stored)
    })
}

/// As [`list`]; none where that fails, which is said on standard error.
pub fn list_or_say(place: &Place) -> Vec<Stored> {
    list(place).unwrap_or_else(|reason| {
        err!("note: nothing is read from the object store: {reason}");
        Vec::new()
    })
}

/// Copies a checkpoint into the folder `dir` of checkpoints, every byte checked; its bytes. Waits
/// for the object store.
///
/// # Errors
/// A message where it cannot be read or is damaged, or where there is no room.
pub fn fetch(place: &Place, stored: &Stored, dir: &std::path::Path) -> Result<u64, String> {
    wait_for(async {
        let remote = Remote::open(place).map_err(|error| error.to_string())?;
        remote.fetch(stored.target, dir).await.map_err(|error| error.to_string())
    })
}

/// Does the work on threads of its own; the caller's may be part of another runtime.
fn wait_for<T: Send>(work: impl Future<Output = Result<T, String>> + Send) -> Result<T, String> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            let mut builder = tokio::runtime::Builder::new_multi_thread();
            match builder.worker_threads(2).enable_all().build() {
                Ok(runtime) => runtime.block_on(work),
                Err(error) => Err(format!("no thread for the object store: {error}")),
            }
        });
        thread.join().unwrap_or_else(|_| Err("the thread for the object store panicked".into()))
    })
}
