//! An operation under way.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::{CommError, Result};
use crate::transport::Pending;

/// An operation under way. The tensors live at least until it is done.
#[must_use = "an operation is done only when it has been waited for"]
pub struct Work(Kind);

enum Kind {
    Queued(Arc<Completion>),
    Message(Box<dyn Pending>),
    Done,
}

impl Work {
    pub(crate) fn queued(completion: Arc<Completion>) -> Work {
        Work(Kind::Queued(completion))
    }

    pub(crate) fn message(pending: Box<dyn Pending>) -> Work {
        Work(Kind::Message(pending))
    }

    pub(crate) fn done() -> Work {
        Work(Kind::Done)
    }

    /// Waits until the operation is done here. Every wait of the transport is bounded, so this one
    /// is too.
    ///
    /// # Errors
    /// What the operation failed with.
    pub fn wait(self) -> Result<()> {
        match self.0 {
            Kind::Queued(completion) => completion.wait(),
            Kind::Message(pending) => pending.wait(),
            Kind::Done => Ok(()),
        }
    }

    /// Whether the operation is over, well or not, so that a wait returns at once. A single message
    /// may say no until it is waited for.
    pub fn is_done(&self) -> bool {
        match &self.0 {
            Kind::Queued(completion) => completion.lock().is_some(),
            Kind::Message(pending) => pending.is_done(),
            Kind::Done => true,
        }
    }
}

/// Where a queued operation's outcome is left.
#[derive(Default)]
pub(crate) struct Completion {
    outcome: Mutex<Option<Result<()>>>,
    changed: Condvar,
}

impl Completion {
    fn lock(&self) -> MutexGuard<'_, Option<Result<()>>> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self) -> Result<()> {
        let mut outcome = self.lock();
        loop {
            if let Some(result) = outcome.as_ref() {
                return result.clone();
            }
            outcome = self.changed.wait(outcome).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn finish(&self, result: Result<()>) {
        let mut outcome = self.lock();
        if outcome.is_none() {
            *outcome = Some(result);
        }
        self.changed.notify_all();
    }
}

/// Finishes a completion exactly once, whatever becomes of the thread that holds it.
pub(crate) struct Finisher(pub(crate) Arc<Completion>);

impl Finisher {
    pub(crate) fn finish(self, result: Result<()>) {
        self.0.finish(result);
    }
}

impl Drop for Finisher {
    fn drop(&mut self) {
        self.0.finish(Err(CommError::Backend("the communication thread ended early".to_string())));
    }
}
