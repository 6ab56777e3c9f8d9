//! The thread that makes micro-batches: it walks the steps, keeps the windows it needs and the
//! next ones on their way, and hands finished micro-batches over a bounded channel.

use super::dataset::Dataset;
use super::storage::RangeReader;
use super::window::{self, Window};
use super::{BatchSource, MicroBatch};
use crate::error::{DataError, Result};
use crate::order::mixture::MixtureCursor;
use crate::order::{EpochOrder, SampleUnit};
use crate::packing::{RowSink, Segment};
use crate::recycled::Pool;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

/// How often a wait looks whether the loader was dropped.
const POLL: Duration = Duration::from_millis(50);

/// A window of a source: epoch, then index in the epoch.
type WindowKey = (u64, usize);

enum Slot {
    Loading(JoinHandle<Result<Window>>),
    Ready(Arc<Window>),
}

/// The windows of one source that are in memory or on their way.
#[derive(Default)]
struct SourceReader {
    epochs: BTreeMap<u64, Arc<EpochOrder>>,
    windows: BTreeMap<WindowKey, Slot>,
}

/// Makes micro-batches of a dataset.
pub struct Assembler {
    dataset: Arc<Dataset>,
    mixture: MixtureCursor,
    readers: Vec<SourceReader>,
    runtime: Handle,
    reader: RangeReader,
    /// Columns of micro-batches.
    columns: Pool<i32>,
    stop: Arc<AtomicBool>,
}

impl Assembler {
    /// An assembler that reads through `reader` on `runtime`, into `columns`, until `stop` is set.
    pub fn new(
        dataset: Arc<Dataset>,
        runtime: Handle,
        reader: RangeReader,
        columns: Pool<i32>,
        stop: Arc<AtomicBool>,
    ) -> Self {
        let mixture = dataset.mixture.cursor();
        let readers = dataset.sources.iter().map(|_| SourceReader::default()).collect();
        Assembler { dataset, mixture, readers, runtime, reader, columns, stop }
    }

    /// Makes all micro-batches of `batches` and sends them. Ends at an error, or when nobody
    /// listens.
    pub fn run(mut self, batches: BatchSource, to: &SyncSender<Result<MicroBatch>>) {
        for batch in batches {
            let made = self.fill(batch);
            let failed = made.is_err();
            if to.send(made).is_err() || failed {
                return;
            }
        }
    }

    /// Fills one micro-batch.
    fn fill(&mut self, mut batch: MicroBatch) -> Result<MicroBatch> {
        let len = batch.sequence_length;
        let size = batch.batch * len;
        let column = || self.columns.lend(size);
        (batch.tokens, batch.targets) = (column(), column());
        (batch.position_ids, batch.document_ids) = (column(), column());
        batch.sample_ids = Vec::with_capacity(batch.batch);
        let sample_len = self.dataset.sample_len;
        for row in 0..batch.batch {
            let token = batch.first_token + (row * len) as u64;
            let mut sink = RowSink {
                len,
                tokens: &mut batch.tokens,
                targets: &mut batch.targets,
                positions: &mut batch.position_ids,
                documents: &mut batch.document_ids,
            };
            let sample = self.dataset.left_out.sample_at(token / sample_len);
            let offset = (token % sample_len) as usize;
            batch.num_target_tokens += self.fill_row(sample, offset, &mut sink)?;
            batch.sample_ids.push(sample);
        }
        Ok(batch)
    }

    fn fill_row(&mut self, sample: u64, offset: usize, row: &mut RowSink<'_>) -> Result<u64> {
        let dataset = self.dataset.clone();
        let at = self.mixture.locate(sample);
        let source = &dataset.sources[at.source];
        let (epoch, index) =
            (at.index / source.samples_per_epoch, at.index % source.samples_per_epoch);
        let order = self.epoch(at.source, epoch);
        let place = order.locate(index).ok_or_else(|| DataError::Stopped {
            detail: format!("sample {index} of source `{}` has no place", source.name),
        })?;
        let first = self.window(at.source, (epoch, place.window))?;
        self.readers[at.source].windows.retain(|key, _| *key >= (epoch, place.window));
        self.prefetch_after(at.source, epoch, place.window);
        let mut span = order.windows[place.window];
        let mut segments: Vec<Segment<'_>> = Vec::new();
        let SampleUnit::Tokens(len) = source.params.unit else {
            first.bin(place.unit - span.first_unit, &mut segments);
            return Ok(dataset.filling.fill(&segments, offset, None, row));
        };
        // A sample at the end of a window reaches into the next ones; one more token is read for
        // the last target.
        let mut held = vec![first];
        for next in place.window + 1..order.windows.len() {
            if span.end_unit > place.unit + len {
                break;
            }
            held.push(self.window(at.source, (epoch, next))?);
            span = order.windows[next];
        }
        let mut wanted = len + 1;
        let mut start = place.unit - order.windows[place.window].first_unit;
        for window in &held {
            wanted -= window.stream(start, wanted, &mut segments);
            start = 0;
        }
        let after = shorten(&mut segments);
        Ok(dataset.filling.fill(&segments, offset, after, row))
    }

    /// The order of an epoch, kept for the newest two.
    fn epoch(&mut self, source: usize, epoch: u64) -> Arc<EpochOrder> {
        let dataset = &self.dataset;
        let epochs = &mut self.readers[source].epochs;
        let order = epochs
            .entry(epoch)
            .or_insert_with(|| Arc::new(dataset.sources[source].epoch(epoch)))
            .clone();
        while epochs.len() > 2 {
            epochs.pop_first();
        }
        order
    }

    /// Starts to load a window, where that has not been done.
    fn start(&mut self, source: usize, key: WindowKey) {
        if self.readers[source].windows.contains_key(&key) {
            return;
        }
        let order = self.epoch(source, key.0);
        let load = window::load(self.dataset.clone(), source, order, key.1, self.reader.clone());
        let slot = Slot::Loading(self.runtime.spawn(load));
        self.readers[source].windows.insert(key, slot);
    }

    /// Starts to load the window that is needed after this one.
    fn prefetch_after(&mut self, source: usize, epoch: u64, window: usize) {
        let order = self.epoch(source, epoch);
        if window + 1 < order.windows.len() {
            return self.start(source, (epoch, window + 1));
        }
        self.start(source, (epoch + 1, 0));
    }

    /// A window, waited for where it is on its way. Reads are bounded in time, so this is.
    fn window(&mut self, source: usize, key: WindowKey) -> Result<Arc<Window>> {
        self.start(source, key);
        let slot = self.readers[source].windows.get_mut(&key);
        let Some(slot) = slot else {
            return Err(DataError::Stopped { detail: format!("window {key:?} is gone") });
        };
        let handle = match slot {
            Slot::Ready(window) => return Ok(window.clone()),
            Slot::Loading(handle) => handle,
        };
        let loaded = loop {
            if self.stop.load(Ordering::Relaxed) {
                return Err(DataError::Interrupted);
            }
            let wait = async { tokio::time::timeout(POLL, &mut *handle).await };
            if let Ok(joined) = self.runtime.block_on(wait) {
                break joined.map_err(|error| DataError::Stopped { detail: error.to_string() })?;
            }
        };
        let window = Arc::new(loaded?);
        *slot = Slot::Ready(window.clone());
        Ok(window)
    }
}

/// Takes the last token, which is only a target, off the segments of a sample. It is returned where
/// it begins a document; within a document the segment's own `next` is set.
fn shorten(segments: &mut Vec<Segment<'_>>) -> Option<i32> {
    let last = segments.last_mut()?;
    let (&id, rest) = last.ids.split_last()?;
    if rest.is_empty() {
        segments.pop();
        return Some(id);
    }
    (last.ids, last.next) = (rest, Some(id));
    None
}
