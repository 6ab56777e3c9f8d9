//! The mathematics of the models, without parallelism.
//!
//! A model is plain tensor code over three seams: weights are views of a
//! [`torch_shim::params::ParameterSet`], layers are built by a [`LayerBuilder`] ([`Dense`] here,
//! sharded ones elsewhere), and the pieces `embed`, `blocks`, `loss` are what a pipeline runs
//! apart. This crate never imports the layout, the collectives or the parallel forms.
//!
//! Tensor variables end in their shape; each file states the letters.

#![expect(non_snake_case, reason = "tensor variables end in their shape, one letter a dimension")]

mod builder;
mod cache;
mod dense;
mod error;
mod generate;
mod inputs;
pub mod llama;
mod products;
mod random;
mod recompute;
mod residual;
mod weights;

pub use builder::{HeadShape, Heads, LayerBuilder, LinearRole, Qkv, Recompute};
pub use cache::{KvCache, LayerCache};
pub use dense::Dense;
pub use error::{ModelError, Result};
pub use generate::{Sampling, generate};
pub use inputs::{AttentionKernels, Flash, Inputs, check_targets, take, targets};
pub use llama::{Llama, Stage};
pub use products::Products;
pub use random::RandomStream;
pub use residual::Residual;
pub use weights::{allocate, allocate_sharded};
