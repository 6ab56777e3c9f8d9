//! A timeline of what this process does: libtorch's operators and kernels, as its profiler records
//! them, and what only we know of: phases of a step, and operations between ranks.
//!
//! There is one for the process, as there is one of libtorch's. While it is off, a mark costs the
//! load of a flag.

use std::ffi::CString;
use std::path::Path;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tch::Device;

use crate::cuda::{self, Event, Stream};
use crate::error::{Result, ShimError};
use crate::result::check;
use crate::sys::{self, RawRange};

/// Spans that are kept; what comes after so many is not.
const MAX_SPANS: usize = 1 << 20;

static IS_ON: AtomicBool = AtomicBool::new(false);
static MARKS: Mutex<Marks> = Mutex::new(Marks { base: None, spans: Vec::new(), open: Vec::new() });

/// What has been marked since the start.
struct Marks {
    /// A point on the GPU's timeline, and when it was, in nanoseconds of Unix time.
    base: Option<(Event, u64)>,
    spans: Vec<Span>,
    /// Spans of streams, whose times the GPU knows.
    open: Vec<(Span, Event, Event)>,
}

/// Something that took time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// What it was, in a word or two.
    pub name: String,
    /// Where it happened: a group's thread, or a stream. Spans of one lane follow each other.
    pub lane: String,
    /// Begin and end in nanoseconds of Unix time.
    pub start_ns: u64,
    /// The end.
    pub end_ns: u64,
    /// Bytes of the tensors that it worked on.
    pub bytes: u64,
    /// More about it, as name and value.
    pub details: Vec<(&'static str, String)>,
}

fn marks() -> MutexGuard<'static, Marks> {
    MARKS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a timeline is being recorded.
pub fn is_on() -> bool {
    IS_ON.load(Ordering::Relaxed)
}

/// Nanoseconds of Unix time now, where a timeline is being recorded.
pub fn now() -> Option<u64> {
    is_on().then(unix_ns)
}

fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Begins a timeline: of this thread's operators and its backward passes', and of marks of all
/// threads. On a GPU its kernels belong to it.
///
/// # Errors
/// When one is being recorded, or libtorch refuses.
pub fn start(device: Device) -> Result<()> {
    if is_on() {
        return Err(ShimError::Invalid("a timeline is being recorded already".into()));
    }
    let base = match device {
        Device::Cuda(index) => {
            cuda::synchronize(index)?;
            let event = Event::timed_on_current(index)?;
            event.wait()?;
            Some((event, unix_ns()))
        }
        _ => None,
    };
    *marks() = Marks { base, spans: Vec::new(), open: Vec::new() };
    // SAFETY: takes a flag only.
    check(unsafe { sys::phx_profiler_start(matches!(device, Device::Cuda(_))) })?;
    IS_ON.store(true, Ordering::Relaxed);
    Ok(())
}

/// Ends it, on the thread that began it. libtorch's part is written to `path`, as JSON that
/// Chrome's viewer reads; the marks are returned. On a GPU all that was given to it must be done.
///
/// # Errors
/// When none is being recorded, or libtorch refuses.
pub fn stop(path: &Path) -> Result<Vec<Span>> {
    if !IS_ON.swap(false, Ordering::Relaxed) {
        return Err(ShimError::Invalid("no timeline is being recorded".into()));
    }
    let text = path.to_str().ok_or_else(|| ShimError::Invalid(format!("no path: {path:?}")))?;
    let text = CString::new(text)?;
    // SAFETY: the text lives through the call.
    let stopped = check(unsafe { sys::phx_profiler_stop(text.as_ptr()) });
    let taken =
        std::mem::replace(&mut *marks(), Marks { base: None, spans: Vec::new(), open: Vec::new() });
    stopped?;
    let Marks { base, mut spans, open } = taken;
    if let Some((base, base_ns)) = base {
        for (mut span, begin, end) in open {
            let at = |event: &Event| -> Result<u64> {
                Ok(base_ns.saturating_add((base.ms_until(event)? * 1e6) as u64))
            };
            (span.start_ns, span.end_ns) = (at(&begin)?, at(&end)?);
            spans.push(span);
        }
    }
    spans.sort_by_key(|span| span.start_ns);
    Ok(spans)
}

/// Adds a span to the timeline, where one is being recorded.
pub fn record(span: Span) {
    let mut marks = marks();
    if is_on() && marks.spans.len() < MAX_SPANS {
        marks.spans.push(span);
    }
}

/// Adds one that begins and ends at points of a stream.
fn record_on_stream(span: Span, begin: Event, end: Event) {
    let mut marks = marks();
    if is_on() && marks.open.len() < MAX_SPANS {
        marks.open.push((span, begin, end));
    }
}

/// What is put on a stream from now on, until it is ended.
pub struct OnStream(Event);

impl OnStream {
    /// Begins it, where a timeline is being recorded.
    ///
    /// # Errors
    /// When the GPU refuses.
    pub fn begin(stream: &Stream) -> Result<Option<Self>> {
        if is_on() { Event::timed_on(stream).map(|event| Some(Self(event))) } else { Ok(None) }
    }

    /// Ends it; the span's times are those of the stream.
    ///
    /// # Errors
    /// When the GPU refuses.
    pub fn end(self, stream: &Stream, span: Span) -> Result<()> {
        record_on_stream(span, self.0, Event::timed_on(stream)?);
        Ok(())
    }
}

/// A phase of this thread's work, for as long as it lives; it must end on the thread that began it.
/// Kernels that are launched in it belong to it.
#[must_use = "a phase ends when it is dropped"]
pub struct Phase(*mut RawRange);

/// Begins a phase, where a timeline is being recorded.
pub fn phase(name: &str) -> Phase {
    let mut range = null_mut();
    if let (true, Ok(name)) = (is_on(), CString::new(name)) {
        // SAFETY: the text lives through the call; what `range` is set to is ours. Without a range
        // the phase is not on the timeline.
        drop(check(unsafe { sys::phx_range_begin(name.as_ptr(), &raw mut range) }));
    }
    Phase(range)
}

impl Drop for Phase {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: made by the shim, freed once.
            unsafe { sys::phx_range_end(self.0) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Kind, Tensor};

    /// One test for all: the timeline is the process's.
    #[test]
    fn operators_phases_and_spans_are_on_the_timeline() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        assert!(stop(&path).is_err() && !is_on() && now().is_none());
        drop(phase("before"));
        record(Span { name: "before".into(), ..Span::default() });
        start(Device::Cpu).unwrap();
        assert!(start(Device::Cpu).is_err());
        let begun = now().unwrap();
        {
            let _phase = phase("forward");
            let x = Tensor::ones([64, 64], (Kind::Float, Device::Cpu)).set_requires_grad(true);
            x.matmul(&x).sum(Kind::Float).backward();
        }
        let other = std::thread::spawn(move || {
            let (name, lane) = ("all_reduce".to_owned(), "group data".to_owned());
            let end_ns = now().unwrap();
            record(Span { name, lane, start_ns: begun, end_ns, ..Span::default() });
        });
        other.join().unwrap();
        let spans = stop(&path).unwrap();
        assert!(!is_on());
        assert_eq!(spans.len(), 1);
        assert!(spans[0].name == "all_reduce" && spans[0].end_ns >= spans[0].start_ns);
        let text = std::fs::read_to_string(&path).unwrap();
        for part in ["\"forward\"", "aten::mm", "MmBackward0", "baseTimeNanoseconds"] {
            assert!(text.contains(part), "{part} is not in the trace");
        }
        assert!(!text.contains("\"before\""));
        // And another one, in the same process.
        start(Device::Cpu).unwrap();
        assert_eq!(stop(&path).unwrap(), []);
    }
}
