//! A few numbers over all ranks.

use collectives::{Communicator, ReduceOp};
use torch_shim::ShimError;
use torch_shim::tch::{Device, Tensor};

use crate::error::Result;

/// Reduces a few numbers (loss, counts, flags) over the ranks, in FP64 and in the order of ranks;
/// in place.
///
/// # Errors
/// What the reduction failed with.
pub fn all_reduce_scalars(comm: &dyn Communicator, values: &mut [f64], op: ReduceOp) -> Result<()> {
    if comm.size() == 1 || values.is_empty() {
        return Ok(());
    }
    let tensor = Tensor::f_from_slice(values).map_err(ShimError::from)?;
    let tensor = tensor.f_to_device(comm.device()).map_err(ShimError::from)?;
    comm.all_reduce(&tensor, op)?.wait()?;
    let tensor = tensor.f_to_device(Device::Cpu).map_err(ShimError::from)?;
    tensor.f_copy_data(values, values.len()).map_err(ShimError::from)?;
    Ok(())
}
