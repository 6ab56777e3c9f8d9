//! The crate against a library that keeps the books: loading, a communicator's life, operations.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fake;
mod library;
mod life;
mod operations;
