//! Carries out the layout's plan: tensor, sequence, context, pipeline and data
//! parallelism, recomputation.
//!
//! [`Worker`] is one rank's piece of the model; [`Worker::new`] applies the parallel forms in their
//! order. The model knows of none of them: they enter through its layer builder and as autograd
//! functions.

#![expect(non_snake_case, reason = "tensor variables end in their shape, one letter a dimension")]

mod buckets;
mod builder;
pub mod context;
mod data;
mod data_parallel;
mod error;
mod failure;
pub mod groups;
mod pieces;
mod pipeline;
mod scalars;
mod shards;
mod slices;
mod slot;
mod squares;
mod tensor;
#[cfg(test)]
mod tests;
mod vocabulary;
mod worker;

pub use data_parallel::DataParallel;
pub use error::{ParallelError, Result};
pub use groups::Groups;
pub use scalars::{Reducing, all_reduce_scalars, reduce};
pub use worker::{Pass, Worker};
