//! NCCL behind a fence: loaded at run time, every failure a `Result`, every wait with an end.
//!
//! Three layers: `sys` states NCCL's C interface as facts, `result` turns each call into a checked
//! one, and the public modules are safe. Nothing is linked: [`Nccl::load`] looks for the library
//! when a run wants it, so one binary serves machines with and without GPUs.
//!
//! A [`Communicator`] is never blocking. NCCL then returns from each call at once, and this crate
//! polls its state until the work is on its stream or the communicator's time-out has passed.
//! Between two polls an [`Aborter`] can end it from any other thread.
//!
//! **Who keeps the memory alive.** This crate sees addresses, not owners. A [`DeviceBuffer`]'s
//! memory must stay allocated, and its output untouched, from the call until the work has passed
//! its [`Stream`]; a stream must live as long. The caller holds what owns them until an event
//! behind the work has passed, after an abort too: that makes the work leave the stream, soon but
//! not at once. So whoever makes a buffer or a stream of an address promises it, in an unsafe call.
//!
//! **Threads.** Any thread may use a communicator; its calls take turns. The calls of different
//! communicators on one device should come from one thread, in the same order on every rank:
//! NCCL promises freedom from deadlock under no other rule.
#![expect(unsafe_code, reason = "this crate is the fence around NCCL's C interface")]

mod bounded;
mod calls;
mod communicator;
mod error;
mod library;
mod result;
mod sys;
mod types;

pub use calls::Calls;
pub use communicator::{Aborter, Communicator, Connecting, Options};
pub use error::{NcclError, Result};
pub use library::{Nccl, Search, Version};
pub use types::{DType, DeviceBuffer, ReduceOp, Stream, UniqueId};
