//! A few numbers: their sums on the device that made them, and over all ranks.

use collectives::{Communicator, ReduceOp, Work};
use torch_shim::cuda::{Readback, Stream, upload};
use torch_shim::tch::{Device, Kind, Tensor};
use torch_shim::{Result as ShimResult, ShimError};

use crate::error::Result;

/// Reduces a few numbers (loss, counts, flags) over the ranks, in FP64 and in the order of ranks;
/// in place. On a GPU the host waits for all that was given to it before.
///
/// # Errors
/// What the reduction failed with.
pub fn all_reduce_scalars(comm: &dyn Communicator, values: &mut [f64], op: ReduceOp) -> Result<()> {
    if comm.size() == 1 || values.is_empty() {
        return Ok(());
    }
    let tensor = upload(&Tensor::f_from_slice(values).map_err(ShimError::from)?, comm.device())?;
    reduce(comm, &tensor, op)?;
    values.copy_from_slice(&Readback::begin(&tensor)?.wait()?);
    Ok(())
}

/// The same for numbers that are on the device, and stay there.
///
/// # Errors
/// What the reduction failed with.
pub fn reduce(comm: &dyn Communicator, numbers: &Tensor, op: ReduceOp) -> Result<()> {
    if comm.size() > 1 {
        comm.all_reduce(numbers, op)?.wait()?;
    }
    Ok(())
}

/// Numbers that the ranks are reducing while they compute something else.
pub struct Reducing(State);

enum State {
    Known(Vec<f64>),
    Queued { work: Work, tensor: Tensor },
    Copying(Readback),
}

impl Reducing {
    /// Begins to reduce what the host knows, as [`all_reduce_scalars`] does. On a GPU it happens on
    /// `beside`, a stream of its own, and does not wait for what the GPU was given to compute.
    ///
    /// # Errors
    /// What the reduction failed with.
    pub fn begin(
        comm: &dyn Communicator,
        values: &[f64],
        op: ReduceOp,
        beside: Option<&Stream>,
    ) -> Result<Self> {
        if comm.size() == 1 || values.is_empty() {
            return Ok(Self(State::Known(values.to_vec())));
        }
        let host = Tensor::f_from_slice(values).map_err(ShimError::from)?;
        let Some(stream) = beside.filter(|_| comm.device() != Device::Cpu) else {
            let tensor = upload(&host, comm.device())?;
            let work = comm.all_reduce(&tensor, op)?;
            return Ok(Self(State::Queued { work, tensor }));
        };
        let reading = stream.current(|| -> Result<Readback> {
            let tensor = upload(&host, comm.device())?;
            reduce(comm, &tensor, op)?;
            Ok(Readback::begin(&tensor)?)
        })?;
        Ok(Self(State::Copying(reading?)))
    }

    /// Waits for them.
    ///
    /// # Errors
    /// What the reduction failed with.
    pub fn wait(self) -> Result<Vec<f64>> {
        match self.0 {
            State::Known(values) => Ok(values),
            State::Queued { work, tensor } => {
                work.wait()?;
                Ok(Readback::begin(&tensor)?.wait()?)
            }
            State::Copying(reading) => Ok(reading.wait()?),
        }
    }
}

/// The sum of scalars in their order, in FP64, on `device`; nothing is read.
pub(crate) fn sum(parts: &[Tensor], device: Device) -> ShimResult<Tensor> {
    let zero = Tensor::f_zeros([] as [i64; 0], (Kind::Double, device))?;
    parts.iter().try_fold(zero, |sum, part| Ok(sum.f_add(&part.f_to_kind(Kind::Double)?)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The host added them so before, and the last bits shall be the same.
    #[test]
    fn sums_have_the_bits_of_a_sum_on_the_host() {
        let values: Vec<f32> = (1..50).map(|n| 1.0 / n as f32).collect();
        let parts: Vec<Tensor> = values.iter().map(|value| Tensor::from(*value)).collect();
        let on_host = values.iter().fold(0.0, |sum, value| sum + f64::from(*value));
        let got = sum(&parts, Device::Cpu).unwrap().double_value(&[]);
        assert_eq!(got.to_bits(), on_host.to_bits());
        assert_eq!(sum(&[], Device::Cpu).unwrap().double_value(&[]), 0.0);
    }
}
