//! Text in, batches out: tokenizing into parquet shards, and streaming them to the ranks in an
//! order that does not depend on the number of ranks.
//!
//! - [`prepare`]: tokenizer training, tokenizing, inspecting and verifying.
//! - [`shards`]: the parquet layout, the manifest, the validation split.
//! - [`order`]: which document comes when: a pure function of the global sample index.
//! - [`packing`]: how documents become rows.
//! - [`prefetch`]: the [`Loader`] that a rank reads, the [`DataCursor`] that a checkpoint keeps.
//!
//! No torch: everything ends in plain vectors.

mod digest;
mod error;
pub mod order;
pub mod packing;
pub mod prefetch;
pub mod prepare;
mod recycled;
pub mod shards;

pub use error::{DataError, Result};
pub use prefetch::{
    DataCursor, DataSummary, Loader, LoaderOptions, LoaderTuning, MicroBatch, preflight,
};
pub use recycled::{Pool, Recycled};
pub use shards::split::Split;
