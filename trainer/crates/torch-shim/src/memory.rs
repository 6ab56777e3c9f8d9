//! The memory of CPU tensors.

use std::ptr::null_mut;

use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::result::{check, made_one};
use crate::sys::{self, RawMeter};

/// Keeps the memory of dropped CPU tensors for the next ones, up to `limit` bytes that no tensor
/// uses. Holds for the process; the first call counts. Large tensors otherwise go back to the
/// kernel when they are dropped, and the next ones pay a page fault for every 4 KiB.
///
/// # Errors
/// When libtorch refuses.
pub fn keep_cpu_memory(limit: usize) -> Result<()> {
    // SAFETY: takes a number only; tensors made before keep the deleter they were made with.
    check(unsafe { sys::phx_keep_cpu_memory(limit) })
}

/// A flat tensor of zeros. On a CPU nothing is written where the kernel just made the memory,
/// which is zero then: for what is large and made once.
///
/// # Errors
/// When memory runs out.
pub fn zeros(elements: i64, kind: Kind, device: Device) -> Result<Tensor> {
    if device != Device::Cpu {
        return Ok(Tensor::f_zeros([elements], (kind, device))?);
    }
    let count = elements.saturating_mul(kind.elt_size_in_bytes() as i64);
    // SAFETY: takes a number; the place for the answer lives through the call.
    let bytes = made_one(|out| unsafe { sys::phx_zero_bytes(count, out) })?;
    Ok(bytes.f_view_dtype(kind)?)
}

/// Has `write` write the elements of a contiguous FP32 tensor on a CPU, where they are. None, and
/// nothing is done, for any other tensor. Nobody else, `write` included, may read or write tensors
/// that share them meanwhile.
pub fn write_floats<T>(tensor: &mut Tensor, write: impl FnOnce(&mut [f32]) -> T) -> Option<T> {
    let is_plain = tensor.device() == Device::Cpu
        && tensor.kind() == Kind::Float
        && tensor.is_contiguous()
        && tensor.numel() > 0;
    if !is_plain {
        return None;
    }
    // SAFETY: so many numbers lie there, one after another, while the tensor is borrowed; other
    // tensors that share them are not read or written by `write`, which is given none.
    let floats =
        unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<f32>(), tensor.numel()) };
    Some(write(floats))
}

/// Counts the bytes of CPU tensors: of those made in [`Meter::count`], until they are dropped,
/// wherever that is. For tests: every tensor of the process pays for it once there was a meter.
#[derive(Debug)]
pub struct Meter(*mut RawMeter);

// SAFETY: the C++ object is counted and read atomically, and not changed but by what it counts.
unsafe impl Send for Meter {}
// SAFETY: as above.
unsafe impl Sync for Meter {}

impl Meter {
    /// A meter that has counted nothing yet.
    ///
    /// # Errors
    /// When the process has an allocator that cannot be metered.
    pub fn new() -> Result<Meter> {
        let mut meter = null_mut();
        // SAFETY: the place for the answer lives through the call.
        check(unsafe { sys::phx_meter_new(&mut meter) })?;
        Ok(Meter(meter))
    }

    /// Counts what this thread makes in `body`, in which no other meter counts.
    pub fn count<T>(&self, body: impl FnOnce() -> T) -> T {
        /// Ends the count, also where `body` panics.
        struct End;
        impl Drop for End {
            fn drop(&mut self) {
                // SAFETY: nothing counts on this thread afterwards.
                unsafe { sys::phx_meter_count(null_mut()) }
            }
        }
        // SAFETY: the meter is alive with `self`, and the thread shares its C++ side.
        unsafe { sys::phx_meter_count(self.0) };
        let _end = End;
        body()
    }

    /// Bytes of what was made and is not dropped yet.
    pub fn now(&self) -> u64 {
        self.read().0
    }

    /// The most that [`Meter::now`] has been.
    pub fn peak(&self) -> u64 {
        self.read().1
    }

    fn read(&self) -> (u64, u64) {
        let (mut now, mut peak) = (0, 0);
        // SAFETY: the meter is alive with `self`, the places for the answers through the call.
        unsafe { sys::phx_meter_read(self.0, &mut now, &mut peak) };
        (now.max(0) as u64, peak.max(0) as u64)
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        // SAFETY: this owner's reference is given back once.
        unsafe { sys::phx_meter_free(self.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::{keep_cpu_memory, write_floats, zeros};
    use tch::{Device, Kind, Tensor};

    /// In one test, because the allocator is the process's.
    #[test]
    fn dropped_memory_is_used_again_up_to_the_limit() {
        let made = |bytes: i64| Tensor::empty([bytes], (Kind::Uint8, Device::Cpu));
        let before = made(1 << 20);
        keep_cpu_memory(3 << 20).unwrap();
        keep_cpu_memory(0).unwrap();
        drop(before);
        let (first, second) = (made(1 << 20), made(1 << 20));
        let at = first.data_ptr();
        assert_ne!(at, second.data_ptr());
        assert_eq!(at as usize % 64, 0);
        drop(first);
        assert_eq!(made((1 << 20) - 1000).data_ptr(), at, "a like size takes the same block");
        assert_eq!(second.zeros_like().sum(Kind::Int64).int64_value(&[]), 0);
        let many: Vec<_> = (0..8).map(|_| made(1 << 20)).collect();
        drop((second, many));
        let grown = made(100).resize_([4 << 20]).fill_(7);
        assert_eq!(grown.sum(Kind::Int64).int64_value(&[]), 7 * (4 << 20));
        assert_eq!(made(0).numel(), 0);
        // New from the kernel, given back dirty, and taken again; too large to be kept; small.
        for elements in [3 << 20, 3 << 20, 70 << 20, 70 << 20, 1000, 1000, 0] {
            let mut tensor = zeros(elements, Kind::Float, Device::Cpu).unwrap();
            assert_eq!((tensor.kind(), tensor.size()), (Kind::Float, vec![elements]));
            assert_eq!(tensor.count_nonzero(None::<i64>).int64_value(&[]), 0, "{elements}");
            let _ = tensor.fill_(7.0);
        }
        assert_eq!(zeros(5, Kind::BFloat16, Device::Cpu).unwrap().kind(), Kind::BFloat16);
    }
    #[test]
    fn only_plain_floats_are_written_in_place() {
        let whole = Tensor::zeros([4, 3], (Kind::Float, Device::Cpu));
        let mut rows = whole.narrow(0, 1, 2);
        let count = |floats: &mut [f32]| {
            floats.iter_mut().zip(1..).for_each(|(float, number)| *float = number as f32);
            floats.len()
        };
        assert_eq!(write_floats(&mut rows, count), Some(6));
        let rows: Vec<f32> = whole.flatten(0, -1).try_into().unwrap();
        assert_eq!(rows, [0., 0., 0., 1., 2., 3., 4., 5., 6., 0., 0., 0.]);
        assert_eq!(write_floats(&mut whole.narrow(1, 0, 2), count), None, "rows with gaps");
        assert_eq!(write_floats(&mut whole.to_kind(Kind::Double), count), None);
        assert_eq!(write_floats(&mut whole.narrow(0, 0, 0), count), None);
        assert_eq!(write_floats(&mut whole.view([12]), |floats| floats.len()), Some(12));
    }
}
