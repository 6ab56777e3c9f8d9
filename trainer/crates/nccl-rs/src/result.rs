//! Layer 2: every call checked. Codes become results, with NCCL's own words; handles are owned.

use std::ffi::{CStr, c_char, c_int};
use std::path::PathBuf;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicPtr, Ordering};

use libloading::os::unix::Library;

use crate::error::{NcclError, Result};
use crate::library::Version;
use crate::sys::{self, Code, Config, Functions, GET_VERSION, GetVersion, RawComm, RawUniqueId};
use crate::types::{DeviceBuffer, ReduceOp, Stream, UniqueId};

/// A loaded library.
pub(crate) struct Api {
    pub(crate) functions: Functions,
    pub(crate) version: Version,
    pub(crate) path: PathBuf,
}

/// How far a call came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    Done,
    InProgress,
}

/// A communicator that lives: destroying or aborting one takes its handle away.
pub(crate) struct Handle(NonNull<RawComm>);

// SAFETY: NCCL lets any thread operate a communicator, as long as one does at a time ("Thread
// Safety" in its user guide); a handle lies behind a lock, and is not cloned.
unsafe impl Send for Handle {}

/// Where NCCL leaves a new communicator, now or from a thread of its own while the work goes on.
///
/// It is never freed: eight bytes a communicator, which stay valid however late NCCL writes.
#[derive(Clone, Copy)]
pub(crate) struct Slot(&'static AtomicPtr<RawComm>);

impl Slot {
    fn new() -> Slot {
        Slot(Box::leak(Box::new(AtomicPtr::new(null_mut()))))
    }

    /// Takes the communicator, once NCCL has left one.
    pub(crate) fn take(self) -> Option<Handle> {
        NonNull::new(self.0.swap(null_mut(), Ordering::AcqRel)).map(Handle)
    }
}

/// The version that a library tells; none where it is no NCCL.
pub(crate) fn version(library: &Library) -> Option<Version> {
    let mut code: c_int = 0;
    // SAFETY: the public header declares it so, and it writes one int.
    let result = unsafe { (library.get::<GetVersion>(GET_VERSION).ok()?)(&mut code) };
    let code = u32::try_from(code).ok()?;
    (result == sys::SUCCESS).then(|| Version::from_code(code))
}

/// A text that NCCL owns.
fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return "no text".to_string();
    }
    // SAFETY: NCCL answers with a zero-terminated text in static memory. Another thread's failure
    // may overwrite the last error meanwhile; its buffer stays zero-terminated.
    let text = unsafe { CStr::from_ptr(pointer) }.to_string_lossy();
    text.lines().next().unwrap_or("no text").trim_end().to_string()
}

impl Api {
    /// The error that a code stands for.
    pub(crate) fn failure(&self, group: &str, function: &str, code: Code) -> NcclError {
        // SAFETY: any code is allowed; the communicator's argument is not used, says the header.
        let (meaning, detail) = unsafe {
            (
                text((self.functions.get_error_string)(code)),
                text((self.functions.get_last_error)(null_mut())),
            )
        };
        let detail = if detail.is_empty() { "no detail".to_string() } else { detail };
        NcclError::Call {
            group: group.to_string(),
            function: function.to_string(),
            code,
            meaning,
            detail,
        }
    }

    /// Success and work in progress are well.
    pub(crate) fn judge(&self, group: &str, function: &str, code: Code) -> Result<Progress> {
        match code {
            sys::SUCCESS => Ok(Progress::Done),
            sys::IN_PROGRESS => Ok(Progress::InProgress),
            _ => Err(self.failure(group, function, code)),
        }
    }

    pub(crate) fn unique_id(&self) -> Result<UniqueId> {
        let mut id = RawUniqueId { internal: [0; UniqueId::BYTES] };
        // SAFETY: NCCL fills the 128 bytes.
        let code = unsafe { (self.functions.get_unique_id)(&mut id) };
        self.judge("(none yet)", "ncclGetUniqueId", code)?;
        Ok(UniqueId::from_bytes(id.internal))
    }

    /// Begins to connect. NCCL may leave a communicator even where it fails.
    pub(crate) fn init(&self, id: UniqueId, rank: c_int, size: c_int) -> (Code, Option<Handle>) {
        let slot = Slot::new();
        let mut config = Config::non_blocking();
        let id = RawUniqueId { internal: id.to_bytes() };
        // SAFETY: the slot lives for ever, the config is copied during the call.
        let code = unsafe {
            let init = self.functions.comm_init_rank_config;
            init(slot.0.as_ptr(), size, id, rank, &mut config)
        };
        (code, slot.take())
    }

    /// Begins to split; the child inherits the parent's config.
    pub(crate) fn split(&self, parent: &Handle, color: Option<c_int>, key: c_int) -> (Code, Slot) {
        let slot = Slot::new();
        let color = color.unwrap_or(sys::NO_COLOR);
        // SAFETY: the parent lives, and the slot does for ever.
        let code = unsafe {
            let split = self.functions.comm_split;
            split(parent.0.as_ptr(), color, key, slot.0.as_ptr(), null_mut())
        };
        (code, slot)
    }

    /// The code of asking, and the state that was asked for.
    pub(crate) fn async_error(&self, comm: &Handle) -> (Code, Code) {
        let mut state = sys::SUCCESS;
        // SAFETY: the communicator lives; NCCL writes one int.
        let code = unsafe { (self.functions.comm_get_async_error)(comm.0.as_ptr(), &mut state) };
        (code, state)
    }

    pub(crate) fn count(&self, comm: &Handle) -> (Code, c_int) {
        let mut count = 0;
        // SAFETY: the communicator lives; NCCL writes one int.
        let code = unsafe { (self.functions.comm_count)(comm.0.as_ptr(), &mut count) };
        (code, count)
    }

    pub(crate) fn user_rank(&self, comm: &Handle) -> (Code, c_int) {
        let mut rank = 0;
        // SAFETY: the communicator lives; NCCL writes one int.
        let code = unsafe { (self.functions.comm_user_rank)(comm.0.as_ptr(), &mut rank) };
        (code, rank)
    }

    pub(crate) fn finalize(&self, comm: &Handle) -> Code {
        // SAFETY: the communicator lives.
        unsafe { (self.functions.comm_finalize)(comm.0.as_ptr()) }
    }

    /// Frees a finalized communicator.
    pub(crate) fn destroy(&self, comm: Handle) -> Code {
        // SAFETY: the communicator lives, and its only handle ends here.
        unsafe { (self.functions.comm_destroy)(comm.0.as_ptr()) }
    }

    /// Ends all work of a communicator and frees it. May take long, or for ever.
    pub(crate) fn abort(&self, comm: Handle) -> Code {
        // SAFETY: the communicator lives, and its only handle ends here.
        unsafe { (self.functions.comm_abort)(comm.0.as_ptr()) }
    }

    pub(crate) fn group_start(&self) -> Code {
        // SAFETY: takes nothing.
        unsafe { (self.functions.group_start)() }
    }

    pub(crate) fn group_end(&self) -> Code {
        // SAFETY: takes nothing; the communicators of the group are kept locked, so they live.
        unsafe { (self.functions.group_end)() }
    }

    pub(crate) fn all_reduce(
        &self,
        comm: &Handle,
        buffer: DeviceBuffer,
        op: ReduceOp,
        stream: Stream,
    ) -> Code {
        let (at, count, dtype) = (buffer.pointer(), buffer.count(), buffer.dtype().code());
        let (comm, stream) = (comm.0.as_ptr(), stream.pointer());
        // SAFETY: the communicator lives; who made the buffer and the stream answers for them.
        unsafe { (self.functions.all_reduce)(at, at, count, dtype, op.code(), comm, stream) }
    }

    pub(crate) fn all_gather(
        &self,
        comm: &Handle,
        output: DeviceBuffer,
        input: DeviceBuffer,
        stream: Stream,
    ) -> Code {
        let (count, dtype) = (input.count(), input.dtype().code());
        let (from, to, comm) = (input.pointer(), output.pointer(), comm.0.as_ptr());
        // SAFETY: the communicator lives; who made the buffers and the stream answers for them.
        unsafe { (self.functions.all_gather)(from, to, count, dtype, comm, stream.pointer()) }
    }

    pub(crate) fn reduce_scatter(
        &self,
        comm: &Handle,
        output: DeviceBuffer,
        input: DeviceBuffer,
        op: ReduceOp,
        stream: Stream,
    ) -> Code {
        let (count, dtype, op) = (output.count(), output.dtype().code(), op.code());
        let (from, to, comm) = (input.pointer(), output.pointer(), comm.0.as_ptr());
        // SAFETY: the communicator lives; who made the buffers and the stream answers for them.
        unsafe {
            (self.functions.reduce_scatter)(from, to, count, dtype, op, comm, stream.pointer())
        }
    }

    pub(crate) fn broadcast(
        &self,
        comm: &Handle,
        buffer: DeviceBuffer,
        root: c_int,
        stream: Stream,
    ) -> Code {
        let (at, count, dtype) = (buffer.pointer(), buffer.count(), buffer.dtype().code());
        let (comm, stream) = (comm.0.as_ptr(), stream.pointer());
        // SAFETY: the communicator lives; who made the buffer and the stream answers for them.
        unsafe { (self.functions.broadcast)(at, at, count, dtype, root, comm, stream) }
    }

    pub(crate) fn send(
        &self,
        comm: &Handle,
        buffer: DeviceBuffer,
        peer: c_int,
        stream: Stream,
    ) -> Code {
        let (at, count, dtype) = (buffer.pointer(), buffer.count(), buffer.dtype().code());
        // SAFETY: the communicator lives; who made the buffer and the stream answers for them.
        unsafe { (self.functions.send)(at, count, dtype, peer, comm.0.as_ptr(), stream.pointer()) }
    }

    pub(crate) fn recv(
        &self,
        comm: &Handle,
        buffer: DeviceBuffer,
        peer: c_int,
        stream: Stream,
    ) -> Code {
        let (at, count, dtype) = (buffer.pointer(), buffer.count(), buffer.dtype().code());
        // SAFETY: the communicator lives; who made the buffer and the stream answers for them.
        unsafe { (self.functions.recv)(at, count, dtype, peer, comm.0.as_ptr(), stream.pointer()) }
    }
}
