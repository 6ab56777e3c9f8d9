//! GPUs: libtorch's CUDA part loaded at run time, streams, and events between them.
//!
//! The crate links no CUDA. Without [`load`], or where it fails, everything else works on the CPU
//! and this module's functions are errors.

use std::ffi::c_void;
use std::ptr::null_mut;

use tch::Tensor;

use crate::error::{Result, ShimError};
use crate::result::{check, raw};
use crate::sys::{self, RawEvent, RawStream};

/// Loads `libtorch_cuda.so` from where the dynamic linker finds it, for the whole process, and
/// returns the number of GPUs that libtorch can use. To be called before the first tensor.
///
/// # Errors
/// When there is no such library, or it does not start.
pub fn load() -> Result<usize> {
    let mut devices = 0;
    // SAFETY: `devices` outlives the call; the library's initializers register it with libc10.
    check(unsafe { sys::phx_cuda_load(&raw mut devices) })?;
    Ok(usize::try_from(devices).unwrap_or(0))
}

fn number(index: usize) -> Result<i32> {
    // libtorch counts devices in eight bits.
    let index = i8::try_from(index).map_err(|_| ShimError::Invalid(format!("no GPU {index}")))?;
    Ok(i32::from(index))
}

/// Makes a GPU the current one of this thread.
///
/// # Errors
/// When there is no such GPU.
pub fn set_device(index: usize) -> Result<()> {
    // SAFETY: takes a number only.
    check(unsafe { sys::phx_cuda_set_device(number(index)?) })
}

/// Waits until a GPU has done all that it was given.
///
/// # Errors
/// When what it was given failed.
pub fn synchronize(index: usize) -> Result<()> {
    // SAFETY: takes a number only.
    check(unsafe { sys::phx_cuda_synchronize(number(index)?) })
}

/// The `cudaStream_t` of this thread's current stream of a GPU, on which libtorch's operators go; it
/// lives as long as the process.
///
/// # Errors
/// When there is no such GPU.
pub fn current_stream(index: usize) -> Result<*mut c_void> {
    let mut handle = null_mut();
    // SAFETY: `handle` outlives the call.
    check(unsafe { sys::phx_stream_current(number(index)?, &raw mut handle) })?;
    Ok(handle)
}

/// A stream of a GPU: what is put on it runs in order.
pub struct Stream(*mut RawStream);

// SAFETY: it is an immutable pair of numbers in libc10's words.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// A stream of libtorch's pool, of high priority. The pool has 32; then they come again.
    ///
    /// # Errors
    /// When there is no such GPU.
    pub fn take(device: usize) -> Result<Stream> {
        let mut stream = null_mut();
        // SAFETY: `stream` outlives the call, and what it is set to is ours.
        check(unsafe { sys::phx_stream_take(number(device)?, &raw mut stream) })?;
        Ok(Stream(stream))
    }

    /// The `cudaStream_t`, which lives as long as the process.
    ///
    /// # Errors
    /// When libtorch refuses.
    pub fn native(&self) -> Result<*mut c_void> {
        let mut handle = null_mut();
        // SAFETY: the stream is alive; `handle` outlives the call.
        check(unsafe { sys::phx_stream_native(self.0, &raw mut handle) })?;
        Ok(handle)
    }

    /// Keeps the tensor's memory from other uses until what is on this stream by the time that
    /// the tensor goes has passed.
    ///
    /// # Errors
    /// When the tensor is not on this stream's GPU.
    pub fn keep(&self, tensor: &Tensor) -> Result<()> {
        // SAFETY: both are alive.
        check(unsafe { sys::phx_tensor_record_stream(raw(tensor), self.0) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: made by the shim, freed once; the stream itself is the pool's.
        unsafe { sys::phx_stream_free(self.0) }
    }
}

/// A point on a stream.
pub struct Event(*mut RawEvent);

// SAFETY: CUDA events may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: what is called on a shared one reads it only; recording happens once, before it is given
// out.
unsafe impl Sync for Event {}

impl Event {
    /// The end of what is on this thread's current stream of a GPU now.
    ///
    /// # Errors
    /// When the GPU refuses.
    pub fn on_current(device: usize) -> Result<Event> {
        let mut event = null_mut();
        // SAFETY: `event` outlives the call, and what it is set to is ours.
        check(unsafe { sys::phx_event_on_current(number(device)?, &raw mut event) })?;
        Ok(Event(event))
    }

    /// The end of what is on `stream` now.
    ///
    /// # Errors
    /// When the GPU refuses.
    pub fn on(stream: &Stream) -> Result<Event> {
        let mut event = null_mut();
        // SAFETY: as above; the stream is alive.
        check(unsafe { sys::phx_event_on(stream.0, &raw mut event) })?;
        Ok(Event(event))
    }

    /// Lets this thread's current stream wait for the event; the host goes on.
    ///
    /// # Errors
    /// When the GPU refuses.
    pub fn hold_current(&self) -> Result<()> {
        // SAFETY: the event is alive.
        check(unsafe { sys::phx_event_hold_current(self.0) })
    }

    /// Lets `stream` wait for the event.
    ///
    /// # Errors
    /// When the GPU refuses.
    pub fn hold(&self, stream: &Stream) -> Result<()> {
        // SAFETY: both are alive.
        check(unsafe { sys::phx_event_hold(self.0, stream.0) })
    }

    /// Whether the stream has come past it.
    ///
    /// # Errors
    /// When what came before it failed.
    pub fn is_past(&self) -> Result<bool> {
        let mut past = false;
        // SAFETY: the event is alive; `past` outlives the call.
        check(unsafe { sys::phx_event_is_past(self.0, &raw mut past) })?;
        Ok(past)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by the shim, freed once; CUDA keeps what a stream still waits for.
        unsafe { sys::phx_event_free(self.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The project's own libtorch has no CUDA; one that has may find no driver, or a GPU.
    #[test]
    fn without_cuda_there_is_an_error_and_no_crash() {
        match load() {
            Ok(devices) if devices > 0 => {
                Stream::take(0).unwrap().native().map(|_| ()).unwrap();
                current_stream(0).map(|_| ()).unwrap();
            }
            Ok(_) => assert!(Stream::take(0).is_err() && current_stream(0).is_err()),
            Err(error) => {
                assert!(error.to_string().contains("libtorch_cuda"), "{error}");
                assert!(Event::on_current(0).is_err() && set_device(0).is_err());
                assert!(current_stream(0).is_err());
            }
        }
        assert!(set_device(1000).is_err());
    }
}
