//! The dense builder: every tensor whole, no communication. The oracle of all sharded forms.

use crate::builder::{HeadShape, Heads, LayerBuilder, LinearRole, Qkv};
use crate::error::Result;
use crate::inputs::{Flash, Inputs};
use crate::products::Products;
use kernels::Kernels;
use kernels::ops::rope::{Layout, Tables};
use kernels::ops::{cross_entropy, embedding, rms_norm, rope, swiglu};
use run_config::Matmul;
use torch_shim::flash::{self, Kernel};
use torch_shim::fused;
use torch_shim::params::Parameter;
use torch_shim::tch::Tensor;

/// Tokens whose logits are held at a time in the loss: bounds the memory of a large vocabulary.
const LOSS_CHUNK_TOKENS: i64 = 1024;

/// Builds unsharded layers: with kernels of our own where there are any and they take the tensors,
/// else with the operators of the shim.
#[derive(Clone, Debug, Default)]
pub struct Dense {
    kernels: Option<Kernels>,
    products: Products,
}

impl Dense {
    /// With the kernels of a device, or none.
    pub fn new(kernels: Option<Kernels>) -> Self {
        Self { kernels, products: Products::Same }
    }

    /// The same, with the products of blocks made as `precision.matmul` says.
    #[must_use]
    pub fn with_products(self, matmul: Matmul) -> Self {
        let products = Products::new(matmul, self.kernels.clone());
        Self { products, ..self }
    }

    /// How the products of blocks are made.
    pub fn products(&self) -> &Products {
        &self.products
    }
}

impl LayerBuilder for Dense {
    fn heads(&self, global: Heads) -> Heads {
        global
    }

    fn embedding(&self, tokens_BS: &Tensor, weight: &Parameter) -> Result<Tensor> {
        match &self.kernels {
            Some(kernels) => Ok(embedding::embedding(kernels, tokens_BS, weight)?),
            None => Ok(fused::embedding(tokens_BS, weight)?),
        }
    }

    fn linear(&self, x: &Tensor, weight: &Parameter, _: LinearRole) -> Result<Tensor> {
        self.products.linear(x, weight)
    }

    fn linear_graph(&self, x: &Tensor, weight: &Parameter, _: LinearRole) -> Result<Tensor> {
        self.products.linear_graph(x, weight)
    }

    fn norm(&self, x_BSD: &Tensor, weight: &Parameter, eps: f64) -> Result<Tensor> {
        match &self.kernels {
            Some(kernels) => Ok(rms_norm::rms_norm(kernels, x_BSD, weight, eps)?),
            None => Ok(fused::rms_norm(x_BSD, weight, eps)?),
        }
    }

    fn add_norm(
        &self,
        stream_BSD: &Tensor,
        branch_BSD: &Tensor,
        weight: &Parameter,
        eps: f64,
    ) -> Result<(Tensor, Tensor)> {
        let (normed_BSD, sum_BSD) = match &self.kernels {
            Some(kernels) => rms_norm::add_rms_norm(kernels, branch_BSD, stream_BSD, weight, eps)?,
            None => fused::add_rms_norm(branch_BSD, stream_BSD, weight, eps)?,
        };
        Ok((sum_BSD, normed_BSD))
    }

    fn rope(
        &self,
        qkv_BSF: &Tensor,
        (cos, sin): (&Tensor, &Tensor),
        HeadShape { heads, head_dim }: HeadShape,
    ) -> Result<Qkv> {
        let (query, kv) = (heads.query as i64, heads.kv as i64);
        let layout = Layout { heads: query, kv_heads: kv, head_dim: head_dim as i64 };
        let (query_BHSE, key_BKSE, value_BKSE) = match &self.kernels {
            Some(kernels) => rope::rope_qkv(kernels, qkv_BSF, Tables { cos, sin }, layout)?,
            None => fused::rope_qkv(qkv_BSF, cos, sin, query, kv, layout.head_dim)?,
        };
        Ok(Qkv { query_BHSE, key_BKSE, value_BKSE })
    }

    fn swiglu(&self, gate_up_BS2I: &Tensor) -> Result<Tensor> {
        match &self.kernels {
            Some(kernels) => Ok(swiglu::swiglu(kernels, gate_up_BS2I)?),
            None => Ok(fused::swiglu(gate_up_BS2I)?),
        }
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
        let chunk = LOSS_CHUNK_TOKENS;
        match &self.kernels {
            Some(kernels) => {
                Ok(cross_entropy::head_loss(kernels, x_BSD, weight, targets_BS, scale, chunk)?)
            }
            None => Ok(fused::head_loss(x_BSD, weight, targets_BS, scale, chunk)?),
        }
    }
}
