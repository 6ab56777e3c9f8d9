//! Carries out the layout's plan. Data parallelism is here; tensor, pipeline and context
//! parallelism find their place beside it.

mod buckets;
mod data_parallel;
mod scalars;

pub use data_parallel::{DataParallel, ParallelError, Result};
pub use scalars::all_reduce_scalars;
