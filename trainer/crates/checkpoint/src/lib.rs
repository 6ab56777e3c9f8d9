//! A model's and an optimizer's tensors, to and from checkpoints, for any number of ranks.
//!
//! Weights go out under their unfused Hugging Face names, moments as `m/NAME` and `v/NAME`, master
//! weights as `master/NAME` where the weights that compute are a copy in another type. Bytes go
//! straight between tensors' memory and files.

mod error;
mod load;
mod save;
mod views;

pub use checkpoint_format::{Barrier, SaveReport, TrainState, WeightSource, fence, scan};
pub use error::{CheckpointError, Result};
pub use load::{Target, load, load_weights};
pub use save::{SaveRequest, Snapshot, save};
