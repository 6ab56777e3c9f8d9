//! Tensors and streams of libtorch as NCCL takes them. Who keeps them alive: a lane its stream as
//! long as its communicator, and [`crate::work::Behind`] the tensors until the work has passed.
#![expect(unsafe_code, reason = "NCCL takes addresses")]

use nccl_rs::{DType, DeviceBuffer};
use torch_shim::cuda::Stream;
use torch_shim::tch::{Kind, Tensor};

use crate::error::{CommError, Result};

/// What NCCL works on. The tensor goes to [`super::lane::Lane::put`] with the call.
pub(super) fn buffer(tensor: &Tensor) -> Result<DeviceBuffer> {
    let dtype = match tensor.kind() {
        Kind::Float => DType::F32,
        Kind::Double => DType::F64,
        Kind::BFloat16 => DType::Bf16,
        Kind::Int64 => DType::I64,
        other => return Err(CommError::Invalid(format!("NCCL has no {other:?}"))),
    };
    // SAFETY: the tensor is contiguous and on the group's GPU, as `Group` checked, and is kept with
    // the work until that has left the stream, or the allocator told to.
    let buffer = unsafe { DeviceBuffer::new(tensor.data_ptr(), tensor.numel(), dtype) };
    buffer.map_err(|error| CommError::Invalid(error.to_string()))
}

/// The stream of a lane.
pub(super) fn stream(stream: &Stream) -> Result<nccl_rs::Stream> {
    let handle = stream.native()?;
    // SAFETY: it is a stream of libtorch's pool, which is never destroyed.
    Ok(unsafe { nccl_rs::Stream::from_native(handle) })
}
