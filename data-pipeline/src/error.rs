//! Everything that can go wrong with data, each message with the file, the value, the limit and
//! what to do about it.

use std::io;
use std::path::{Path, PathBuf};

/// A result of this crate.
pub type Result<T, E = DataError> = std::result::Result<T, E>;

/// An error in the data, in its description, or in reading it.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A path or pattern matches no file.
    #[error(
        "source `{source_name}`: no {wanted} matches `{pattern}`: {why}; {hint}",
        hint = "make shards with `phalanx data tokenize`, or correct `data.sources[].path`"
    )]
    NoFiles {
        /// Name of the source.
        source_name: String,
        /// Path or glob as configured.
        pattern: String,
        /// What was looked for.
        wanted: &'static str,
        /// Why there is none.
        why: String,
    },
    /// A file that is needed does not exist.
    #[error("{what} `{path}` does not exist; {hint}")]
    NotFound {
        /// What the file is.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What to do.
        hint: &'static str,
    },
    /// The operating system refused.
    #[error("cannot {action} `{path}`: {error}")]
    Io {
        /// The verb, as in "read".
        action: &'static str,
        /// File or folder.
        path: PathBuf,
        /// The system's reason; it stands in the message, and as a source would be printed twice.
        error: io::Error,
    },
    /// A shard without a single token.
    #[error(
        "shard `{path}` is empty ({rows} rows, 0 tokens); delete it or tokenize its input again"
    )]
    EmptyShard {
        /// The shard.
        path: PathBuf,
        /// Its rows.
        rows: u64,
    },
    /// A file that is cut short or not what its name says.
    #[error(
        "`{path}` is damaged or not parquet ({bytes} bytes): {detail}; copy it again or make it \
         again with `phalanx data tokenize`"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        bytes: u64,
        /// What the reader found.
        detail: String,
    },
    /// A parquet file without a column of token ids.
    #[error(
        "shard `{path}` has no usable column of token ids: {found}; it needs `input_ids`, \
         `tokens` or `token_ids` as a list of int32, uint32 or int64, or as binary (uint32, \
         little-endian)"
    )]
    Schema {
        /// The shard.
        path: PathBuf,
        /// The columns it has.
        found: String,
    },
    /// A token id that the model has no embedding for.
    #[error(
        "shard `{path}`, row {row}, position {position}: token id {id} is outside the vocabulary \
         of {vocab_size} (0 to {max}); the shard was made with another tokenizer, or \
         `model.vocab_size` is too small",
        max = vocab_size.saturating_sub(1)
    )]
    TokenOutOfRange {
        /// The shard.
        path: PathBuf,
        /// Row in the shard, from 0.
        row: u64,
        /// Position in the row, from 0.
        position: u64,
        /// The id.
        id: i64,
        /// Number of ids the model has.
        vocab_size: usize,
    },
    /// The shard was made with another tokenizer.
    #[error(
        "shard `{path}` was made with the tokenizer of sha256 {shard_sha256}, but `{tokenizer}` \
         has sha256 {tokenizer_sha256}; tokenize again, or set `data.tokenizer` to the \
         tokenizer the shard was made with"
    )]
    TokenizerMismatch {
        /// The shard.
        path: PathBuf,
        /// Hash in the shard's footer.
        shard_sha256: String,
        /// The configured tokenizer.
        tokenizer: PathBuf,
        /// Its hash.
        tokenizer_sha256: String,
    },
    /// The shard's vocabulary is larger than the model's.
    #[error(
        "shard `{path}` uses a vocabulary of {shard_vocab} ids, the model has {vocab_size}; set \
         `model.vocab_size` to at least {shard_vocab}"
    )]
    VocabularyMismatch {
        /// The shard.
        path: PathBuf,
        /// Vocabulary in the shard's footer.
        shard_vocab: usize,
        /// The model's.
        vocab_size: usize,
    },
    /// A source that cannot fill one sequence.
    #[error(
        "source `{source_name}` has {tokens} tokens in {documents} documents for {split}, fewer \
         than one sequence needs ({needed}); add data, shorten `data.sequence_length`, or {hint}"
    )]
    TooSmall {
        /// Name of the source.
        source_name: String,
        /// `training` or `validation`.
        split: &'static str,
        /// Documents of the split.
        documents: u64,
        /// Their tokens.
        tokens: u64,
        /// Tokens of one sequence, with the target of the last.
        needed: u64,
        /// What else helps.
        hint: &'static str,
    },
    /// A setting that this loader cannot carry out.
    #[error("{key}: {detail}")]
    Setting {
        /// Path of the key in the YAML.
        key: String,
        /// Value, limit and hint.
        detail: String,
    },
    /// The saved position belongs to another data order.
    #[error(
        "cannot resume: {what} was {saved} when the checkpoint was saved and is {current} now, \
         which would change the order of the data; {hint}"
    )]
    CursorMismatch {
        /// What differs.
        what: &'static str,
        /// Its saved value.
        saved: String,
        /// Its value now.
        current: String,
        /// What to do.
        hint: &'static str,
    },
    /// Reading takes too long.
    #[error(
        "no batch after {waited_s:.1} s: {doing}; check the disk or network that holds the shard"
    )]
    Timeout {
        /// Seconds waited.
        waited_s: f64,
        /// What the reader is at, with the shard's name.
        doing: String,
    },
    /// The reader ended early.
    #[error("the data reader stopped: {detail}")]
    Stopped {
        /// Why.
        detail: String,
    },
    /// A tokenizer file that cannot be used.
    #[error("tokenizer `{path}`: {detail}")]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        detail: String,
    },
    /// An input document that cannot be read.
    #[error("input `{path}`, {place}: {detail}")]
    Input {
        /// The file.
        path: PathBuf,
        /// Line or row.
        place: String,
        /// What is wrong with it, and what to do.
        detail: String,
    },
    /// An output folder that holds something else.
    #[error("output folder `{path}`: {detail}")]
    Output {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        detail: String,
    },
    /// The user stopped it.
    #[error("interrupted; run the same command again to go on where it stopped")]
    Interrupted,
}

impl DataError {
    /// An [`DataError::Io`], or [`DataError::NotFound`]-like text from the system.
    pub(crate) fn io(action: &'static str, path: &Path, error: io::Error) -> Self {
        DataError::Io { action, path: path.to_path_buf(), error }
    }

    /// Whether the user's data or config is at fault, and trying again will not help.
    pub fn is_bad_input(&self) -> bool {
        !matches!(
            self,
            DataError::Io { .. }
                | DataError::Timeout { .. }
                | DataError::Stopped { .. }
                | DataError::Interrupted
        )
    }
}
