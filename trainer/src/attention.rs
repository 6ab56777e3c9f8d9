//! Which kernels compute attention on a GPU.

use crate::error::Result;
use crate::gpu::Gpu;
use model::AttentionKernels;
use run_config::{AttentionKernel, ComputeDtype, RunConfig};
use torch_shim::flash::{Kernel, misbehaviour};
use torch_shim::tch::Device;

/// From this compute capability on, cuDNN's are made for the hardware, and are tried first.
const CUDNN_FROM: (u32, u32) = (9, 0);

/// The kernels of a run on a GPU. Those that nobody has asked for are believed once they have
/// computed what the formulas say, with the heads of this run.
///
/// # Errors
/// Where libtorch fails at the formulas.
pub fn kernels(config: &RunConfig, gpu: &Gpu) -> Result<AttentionKernels> {
    let one = |kernel| AttentionKernels { whole: kernel, packed: kernel };
    let is_bf16 = config.precision.compute == ComputeDtype::Bf16;
    match config.precision.attention {
        AttentionKernel::Flash => return Ok(one(Kernel::Flash)),
        AttentionKernel::Cudnn => return Ok(one(Kernel::Cudnn)),
        AttentionKernel::Auto if !is_bf16 || gpu.card.capability < CUDNN_FROM => {
            return Ok(one(Kernel::Flash));
        }
        AttentionKernel::Auto => {}
    }
    let choose = |is_packed: bool| -> Result<Kernel> {
        let (model, tensor) = (&config.model, config.parallelism.tensor.max(1));
        let heads = |count: usize| (count / tensor).max(1) as i64;
        let shape = (heads(model.heads), heads(model.kv_heads), model.head_dim as i64);
        let device = Device::Cuda(gpu.index);
        match misbehaviour(Kernel::Cudnn, shape, device, is_packed)? {
            None => Ok(Kernel::Cudnn),
            Some(wrong) => {
                tracing::info!("attention by FlashAttention, as of cuDNN {wrong}");
                Ok(Kernel::Flash)
            }
        }
    };
    let whole = choose(false)?;
    let packed = if config.data.document_mask { choose(true)? } else { whole };
    tracing::debug!("attention by {whole:?}, within documents by {packed:?}");
    Ok(AttentionKernels { whole, packed })
}
