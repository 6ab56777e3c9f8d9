//! Any layout trains the same model to the same losses: ranks are threads of this process.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod communication;
mod faults;
mod forms;
mod fp8;
mod grid;
mod harness;
mod memory;
mod overlap;
mod reshard;
mod tapped;
mod validation;
