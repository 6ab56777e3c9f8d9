//! Tokenizes files into shards, on all cores, in an order that depends on the inputs alone.
//!
//! The inputs are cut in tasks, runs of files; a few threads take one task each, read its documents
//! and write its shards, and all cores encode. A finished shard is recorded, and an interrupted
//! command goes on behind the last one of each task.

use super::documents::{self, DocumentOptions, InputFile, find_inputs};
use super::progress::Progress;
use super::record::{DoneShard, Plan, Record, TaskRecord};
use super::tokenizer::Tokenizer;
use super::{WRITER, chunk};
use crate::error::{DataError, Result};
use crate::shards::ShardInfo;
use crate::shards::footer::LAYOUT_VERSION;
use crate::shards::writer::{ShardTotals, ShardWriter};
use rayon::prelude::*;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use tokenizers::pipeline::PipelineToken;

/// Text that is encoded at a time, per task.
const BATCH_BYTES: usize = 8 << 20;
/// Chunks of text that a core takes at a time.
const CHUNKS_AT_A_TIME: usize = 8;
/// The least bytes of a task, so that many small files share a shard.
const MIN_TASK_BYTES: u64 = 64 << 20;
/// The most tasks, so that there are not more shards than this without need.
const MAX_TASKS: u64 = 1024;
/// Row groups of a small data set: enough of them to shuffle and to split.
const ROW_GROUPS_WANTED: u64 = 64;
/// Limits of the automatic size of a row group, in tokens.
const ROW_GROUP_TOKENS: (u64, u64) = (32 << 10, 4 << 20);

/// What to tokenize, and how.
#[derive(Clone, Debug)]
pub struct TokenizeOptions {
    /// Files, folders or globs.
    pub inputs: Vec<String>,
    /// How documents are found in them.
    pub documents: DocumentOptions,
    /// The tokenizer.
    pub tokenizer: PathBuf,
    /// Folder of the shards.
    pub output: PathBuf,
    /// Most tokens of a shard; only a document that is longer makes a longer one.
    pub shard_tokens: u64,
    /// Tokens of a row group, about; `None`: by the size of the inputs.
    pub row_group_tokens: Option<u64>,
    /// Whether documents begin with the tokenizer's begin token.
    pub bos: bool,
    /// Whether documents end with the tokenizer's end token.
    pub eos: bool,
    /// Threads; `None`: one per core.
    pub threads: Option<usize>,
    /// Whether shards that are there are deleted first.
    pub overwrite: bool,
}

/// What was made.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct TokenizeSummary {
    /// Folder of the shards.
    pub output: PathBuf,
    /// Number of shards.
    pub shards: usize,
    /// Shards that were there from an earlier, interrupted run.
    pub shards_from_before: usize,
    /// Documents.
    pub documents: u64,
    /// Tokens, special ones included.
    pub tokens: u64,
    /// Size of the shards.
    pub bytes: u64,
    /// Seconds it took.
    pub seconds: f64,
}

/// Tokenizes, or goes on where an interrupted run stopped.
pub fn tokenize(options: &TokenizeOptions) -> Result<TokenizeSummary> {
    let started = std::time::Instant::now();
    let inputs = find_inputs(&options.inputs)?;
    let tokenizer = Tokenizer::load(&options.tokenizer)?;
    let text_bytes: u64 = inputs.iter().map(InputFile::text_bytes).sum();
    let group_tokens = options.row_group_tokens.unwrap_or_else(|| {
        (text_bytes / 4 / ROW_GROUPS_WANTED).clamp(ROW_GROUP_TOKENS.0, ROW_GROUP_TOKENS.1)
    });
    let plan = Plan {
        writer: WRITER.into(),
        tokenizer_sha256: tokenizer.sha256.clone(),
        inputs: inputs.clone(),
        settings: format!(
            "{:?} shard {} group {group_tokens} bos {} eos {}",
            options.documents, options.shard_tokens, options.bos, options.eos
        ),
    };
    let record = Record::open(&options.output, &plan, options.overwrite)?;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(options.threads.unwrap_or(0))
        .build()
        .map_err(|error| DataError::Stopped { detail: error.to_string() })?;
    let job = Job {
        options,
        tokenizer: &tokenizer,
        tasks: tasks(inputs),
        record: &record,
        pool: &pool,
        progress: Progress::new("tokenizing", text_bytes),
        info: info(&tokenizer, options),
        group_tokens: group_tokens as usize,
        failed: AtomicBool::new(false),
    };
    let outcome = job.run();
    job.progress.finish();
    let mut summary = outcome?;
    summary.seconds = started.elapsed().as_secs_f64();
    if summary.tokens == 0 {
        return Err(DataError::Input {
            path: options.inputs.first().map(PathBuf::from).unwrap_or_default(),
            place: "all inputs".into(),
            detail: "there is no document with text".into(),
        });
    }
    Ok(summary)
}

fn info(tokenizer: &Tokenizer, options: &TokenizeOptions) -> ShardInfo {
    ShardInfo {
        layout: LAYOUT_VERSION,
        writer: WRITER.into(),
        tokenizer_sha256: tokenizer.sha256.clone(),
        vocab_size: tokenizer.vocab_size,
        bos_id: tokenizer.bos_id.filter(|_| options.bos),
        eos_id: tokenizer.eos_id.filter(|_| options.eos),
        packing: "document".into(),
    }
}

/// Runs of files of about equal size.
fn tasks(inputs: Vec<InputFile>) -> Vec<Vec<InputFile>> {
    let total: u64 = inputs.iter().map(InputFile::text_bytes).sum();
    let wanted = (total / MAX_TASKS).max(MIN_TASK_BYTES);
    let mut tasks: Vec<Vec<InputFile>> = Vec::new();
    let mut room = 0;
    for input in inputs {
        let bytes = input.text_bytes();
        match tasks.last_mut() {
            Some(task) if room >= bytes => {
                room -= bytes;
                task.push(input);
            }
            _ => {
                room = wanted.saturating_sub(bytes);
                tasks.push(vec![input]);
            }
        }
    }
    tasks
}

struct Job<'a> {
    options: &'a TokenizeOptions,
    tokenizer: &'a Tokenizer,
    tasks: Vec<Vec<InputFile>>,
    record: &'a Record,
    pool: &'a rayon::ThreadPool,
    progress: Progress,
    info: ShardInfo,
    group_tokens: usize,
    failed: AtomicBool,
}

/// Where a task is.
#[derive(Default)]
struct Position {
    input: usize,
    document: u64,
}

impl Job<'_> {
    /// Runs all tasks, a few at a time; the error of the first task in order is returned.
    fn run(&self) -> Result<TokenizeSummary> {
        let next = AtomicUsize::new(0);
        let errors = Mutex::new(Vec::new());
        let before: usize =
            (0..self.tasks.len()).map(|task| self.record.task(task).shards.len()).sum();
        std::thread::scope(|scope| {
            for _ in 0..self.pool.current_num_threads().min(self.tasks.len()) {
                scope.spawn(|| {
                    loop {
                        let task = next.fetch_add(1, Ordering::Relaxed);
                        if task >= self.tasks.len() || self.failed.load(Ordering::Relaxed) {
                            return;
                        }
                        if let Err(error) = self.run_task(task) {
                            self.failed.store(true, Ordering::Relaxed);
                            let mut errors =
                                errors.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                            errors.push((task, error));
                        }
                    }
                });
            }
        });
        let errors = errors.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some((_, error)) = errors.into_iter().min_by_key(|(task, _)| *task) {
            return Err(error);
        }
        let mut summary = TokenizeSummary {
            output: self.options.output.clone(),
            shards_from_before: before,
            ..TokenizeSummary::default()
        };
        for shard in (0..self.tasks.len()).flat_map(|task| self.record.task(task).shards) {
            summary.shards += 1;
            summary.documents += shard.totals.documents;
            summary.tokens += shard.totals.tokens;
            summary.bytes += shard.totals.bytes;
        }
        Ok(summary)
    }

    fn run_task(&self, task: usize) -> Result<()> {
        let mut record = self.record.task(task);
        if record.finished {
            self.progress.add(self.tasks[task].iter().map(InputFile::text_bytes).sum(), 0, 0);
            return Ok(());
        }
        let mut at = Position::default();
        if let Some(last) = record.shards.last() {
            at = Position { input: last.next_input, document: last.next_document };
        }
        let mut writer: Option<ShardWriter> = None;
        while at.input < self.tasks[task].len() {
            let input = &self.tasks[task][at.input];
            let mut documents = documents::open(&input.path, &self.options.documents)?;
            for _ in 0..at.document {
                documents.next().transpose()?;
            }
            loop {
                let batch = next_batch(&mut documents)?;
                if batch.is_empty() || self.failed.load(Ordering::Relaxed) {
                    break;
                }
                self.write_batch(task, &batch, &mut at, &mut record, &mut writer)?;
            }
            if self.failed.load(Ordering::Relaxed) {
                return Ok(());
            }
            at = Position { input: at.input + 1, document: 0 };
        }
        record.finished = true;
        self.finish_shard(task, &at, &mut record, &mut writer)
    }

    /// Encodes a batch on all cores and appends it to the shard that is being written; begins
    /// another one in front of a document that would make it too long.
    fn write_batch(
        &self,
        task: usize,
        batch: &[String],
        at: &mut Position,
        record: &mut TaskRecord,
        writer: &mut Option<ShardWriter>,
    ) -> Result<()> {
        let chunks: Vec<(usize, &str)> = batch
            .iter()
            .enumerate()
            .flat_map(|(document, text)| chunk::chunks(text).map(move |chunk| (document, chunk)))
            .collect();
        let encoded = self.pool.install(|| {
            let encode = |&(document, chunk): &(usize, &str)| {
                let mut ids = Vec::new();
                self.tokenizer.encode_chunk(chunk, &mut ids).map(|()| (document, ids))
            };
            let chunks = chunks.par_iter().with_min_len(CHUNKS_AT_A_TIME.min(chunks.len()));
            chunks.map(encode).collect::<Result<Vec<(usize, Vec<PipelineToken>)>>>()
        })?;
        let mut tokens = 0;
        for parts in encoded.chunk_by(|(a, _), (b, _)| a == b) {
            let mut ids: Vec<u32> = Vec::new();
            ids.extend(self.info.bos_id);
            ids.extend(parts.iter().flat_map(|(_, part)| part.iter().map(|id| id.id())));
            ids.extend(self.info.eos_id);
            tokens += ids.len() as u64;
            let most = self.options.shard_tokens.saturating_sub(ids.len() as u64);
            if writer.as_ref().is_some_and(|writer| writer.totals().tokens > most) {
                self.finish_shard(task, at, record, writer)?;
            }
            let shard = match writer {
                Some(shard) => shard,
                None => writer.insert(self.new_shard(task, record)?),
            };
            shard.push(ids.into_iter())?;
            at.document += 1;
        }
        let bytes = batch.iter().map(|text| text.len() as u64).sum();
        self.progress.add(bytes, batch.len() as u64, tokens);
        Ok(())
    }

    fn new_shard(&self, task: usize, record: &TaskRecord) -> Result<ShardWriter> {
        let path = self.options.output.join(shard_name(task, record.shards.len()));
        ShardWriter::create(&path, &self.info, self.group_tokens)
    }

    /// Ends the shard that is being written, if there is one, and records where the task is.
    fn finish_shard(
        &self,
        task: usize,
        at: &Position,
        record: &mut TaskRecord,
        writer: &mut Option<ShardWriter>,
    ) -> Result<()> {
        if let Some(writer) = writer.take() {
            let totals: ShardTotals = writer.finish()?;
            record.shards.push(DoneShard {
                name: shard_name(task, record.shards.len()),
                totals,
                next_input: at.input,
                next_document: at.document,
            });
        }
        self.record.save_task(task, record)
    }
}

fn shard_name(task: usize, number: usize) -> String {
    format!("shard-{task:05}-{number:03}.parquet")
}

/// The next documents, of about [`BATCH_BYTES`] bytes; none at the end.
fn next_batch(documents: &mut documents::Documents) -> Result<Vec<String>> {
    let (mut batch, mut bytes) = (Vec::new(), 0);
    while bytes < BATCH_BYTES {
        let Some(document) = documents.next() else { break };
        let document = document?;
        bytes += document.len();
        batch.push(document);
    }
    Ok(batch)
}
