//! The seam between mathematics and parallelism.
//!
//! A model file states *what* is computed; a [`LayerBuilder`] builds the graph of each layer. The
//! dense one here keeps every tensor whole and is the oracle; a sharded one, elsewhere, holds a
//! slice of each weight and communicates where the meaning of a layer ([`LinearRole`]) asks for it.
//! So the model imports no parallelism, and there is one model file per family, not two.
//!
//! Shapes: `B` batch, `S` sequence, `D` dim, `H` heads, `K` key and value heads, `E` head_dim,
//! `F` rows of a fused projection.

use crate::error::Result;
use crate::inputs::Inputs;
use crate::residual::Residual;
use torch_shim::params::Parameter;
use torch_shim::tch::Tensor;

/// What a linear layer is for; a sharded builder splits rows or columns accordingly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinearRole {
    /// Residual stream to query, key and value heads: the output is split over heads.
    Qkv,
    /// Heads to the residual stream: the input is split over heads.
    AttentionOutput,
    /// Residual stream to gate and up: the output is split over the inner width.
    GateUp,
    /// Inner width to the residual stream: the input is split.
    Down,
}

/// Heads that one rank computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// Key and value heads.
    pub kv: usize,
}

/// Heads, and how wide each is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// How many.
    pub heads: Heads,
    /// Elements of one.
    pub head_dim: usize,
}

/// Queries, keys and values after the rotary embedding.
#[derive(Debug)]
pub struct Qkv {
    /// `[B, H, S, E]`.
    pub query_BHSE: Tensor,
    /// `[B, K, S, E]`.
    pub key_BKSE: Tensor,
    /// `[B, K, S, E]`.
    pub value_BKSE: Tensor,
}

/// What is computed again in the backward pass instead of being kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Nothing.
    #[default]
    None,
    /// The attention of a block, from its normed input.
    Attention,
    /// Whole blocks, from their input.
    Block,
}

/// Builds the graph of each layer.
pub trait LayerBuilder: Send + Sync {
    /// The heads computed here, of a model that has `global` ones.
    fn heads(&self, global: Heads) -> Heads;

    /// Rows of the embedding table: `[B, S]` ids to `[B, S, D]`.
    ///
    /// # Errors
    /// Where libtorch or a collective fails; so for all methods.
    fn embedding(&self, tokens_BS: &Tensor, weight: &Parameter) -> Result<Tensor>;

    /// `x W^T`.
    fn linear(&self, x: &Tensor, weight: &Parameter, role: LinearRole) -> Result<Tensor>;

    /// The graph of [`LayerBuilder::linear`] alone, where nobody reads the values: neither the
    /// product nor its sum over ranks is made.
    fn linear_graph(&self, x: &Tensor, weight: &Parameter, role: LinearRole) -> Result<Tensor>;

    /// Root-mean-square norm over the last dimension.
    fn norm(&self, x_BSD: &Tensor, weight: &Parameter, eps: f64) -> Result<Tensor>;

    /// The residual boundary: adds a branch to the stream and norms the sum, which is what the
    /// next branch reads. Returns (sum, normed sum).
    fn add_norm(
        &self,
        stream_BSD: &Tensor,
        branch_BSD: &Tensor,
        weight: &Parameter,
        eps: f64,
    ) -> Result<(Tensor, Tensor)>;

    /// Splits the fused projection, and turns queries and keys by the `tables` of the positions:
    /// cosines and sines, `[S, E]` or `[B, S, E]`. The projection's memory may be used for it:
    /// nobody else reads its values.
    fn rope(&self, qkv_BSF: &Tensor, tables: (&Tensor, &Tensor), shape: HeadShape) -> Result<Qkv>;

    /// `silu(gate) * up` of the fused projection.
    fn swiglu(&self, gate_up_BS2I: &Tensor) -> Result<Tensor>;

    /// Causal softmax attention within documents: `[B, S, H * E]`.
    fn attention(&self, qkv: &Qkv, inputs: &Inputs) -> Result<Tensor>;

    /// All logits, `[B, S, V]`; for evaluation and sampling.
    fn logits(&self, x_BSD: &Tensor, weight: &Parameter) -> Result<Tensor>;

    /// `scale` times the sum of the cross-entropies over positions whose target is not -100.
    fn loss(
        &self,
        x_BSD: &Tensor,
        weight: &Parameter,
        targets_BS: &Tensor,
        scale: f64,
    ) -> Result<Tensor>;

    /// What is computed again in the backward pass.
    fn recompute(&self) -> Recompute {
        Recompute::None
    }

    /// Called before a block, with what it will read; what it returns is read instead.
    fn enter_block(&self, layer: usize, stream: Residual) -> Result<Residual> {
        let _ = layer;
        Ok(stream)
    }

    /// Called after a block, with what it made.
    fn leave_block(&self, layer: usize, stream: Residual) -> Result<Residual> {
        let _ = layer;
        Ok(stream)
    }
}
