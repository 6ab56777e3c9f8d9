//! The sharded builder: each layer as one rank of a tensor- and context-parallel group builds it.
//!
//! Where an axis has one rank, the dense form is used, so that a run without parallelism is the
//! oracle itself.

use std::collections::HashMap;

use layout::communication::LOSS_CHUNK_TOKENS;
use model::{
    Dense, HeadShape, Heads, Inputs, LayerBuilder, LinearRole, ModelError, Qkv, Recompute,
    Residual, Result,
};
use torch_shim::params::Parameter;
use torch_shim::tch::Tensor;

use crate::context::ContextGroup;
use crate::shards::Shards;
use crate::tensor::TensorGroup;
use crate::vocabulary::LossBy;

/// Builds sharded layers.
pub(crate) struct Sharded {
    /// What a layer is where no axis cuts it.
    pub(crate) dense: Dense,
    pub(crate) tensor: Option<TensorGroup>,
    pub(crate) context: Option<ContextGroup>,
    pub(crate) recompute: Recompute,
    /// Sharded weights, and the unit of each block.
    pub(crate) shards: Option<(Shards, HashMap<usize, usize>)>,
}

impl Sharded {
    /// The weight is there.
    fn need(&self, weight: &Parameter) -> Result<()> {
        match &self.shards {
            Some((shards, _)) => Ok(shards.need(weight)?),
            None => Ok(()),
        }
    }
}

impl LayerBuilder for Sharded {
    fn heads(&self, global: Heads) -> Heads {
        let ranks = self.tensor.as_ref().map_or(1, |tensor| tensor.comm.size());
        Heads { query: global.query / ranks, kv: (global.kv / ranks).max(1) }
    }

    fn embedding(&self, tokens_BS: &Tensor, weight: &Parameter) -> Result<Tensor> {
        let looked_up = || match &self.tensor {
            Some(tensor) => Ok(tensor.embedding(tokens_BS, weight)?),
            None => self.dense.embedding(tokens_BS, weight),
        };
        let Some((shards, _)) = &self.shards else { return looked_up() };
        shards.need_embedding(weight)?;
        Ok(shards.leave_embedding(weight, looked_up()?)?)
    }

    fn linear(&self, x: &Tensor, weight: &Parameter, role: LinearRole) -> Result<Tensor> {
        self.need(weight)?;
        let Some(tensor) = &self.tensor else { return self.dense.linear(x, weight, role) };
        Ok(match role {
            LinearRole::Qkv | LinearRole::GateUp => tensor.column(x, weight)?,
            LinearRole::AttentionOutput | LinearRole::Down => tensor.row(x, weight, true)?,
        })
    }

    fn linear_graph(&self, x: &Tensor, weight: &Parameter, role: LinearRole) -> Result<Tensor> {
        self.need(weight)?;
        match (&self.tensor, role) {
            (None, _) => self.dense.linear_graph(x, weight, role),
            (Some(tensor), LinearRole::AttentionOutput | LinearRole::Down) => {
                Ok(tensor.row(x, weight, false)?)
            }
            // No part ends with these.
            (Some(tensor), LinearRole::Qkv | LinearRole::GateUp) => Ok(tensor.column(x, weight)?),
        }
    }

    fn norm(&self, x_BSD: &Tensor, weight: &Parameter, eps: f64) -> Result<Tensor> {
        self.need(weight)?;
        self.dense.norm(x_BSD, weight, eps)
    }

    fn add_norm(
        &self,
        stream_BSD: &Tensor,
        branch_BSD: &Tensor,
        weight: &Parameter,
        eps: f64,
    ) -> Result<(Tensor, Tensor)> {
        self.need(weight)?;
        self.dense.add_norm(stream_BSD, branch_BSD, weight, eps)
    }

    fn rope(&self, qkv_BSF: &Tensor, tables: (&Tensor, &Tensor), shape: HeadShape) -> Result<Qkv> {
        self.dense.rope(qkv_BSF, tables, shape)
    }

    fn swiglu(&self, gate_up_BS2I: &Tensor) -> Result<Tensor> {
        self.dense.swiglu(gate_up_BS2I)
    }

    fn attention(&self, qkv: &Qkv, inputs: &Inputs) -> Result<Tensor> {
        match &self.context {
            Some(context) => Ok(context.attention(qkv, &inputs.documents)?),
            None => self.dense.attention(qkv, inputs),
        }
    }

    fn logits(&self, x_BSD: &Tensor, weight: &Parameter) -> Result<Tensor> {
        match &self.tensor {
            // Whoever wants logits loads the whole model: training and validation do not.
            Some(_) => Err(ModelError::NotOnThisStage { piece: "all logits".into() }),
            None => self.dense.logits(x_BSD, weight),
        }
    }

    fn loss(
        &self,
        x_BSD: &Tensor,
        weight: &Parameter,
        targets_BS: &Tensor,
        scale: f64,
    ) -> Result<Tensor> {
        self.need(weight)?;
        match &self.tensor {
            Some(tensor) => {
                let how =
                    LossBy { kernels: self.dense.kernels(), tokens: LOSS_CHUNK_TOKENS as i64 };
                Ok(tensor.loss(x_BSD, weight, targets_BS, scale, how)?)
            }
            None => self.dense.loss(x_BSD, weight, targets_BS, scale),
        }
    }

    fn recompute(&self) -> Recompute {
        self.recompute
    }

    fn enter_block(&self, layer: usize, stream: Residual) -> Result<Residual> {
        match self.shards.as_ref().and_then(|(shards, units)| Some((shards, units.get(&layer)?))) {
            Some((shards, &unit)) => Ok(shards.enter(unit, stream)?),
            None => Ok(stream),
        }
    }

    fn leave_block(&self, layer: usize, stream: Residual) -> Result<Residual> {
        match self.shards.as_ref().and_then(|(shards, units)| Some((shards, units.get(&layer)?))) {
            Some((shards, &unit)) => Ok(shards.leave(unit, stream)?),
            None => Ok(stream),
        }
    }
}
