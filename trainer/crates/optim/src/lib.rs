//! The optimizer: AdamW over a parameter set, gradient clipping, learning-rate schedules.
//!
//! All state is flat tensors laid out as the master weights are, in FP32 (FP64 for FP64 compute).

mod adamw;
mod clip;
mod error;
pub mod schedule;

pub use adamw::{AdamW, Moments};
pub use clip::{clip_coefficient, gradient_norm};
pub use error::{OptimError, Result};
pub use schedule::learning_rate;
