//! What a rank reads: ready micro-batches, made ahead of need by threads of the loader's own.
//!
//! The training thread only takes finished micro-batches off a bounded channel. Behind it, one
//! thread assembles them out of windows of row groups, which a small tokio runtime reads, decodes
//! and checks ahead of need: the window in use and the next of each source are in memory, within
//! `data.buffer_mib`. Every rank decodes whole windows, because the documents of a sample come from
//! all over its window; at 100M tokens a second and core that is under 1 % of a core per rank in
//! a run of thousands of GPUs, and it keeps the order free of the number of ranks.

mod assemble;
mod cursor;
pub mod dataset;
mod storage;
mod window;

pub use cursor::{DataCursor, ORDER_VERSION};
pub use dataset::{DataSummary, Dataset, SourceSummary, preflight};
pub use storage::{LocalFiles, RetryPolicy, Storage};

use crate::error::{DataError, Result};
use crate::order::LeftOut;
use crate::recycled::{Pool, Recycled};
use crate::shards::split::Split;
use assemble::Assembler;
use run_config::batch_plan::step_batch;
use run_config::{BatchStage, RunConfig, SampleRange};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use storage::{Activity, RangeReader};
use tokio::runtime::Runtime;

/// Bytes of micro-batches that wait for the training thread, at the most: few, so that memory still
/// in the cache is filled again. What bridges a slow read are the windows behind them.
const READY_BYTES: usize = 2 << 20;
/// Micro-batches that may wait, at the least and at the most.
const READY_BATCHES: (usize, usize) = (2, 16);
/// Bytes of a token in a micro-batch: four columns of 32 bits.
const BYTES_PER_TOKEN: usize = 16;
/// Threads that read and decode.
const BLOCKING_THREADS: usize = 4;

/// Which part of the data a rank reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoaderOptions {
    /// Training or validation.
    pub split: Split,
    /// Data-parallel rank: which share of each batch is read.
    pub dp_rank: usize,
    /// Data-parallel size: into how many shares a batch is cut.
    pub dp_size: usize,
    /// First step, from 1. For validation, the first of its own batches.
    pub first_step: u64,
    /// Number of steps.
    pub steps: u64,
}

/// How the reading is done. The defaults suit local disks and network file systems.
#[derive(Clone)]
pub struct LoaderTuning {
    /// Where shards are read from.
    pub storage: Arc<dyn Storage>,
    /// Limits of one read.
    pub retry: RetryPolicy,
    /// The longest that [`Loader::next`] waits.
    pub next_timeout: Duration,
}

impl Default for LoaderTuning {
    fn default() -> Self {
        let retry = RetryPolicy {
            timeout: Duration::from_secs(60),
            attempts: 5,
            backoff: Duration::from_millis(200),
        };
        let next_timeout = retry.longest() + Duration::from_secs(60);
        LoaderTuning { storage: Arc::<LocalFiles>::default(), retry, next_timeout }
    }
}

/// What one forward and backward pass reads. Rows are `sequence_length` tokens long, row after row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MicroBatch {
    /// Optimizer step, from 1.
    pub step: u64,
    /// Index of the micro-batch in the step, from 0.
    pub index: usize,
    /// Micro-batches of this rank in the step.
    pub num_micro_batches: usize,
    /// Rows.
    pub batch: usize,
    /// Tokens of a row.
    pub sequence_length: usize,
    /// Token ids, `[batch, sequence_length]`.
    pub tokens: Recycled<i32>,
    /// The id to predict at each position, -100 where there is none.
    pub targets: Recycled<i32>,
    /// Position of each token; with `data.document_mask` from 0 in each document.
    pub position_ids: Recycled<i32>,
    /// Document of each token, from 0 in each row; all 0 without `data.document_mask`.
    pub document_ids: Recycled<i32>,
    /// Positions with a target.
    pub num_target_tokens: u64,
    /// Global index of the sample of each row.
    pub sample_ids: Vec<u64>,
    /// Seconds that [`Loader::next`] waited for it.
    pub wait_s: f64,
    /// First token of the global stream.
    pub(crate) first_token: u64,
}

/// The micro-batches of one rank, still to be filled: a pure walk over the steps.
#[derive(Clone, Debug)]
pub(crate) struct BatchSource {
    stages: Vec<BatchStage>,
    micro_batch: usize,
    options: LoaderOptions,
    step: u64,
    index: usize,
}

impl Iterator for BatchSource {
    type Item = MicroBatch;

    fn next(&mut self) -> Option<MicroBatch> {
        if self.step - self.options.first_step >= self.options.steps {
            return None;
        }
        let plan = step_batch(&self.stages, self.step);
        let per_rank = plan.global_batch / self.options.dp_size;
        let num_micro_batches = per_rank / self.micro_batch;
        let first_row = self.options.dp_rank * per_rank + self.index * self.micro_batch;
        let batch = MicroBatch {
            step: self.step,
            index: self.index,
            num_micro_batches,
            batch: self.micro_batch,
            sequence_length: plan.sequence_length,
            first_token: plan.first_token + (first_row * plan.sequence_length) as u64,
            ..MicroBatch::default()
        };
        self.index += 1;
        if self.index == num_micro_batches {
            (self.step, self.index) = (self.step + 1, 0);
        }
        Some(batch)
    }
}

/// Reads one rank's share of the data ahead of need.
pub struct Loader {
    ready: Option<Receiver<Result<MicroBatch>>>,
    runtime: Option<Runtime>,
    thread: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    activity: Activity,
    next_timeout: Duration,
    start: DataCursor,
    left_out: LeftOut,
    stages: Vec<BatchStage>,
    wait_s: f64,
}

impl Loader {
    /// Opens the data of a run and begins to read. With [`Split::Validation`] every step is one
    /// batch of the last stage's shape, the same ones at every evaluation.
    pub fn open(config: &RunConfig, options: LoaderOptions) -> Result<Self> {
        Loader::open_with(config, options, LoaderTuning::default())
    }

    /// As [`Loader::open`], without these samples besides those that the config leaves out.
    pub fn open_without(
        config: &RunConfig,
        options: LoaderOptions,
        samples: &[SampleRange],
    ) -> Result<Self> {
        let dataset = Dataset::open(config, options.split)?.leaving_out(samples);
        Loader::over(Arc::new(dataset), config, options, LoaderTuning::default())
    }

    /// As [`Loader::open`], with the reading tuned.
    pub fn open_with(
        config: &RunConfig,
        options: LoaderOptions,
        tuning: LoaderTuning,
    ) -> Result<Self> {
        let dataset = Arc::new(Dataset::open(config, options.split)?);
        Loader::over(dataset, config, options, tuning)
    }

    /// Begins to read a dataset that is already open.
    pub fn over(
        dataset: Arc<Dataset>,
        config: &RunConfig,
        options: LoaderOptions,
        tuning: LoaderTuning,
    ) -> Result<Self> {
        let batches = batch_source(config, options)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .max_blocking_threads(BLOCKING_THREADS)
            .thread_name("data-read")
            .enable_time()
            .build()
            .map_err(|error| stopped(&error))?;
        let largest = batches.stages.iter().map(|stage| stage.sequence_length).max().unwrap_or(1);
        let bytes = largest * batches.micro_batch * BYTES_PER_TOKEN;
        let depth = (READY_BYTES / bytes.max(1)).clamp(READY_BATCHES.0, READY_BATCHES.1);
        let (sender, ready) = sync_channel(depth);
        let (stop, activity) = (Arc::new(AtomicBool::new(false)), Activity::default());
        let reader = RangeReader {
            storage: tuning.storage,
            policy: tuning.retry,
            activity: activity.clone(),
            decoded: Pool::new((config.data.buffer_mib << 20) / size_of::<i32>()),
        };
        let (start, stages) = (dataset.start.clone(), batches.stages.clone());
        let left_out = dataset.left_out.clone();
        // Besides those that wait, one is being filled and one is in use.
        let columns = Pool::new((depth + 2) * bytes / size_of::<i32>());
        let handle = runtime.handle().clone();
        let assembler = Assembler::new(dataset, handle, reader, columns, stop.clone());
        let thread = std::thread::Builder::new()
            .name("data-assemble".into())
            .spawn(move || assembler.run(batches, &sender))
            .map_err(|error| stopped(&error))?;
        Ok(Loader {
            ready: Some(ready),
            runtime: Some(runtime),
            thread: Some(thread),
            stop,
            activity,
            next_timeout: tuning.next_timeout,
            start,
            left_out,
            stages,
            wait_s: 0.0,
        })
    }

    /// The next micro-batch, step by step; `None` after the last. Waits for a bounded time; a
    /// time-out names the shard that is being read.
    #[expect(
        clippy::should_implement_trait,
        reason = "it can fail, which Iterator cannot say well"
    )]
    pub fn next(&mut self) -> Result<Option<MicroBatch>> {
        let started = Instant::now();
        let Some(ready) = &self.ready else { return Ok(None) };
        match ready.recv_timeout(self.next_timeout) {
            Ok(Ok(mut batch)) => {
                batch.wait_s = started.elapsed().as_secs_f64();
                self.wait_s += batch.wait_s;
                Ok(Some(batch))
            }
            Ok(Err(error)) => {
                self.ready = None;
                Err(error)
            }
            Err(RecvTimeoutError::Timeout) => Err(DataError::Timeout {
                waited_s: started.elapsed().as_secs_f64(),
                doing: self.activity.describe(),
            }),
            Err(RecvTimeoutError::Disconnected) => self.ended(),
        }
    }

    /// The thread ended: after the last micro-batch, or by a fault of its own.
    fn ended(&mut self) -> Result<Option<MicroBatch>> {
        self.ready = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Err(_)) => Err(DataError::Stopped { detail: "its thread panicked".into() }),
            _ => Ok(None),
        }
    }

    /// Seconds that [`Loader::next`] has waited so far.
    pub fn wait_s(&self) -> f64 {
        self.wait_s
    }

    /// Samples of which a 1-based step of training reads at least a part, over all ranks: from the
    /// first to the last.
    pub fn samples_of(&self, step: u64) -> SampleRange {
        let batch = step_batch(&self.stages, step);
        let sample = |token: u64| self.left_out.sample_at(token / self.start.sequence_length);
        SampleRange {
            first: sample(batch.first_token),
            last: sample(batch.end_token().saturating_sub(1)),
        }
    }

    /// Samples that are left out.
    pub fn left_out(&self) -> &LeftOut {
        &self.left_out
    }

    /// The position after a 1-based step of training (0: the start), the same on all ranks.
    pub fn cursor_after(&self, step: u64) -> DataCursor {
        let consumed_tokens =
            if step == 0 { 0 } else { step_batch(&self.stages, step).end_token() };
        DataCursor {
            consumed_tokens,
            consumed_samples: consumed_tokens.div_ceil(self.start.sequence_length),
            ..self.start.clone()
        }
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.ready = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Checks that the batches divide over the ranks, and makes the walk over them.
fn batch_source(config: &RunConfig, options: LoaderOptions) -> Result<BatchSource> {
    let mut stages = config.training.batch_stages.clone();
    if options.split == Split::Validation {
        stages =
            stages.last().map(|last| BatchStage { from_tokens: 0, ..*last }).into_iter().collect();
    }
    let LoaderOptions { dp_rank, dp_size, first_step, .. } = options;
    let micro_batch = config.training.micro_batch;
    let refuse = |key: &str, detail: String| Err(DataError::Setting { key: key.into(), detail });
    if dp_rank >= dp_size || first_step == 0 {
        let detail = format!("rank {dp_rank} of {dp_size} from step {first_step} does not exist");
        return refuse("data-parallel share", detail);
    }
    let longest = stages.iter().map(|stage| stage.sequence_length).max().unwrap_or(0);
    for stage in &stages {
        let (batch, len) = (stage.global_batch, stage.sequence_length);
        if micro_batch == 0 || batch == 0 || !batch.is_multiple_of(dp_size * micro_batch) {
            return refuse(
                "training.global_batch",
                format!(
                    "{batch} sequences do not divide over {dp_size} data-parallel ranks in \
                     micro-batches of {micro_batch}; choose a multiple of {}",
                    dp_size * micro_batch.max(1)
                ),
            );
        }
        if len == 0 || !longest.is_multiple_of(len) {
            let detail = format!("{len} does not divide the longest of all stages, {longest}");
            return refuse("training.global_batch[].sequence_length", detail);
        }
    }
    Ok(BatchSource { stages, micro_batch, options, step: first_step, index: 0 })
}

fn stopped(error: &std::io::Error) -> DataError {
    DataError::Stopped { detail: format!("it could not start: {error}") }
}
