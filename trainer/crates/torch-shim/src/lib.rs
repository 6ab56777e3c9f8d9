//! The fence around libtorch: tch, and a C++ shim for what tch does not reach.
//!
//! Three layers: [`sys`] declares the shim's C functions, `result` turns each call into a `Result`,
//! and the public modules are safe. This is the only crate that may be unsafe around libtorch.
#![expect(unsafe_code, reason = "this crate is the fence around libtorch's C++ interface")]

pub mod autograd;
pub mod bytes;
pub mod cuda;
mod error;
pub mod flash;
pub mod fused;
pub mod gloo;
pub mod memory;
pub mod norm;
pub mod ops;
pub mod params;
pub mod profiler;
pub mod random;
pub mod reduce;
mod result;
pub mod scaled;
mod sys;
pub mod uses;

pub use error::{Result, ShimError};
pub use tch;
