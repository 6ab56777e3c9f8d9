//! MPI's calls, each checked, and the memory that it reads and writes. Everything here happens on
//! the one thread that made the [`World`].
#![expect(
    unsafe_code,
    reason = "rsmpi's safe requests borrow their memory for a scope; ours outlive every scope"
)]

use std::ffi::{c_char, c_int, c_void};
use std::mem::{ManuallyDrop, MaybeUninit, forget};
use std::ops::Range;

use mpi::environment::Universe;
use mpi::ffi::{self, MPI_Request, MPI_Status};
use mpi::topology::Communicator as _;
use mpi::{Threading, initialize_with_threading};
use torch_shim::reduce;
use torch_shim::tch::{Device, Tensor};

use crate::error::{CommError, Result};

/// Bytes of the largest single message: MPI counts in 32 bits. Larger ones go in pieces.
const LARGEST: usize = 1 << 30;

/// MPI in this process. Unless it is left, nothing ends it: a process that fails exits without,
/// and MPI takes the whole job down.
pub(super) struct World {
    universe: ManuallyDrop<Universe>,
    /// This process's number.
    pub(super) process: i32,
    /// The number of processes.
    pub(super) size: i32,
    /// The largest tag that a message may have.
    pub(super) largest_tag: i32,
}

impl World {
    /// Starts MPI. Only the calling thread may use it from here on.
    pub(super) fn start() -> Result<World> {
        let (universe, threading) =
            initialize_with_threading(Threading::Funneled).ok_or_else(|| {
                CommError::Backend("MPI was started before in this process".to_string())
            })?;
        if threading == Threading::Single {
            let text = "this MPI library wants a process of one thread";
            return Err(CommError::Backend(text.to_string()));
        }
        let (process, size) = (universe.world().rank(), universe.world().size());
        // SAFETY: MPI is started; both are constants of the library.
        check(unsafe {
            ffi::MPI_Comm_set_errhandler(ffi::RSMPI_COMM_WORLD, ffi::RSMPI_ERRORS_RETURN)
        })?;
        let largest_tag = largest_tag()?;
        Ok(World { universe: ManuallyDrop::new(universe), process, size, largest_tag })
    }

    /// Ends MPI, together with all other processes of the job.
    pub(super) fn leave(self) {
        drop(ManuallyDrop::into_inner(self.universe));
    }
}

fn largest_tag() -> Result<i32> {
    let mut value: *const c_int = std::ptr::null();
    let mut is_set = 0;
    // SAFETY: this attribute's value is an address of a C int, which MPI keeps; the call writes
    // that address and a flag.
    unsafe {
        let place = (&raw mut value).cast::<c_void>();
        let key = ffi::MPI_TAG_UB as c_int;
        check(ffi::MPI_Comm_get_attr(ffi::RSMPI_COMM_WORLD, key, place, &mut is_set))?;
        // The standard promises this much.
        Ok(if is_set == 0 || value.is_null() { 32_767 } else { *value })
    }
}

/// The error of a call that did not succeed, in MPI's own words.
fn check(code: c_int) -> Result<()> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = [0u8; ffi::MPI_MAX_ERROR_STRING as usize + 1];
    let mut length = 0;
    // SAFETY: MPI writes at most MPI_MAX_ERROR_STRING bytes.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast::<c_char>(), &mut length) };
    let length = usize::try_from(length).unwrap_or(0).min(text.len());
    Err(CommError::Backend(String::from_utf8_lossy(&text[..length]).into_owned()))
}

/// A tensor that nothing but a message holds: no other tensor shares its memory, and nobody can
/// take that memory away from under it.
pub(super) struct Private(Tensor);

impl Private {
    /// A copy.
    pub(super) fn copy_of(tensor: &Tensor) -> Result<Private> {
        let copy = Self::like(tensor)?;
        reduce::copy(&copy.0, tensor)?;
        Ok(copy)
    }

    /// As large, with anything in it.
    pub(super) fn like(tensor: &Tensor) -> Result<Private> {
        Ok(Private(Tensor::f_empty(tensor.size(), (tensor.kind(), Device::Cpu))?))
    }

    /// The tensor, when no message needs it any more.
    pub(super) fn into_tensor(self) -> Tensor {
        self.0
    }

    fn bytes(&self) -> usize {
        self.0.numel() * self.0.kind().elt_size_in_bytes()
    }
}

/// Which way a message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// To the peer.
    Send,
    /// From the peer.
    Receive,
}

/// A process that a message comes from.
pub(super) const ANY_PROCESS: i32 = -1;

/// A message that MPI works on, with its memory, which is never given up before MPI is done.
pub(super) struct InFlight {
    pieces: Vec<Piece>,
    buffer: ManuallyDrop<Private>,
    direction: Direction,
}

struct Piece {
    request: MPI_Request,
    bytes: c_int,
}

impl InFlight {
    /// Starts a message on the world's thread.
    pub(super) fn start(
        _world: &World,
        direction: Direction,
        buffer: Private,
        process: i32,
        tag: i32,
    ) -> Result<InFlight> {
        let base = buffer.0.data_ptr().cast::<u8>();
        let ranges = pieces(buffer.bytes(), LARGEST);
        let mut flight =
            InFlight { pieces: Vec::new(), buffer: ManuallyDrop::new(buffer), direction };
        for range in ranges {
            let bytes = range.len() as c_int;
            // SAFETY: the range lies within the buffer, which stays allocated and unshared until
            // MPI is done with it (see `drop`); MPI is started, and this is its thread.
            let request = unsafe {
                let place: *mut c_void = base.add(range.start).cast();
                let kind = ffi::RSMPI_UINT8_T;
                let comm = ffi::RSMPI_COMM_WORLD;
                let mut request = ffi::RSMPI_REQUEST_NULL;
                check(match direction {
                    Direction::Send => {
                        ffi::MPI_Isend(place, bytes, kind, process, tag, comm, &mut request)
                    }
                    Direction::Receive => {
                        let process =
                            if process == ANY_PROCESS { ffi::RSMPI_ANY_SOURCE } else { process };
                        ffi::MPI_Irecv(place, bytes, kind, process, tag, comm, &mut request)
                    }
                })?;
                request
            };
            flight.pieces.push(Piece { request, bytes });
        }
        Ok(flight)
    }

    /// Whether MPI is done; lets it work on all messages.
    pub(super) fn test(&mut self) -> Result<bool> {
        while let Some(piece) = self.pieces.first_mut() {
            let mut is_done = 0;
            let mut status = MaybeUninit::<MPI_Status>::zeroed();
            // SAFETY: the request is under way; MPI writes a flag and a status.
            check(unsafe { ffi::MPI_Test(&mut piece.request, &mut is_done, status.as_mut_ptr()) })?;
            if is_done == 0 {
                return Ok(false);
            }
            // SAFETY: zeroed is a valid status, and MPI has written over it.
            let status = unsafe { status.assume_init() };
            let bytes = piece.bytes;
            // MPI is done with this one, whatever became of it.
            self.pieces.remove(0);
            self.judge(&status, bytes)?;
        }
        Ok(true)
    }

    /// A message that was received must have all the bytes.
    fn judge(&self, status: &MPI_Status, expected: c_int) -> Result<()> {
        if self.direction == Direction::Send {
            return Ok(());
        }
        let (mut is_cancelled, mut bytes) = (0, 0);
        // SAFETY: the status is that of a finished request.
        unsafe {
            check(ffi::MPI_Test_cancelled(status, &mut is_cancelled))?;
            check(ffi::MPI_Get_count(status, ffi::RSMPI_UINT8_T, &mut bytes))?;
        }
        if is_cancelled != 0 {
            return Err(CommError::Backend("the message was given up".to_string()));
        }
        if bytes != expected {
            let text = format!("a message of {bytes} bytes came where {expected} were expected");
            return Err(CommError::Backend(text));
        }
        Ok(())
    }

    /// Asks MPI to give up what has not begun to arrive. It is done only when `test` says so.
    pub(super) fn give_up(&mut self) {
        if self.direction == Direction::Send {
            return;
        }
        for piece in &mut self.pieces {
            // SAFETY: the request is under way. Where MPI refuses, it goes on as before.
            let _ = unsafe { ffi::MPI_Cancel(&mut piece.request) };
        }
    }

    /// The memory, where MPI is done with it.
    pub(super) fn into_buffer(mut self) -> Option<Private> {
        if !self.pieces.is_empty() {
            return None;
        }
        // SAFETY: taken once: `self` is forgotten, and `drop` does not run.
        let buffer = unsafe { ManuallyDrop::take(&mut self.buffer) };
        forget(self);
        Some(buffer)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        // Memory that MPI may still write to is lost rather than freed.
        if self.pieces.is_empty() {
            // SAFETY: dropped once, here.
            unsafe { ManuallyDrop::drop(&mut self.buffer) }
        }
    }
}

/// `bytes` in ranges of at most `largest`.
fn pieces(bytes: usize, largest: usize) -> impl Iterator<Item = Range<usize>> {
    (0..bytes).step_by(largest).map(move |start| start..bytes.min(start + largest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_messages_go_in_pieces() {
        let all = |bytes| -> Vec<(usize, usize)> {
            pieces(bytes, 4).map(|piece| (piece.start, piece.end)).collect()
        };
        assert_eq!(all(0), []);
        assert_eq!(all(3), [(0, 3)]);
        assert_eq!(all(8), [(0, 4), (4, 8)]);
        assert_eq!(all(9), [(0, 4), (4, 8), (8, 9)]);
    }
}
