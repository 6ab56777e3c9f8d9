//! Text to shards: reading documents, training a tokenizer, tokenizing, and looking at the result.

pub mod chunk;
pub mod documents;
pub mod inspect;
pub mod llama3;
pub mod progress;
pub mod record;
pub mod tiktoken;
pub mod tokenize;
pub mod tokenizer;
pub mod train;

pub use crate::digest::file_sha256 as sha256_of;
pub use documents::{DocumentOptions, InputFile};
pub use progress::Progress;
pub use tokenize::{TokenizeOptions, TokenizeSummary, tokenize};
pub use tokenizer::Tokenizer;
pub use train::{TrainOptions, TrainSummary, train_tokenizer};

/// Name and version of this program, for footers and records.
pub const WRITER: &str = concat!("phalanx ", env!("CARGO_PKG_VERSION"));
