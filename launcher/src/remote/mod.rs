//! The remote tier: a run's checkpoints in an object store.
//!
//! ```text
//! checkpoint.remote/NAME/
//!   RUN                      identity of the run whose checkpoints these are
//!   step-0001200.g0003/      files as on disk; COMMIT last, and only where there is none
//! ```
//! Nothing is ever written twice under one name: a checkpoint's folder has its generation. The
//! launcher copies, once a checkpoint is committed on disk ([`upload`], as [`uploads`] decides),
//! and fetches what is missing or damaged here ([`fetch`]).

pub mod access;
pub mod store;
pub mod transfer;
pub mod upload;
pub mod uploads;

use crate::print::err;
use access::RemoteError;
use run_config::RunConfig;
use std::future::Future;
use std::path::Path;
use store::{Remote, Stored};
use transfer::Width;
use uploads::Target;

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
/// Where it cannot be read, or holds another run's.
pub fn list(place: &Place) -> Result<Vec<Stored>, RemoteError> {
    wait_for(async {
        let remote = Remote::open_to_read(place)?;
        remote.check_owner().await?;
        let mut stored = remote.list().await?;
        stored.retain(|stored| stored.is_complete);
        Ok(stored)
    })
}

/// As [`list`]; none where that fails, which is said on standard error.
pub fn list_or_say(place: &Place) -> Vec<Stored> {
    list(place).unwrap_or_else(|error| {
        err!("note: nothing is read from the object store: {error}");
        Vec::new()
    })
}

/// Copies a checkpoint into the folder `dir` of checkpoints, every byte checked; its bytes. Waits
/// for the object store.
///
/// # Errors
/// Where it cannot be read or is damaged, or where there is no room.
pub fn fetch(place: &Place, target: Target, dir: &Path, width: Width) -> Result<u64, RemoteError> {
    wait_for(async { Remote::open_to_read(place)?.fetch(target, dir, width).await })
}

/// Does the work on threads of its own; the caller's may be part of another runtime.
fn wait_for<T: Send>(
    work: impl Future<Output = Result<T, RemoteError>> + Send,
) -> Result<T, RemoteError> {
    let local = |what: String| RemoteError::Local(what);
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            let mut builder = tokio::runtime::Builder::new_multi_thread();
            match builder.worker_threads(2).enable_all().build() {
                Ok(runtime) => runtime.block_on(work),
                Err(error) => Err(local(format!("no thread for the object store: {error}"))),
            }
        });
        let panicked = || Err(local("the thread for the object store panicked".into()));
        thread.join().unwrap_or_else(|_| panicked())
    })
}
