//! Small corpora of which every token is known: ids are unique and rise through each document, so
//! that an id tells its document, its place, and what must follow it.
#![allow(dead_code, reason = "each test file uses a part")]

use data_pipeline::shards::footer::{LAYOUT_VERSION, ShardInfo};
use data_pipeline::shards::split::HoldOut;
use data_pipeline::shards::{ShardWriter, writer::ShardTotals};
use data_pipeline::{Loader, LoaderOptions, MicroBatch, Split};
use run_config::RunConfig;
use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

pub const VOCAB: usize = 1 << 20;

/// A corpus on disk.
pub struct Corpus {
    pub folder: tempfile::TempDir,
    /// Ids of each document, and its split.
    pub documents: Vec<(Range<i32>, Split)>,
    /// Document of each id.
    pub document_of: HashMap<i32, usize>,
}

/// Writes `shards` shards of `documents` documents each, of 1 to `longest` tokens.
pub fn corpus(shards: usize, documents: usize, longest: u64, fraction: f64) -> Corpus {
    corpus_from(shards, documents, longest, fraction, 0, 500)
}

pub fn corpus_from(
    shards: usize,
    documents: usize,
    longest: u64,
    fraction: f64,
    first_id: i32,
    group_tokens: usize,
) -> Corpus {
    let folder = tempfile::tempdir().unwrap();
    let mut corpus = Corpus { folder, documents: Vec::new(), document_of: HashMap::new() };
    let mut next = first_id;
    let mut state = 12345u64;
    for shard in 0..shards {
        let path = corpus.folder.path().join(format!("part-{shard}.parquet"));
        let hold_out = HoldOut::new(&path, fraction);
        let mut writer = ShardWriter::create(&path, &info(VOCAB), group_tokens).unwrap();
        for row in 0..documents {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let ids = next..next + 1 + ((state >> 33) % longest) as i32;
            next = ids.end;
            writer.push(ids.clone().map(|id| id as u32).collect::<Vec<_>>().into_iter()).unwrap();
            corpus.document_of.extend(ids.clone().map(|id| (id, corpus.documents.len())));
            corpus.documents.push((ids, hold_out.split_of(row as u64)));
        }
        let totals: ShardTotals = writer.finish().unwrap();
        assert_eq!(totals.documents, documents as u64);
    }
    assert!((next as usize) < VOCAB, "ids must be unique");
    corpus
}

/// Facts of a shard whose tokenizer is the file [`tokenizer_file`] writes.
pub fn info(vocab_size: usize) -> ShardInfo {
    ShardInfo {
        layout: LAYOUT_VERSION,
        writer: "test".into(),
        // SHA-256 of "{}", computed with sha256sum.
        tokenizer_sha256: "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a".into(),
        vocab_size,
        bos_id: None,
        eos_id: Some(7),
        packing: "document".into(),
    }
}

pub fn tokenizer_file(folder: &Path) -> PathBuf {
    let path = folder.join("tokenizer.json");
    std::fs::write(&path, "{}").unwrap();
    path
}

impl Corpus {
    pub fn config(&self, overrides: &[&str]) -> RunConfig {
        config(&[(self.folder.path(), 1.0)], overrides)
    }

    /// Tokens of a split.
    pub fn tokens(&self, split: Split) -> usize {
        self.documents.iter().filter(|d| d.1 == split).map(|d| d.0.len()).sum()
    }

    /// The id that must follow in the document.
    pub fn follows(&self, id: i32) -> Option<i32> {
        let document = &self.documents[self.document_of[&id]].0;
        document.contains(&(id + 1)).then_some(id + 1)
    }
}

pub fn config(sources: &[(&Path, f64)], overrides: &[&str]) -> RunConfig {
    let tokenizer = tokenizer_file(sources[0].0);
    let sources: Vec<String> = sources
        .iter()
        .enumerate()
        .map(|(i, (path, weight))| {
            format!("{{name: s{i}, path: \"{}\", weight: {weight}}}", path.display())
        })
        .collect();
    let yaml = format!(
        "name: test\nseed: 1\nmodel: {{dim: 16, layers: 1, heads: 2, ffn_dim: 16, vocab_size: \
         {VOCAB}}}\ndata: {{tokenizer: \"{}\", sources: [{}], sequence_length: 64, \
         validation_fraction: 0.1, buffer_mib: 1}}\ntraining: {{steps: 10, global_batch: 8, \
         micro_batch: 1}}\nschedule: {{warmup_steps: 0}}\n",
        tokenizer.display(),
        sources.join(", ")
    );
    let overrides: Vec<String> = overrides.iter().map(|o| o.to_string()).collect();
    RunConfig::from_yaml_str(&yaml, Path::new("/"), &overrides).unwrap().config
}

pub fn options(first_step: u64, steps: u64) -> LoaderOptions {
    LoaderOptions { split: Split::Train, dp_rank: 0, dp_size: 1, first_step, steps }
}

/// All micro-batches that a loader gives.
pub fn read(config: &RunConfig, options: LoaderOptions) -> Vec<MicroBatch> {
    read_all(&mut Loader::open(config, options).unwrap())
}

pub fn read_all(loader: &mut Loader) -> Vec<MicroBatch> {
    let mut batches = Vec::new();
    while let Some(mut batch) = loader.next().unwrap() {
        batch.wait_s = 0.0;
        batches.push(batch);
    }
    batches
}

/// Rows of micro-batches: sample, tokens, targets, positions, documents.
pub struct Row {
    pub sample: u64,
    pub tokens: Vec<i32>,
    pub targets: Vec<i32>,
    pub positions: Vec<i32>,
    pub documents: Vec<i32>,
}

pub fn rows(batches: &[MicroBatch]) -> Vec<Row> {
    let row = |batch: &MicroBatch, row: usize| {
        let range = row * batch.sequence_length..(row + 1) * batch.sequence_length;
        Row {
            sample: batch.sample_ids[row],
            tokens: batch.tokens[range.clone()].to_vec(),
            targets: batch.targets[range.clone()].to_vec(),
            positions: batch.position_ids[range.clone()].to_vec(),
            documents: batch.document_ids[range].to_vec(),
        }
    };
    batches.iter().flat_map(|batch| (0..batch.batch).map(move |at| row(batch, at))).collect()
}
