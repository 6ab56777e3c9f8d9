//! An operation under way.

use std::cell::Cell;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use torch_shim::cuda::{Event, Stream};
use torch_shim::profiler::Span;
use torch_shim::tch::Tensor;

use crate::error::{CommError, Result};
use crate::group::ended;
use crate::transport::Pending;
use crate::whereabouts::{Awaited, Whereabouts};

thread_local! {
    static WAITED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// How long this thread has waited for operations in all. On a GPU the host does not wait.
pub fn waited() -> Duration {
    WAITED.get()
}

/// An operation under way. The tensors live at least until it is done.
#[must_use = "an operation is done only when it has been waited for"]
pub struct Work {
    kind: Kind,
    /// What is known of the failure of a single message.
    explain: Option<Box<Explain>>,
    awaited: Option<(Whereabouts, Awaited)>,
    /// When it began, for a timeline.
    span: Option<Span>,
}

/// Makes a transport's error one for people.
pub(crate) type Explain = dyn FnOnce(CommError) -> CommError + Send;

enum Kind {
    Queued(Arc<Completion>),
    Message(Box<dyn Pending>),
    Done,
}

impl Work {
    pub(crate) fn queued(completion: Arc<Completion>) -> Work {
        Work::of(Kind::Queued(completion))
    }

    pub(crate) fn message(pending: Box<dyn Pending>) -> Work {
        Work::of(Kind::Message(pending))
    }

    pub(crate) fn done() -> Work {
        Work::of(Kind::Done)
    }

    fn of(kind: Kind) -> Work {
        Work { kind, explain: None, awaited: None, span: None }
    }

    /// What it fails with is told by `explain`.
    pub(crate) fn explained(self, explain: Box<Explain>) -> Work {
        Work { explain: Some(explain), ..self }
    }

    /// A wait for it is told to the rank's whereabouts.
    pub(crate) fn awaited(self, awaited: Option<(Whereabouts, Awaited)>) -> Work {
        Work { awaited, ..self }
    }

    /// It is on the timeline until it is seen to be done.
    pub(crate) fn timed(self, span: Option<Span>) -> Work {
        Work { span, ..self }
    }

    /// Waits until the operation is done here. Every wait of a transport is bounded, so this one
    /// is too. On a GPU it is this thread's current stream that waits, and the host goes on: what
    /// fails there is known to [`crate::Communicator::alive`] by the time that the host has read
    /// anything computed after it.
    ///
    /// # Errors
    /// What the operation failed with.
    pub fn wait(self) -> Result<()> {
        let since = Instant::now();
        let standing = self.awaited.map(|(whereabouts, awaited)| whereabouts.stand(awaited));
        let result = match self.kind {
            Kind::Queued(completion) => completion.wait(),
            Kind::Message(pending) => pending.wait(),
            Kind::Done => Ok(()),
        };
        if let Some(standing) = standing {
            standing.over(result.is_ok());
        }
        WAITED.set(WAITED.get() + since.elapsed());
        self.span.into_iter().for_each(ended);
        result.map_err(|error| match self.explain {
            Some(explain) => explain(error),
            None => error,
        })
    }

    /// Whether the operation is over, well or not, so that a wait returns at once. That of a
    /// receive may say no until it is waited for; that of a send says yes soon after.
    pub fn is_done(&self) -> bool {
        match &self.kind {
            Kind::Queued(completion) => completion.is_done(),
            Kind::Message(pending) => pending.is_done(),
            Kind::Done => true,
        }
    }
}

/// An operation that is on a stream: the end of it, and the tensors that it works on.
///
/// Once some stream of the tensors' users waits for the end, the allocator's own order keeps their
/// memory; until then it is told to keep it.
pub(crate) struct Behind {
    pub(crate) event: Arc<Event>,
    pub(crate) stream: Arc<Stream>,
    pub(crate) tensors: Vec<Tensor>,
}

impl Behind {
    /// Lets this thread's current stream wait.
    fn follow(mut self) -> Result<()> {
        self.event.hold_current()?;
        self.tensors.clear();
        Ok(())
    }
}

impl Drop for Behind {
    fn drop(&mut self) {
        for tensor in &self.tensors {
            if let Err(error) = self.stream.keep(tensor) {
                tracing::warn!("a tensor that NCCL works on: {error}");
            }
        }
    }
}

/// Where a queued operation's outcome is left.
#[derive(Default)]
pub(crate) struct Completion {
    outcome: Mutex<Option<Result<Option<Behind>>>>,
    changed: Condvar,
}

impl Completion {
    fn lock(&self) -> MutexGuard<'_, Option<Result<Option<Behind>>>> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_done(&self) -> bool {
        match self.lock().as_ref() {
            None => false,
            Some(Ok(Some(behind))) => behind.event.is_past().unwrap_or(true),
            Some(_) => true,
        }
    }

    fn wait(&self) -> Result<()> {
        let mut outcome = self.lock();
        loop {
            match outcome.as_mut() {
                None => {}
                Some(Err(error)) => return Err(error.clone()),
                Some(Ok(behind)) => {
                    let behind = behind.take();
                    drop(outcome);
                    return behind.map_or(Ok(()), Behind::follow);
                }
            }
            outcome = self.changed.wait(outcome).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn finish(&self, result: Result<Option<Behind>>) {
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
    pub(crate) fn finish(self, result: Result<Option<Behind>>) {
        self.0.finish(result);
    }
}

impl Drop for Finisher {
    fn drop(&mut self) {
        self.0.finish(Err(CommError::Backend("the communication thread ended early".to_string())));
    }
}
