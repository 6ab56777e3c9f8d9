//! Grouped-query attention with rotary positions; queries, keys and values in one product.
//!
//! Shapes: `B` batch, `S` sequence, `D` dim, `H` query heads, `K` key and value heads,
//! `E` head_dim, `F` = (H + 2 K) E rows of the fused projection.

use super::block::Forward;
use crate::builder::{HeadShape, Heads, LayerBuilder, LinearRole};
use crate::cache::LayerCache;
use crate::error::Result;
use crate::weights::find;
use model_spec::names;
use run_config::ModelConfig;
use torch_shim::params::{Parameter, ParameterSet};
use torch_shim::tch::Tensor;

/// The attention of one block.
#[derive(Debug)]
pub struct Attention {
    qkv: Parameter,
    output: Parameter,
    heads: Heads,
    head_dim: usize,
}

impl Attention {
    /// The attention of block `layer`.
    ///
    /// # Errors
    /// Where one of its parameters is missing.
    pub fn new(
        config: &ModelConfig,
        parameters: &ParameterSet,
        layer: usize,
        builder: &dyn LayerBuilder,
    ) -> Result<Self> {
        let find = |name| find(parameters, &names::in_block(layer, name));
        Ok(Self {
            qkv: find(names::QKV)?,
            output: find(names::ATTENTION_OUTPUT)?,
            heads: builder.heads(Heads { query: config.heads, kv: config.kv_heads }),
            head_dim: config.head_dim,
        })
    }

    /// Another owner of the same weights.
    pub fn share(&self) -> Self {
        Self {
            qkv: self.qkv.shallow_clone(),
            output: self.output.shallow_clone(),
            heads: self.heads,
            head_dim: self.head_dim,
        }
    }

    /// `[B, S, D]` to `[B, S, D]`; with a `cache`, over the tokens that follow those in it.
    ///
    /// # Errors
    /// Where libtorch or a collective fails.
    pub fn forward(
        &self,
        forward: &Forward,
        x_BSD: &Tensor,
        cache: Option<&mut LayerCache>,
    ) -> Result<Tensor> {
        let qkv_BSF = forward.linear(x_BSD, &self.qkv, LinearRole::Qkv)?;
        let tables = (&forward.rope.cos, &forward.rope.sin);
        let shape = HeadShape { heads: self.heads, head_dim: self.head_dim };
        let qkv = forward.builder.rope(&qkv_BSF, tables, shape)?;
        let mixed_BSF = match cache {
            None => forward.builder.attention(&qkv, &forward.inputs)?,
            Some(cache) => cache.attend(&qkv)?,
        };
        forward.linear(&mixed_BSF, &self.output, LinearRole::AttentionOutput)
    }
}
