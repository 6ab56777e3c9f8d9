//! Trains a byte-level BPE tokenizer with Llama 3's pattern and special tokens.

use super::documents::{self, DocumentOptions, find_inputs};
use super::progress::Progress;
use super::{chunk, llama3};
use crate::digest::file_sha256;
use crate::error::{DataError, Result};
use crate::shards::writer::{partial_path, write_and_publish};
use serde_json::{Map, Value, json};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use tokenizers::Trainer;
use tokenizers::pipeline::{PipelineTokenizer, PreTokenizer, PreTokenizerScratch};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::trainers::bpe::BpeTrainer;

/// Number of single bytes, which every vocabulary begins with.
const NUM_BYTES: usize = 256;
/// The largest vocabulary, as `model.vocab_size` has it.
const MAX_VOCAB: usize = 1 << 24;
/// The most special tokens without a meaning that fill a vocabulary up. Each costs time when the
/// tokenizer is loaded, and an embedding that nothing trains.
const MAX_RESERVED: usize = 1 << 18;
/// The longest word that is learned from, in bytes; longer ones are noise and cost much.
const MAX_WORD_BYTES: usize = 256;

/// What to train on, and what to make.
#[derive(Clone, Debug)]
pub struct TrainOptions {
    /// Files, folders or globs.
    pub inputs: Vec<String>,
    /// How documents are found in them.
    pub documents: DocumentOptions,
    /// The `tokenizer.json` to write.
    pub output: PathBuf,
    /// Number of ids, special tokens included.
    pub vocab_size: usize,
    /// Pairs seen less often are not merged.
    pub min_frequency: u64,
    /// Bytes of text after which training has enough; `None`: all.
    pub max_bytes: Option<u64>,
}

/// What was made.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct TrainSummary {
    /// The file.
    pub tokenizer: PathBuf,
    /// Its SHA-256.
    pub sha256: String,
    /// Its ids.
    pub vocab_size: usize,
    /// Merges learned.
    pub merges: usize,
    /// Special tokens without a meaning that fill the vocabulary up.
    pub reserved: usize,
    /// Documents learned from.
    pub documents: u64,
    /// Bytes of their text.
    pub bytes: u64,
}

/// Trains a tokenizer and writes its file.
pub fn train_tokenizer(options: &TrainOptions) -> Result<TrainSummary> {
    check_vocab_size(options.vocab_size)?;
    let inputs = find_inputs(&options.inputs)?;
    let total = inputs.iter().map(documents::InputFile::text_bytes).sum();
    let progress = Progress::new("learning", total);
    let mut feed = Feed { options, files: inputs.into_iter(), ..Feed::new(options, &progress) };
    let words = WordCutter::new(&options.output)?;
    let alphabet: HashSet<char> = ByteLevel::alphabet().into_iter().collect();
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(options.vocab_size - llama3::SPECIAL_TOKENS.len())
        .min_frequency(options.min_frequency)
        .initial_alphabet(alphabet)
        .build();
    let fail = |error: tokenizers::Error| DataError::Tokenizer {
        path: options.output.clone(),
        detail: format!("training failed: {error}"),
    };
    let fed = trainer.feed(&mut feed, |text| words.cut(text));
    progress.finish();
    if let Some(error) = feed.error {
        return Err(error);
    }
    fed.map_err(fail)?;
    if feed.bytes == 0 {
        return Err(DataError::Input {
            path: options.inputs.first().map(PathBuf::from).unwrap_or_default(),
            place: "all inputs".into(),
            detail: "there is no text to learn from".into(),
        });
    }
    // Each merge shortens a word, so that there are fewer than bytes; the trainer makes room for
    // as many as it is asked for.
    let most = NUM_BYTES.saturating_add(usize::try_from(feed.bytes).unwrap_or(usize::MAX));
    trainer.vocab_size = trainer.vocab_size.min(most);
    let (vocab, merges, _) = trainer.train_vocab().map_err(fail)?;
    let (num_merges, bytes, documents) = (merges.len(), feed.bytes, feed.documents);
    let base = vocab.len();
    let reserved = options.vocab_size - llama3::SPECIAL_TOKENS.len() - base;
    if reserved > MAX_RESERVED {
        return Err(too_little_text(options, num_merges));
    }
    let vocab: Map<String, Value> = vocab.into_iter().map(|(t, id)| (t, Value::from(id))).collect();
    let merges = merges.into_iter().map(|(left, right)| json!([left, right])).collect();
    let names = llama3::SPECIAL_TOKENS.iter().map(|name| name.to_string());
    let names = names.chain((0..reserved).map(llama3::reserved));
    let file = llama3::file(vocab, merges, names.zip(base as u32..));
    write_atomically(&options.output, file.to_string().as_bytes())?;
    Ok(TrainSummary {
        tokenizer: options.output.clone(),
        sha256: file_sha256(&options.output)?,
        vocab_size: options.vocab_size,
        merges: num_merges,
        reserved,
        documents,
        bytes,
    })
}

fn check_vocab_size(vocab_size: usize) -> Result<()> {
    let num_specials = llama3::SPECIAL_TOKENS.len();
    let least = NUM_BYTES + num_specials;
    let detail = if vocab_size < least {
        format!(
            "{vocab_size} is too small: {NUM_BYTES} bytes and {num_specials} special tokens need \
             {least}"
        )
    } else if vocab_size > MAX_VOCAB {
        format!("{vocab_size} is too large: a model has at most {MAX_VOCAB}")
    } else {
        return Ok(());
    };
    Err(DataError::Setting { key: "--vocab-size".into(), detail })
}

fn too_little_text(options: &TrainOptions, num_merges: usize) -> DataError {
    let most = NUM_BYTES + num_merges + llama3::SPECIAL_TOKENS.len();
    DataError::Setting {
        key: "--vocab-size".into(),
        detail: format!(
            "{} is too large: the text only has {num_merges} possible merges, seen at least {} \
             times, enough for {most} ids, and at most {MAX_RESERVED} more are filled up with \
             reserved tokens; give more text, or --vocab-size {most}",
            options.vocab_size, options.min_frequency
        ),
    }
}

/// The documents of all inputs, up to a number of bytes. The first error ends them and is kept.
struct Feed<'a> {
    options: &'a TrainOptions,
    progress: &'a Progress,
    files: std::vec::IntoIter<documents::InputFile>,
    current: Option<documents::Documents>,
    bytes: u64,
    documents: u64,
    error: Option<DataError>,
}

impl<'a> Feed<'a> {
    fn new(options: &'a TrainOptions, progress: &'a Progress) -> Self {
        let files = Vec::new().into_iter();
        Feed { options, progress, files, current: None, bytes: 0, documents: 0, error: None }
    }

    fn read(&mut self) -> Result<Option<String>> {
        loop {
            if self.options.max_bytes.is_some_and(|limit| self.bytes >= limit) {
                return Ok(None);
            }
            if let Some(document) = self.current.as_mut().and_then(Iterator::next) {
                let document = document?;
                self.bytes += document.len() as u64;
                self.documents += 1;
                self.progress.add(document.len() as u64, 1, 0);
                return Ok(Some(document));
            }
            let Some(file) = self.files.next() else { return Ok(None) };
            self.current = Some(documents::open(&file.path, &self.options.documents)?);
        }
    }
}

impl Iterator for Feed<'_> {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        self.read().unwrap_or_else(|error| {
            self.error = Some(error);
            self.files = Vec::new().into_iter();
            self.current = None;
            None
        })
    }
}

/// Cuts text in words with the pipeline that will encode with the tokenizer.
struct WordCutter {
    pipeline: PipelineTokenizer,
    alphabet: [char; 256],
}

impl WordCutter {
    fn new(output: &Path) -> Result<Self> {
        let bytes: Vec<[u8; 1]> = (0..=255).map(|byte| [byte]).collect();
        let tokens = bytes.iter().map(|byte| (&byte[..], u32::from(byte[0])));
        let special = [(llama3::BOS.to_string(), NUM_BYTES as u32)].into_iter();
        let json = llama3::tokenizer_json(tokens, std::iter::empty(), special).to_string();
        let built = tokenizers::canonicalize_str(&json)
            .map_err(|error| error.to_string())
            .and_then(|json| tokenizers::from_json(&json).map_err(|error| error.to_string()));
        let pipeline = built.map_err(|error| DataError::Tokenizer {
            path: output.to_path_buf(),
            detail: format!("the pre-tokenizer cannot be built: {error}"),
        })?;
        Ok(WordCutter { pipeline, alphabet: ByteLevel::alphabet() })
    }

    fn cut(&self, text: &str) -> std::result::Result<Vec<String>, tokenizers::Error> {
        let (mut scratch, mut spans) = (PreTokenizerScratch::default(), Vec::new());
        let mut words = Vec::new();
        for chunk in chunk::chunks(text) {
            spans.clear();
            self.pipeline.get_pre_tokenizer().pre_tokenize(chunk, &mut scratch, &mut spans)?;
            for span in &spans {
                let word = &chunk.as_bytes()[span.start as usize..span.end as usize];
                if word.len() <= MAX_WORD_BYTES {
                    words.push(word.iter().map(|&b| self.alphabet[usize::from(b)]).collect());
                }
            }
        }
        Ok(words)
    }
}

/// Writes a file beside its place, syncs and renames it.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let failed = |error| DataError::io("write", path, error);
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(failed)?;
    }
    write_and_publish(&partial_path(path), path, bytes)
}
