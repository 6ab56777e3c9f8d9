//! The checkpoint on disk: layout, commit protocol, checks, reads into any layout, comparison, and
//! the exchange with Hugging Face's and Meta's formats. No torch, no network, no pickle that can
//! run code.
//!
//! ```text
//! checkpoints/step-0001200/
//!   rank-00000-000.safetensors …   that rank's share, files of at most 4 GiB
//!   index.json                     tensor -> shape, dtype, boxes: part, file, bytes, checksum
//!   state.json                     step, tokens, data cursor, mesh, generation, hashes
//!   MANIFEST.json                  every file: size, checksum; what the boxes add up to
//!   COMMIT                         SHA-256 of MANIFEST.json, written last
//! ```
//!
//! In the memory of several nodes each has the files of its own ranks alone: a [`bundle`].

pub mod boxes;
pub mod bundle;
pub mod checksum;
mod coordinate;
pub mod diff;
pub mod disk;
mod dtype;
mod error;
pub mod export;
pub mod failpoint;
pub mod fence;
pub mod hf;
pub mod import;
pub mod index;
pub mod interval;
pub mod manifest;
mod mapped;
pub mod meta;
pub mod names;
pub mod parallel;
mod place;
mod read;
pub mod retention;
mod save;
pub mod scan;
pub mod share;
pub mod source;
pub mod tensor_file;
mod torch_file;
mod verify;
mod zip;

pub use boxes::{TensorBox, boxes_of_flat_range};
pub use coordinate::{Barrier, JointSave, SaveReport};
pub use dtype::{Dtype, convert};
pub use error::{FormatError, Result};
pub use manifest::TrainState;
pub use place::Arrival;
pub use read::Checkpoint;
pub use save::{Piece, Save};
pub use source::WeightSource;
pub use verify::Verified;
