//! GPUs: libtorch's CUDA part loaded at run time, streams, and events between them.
//!
//! The crate links no CUDA. Without [`load`], or where it fails, everything else works on the CPU
//! and this module's functions are errors.

pub mod driver;
mod readback;

use std::ffi::{CString, c_void};
use std::ptr::null_mut;

use tch::{Device, Tensor};

use crate::error::{Result, ShimError};
use crate::result::{check, made_one, raw};
use crate::sys::{self, RawEvent, RawStream};

pub use readback::Readback;

/// Loads `libtorch_cuda.so` from where the dynamic linker finds it, for the whole process, and
/// returns the CUDA that it was built with, as major and minor. To be called before the first
/// tensor.
///
/// # Errors
/// When there is no such library, or one that it needs.
pub fn load() -> Result<(u32, u32)> {
    let mut runtime = 0;
    // SAFETY: `runtime` outlives the call; the library's initializers register it with libc10.
    check(unsafe { sys::phx_cuda_load(&raw mut runtime) })?;
    Ok(driver::version(runtime))
}

/// Starts CUDA, once it is loaded; returns the number of GPUs that libtorch can use, 1 or more.
///
/// # Errors
/// Why there is none.
pub fn start() -> Result<usize> {
    let mut devices = 0;
    // SAFETY: `devices` outlives the call.
    check(unsafe { sys::phx_cuda_start(&raw mut devices) })?;
    Ok(usize::try_from(devices).unwrap_or(0))
}

/// Sets how the allocator takes GPU memory, in the words of `PYTORCH_ALLOC_CONF`; after [`load`]
/// and before it has given out any.
///
/// # Errors
/// When libtorch does not know a setting.
pub fn set_allocator(settings: &str) -> Result<()> {
    let settings = CString::new(settings)?;
    // SAFETY: the text lives through the call.
    check(unsafe { sys::phx_cuda_allocator(settings.as_ptr()) })
}

/// Lets a GPU add two numbers, and reads the sum.
///
/// # Errors
/// When it cannot: libtorch has no code for its kind, say.
pub fn probe(index: usize) -> Result<()> {
    // SAFETY: takes a number only.
    check(unsafe { sys::phx_cuda_probe(number(index)?) })
}

/// Bytes of a GPU's memory, as libtorch's allocator counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Of tensors, now.
    pub allocated: u64,
    /// Of tensors, the most at once since the peaks were reset.
    pub peak_allocated: u64,
    /// Taken from the GPU by this process, now.
    pub reserved: u64,
    /// Taken from the GPU by this process, the most at once since the peaks were reset.
    pub peak_reserved: u64,
    /// That nobody has taken.
    pub free: u64,
    /// Of the GPU.
    pub total: u64,
}

/// What is in use of a GPU's memory. The host does not wait for the GPU.
///
/// # Errors
/// When there is no such GPU.
pub fn memory_use(index: usize) -> Result<MemoryUse> {
    let mut bytes = [0; 6];
    // SAFETY: the shim writes six numbers.
    check(unsafe { sys::phx_cuda_memory(number(index)?, bytes.as_mut_ptr()) })?;
    let [allocated, peak_allocated, reserved, peak_reserved, free, total] =
        bytes.map(|bytes| u64::try_from(bytes).unwrap_or(0));
    Ok(MemoryUse { allocated, peak_allocated, reserved, peak_reserved, free, total })
}

/// From now on, peaks are those from now on.
///
/// # Errors
/// When there is no such GPU.
pub fn reset_peaks(index: usize) -> Result<()> {
    // SAFETY: takes a number only.
    check(unsafe { sys::phx_cuda_reset_peaks(number(index)?) })
}

/// A copy on `device` of a tensor on the CPU; itself, where `device` is the CPU. The host does not
/// wait, whatever the GPU is at.
///
/// # Errors
/// When memory is short.
pub fn upload(host: &Tensor, device: Device) -> Result<Tensor> {
    let Device::Cuda(index) = device else { return Ok(host.shallow_clone()) };
    let index = number(index)?;
    // SAFETY: the tensor lives through the call; the shim keeps what it copies from.
    made_one(|out| unsafe { sys::phx_upload(raw(host), index, out) })
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

/// The `cudaStream_t` of this thread's current stream of a GPU, on which libtorch's operators go;
/// it lives as long as the process.
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

    /// Its number among all streams, as libtorch's profiler shows it.
    pub fn id(&self) -> i64 {
        // SAFETY: the stream is alive.
        unsafe { sys::phx_stream_id(self.0) }
    }

    /// Runs `body` with this stream as the thread's current one: what it gives the GPU goes there.
    ///
    /// # Errors
    /// When libtorch refuses.
    pub fn current<T>(&self, body: impl FnOnce() -> T) -> Result<T> {
        let _before = Before(self.exchange()?);
        Ok(body())
    }

    fn exchange(&self) -> Result<Stream> {
        let mut before = null_mut();
        // SAFETY: the stream is alive; what `before` is set to is ours.
        check(unsafe { sys::phx_stream_exchange(self.0, &raw mut before) })?;
        Ok(Stream(before))
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

/// The stream that is a thread's current one again once this goes.
struct Before(Stream);

impl Drop for Before {
    fn drop(&mut self) {
        // A stream that was current is one.
        let _ = self.0.exchange();
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
        Self::mark_current(device, false)
    }

    /// As [`Event::on_current`], with the time at which it is passed.
    ///
    /// # Errors
    /// When the GPU refuses.
    pub fn timed_on_current(device: usize) -> Result<Event> {
        Self::mark_current(device, true)
    }

    fn mark_current(device: usize, timed: bool) -> Result<Event> {
        let mut event = null_mut();
        // SAFETY: `event` outlives the call, and what it is set to is ours.
        check(unsafe { sys::phx_event_on_current(number(device)?, timed, &raw mut event) })?;
        Ok(Event(event))
    }

    /// The end of what is on `stream` now.
    ///
    /// # Errors
    /// When the GPU refuses.
    pub fn on(stream: &Stream) -> Result<Event> {
        Self::mark(stream, false)
    }

    /// As [`Event::on`], with the time at which it is passed.
    ///
    /// # Errors
    /// When the GPU refuses.
    pub fn timed_on(stream: &Stream) -> Result<Event> {
        Self::mark(stream, true)
    }

    fn mark(stream: &Stream, timed: bool) -> Result<Event> {
        let mut event = null_mut();
        // SAFETY: as above; the stream is alive.
        check(unsafe { sys::phx_event_on(stream.0, timed, &raw mut event) })?;
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

impl Event {
    /// Lets the host wait until the stream has come past it.
    ///
    /// # Errors
    /// When what came before it failed.
    pub fn wait(&self) -> Result<()> {
        // SAFETY: the event is alive.
        check(unsafe { sys::phx_event_wait(self.0) })
    }

    /// Milliseconds from this one to `later`; both are timed, and past.
    ///
    /// # Errors
    /// When one of them is not.
    pub fn ms_until(&self, later: &Event) -> Result<f64> {
        let mut elapsed = 0.0;
        // SAFETY: both events are alive; `elapsed` outlives the call.
        check(unsafe { sys::phx_event_elapsed(self.0, later.0, &raw mut elapsed) })?;
        Ok(elapsed)
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
    use tch::Kind;

    /// The project's own libtorch has no CUDA; one that has may find no driver, or a GPU.
    #[test]
    fn without_cuda_there_is_an_error_and_no_crash() {
        let devices = load().and_then(|_| start());
        match devices {
            Ok(devices) => {
                assert!(devices > 0);
                probe(0).unwrap();
                Stream::take(0).unwrap().native().map(|_| ()).unwrap();
                current_stream(0).map(|_| ()).unwrap();
                let host = Tensor::from_slice(&[1.0, 2.0]);
                let there = upload(&host, Device::Cuda(0)).unwrap();
                assert_eq!(Readback::begin(&there).unwrap().wait().unwrap(), [1.0, 2.0]);
                assert!(memory_use(0).unwrap().peak_allocated > 0);
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                assert!(Event::on_current(0).is_err() && set_device(0).is_err());
                assert!(Stream::take(0).is_err() && current_stream(0).is_err());
                assert!(memory_use(0).is_err() && probe(0).is_err());
                let host = Tensor::from_slice(&[1.0]);
                assert!(upload(&host, Device::Cuda(0)).is_err());
            }
        }
        assert!(set_device(1000).is_err());
    }

    #[test]
    fn on_the_cpu_nothing_is_copied_and_numbers_are_there_at_once() {
        let host = Tensor::from_slice(&[1.5, -2.0]);
        let same = upload(&host, Device::Cpu).unwrap();
        assert_eq!(same.data_ptr(), host.data_ptr());
        let reading = Readback::begin(&host).unwrap();
        let _ = host.shallow_clone().fill_(7.0);
        assert_eq!(reading.wait().unwrap(), [1.5, -2.0], "as they were when it began");
        let single = Tensor::from_slice(&[0.25f32]).to_kind(Kind::BFloat16);
        assert_eq!(Readback::begin(&single).unwrap().wait().unwrap(), [0.25]);
    }

    /// What a GPU does with it shows on one.
    #[test]
    fn settings_of_the_allocator_are_read() {
        set_allocator("expandable_segments:True").unwrap();
        assert!(set_allocator("expandable_segments:perhaps").is_err());
        assert!(set_allocator("zero\0byte").is_err());
    }
}
