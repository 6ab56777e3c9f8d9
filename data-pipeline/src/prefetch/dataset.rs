//! The sources of a run, checked against its tokenizer and model, with the order of each.

use super::cursor::{DataCursor, ORDER_VERSION};
use crate::digest::{file_sha256, hex};
use crate::error::{DataError, Result};
use crate::order::feistel::key_of;
use crate::order::mixture::Mixture;
use crate::order::{EpochOrder, GroupSize, LeftOut, OrderParams, SampleUnit};
use crate::packing::Filling;
use crate::shards::manifest::{Manifest, ScanParams, SplitSize};
use crate::shards::scan::find_files;
use crate::shards::split::Split;
use run_config::{Packing, RunConfig, SampleRange};
use sha2::{Digest, Sha256};
use std::sync::Arc;
use xxhash_rust::xxh3::xxh3_64;

/// Bytes of a token in memory.
const TOKEN_BYTES: u64 = 4;
/// Windows of a source that are held at a time: the one in use and the next.
const WINDOWS_HELD: u64 = 2;

/// One source and the order of its samples.
#[derive(Clone, Debug)]
pub struct DatasetSource {
    /// Its name.
    pub name: String,
    /// Its row groups.
    pub manifest: Arc<Manifest>,
    /// Sizes of the row groups in the split.
    pub sizes: Vec<GroupSize>,
    /// What fixes its order.
    pub params: OrderParams,
    /// Samples of one epoch.
    pub samples_per_epoch: u64,
}

impl DatasetSource {
    /// Puts the row groups of a manifest in the order of `params`. `None` where the split has too
    /// little for one sample.
    pub fn new(
        name: &str,
        manifest: Arc<Manifest>,
        split: Split,
        params: OrderParams,
    ) -> Option<Self> {
        let size = |sizes: SplitSize| match params.unit {
            SampleUnit::Tokens(_) => sizes.tokens,
            SampleUnit::Bins => sizes.bins,
        };
        let group_size = |group: &crate::shards::RowGroup| GroupSize {
            tokens: group.tokens,
            units: size(group.split(split)),
        };
        let sizes: Vec<_> = manifest.groups.iter().map(group_size).collect();
        let samples_per_epoch = params.samples_per_epoch(sizes.iter().map(|s| s.units).sum());
        (samples_per_epoch > 0).then(|| DatasetSource {
            name: name.to_string(),
            manifest,
            sizes,
            params,
            samples_per_epoch,
        })
    }

    /// Order of one epoch.
    pub fn epoch(&self, epoch: u64) -> EpochOrder {
        EpochOrder::new(&self.sizes, self.params, epoch)
    }
}

/// What a source holds, for people to look at.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceSummary {
    /// Its name.
    pub name: String,
    /// Number of shards.
    pub shards: usize,
    /// What is trained on.
    pub train: SplitSize,
    /// What is held out.
    pub validation: SplitSize,
    /// Share of the samples that come from it.
    pub share: f64,
}

/// What the data of a run holds, for people to look at.
#[derive(Clone, Debug, PartialEq)]
pub struct DataSummary {
    /// Per source, in the order of the config.
    pub sources: Vec<SourceSummary>,
}

/// The sources of a run in one split.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// Sources in the order of the config.
    pub sources: Vec<DatasetSource>,
    /// How they are mixed.
    pub mixture: Mixture,
    /// Tokens of a sample.
    pub sample_len: u64,
    /// How rows are filled.
    pub filling: Filling,
    /// Ids must be below this.
    pub vocab_size: usize,
    /// Which documents are meant.
    pub split: Split,
    /// Share of the documents held out.
    pub validation_fraction: f64,
    /// Cursor at the start.
    pub start: DataCursor,
    /// Samples that are left out of the order.
    pub left_out: LeftOut,
}

impl Dataset {
    /// Finds, scans (or takes from the cache) and checks the sources of a run.
    pub fn open(config: &RunConfig, split: Split) -> Result<Self> {
        let manifests = load_manifests(config)?;
        let shuffled = config.data.shuffle && split == Split::Train;
        let sample_len = sample_len(config);
        let mut sources = Vec::with_capacity(manifests.len());
        for (source, manifest) in config.data.sources.iter().zip(&manifests) {
            let key = key_of(&[config.seed, xxh3_64(source.name.as_bytes())]);
            let params = OrderParams {
                unit: match config.data.packing {
                    Packing::Concatenate => SampleUnit::Tokens(sample_len),
                    Packing::BestFit => SampleUnit::Bins,
                },
                key: shuffled.then_some(key),
                window_tokens: window_tokens(config, &source.name, manifest)?,
            };
            let built = DatasetSource::new(&source.name, manifest.clone(), split, params);
            sources.push(built.ok_or_else(|| {
                too_small(&source.name, manifest.totals(split), split, sample_len)
            })?);
        }
        let weights: Vec<f64> = config.data.sources.iter().map(|source| source.weight).collect();
        let files = manifests.iter().flat_map(|manifest| &manifest.files);
        let pad_id = files.into_iter().find_map(|file| file.eos_id).unwrap_or(0);
        let dataset = Dataset {
            sources,
            mixture: Mixture::new(&weights, if shuffled { config.seed } else { 0 })?,
            sample_len,
            filling: Filling { document_mask: config.data.document_mask, pad_id: pad_id as i32 },
            vocab_size: config.model.vocab_size,
            split,
            validation_fraction: config.data.validation_fraction,
            start: start_cursor(config, &manifests),
            left_out: LeftOut::default(),
        };
        // They are samples of the order of training.
        Ok(match split {
            Split::Train => dataset.leaving_out(&config.data.skip_samples),
            Split::Validation => dataset,
        })
    }

    /// The same without these samples.
    #[must_use]
    pub fn leaving_out(mut self, samples: &[SampleRange]) -> Self {
        self.left_out = LeftOut::new(&[self.left_out.ranges(), samples].concat());
        self.start.left_out = self.left_out.ranges().to_vec();
        self
    }
}

/// Checks the data of a run without reading its tokens, so that bad input is an error before the
/// ranks are started, and their start finds the manifest cached.
pub fn preflight(config: &RunConfig) -> Result<DataSummary> {
    let train = Dataset::open(config, Split::Train)?;
    if config.validation.every_steps > 0 && config.validation.steps > 0 {
        Dataset::open(config, Split::Validation)?;
    }
    let (counts, slots) = train.mixture.counts();
    let summary = |(source, count): (&DatasetSource, &u64)| SourceSummary {
        name: source.name.clone(),
        shards: source.manifest.files.len(),
        train: source.manifest.totals(Split::Train),
        validation: source.manifest.totals(Split::Validation),
        share: *count as f64 / slots as f64,
    };
    Ok(DataSummary { sources: train.sources.iter().zip(counts).map(summary).collect() })
}

/// Tokens of a sample: the longest sequence of all stages.
fn sample_len(config: &RunConfig) -> u64 {
    let stages = &config.training.batch_stages;
    stages.iter().map(|stage| stage.sequence_length as u64).max().unwrap_or(1).max(1)
}

fn load_manifests(config: &RunConfig) -> Result<Vec<Arc<Manifest>>> {
    let bin_len = match config.data.packing {
        Packing::Concatenate => None,
        Packing::BestFit => Some(sample_len(config)),
    };
    let params = ScanParams {
        validation_fraction: config.data.validation_fraction,
        bin_len,
        vocab_size: config.model.vocab_size,
    };
    let mut tokenizer_sha256 = None;
    let mut manifests = Vec::with_capacity(config.data.sources.len());
    for source in &config.data.sources {
        let manifest = Manifest::load(&find_files(&source.name, &source.path)?, &params)?;
        check_tokenizer(config, &manifest, &mut tokenizer_sha256)?;
        manifests.push(Arc::new(manifest));
    }
    Ok(manifests)
}

/// Compares what the shards say of their tokenizer with the configured one and the model.
fn check_tokenizer(
    config: &RunConfig,
    manifest: &Manifest,
    tokenizer_sha256: &mut Option<String>,
) -> Result<()> {
    let tokenizer = &config.data.tokenizer;
    for file in &manifest.files {
        let Some(shard_sha256) = &file.tokenizer_sha256 else { continue };
        if tokenizer_sha256.is_none() {
            if !tokenizer.is_file() {
                return Err(DataError::NotFound {
                    what: "the tokenizer",
                    path: tokenizer.clone(),
                    hint: "set `data.tokenizer` to the file the shards were made with",
                });
            }
            *tokenizer_sha256 = Some(file_sha256(tokenizer)?);
        }
        let wanted = tokenizer_sha256.as_deref().unwrap_or_default();
        if shard_sha256 != wanted {
            return Err(DataError::TokenizerMismatch {
                path: file.path.clone(),
                shard_sha256: shard_sha256.clone(),
                tokenizer: tokenizer.clone(),
                tokenizer_sha256: wanted.to_string(),
            });
        }
        let (shard_vocab, vocab_size) = (file.vocab_size.unwrap_or(0), config.model.vocab_size);
        if shard_vocab > vocab_size {
            let path = file.path.clone();
            return Err(DataError::VocabularyMismatch { path, shard_vocab, vocab_size });
        }
    }
    Ok(())
}

/// Tokens of a shuffle window, so that the windows held of all sources stay within the buffer.
fn window_tokens(config: &RunConfig, name: &str, manifest: &Manifest) -> Result<u64> {
    let num_sources = config.data.sources.len() as u64;
    let budget = (config.data.buffer_mib as u64) << 20;
    let held = budget / num_sources / (WINDOWS_HELD * TOKEN_BYTES);
    let largest = manifest.groups.iter().map(|group| group.tokens).max().unwrap_or(0);
    // A window overshoots by up to one row group, and another may be on its way in bytes.
    match held.checked_sub(2 * largest) {
        Some(tokens) if tokens > 0 => Ok(tokens),
        _ => {
            let needed = (2 * largest + 1) * WINDOWS_HELD * TOKEN_BYTES * num_sources;
            Err(DataError::Setting {
                key: "data.buffer_mib".into(),
                detail: format!(
                    "{} MiB are too few for the row groups of source `{name}` ({largest} tokens \
                     each, {num_sources} sources): at least {} MiB are needed; raise it, or \
                     tokenize with a smaller --row-group-tokens",
                    config.data.buffer_mib,
                    needed.div_ceil(1 << 20)
                ),
            })
        }
    }
}

fn too_small(name: &str, size: SplitSize, split: Split, sample_len: u64) -> DataError {
    DataError::TooSmall {
        source_name: name.to_string(),
        split: split.name(),
        documents: size.documents,
        tokens: size.tokens,
        needed: sample_len + 1,
        hint: match split {
            Split::Train => "lower `data.validation_fraction`",
            Split::Validation => {
                "raise `data.validation_fraction`, or set `validation.every_steps: 0`"
            }
        },
    }
}

fn start_cursor(config: &RunConfig, manifests: &[Arc<Manifest>]) -> DataCursor {
    let (mut contents, mut sources) = (Sha256::new(), Sha256::new());
    for (source, manifest) in config.data.sources.iter().zip(manifests) {
        contents.update(manifest.content_hash.to_le_bytes());
        sources.update((source.name.len() as u64).to_le_bytes());
        sources.update(source.name.as_bytes());
        sources.update(source.weight.to_bits().to_le_bytes());
    }
    DataCursor {
        version: ORDER_VERSION,
        consumed_tokens: 0,
        consumed_samples: 0,
        seed: config.seed,
        manifest_hash: hex(&contents.finalize()),
        sources_hash: hex(&sources.finalize()),
        num_sources: manifests.len(),
        sequence_length: sample_len(config),
        packing: match config.data.packing {
            Packing::Concatenate => "concatenate".into(),
            Packing::BestFit => "best_fit".into(),
        },
        shuffle: config.data.shuffle,
        validation_fraction: config.data.validation_fraction,
        buffer_mib: config.data.buffer_mib,
        left_out: Vec::new(),
    }
}
