//! CUDA kernels of our own, compiled by NVRTC when they are first used and kept on disk, each
//! beside the plain tensor form that it is compared with.
//!
//! Nothing is linked: NVRTC and the driver are loaded at run time ([`Kernels::open`]), so that one
//! binary serves machines with and without GPUs, and every failure is a `Result`. A kernel is one
//! `.cu` file in `ops/`, written so that a host compiler can run it too: tests carry its blocks out
//! thread by thread on the CPU, from the same text. What launches it is an [`Executor`]: a GPU
//! ([`Gpu`]), or in tests that emulation.
//!
//! **Who keeps the memory alive.** A launch goes on libtorch's current stream of the device, as
//! libtorch's own operators do, so its allocator's rules hold for the tensors of a launch.
#![expect(unsafe_code, reason = "this crate is the fence around CUDA's driver and NVRTC")]
#![expect(non_snake_case, reason = "tensor variables end in their shape, one letter a dimension")]

mod cache;
pub mod driver;
mod error;
mod gpu;
mod launch;
mod library;
pub mod nvrtc;
pub mod ops;
mod program;

pub use cache::{Cache, Key};
pub use error::{KernelError, Result};
pub use gpu::{Gpu, Options};
pub use launch::{Access, Argument, Executor, Grid, Kernels, Launch};
pub use library::Search;
pub use program::{Program, Storage, Variant};
