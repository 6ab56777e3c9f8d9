//! One NCCL communicator, the stream it works on, and what is under way there.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nccl_rs::{Aborter, Communicator, Nccl, NcclError, Options, UniqueId};
use torch_shim::cuda::{self, Event, Stream};
use torch_shim::gloo::Store;
use torch_shim::profiler::{OnStream, Span};
use torch_shim::tch::Tensor;

use crate::backend::bytes;
use crate::error::{CommError, Result};
use crate::group::GroupOptions;
use crate::nccl::{lock, native};
use crate::work::Behind;

/// How often the host looks where it waits.
const PAUSE: Duration = Duration::from_micros(50);

/// What is called on a lane: it only puts work on the stream.
pub(crate) type Call<'a> = dyn Fn(&Communicator, nccl_rs::Stream) -> Result<(), NcclError> + 'a;

/// Where a group's communicators are made, and how they end.
pub(crate) struct Place {
    nccl: Nccl,
    store: Store,
    pub(crate) device: usize,
    pub(crate) group: String,
    timeout: Duration,
    ends: Mutex<Ends>,
}

#[derive(Default)]
struct Ends {
    aborters: Vec<Aborter>,
    /// Why all is over.
    cause: Option<String>,
    /// What failed first where nobody waits for it.
    failure: Option<CommError>,
}

impl Place {
    pub(crate) fn new(nccl: Nccl, store: Store, device: usize, options: &GroupOptions) -> Place {
        let (group, timeout) = (options.name.clone(), options.timeout);
        Place { nccl, store, device, group, timeout, ends: Mutex::default() }
    }

    /// The end of what this thread has given the GPU so far.
    pub(crate) fn now(&self) -> Result<Event> {
        Ok(Event::on_current(self.device)?)
    }

    pub(crate) fn failed(&self, error: &CommError) {
        lock(&self.ends).failure.get_or_insert_with(|| error.clone());
    }

    pub(crate) fn failure(&self) -> Result<()> {
        lock(&self.ends).failure.clone().map_or(Ok(()), Err)
    }

    pub(crate) fn abort(&self, cause: &str) {
        let aborters = {
            let mut ends = lock(&self.ends);
            ends.cause.get_or_insert_with(|| cause.to_string());
            std::mem::take(&mut ends.aborters)
        };
        let abort = |aborter: &Aborter| {
            if let Err(error) = aborter.abort(cause) {
                tracing::warn!("group {}: {error}", self.group);
            }
        };
        // All at once: each may take its whole time-out.
        std::thread::scope(|scope| {
            for aborter in &aborters {
                let thread = std::thread::Builder::new().name(format!("abort-{}", self.group));
                if thread.spawn_scoped(scope, move || abort(aborter)).is_err() {
                    abort(aborter);
                }
            }
        });
    }

    /// Whoever is made late must not miss the abort.
    fn enter(&self, aborter: Aborter) -> Result<()> {
        let mut ends = lock(&self.ends);
        if let Some(cause) = &ends.cause {
            return Err(CommError::Dead { group: self.group.clone(), cause: cause.clone() });
        }
        ends.aborters.push(aborter);
        Ok(())
    }

    fn error(&self, error: &NcclError) -> CommError {
        CommError::Backend(format!("group {}: {error}", self.group))
    }
}

/// One communicator and its stream.
pub(crate) struct Lane {
    place: Arc<Place>,
    communicator: Communicator,
    stream: Arc<Stream>,
    native: nccl_rs::Stream,
    under_way: Mutex<VecDeque<UnderWay>>,
}

/// Work on the stream.
struct UnderWay {
    what: String,
    after: Event,
    end: Arc<Event>,
    /// When it was first seen that it could begin.
    begun: Option<Instant>,
}

impl Lane {
    /// Meets the others under a name of the group; the first rank makes the id.
    pub(crate) fn connect(
        place: &Arc<Place>,
        name: &str,
        (rank, size): (usize, usize),
    ) -> Result<Lane> {
        cuda::set_device(place.device)?;
        let key = format!("nccl/{name}");
        let id = if rank == 0 {
            let id = place.nccl.unique_id().map_err(|error| place.error(&error))?;
            place.store.set(&key, &id.to_bytes())?;
            id
        } else {
            let bytes = place.store.get(&key, place.timeout)?;
            let length = bytes.len();
            let bytes = bytes.try_into().map_err(|_| {
                CommError::Backend(format!("{key}: {length} bytes are no id of NCCL"))
            })?;
            UniqueId::from_bytes(bytes)
        };
        let options = Options { timeout: place.timeout, ..Options::new(name) };
        let connecting = Communicator::begin(&place.nccl, id, rank, size, options)
            .map_err(|error| place.error(&error))?;
        place.enter(connecting.aborter())?;
        let communicator = connecting.wait().map_err(|error| place.error(&error))?;
        let stream = Arc::new(Stream::take(place.device)?);
        let native = native::stream(&stream)?;
        let under_way = Mutex::default();
        Ok(Lane { place: place.clone(), communicator, stream, native, under_way })
    }

    /// Puts work on the stream, behind `after`.
    pub(crate) fn put(
        &self,
        what: &str,
        after: Event,
        tensors: Vec<Tensor>,
        call: &Call<'_>,
    ) -> Result<Behind> {
        after.hold(&self.stream)?;
        let timed = OnStream::begin(&self.stream)?;
        call(&self.communicator, self.native).map_err(|error| self.place.error(&error))?;
        if let Some(timed) = timed {
            timed.end(&self.stream, self.span(what, &tensors))?;
        }
        let end = Arc::new(Event::on(&self.stream)?);
        let what = what.to_string();
        let begun = None;
        lock(&self.under_way).push_back(UnderWay { what, after, end: end.clone(), begun });
        Ok(Behind { event: end, stream: self.stream.clone(), tensors })
    }

    /// For a timeline.
    fn span(&self, what: &str, tensors: &[Tensor]) -> Span {
        // `operation 7 (all_reduce Sum Float [12])`, or `message 7 of …`.
        let operation = what.split_once('(').map_or(what, |(_, rest)| rest.trim_end_matches(')'));
        let (group, stream) = (self.place.group.clone(), self.stream.id());
        Span {
            name: operation.split(' ').next().unwrap_or_default().to_owned(),
            lane: format!("group {group}, stream {stream}"),
            bytes: tensors.iter().map(bytes).max().unwrap_or(0),
            details: vec![
                ("group", group),
                ("stream", stream.to_string()),
                ("operation", operation.to_owned()),
            ],
            ..Span::default()
        }
    }

    /// The first operation on the stream that has not ended, and when it was seen to begin.
    pub(crate) fn oldest(&self) -> Option<(String, Instant)> {
        let under_way = lock(&self.under_way);
        under_way.front().and_then(|work| Some((work.what.clone(), work.begun?)))
    }

    /// What failed on the stream, or does not end.
    pub(crate) fn watch(&self) -> Result<()> {
        self.communicator.check().map_err(|error| self.place.error(&error))?;
        let mut under_way = lock(&self.under_way);
        while let Some(work) = under_way.front_mut() {
            if work.end.is_past()? {
                under_way.pop_front();
                continue;
            }
            if work.begun.is_none() && work.after.is_past()? {
                work.begun = Some(Instant::now());
            }
            if work.begun.is_some_and(|begun| begun.elapsed() >= self.place.timeout) {
                let why = "it could begin: a rank is missing, or stuck";
                return Err(self.late(&work.what, why));
            }
            break;
        }
        Ok(())
    }

    fn late(&self, what: &str, why: &str) -> CommError {
        let (group, limit) = (&self.place.group, self.place.timeout.as_millis());
        CommError::Backend(format!("group {group}: {what} has not ended {limit} ms after {why}"))
    }

    /// Lets the host wait for the `end` of work that was just put on the stream: for at most the
    /// time-out, also where what comes before it never ends.
    pub(crate) fn wait(&self, what: &str, end: &Event) -> Result<()> {
        let issued = Instant::now();
        while !end.is_past()? {
            self.watch()?;
            self.place.failure()?;
            if issued.elapsed() >= self.place.timeout {
                let why = "it was issued: what the GPU was given before is stuck, or a rank";
                return Err(self.late(what, why));
            }
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }
}
