//! Tokenized documents in parquet: the layout, writing, reading, the manifest and the split.

pub mod decode;
pub mod fast;
pub mod footer;
pub mod manifest;
pub mod scan;
pub mod split;
pub mod writer;

pub use decode::DecodedGroup;
pub use footer::{Footer, ShardInfo};
pub use manifest::{Manifest, RowGroup, ShardFile};
pub use writer::ShardWriter;

/// A vocabulary of all ids that there can be: they have 31 bits.
pub const ANY_VOCABULARY: usize = 1 << 31;
/// Column of token ids, `list<int32 not null>`, one document a row.
pub const IDS_COLUMN: &str = "input_ids";
/// Column of the number of tokens of each document, `int32`.
pub const LENGTHS_COLUMN: &str = "n_tokens";
/// Names under which a column of token ids is looked for, in this order.
pub const IDS_COLUMN_NAMES: [&str; 3] = ["input_ids", "tokens", "token_ids"];
