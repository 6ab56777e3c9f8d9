//! The dense builder: every tensor whole, no communication. The oracle of all sharded forms.

use crate::builder::{Heads, LayerBuilder, LinearRole, Qkv};
use crate::error::Result;
use crate::inputs::{Flash, Inputs};
use torch_shim::flash::{self, Kernel};
use torch_shim::fused;
use torch_shim::params::Parameter;
use torch_shim::tch::Tensor;

/// Tokens whose logits are held at a time in the loss: bounds the memory of a large vocabulary.
const LOSS_CHUNK_TOKENS: i64 = 1024;

/// Builds unsharded layers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Dense;

impl LayerBuilder for Dense {
    fn heads(&self, global: Heads) -> Heads {
        global
    }

    fn embedding(&self, tokens_BS: &Tensor, weight: &Parameter) -> Result<Tensor> {
        Ok(fused::embedding(tokens_BS, weight)?)
    }

    fn linear(&self, x: &Tensor, weight: &Parameter, _: LinearRole) -> Result<Tensor> {
        Ok(fused::linear(x, weight)?)
    }

    fn linear_graph(&self, x: &Tensor, weight: &Parameter, _: LinearRole) -> Result<Tensor> {
        Ok(fused::linear_graph(x, weight)?)
    }

    fn norm(&self, x_BSD: &Tensor, weight: &Parameter, eps: f64) -> Result<Tensor> {
        Ok(fused::rms_norm(x_BSD, weight, eps)?)
    }

    fn add_norm(
        &self,
        stream_BSD: &Tensor,
        branch_BSD: &Tensor,
        weight: &Parameter,
        eps: f64,
    ) -> Result<(Tensor, Tensor)> {
        let (normed_BSD, sum_BSD) = fused::add_rms_norm(branch_BSD, stream_BSD, weight, eps)?;
        Ok((sum_BSD, normed_BSD))
    }

    fn attention(&self, qkv: &Qkv, inputs: &Inputs) -> Result<Tensor> {
        let Qkv { query_BHSE, key_BKSE, value_BKSE } = qkv;
        if let Some(Flash { kernel, packed }) = &inputs.flash
            && (*kernel == Kernel::Plain || flash::takes(query_BHSE))
        {
            let packed = packed.as_ref();
            return Ok(flash::attention(*kernel, query_BHSE, key_BKSE, value_BKSE, packed)?);
        }
        Ok(fused::attention(query_BHSE, key_BKSE, value_BKSE, &inputs.documents)?)
    }

    fn logits(&self, x_BSD: &Tensor, weight: &Parameter) -> Result<Tensor> {
        Ok(fused::linear(x_BSD, weight)?)
    }

    fn loss(
        &self,
        x_BSD: &Tensor,
        weight: &Parameter,
        targets_BS: &Tensor,
        scale: f64,
    ) -> Result<Tensor> {
        Ok(fused::head_loss(x_BSD, weight, targets_BS, scale, LOSS_CHUNK_TOKENS)?)
    }
}
