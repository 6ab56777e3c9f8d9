//! A communicator's life: connecting, splitting, failing, ending.

use std::ffi::c_int;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::bounded::{Pace, lock_within, run_within};
use crate::calls::Calling;
use crate::error::{NcclError, Result};
use crate::library::Nccl;
use crate::result::{Handle, Progress, Slot};
use crate::sys::{Code, INVALID_ARGUMENT};
use crate::types::UniqueId;

/// What a communicator is made with.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its name in errors (`data`, `tensor-3`).
    pub name: String,
    /// The longest wait for NCCL to connect, to put work on a stream, or to finish.
    pub timeout: Duration,
    /// The longest wait for an abort.
    pub abort_timeout: Duration,
}

impl Options {
    /// A communicator of that name, with 60 s to connect and 5 s to abort.
    pub fn new(name: impl Into<String>) -> Self {
        let (timeout, abort_timeout) = (Duration::from_secs(60), Duration::from_secs(5));
        Options { name: name.into(), timeout, abort_timeout }
    }
}

/// What a communicator, its aborters and its calls have in common.
///
/// Locks are taken in the order of the fields. NCCL is called under `state` only, and each call
/// returns at once, so that an abort gets in between any two.
pub(crate) struct Shared {
    pub(crate) nccl: Nccl,
    pub(crate) options: Options,
    /// Held from an operation's first call until its work is on the stream: NCCL wants no other
    /// call on the communicator before.
    turn: Mutex<()>,
    state: Mutex<State>,
    /// The function that `state` was last taken for.
    inside: Mutex<String>,
    /// Why the communicator is dead: the first cause. Never held while NCCL is called.
    cause: Mutex<Option<String>>,
}

pub(crate) struct State {
    /// None once destroyed or aborted.
    handle: Option<Handle>,
    /// Where a split under way leaves the child, which an abort ends too.
    child: Option<Slot>,
}

impl State {
    /// The communicator, where it still lives.
    pub(crate) fn handle(&self, shared: &Shared) -> Result<&Handle> {
        shared.alive()?;
        self.handle.as_ref().ok_or_else(|| shared.dead("it has ended"))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn dead(&self, otherwise: &str) -> NcclError {
        let cause = lock(&self.cause).clone().unwrap_or_else(|| otherwise.to_string());
        NcclError::Dead { group: self.options.name.clone(), cause }
    }

    fn alive(&self) -> Result<()> {
        if lock(&self.cause).is_some() { Err(self.dead("")) } else { Ok(()) }
    }

    /// Notes the first cause: from now on every call fails at once.
    pub(crate) fn fail(&self, cause: &str) {
        lock(&self.cause).get_or_insert_with(|| cause.to_string());
    }

    /// Turns a code into a result; a failure that the communicator does not survive is its death.
    pub(crate) fn judge(&self, function: &str, code: Code) -> Result<Progress> {
        let result = self.nccl.api.judge(&self.options.name, function, code);
        if let Err(error) = &result
            && code != INVALID_ARGUMENT
        {
            self.fail(&error.to_string());
        }
        result
    }

    /// Waits for this operation's turn.
    pub(crate) fn take_turn(&self, function: &str) -> Result<MutexGuard<'_, ()>> {
        self.alive()?;
        let limit = self.options.timeout;
        lock_within(&self.turn, limit).ok_or_else(|| self.stuck(function, limit))
    }

    /// Takes the right to call NCCL.
    pub(crate) fn enter(&self, function: &str) -> Result<MutexGuard<'_, State>> {
        self.enter_within(function, self.options.timeout)
    }

    fn enter_within(&self, function: &str, limit: Duration) -> Result<MutexGuard<'_, State>> {
        let state = lock_within(&self.state, limit).ok_or_else(|| self.stuck(function, limit))?;
        function.clone_into(&mut lock(&self.inside));
        Ok(state)
    }

    fn stuck(&self, function: &str, limit: Duration) -> NcclError {
        NcclError::Stuck {
            group: self.options.name.clone(),
            wanted: function.to_string(),
            inside: lock(&self.inside).clone(),
            limit_ms: limit.as_millis(),
        }
    }

    /// Asks NCCL how far the communicator is. A failure that it reports is the communicator's
    /// death, whatever its code.
    fn progress(&self, waiting_for: &str) -> Result<Progress> {
        let (code, state) = {
            let state = self.enter("ncclCommGetAsyncError")?;
            self.nccl.api.async_error(state.handle(self)?)
        };
        self.judge("ncclCommGetAsyncError", code)?;
        let group = &self.options.name;
        let progress = self.nccl.api.judge(group, waiting_for, state);
        progress.inspect_err(|error| self.fail(&error.to_string()))
    }

    /// Polls until nothing is in progress any more, at most until the time-out.
    pub(crate) fn settle(&self, waiting_for: &str) -> Result<()> {
        let mut pace = Pace::new(self.options.timeout);
        while self.progress(waiting_for)? == Progress::InProgress {
            if !pace.pause() {
                let error = NcclError::Deadline {
                    group: self.options.name.clone(),
                    waiting_for: waiting_for.to_string(),
                    limit_ms: self.options.timeout.as_millis(),
                };
                self.fail(&error.to_string());
                return Err(error);
            }
        }
        Ok(())
    }

    /// Asks for this rank and the number of ranks.
    fn place(&self) -> Result<(usize, usize)> {
        let (count, rank) = {
            let state = self.enter("ncclCommCount")?;
            let handle = state.handle(self)?;
            (self.nccl.api.count(handle), self.nccl.api.user_rank(handle))
        };
        let number = |function: &str, (code, number): (Code, c_int)| {
            self.judge(function, code)?;
            usize::try_from(number).map_err(|_| self.dead(&format!("{function} answered {number}")))
        };
        Ok((number("ncclCommUserRank", rank)?, number("ncclCommCount", count)?))
    }

    fn abort(&self, cause: &str) -> Result<()> {
        self.fail(cause);
        let limit = self.options.abort_timeout;
        let (handle, child) = {
            let mut state = self.enter_within("ncclCommAbort", limit)?;
            (state.handle.take(), state.child.take())
        };
        let Some(handle) = handle else { return Ok(()) };
        let api = self.nccl.api.clone();
        let codes = self.run_within(limit, "ncclCommAbort", move || {
            let parent = api.abort(handle);
            // Only now does NCCL write to the child's slot no more.
            let child = child.and_then(Slot::take).map(|child| api.abort(child));
            [Some(parent), child]
        })?;
        for code in codes.into_iter().flatten() {
            self.nccl.api.judge(&self.options.name, "ncclCommAbort", code)?;
        }
        Ok(())
    }

    /// Ends a communicator on which nothing is under way.
    fn finish(&self) -> Result<()> {
        let _calling = Calling::begin(&self.options.name, "ncclCommFinalize")?;
        let _turn = self.take_turn("ncclCommFinalize")?;
        let code = {
            let state = self.enter("ncclCommFinalize")?;
            self.nccl.api.finalize(state.handle(self)?)
        };
        self.judge("ncclCommFinalize", code)?;
        self.settle("ncclCommFinalize")?;
        let handle = self.enter("ncclCommDestroy")?.handle.take();
        self.fail("it was finished");
        let Some(handle) = handle else { return Err(self.dead("it has ended")) };
        let api = self.nccl.api.clone();
        let code =
            self.run_within(self.options.timeout, "ncclCommDestroy", move || api.destroy(handle))?;
        self.nccl.api.judge(&self.options.name, "ncclCommDestroy", code).map(|_| ())
    }

    /// A call that may block, on a thread of its own.
    fn run_within<T: Send + 'static>(
        &self,
        limit: Duration,
        function: &str,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T> {
        run_within(limit, function, call).map_err(|detail| {
            tracing::warn!("group {}: {detail}", self.options.name);
            NcclError::Deadline {
                group: self.options.name.clone(),
                waiting_for: function.to_string(),
                limit_ms: limit.as_millis(),
            }
        })
    }
}

/// Aborts what nobody has finished, when it goes.
pub(crate) struct Owner(Arc<Shared>);

impl Owner {
    fn new(nccl: Nccl, options: Options, handle: Handle) -> Owner {
        Owner(Arc::new(Shared {
            nccl,
            options,
            turn: Mutex::new(()),
            state: Mutex::new(State { handle: Some(handle), child: None }),
            inside: Mutex::default(),
            cause: Mutex::default(),
        }))
    }
}

impl std::ops::Deref for Owner {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        if let Err(error) = self.abort("it was dropped") {
            tracing::warn!("{error}");
        }
    }
}

/// Ends a communicator from any thread, at any time.
#[derive(Clone)]
pub struct Aborter(Arc<Shared>);

impl Aborter {
    /// As [`Communicator::abort`].
    ///
    /// # Errors
    /// As there.
    pub fn abort(&self, cause: &str) -> Result<()> {
        self.0.abort(cause)
    }
}

/// A communicator whose ranks have not all come yet.
pub struct Connecting {
    shared: Owner,
    rank: usize,
    size: usize,
}

impl Connecting {
    /// What another thread can end the wait with.
    pub fn aborter(&self) -> Aborter {
        Aborter(self.shared.0.clone())
    }

    /// Waits until all ranks have come.
    ///
    /// # Errors
    /// When they do not come within the time-out, NCCL fails, or the communicator is aborted. It
    /// is ended then.
    pub fn wait(self) -> Result<Communicator> {
        self.shared.settle("ncclCommInitRankConfig")?;
        let (rank, size) = self.shared.place()?;
        if (rank, size) != (self.rank, self.size) {
            let (name, asked) = (&self.shared.options.name, (self.rank, self.size));
            return Err(NcclError::Invalid(format!(
                "group {name}: rank {} of {} became rank {rank} of {size}",
                asked.0, asked.1
            )));
        }
        Ok(Communicator { shared: self.shared, rank, size })
    }
}

/// One rank's end of a group of ranks, each with a GPU.
///
/// After a failure (but for an invalid argument) or an abort it is dead: every later call fails at
/// once, with the first cause. What is dropped unfinished is aborted.
pub struct Communicator {
    pub(crate) shared: Owner,
    rank: usize,
    size: usize,
}

impl Communicator {
    /// Begins to connect as `rank` of `size`, on the CUDA device that is current on this thread.
    /// `NCCL_COMM_BLOCKING=1` in the environment would make NCCL's calls wait after all, and must
    /// not be set.
    ///
    /// # Errors
    /// When there is no such rank, or NCCL refuses.
    pub fn begin(
        nccl: &Nccl,
        id: UniqueId,
        rank: usize,
        size: usize,
        options: Options,
    ) -> Result<Connecting> {
        let numbers = (c_int::try_from(rank), c_int::try_from(size));
        let (Ok(rank_code), Ok(size_code)) = numbers else {
            return Err(no_such_rank(&options.name, rank, size));
        };
        if rank >= size {
            return Err(no_such_rank(&options.name, rank, size));
        }
        let function = "ncclCommInitRankConfig";
        let calling = Calling::begin(&options.name, function)?;
        let (code, handle) = nccl.api.init(id, rank_code, size_code);
        drop(calling);
        // Owned before the code is looked at, so that a failed one is aborted.
        let name = options.name.clone();
        let shared = handle.map(|handle| Owner::new(nccl.clone(), options, handle));
        nccl.api.judge(&name, function, code)?;
        let Some(shared) = shared else {
            let detail = format!("group {name}: {function} succeeded, and left no communicator");
            return Err(NcclError::Invalid(detail));
        };
        Ok(Connecting { shared, rank, size })
    }

    /// Connects: [`Communicator::begin`], then [`Connecting::wait`].
    ///
    /// # Errors
    /// As theirs.
    pub fn connect(
        nccl: &Nccl,
        id: UniqueId,
        rank: usize,
        size: usize,
        options: Options,
    ) -> Result<Communicator> {
        Communicator::begin(nccl, id, rank, size, options)?.wait()
    }

    /// This rank's number.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of ranks.
    pub fn size(&self) -> usize {
        self.size
    }

    /// What another thread can end it with.
    pub fn aborter(&self) -> Aborter {
        Aborter(self.shared.0.clone())
    }

    /// Whether NCCL has nothing bad to report. To be asked while one waits for work on a stream:
    /// what fails there is reported here, and the stream never passes.
    ///
    /// # Errors
    /// The failure that NCCL reports, or the cause of death.
    pub fn check(&self) -> Result<()> {
        self.shared.progress("work on a stream").map(|_| ())
    }

    /// Splits the group, which all its ranks must do, with nothing under way: those of one color
    /// come into one child, in the order of their keys. A rank without a color gets none.
    ///
    /// # Errors
    /// As [`Communicator::group`], and when the others do not split within the time-out.
    pub fn split(
        &self,
        color: Option<u32>,
        key: u32,
        name: impl Into<String>,
    ) -> Result<Option<Communicator>> {
        let shared = &*self.shared;
        let function = "ncclCommSplit";
        let number = |number: u32| {
            c_int::try_from(number).map_err(|_| {
                let group = &shared.options.name;
                let limit = c_int::MAX;
                let text = format!("group {group}: color or key {number} is above {limit}");
                NcclError::Invalid(text)
            })
        };
        let (color_code, key) = (color.map(number).transpose()?, number(key)?);
        let calling = Calling::begin(&shared.options.name, function)?;
        let turn = shared.take_turn(function)?;
        {
            let mut state = shared.enter(function)?;
            let (code, slot) = shared.nccl.api.split(state.handle(shared)?, color_code, key);
            state.child = Some(slot);
            shared.judge(function, code)?;
        }
        drop(calling);
        shared.settle(function)?;
        let child = shared.enter(function)?.child.take().and_then(Slot::take);
        drop(turn);
        let handle = match (child, color) {
            (Some(handle), _) => handle,
            (None, None) => return shared.alive().map(|()| None),
            (None, Some(_)) => return Err(shared.dead("its split left no child")),
        };
        let options = Options { name: name.into(), ..shared.options.clone() };
        let child = Owner::new(shared.nccl.clone(), options, handle);
        child.settle(function)?;
        let (rank, size) = child.place()?;
        Ok(Some(Communicator { shared: child, rank, size }))
    }

    /// Ends all work under way, on the device too, and frees the communicator; `cause` is what
    /// later calls report. Any thread may call it, at any time, more than once. All ranks that
    /// still live must abort too: NCCL may wait for those of the same machine.
    ///
    /// # Errors
    /// When a call hangs inside NCCL or the abort itself takes too long: then the process has to
    /// end. When NCCL reports a failure of the abort.
    pub fn abort(&self, cause: &str) -> Result<()> {
        self.shared.abort(cause)
    }

    /// Waits until the work under way is done everywhere, and frees the communicator. All ranks
    /// must do so.
    ///
    /// # Errors
    /// When that takes longer than the time-out, or NCCL fails; it is aborted then.
    pub fn finish(self) -> Result<()> {
        self.shared.finish()
    }
}

fn no_such_rank(group: &str, rank: usize, size: usize) -> NcclError {
    NcclError::Invalid(format!("group {group}: there is no rank {rank} of {size}"))
}
