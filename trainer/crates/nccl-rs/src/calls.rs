//! The operations: one at a time on a communicator, or several in a group.

use std::cell::Cell;
use std::ffi::c_int;

use crate::communicator::{Communicator, Shared};
use crate::error::{NcclError, Result};
use crate::result::{Handle, Progress};
use crate::sys::Code;
use crate::types::{DeviceBuffer, ReduceOp, Stream};

thread_local! {
    /// Whether this thread is in the middle of calls: NCCL puts whatever a thread calls between
    /// the start and the end of a group into that group, whoever it belongs to.
    static IS_CALLING: Cell<bool> = const { Cell::new(false) };
}

/// The operations of one communicator, while this thread has it to itself.
///
/// All work goes to the stream that is given; an operation that returns well has only been put
/// there, or (in a group) will be when the group ends.
pub struct Calls<'a> {
    shared: &'a Shared,
    handle: &'a Handle,
    rank: usize,
    size: usize,
    num_issued: Cell<usize>,
    is_in_progress: Cell<bool>,
}

impl Calls<'_> {
    /// This rank's number.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of ranks.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Reduces `buffer` over the ranks, in place.
    ///
    /// # Errors
    /// When NCCL refuses. An invalid argument leaves the communicator as it was; after any other
    /// refusal it is dead.
    pub fn all_reduce(&self, buffer: DeviceBuffer, op: ReduceOp, stream: Stream) -> Result<()> {
        let api = &self.shared.nccl.api;
        self.issued("ncclAllReduce", api.all_reduce(self.handle, buffer, op, stream))
    }

    /// Puts the ranks' `input`s side by side into `output`. The input may be the rank's own piece
    /// of the output.
    ///
    /// # Errors
    /// As [`Calls::all_reduce`], and when `output` does not hold as many inputs as there are ranks.
    pub fn all_gather(
        &self,
        output: DeviceBuffer,
        input: DeviceBuffer,
        stream: Stream,
    ) -> Result<()> {
        self.fits("ncclAllGather", output, input, self.size)?;
        let api = &self.shared.nccl.api;
        self.issued("ncclAllGather", api.all_gather(self.handle, output, input, stream))
    }

    /// Reduces `input` over the ranks; each keeps its own piece in `output`, which may be that
    /// piece of the input.
    ///
    /// # Errors
    /// As [`Calls::all_reduce`], and when `input` does not hold as many outputs as there are ranks.
    pub fn reduce_scatter(
        &self,
        output: DeviceBuffer,
        input: DeviceBuffer,
        op: ReduceOp,
        stream: Stream,
    ) -> Result<()> {
        self.fits("ncclReduceScatter", input, output, self.size)?;
        let api = &self.shared.nccl.api;
        self.issued("ncclReduceScatter", api.reduce_scatter(self.handle, output, input, op, stream))
    }

    /// Copies the root's `buffer` to all ranks.
    ///
    /// # Errors
    /// As [`Calls::all_reduce`], and when there is no such root.
    pub fn broadcast(&self, buffer: DeviceBuffer, root: usize, stream: Stream) -> Result<()> {
        let root = self.rank_code("ncclBroadcast", root)?;
        let api = &self.shared.nccl.api;
        self.issued("ncclBroadcast", api.broadcast(self.handle, buffer, root, stream))
    }

    /// Sends `buffer` to a rank. NCCL has no tags: what two ranks send each other is matched by
    /// order. Sends and receives that wait for each other belong in one group.
    ///
    /// # Errors
    /// As [`Calls::all_reduce`], and when there is no such rank.
    pub fn send(&self, buffer: DeviceBuffer, peer: usize, stream: Stream) -> Result<()> {
        let peer = self.rank_code("ncclSend", peer)?;
        self.issued("ncclSend", self.shared.nccl.api.send(self.handle, buffer, peer, stream))
    }

    /// Receives what `peer` sends next.
    ///
    /// # Errors
    /// As [`Calls::send`].
    pub fn recv(&self, buffer: DeviceBuffer, peer: usize, stream: Stream) -> Result<()> {
        let peer = self.rank_code("ncclRecv", peer)?;
        self.issued("ncclRecv", self.shared.nccl.api.recv(self.handle, buffer, peer, stream))
    }

    fn issued(&self, function: &str, code: Code) -> Result<()> {
        if self.shared.judge(function, code)? == Progress::InProgress {
            self.is_in_progress.set(true);
        }
        self.num_issued.set(self.num_issued.get() + 1);
        Ok(())
    }

    fn rank_code(&self, function: &str, rank: usize) -> Result<c_int> {
        c_int::try_from(rank).ok().filter(|_| rank < self.size).ok_or_else(|| {
            let (group, size) = (&self.shared.options.name, self.size);
            NcclError::Invalid(format!("group {group}: {function}: no rank {rank} among {size}"))
        })
    }

    fn fits(
        &self,
        function: &str,
        large: DeviceBuffer,
        small: DeviceBuffer,
        ratio: usize,
    ) -> Result<()> {
        let expected = small.count().checked_mul(ratio);
        if large.dtype() != small.dtype() || Some(large.count()) != expected {
            return Err(NcclError::Invalid(format!(
                "group {}: {function}: {large:?} is not {ratio} times {small:?}",
                self.shared.options.name
            )));
        }
        Ok(())
    }
}

/// A group that has been started, and is ended whatever happens.
struct OpenGroup<'a> {
    calls: &'a Calls<'a>,
    is_open: bool,
}

impl<'a> OpenGroup<'a> {
    fn start(calls: &'a Calls<'a>) -> Result<OpenGroup<'a>> {
        calls.shared.judge("ncclGroupStart", calls.shared.nccl.api.group_start())?;
        Ok(OpenGroup { calls, is_open: true })
    }

    fn end(&mut self) -> Result<()> {
        self.is_open = false;
        let code = self.calls.shared.nccl.api.group_end();
        if self.calls.shared.judge("ncclGroupEnd", code)? == Progress::InProgress {
            self.calls.is_in_progress.set(true);
        }
        Ok(())
    }
}

impl Drop for OpenGroup<'_> {
    fn drop(&mut self) {
        if self.is_open {
            // The closure panicked: its own failure is told, and the communicator notes this one.
            let _ = self.end();
            self.calls.shared.fail("a group of calls was left by a panic");
        }
    }
}

/// Marks this thread as calling, until it is dropped.
pub(crate) struct Calling;

impl Calling {
    /// # Errors
    /// When the thread is in the middle of calls.
    pub(crate) fn begin(group: &str, function: &str) -> Result<Calling> {
        if IS_CALLING.replace(true) {
            return Err(NcclError::Invalid(format!(
                "group {group}: {function} inside a group of calls: NCCL would make it part of \
                 that group; use the group's own operations"
            )));
        }
        Ok(Calling)
    }
}

impl Drop for Calling {
    fn drop(&mut self) {
        IS_CALLING.set(false);
    }
}

impl Communicator {
    /// Issues several operations as one: NCCL starts them together, so that sends and receives
    /// may wait for each other. The group is ended also when `work` returns early or panics.
    ///
    /// The closure has the communicator to itself, and an abort waits for it: it should do nothing
    /// but issue.
    ///
    /// # Errors
    /// What `work` or NCCL failed with. When some operations had been issued by then, the
    /// communicator is dead: the other ranks cannot know which.
    pub fn group<R, E: From<NcclError>>(
        &self,
        work: impl FnOnce(&Calls<'_>) -> Result<R, E>,
    ) -> Result<R, E> {
        self.issue("ncclGroupEnd", |calls| {
            let mut open = OpenGroup::start(calls)?;
            let result = work(calls);
            let ended = open.end();
            let num_issued = calls.num_issued.get();
            if result.is_err() && num_issued > 0 {
                self.shared.fail(&format!("a group was left after {num_issued} of its calls"));
            }
            let result = result?;
            ended?;
            Ok(result)
        })
    }

    /// Calls NCCL in this communicator's turn, then waits until the work is on its stream.
    fn issue<R, E: From<NcclError>>(
        &self,
        function: &str,
        work: impl FnOnce(&Calls<'_>) -> Result<R, E>,
    ) -> Result<R, E> {
        let shared = &*self.shared;
        let calling = Calling::begin(&shared.options.name, function)?;
        let _turn = shared.take_turn(function)?;
        let (result, is_in_progress) = {
            let state = shared.enter(function)?;
            let calls = Calls {
                shared,
                handle: state.handle(shared)?,
                rank: self.rank(),
                size: self.size(),
                num_issued: Cell::new(0),
                is_in_progress: Cell::new(false),
            };
            (work(&calls), calls.is_in_progress.get())
        };
        drop(calling);
        let result = result?;
        if is_in_progress {
            shared.settle(function)?;
        }
        Ok(result)
    }

    /// As [`Calls::all_reduce`].
    ///
    /// # Errors
    /// As there; when NCCL does not put the work on its stream within the time-out; when the
    /// communicator is dead.
    pub fn all_reduce(&self, buffer: DeviceBuffer, op: ReduceOp, stream: Stream) -> Result<()> {
        self.issue("ncclAllReduce", |calls| calls.all_reduce(buffer, op, stream))
    }

    /// As [`Calls::all_gather`].
    ///
    /// # Errors
    /// As there, and as [`Communicator::all_reduce`].
    pub fn all_gather(
        &self,
        output: DeviceBuffer,
        input: DeviceBuffer,
        stream: Stream,
    ) -> Result<()> {
        self.issue("ncclAllGather", |calls| calls.all_gather(output, input, stream))
    }

    /// As [`Calls::reduce_scatter`].
    ///
    /// # Errors
    /// As there, and as [`Communicator::all_reduce`].
    pub fn reduce_scatter(
        &self,
        output: DeviceBuffer,
        input: DeviceBuffer,
        op: ReduceOp,
        stream: Stream,
    ) -> Result<()> {
        self.issue("ncclReduceScatter", |calls| calls.reduce_scatter(output, input, op, stream))
    }

    /// As [`Calls::broadcast`].
    ///
    /// # Errors
    /// As there, and as [`Communicator::all_reduce`].
    pub fn broadcast(&self, buffer: DeviceBuffer, root: usize, stream: Stream) -> Result<()> {
        self.issue("ncclBroadcast", |calls| calls.broadcast(buffer, root, stream))
    }

    /// As [`Calls::send`].
    ///
    /// # Errors
    /// As there, and as [`Communicator::all_reduce`].
    pub fn send(&self, buffer: DeviceBuffer, peer: usize, stream: Stream) -> Result<()> {
        self.issue("ncclSend", |calls| calls.send(buffer, peer, stream))
    }

    /// As [`Calls::recv`].
    ///
    /// # Errors
    /// As there, and as [`Communicator::all_reduce`].
    pub fn recv(&self, buffer: DeviceBuffer, peer: usize, stream: Stream) -> Result<()> {
        self.issue("ncclRecv", |calls| calls.recv(buffer, peer, stream))
    }

    /// Sends the p-th piece of `input` to rank p, and puts what comes from there into the p-th of
    /// `output`: a group of sends and receives.
    ///
    /// # Errors
    /// As [`Communicator::group`], and when the pieces are not equal.
    pub fn all_to_all(
        &self,
        output: DeviceBuffer,
        input: DeviceBuffer,
        stream: Stream,
    ) -> Result<()> {
        self.group(|calls| {
            calls.fits("all-to-all", output, input, 1)?;
            for peer in 0..calls.size {
                calls.send(input.piece(peer, calls.size)?, peer, stream)?;
                calls.recv(output.piece(peer, calls.size)?, peer, stream)?;
            }
            Ok(())
        })
    }
}
