//! `phalanx-trainer bench`: the speed of training steps, and what the device can do at best.

mod device;
mod train;

pub use device::{DeviceArgs, run as run_device};
pub use train::{BenchArgs, run as run_train};
