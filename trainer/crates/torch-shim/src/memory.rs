//! The memory of CPU tensors.

use crate::error::Result;
use crate::result::check;
use crate::sys;

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

#[cfg(test)]
mod tests {
    use super::keep_cpu_memory;
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
    }
}
