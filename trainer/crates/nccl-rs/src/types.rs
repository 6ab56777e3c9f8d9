//! What calls are made of: element types, reductions, addresses, streams, ids.

use std::ffi::{c_int, c_void};
use std::fmt;
use std::ptr::without_provenance_mut;

use crate::error::{NcclError, Result};

/// The type of an element; the numbers are those of `ncclDataType_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum DType {
    /// `ncclUint8`.
    U8 = 1,
    /// `ncclInt32`.
    I32 = 2,
    /// `ncclInt64`.
    I64 = 4,
    /// `ncclFloat16`.
    F16 = 6,
    /// `ncclFloat32`.
    F32 = 7,
    /// `ncclFloat64`.
    F64 = 8,
    /// `ncclBfloat16`.
    Bf16 = 9,
}

impl DType {
    /// Bytes of an element.
    pub fn size_bytes(self) -> usize {
        match self {
            DType::U8 => 1,
            DType::F16 | DType::Bf16 => 2,
            DType::I32 | DType::F32 => 4,
            DType::I64 | DType::F64 => 8,
        }
    }

    pub(crate) fn code(self) -> c_int {
        self as c_int
    }
}

/// How the buffers of the ranks become one; the numbers are those of `ncclRedOp_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum ReduceOp {
    /// `ncclSum`.
    Sum = 0,
    /// `ncclProd`.
    Prod = 1,
    /// `ncclMax`.
    Max = 2,
    /// `ncclMin`.
    Min = 3,
    /// `ncclAvg`: the sum divided by the number of ranks.
    Avg = 4,
}

impl ReduceOp {
    pub(crate) fn code(self) -> c_int {
        self as c_int
    }
}

/// Contiguous elements in a device's memory: an address, not an owner.
///
/// Whoever makes one answers for it: the memory is of the communicator's device, holds that many
/// elements, and lives until the work it is given to has passed its stream. The crate's page says
/// more.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct DeviceBuffer {
    address: usize,
    count: usize,
    dtype: DType,
}

impl DeviceBuffer {
    /// `count` elements from `address` on (a tensor's data pointer, its number of elements).
    ///
    /// # Safety
    /// Whenever the buffer, or a piece of it, is given to an operation, that many elements lie at
    /// the address in memory that the communicator's GPU reaches, and they stay there, and an
    /// output untouched, until the work has left its stream.
    ///
    /// # Errors
    /// When the address is null although there are elements, or not aligned to one.
    pub unsafe fn new(address: *mut c_void, count: usize, dtype: DType) -> Result<DeviceBuffer> {
        let address = address.addr();
        let is_null = address == 0 && count > 0;
        if is_null || !address.is_multiple_of(dtype.size_bytes()) {
            return Err(NcclError::Invalid(format!(
                "{address:#x} is no address of {count} elements of {dtype:?}"
            )));
        }
        Ok(DeviceBuffer { address, count, dtype })
    }

    /// The number of elements.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The `index`-th of `num_pieces` equal pieces.
    ///
    /// # Errors
    /// When the pieces are not equal, or there is no such piece.
    pub fn piece(&self, index: usize, num_pieces: usize) -> Result<DeviceBuffer> {
        if num_pieces == 0 || index >= num_pieces || !self.count.is_multiple_of(num_pieces) {
            let count = self.count;
            let text = format!("{count} elements have no piece {index} of {num_pieces} equal ones");
            return Err(NcclError::Invalid(text));
        }
        let count = self.count / num_pieces;
        let address = self.address + index * count * self.dtype.size_bytes();
        Ok(DeviceBuffer { address, count, dtype: self.dtype })
    }

    pub(crate) fn pointer(&self) -> *mut c_void {
        without_provenance_mut(self.address)
    }
}

impl fmt::Debug for DeviceBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} x {:?} at {:#x}", self.count, self.dtype, self.address)
    }
}

/// A CUDA stream (`cudaStream_t`), which its owner keeps until the work on it is done; null is the
/// default stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream(usize);

impl Stream {
    /// The stream with this native handle.
    ///
    /// # Safety
    /// It is a stream of the communicator's GPU, or null, and lives until all work on it is done:
    /// the driver follows the handle.
    pub unsafe fn from_native(handle: *mut c_void) -> Stream {
        Stream(handle.addr())
    }

    pub(crate) fn pointer(self) -> *mut c_void {
        without_provenance_mut(self.0)
    }
}

/// What the ranks of a new communicator find each other by: one rank makes it
/// ([`crate::Nccl::unique_id`]), and all get it through the store.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct UniqueId([u8; UniqueId::BYTES]);

impl UniqueId {
    /// Its length.
    pub const BYTES: usize = 128;

    /// The id as another rank made it.
    pub fn from_bytes(bytes: [u8; UniqueId::BYTES]) -> UniqueId {
        UniqueId(bytes)
    }

    /// The id, for other ranks.
    pub fn to_bytes(self) -> [u8; UniqueId::BYTES] {
        self.0
    }
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UniqueId(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffer(address: *mut c_void, count: usize, dtype: DType) -> Result<DeviceBuffer> {
        // SAFETY: it is given to no operation.
        unsafe { DeviceBuffer::new(address, count, dtype) }
    }

    #[test]
    fn the_codes_are_nccls() {
        let dtypes = [
            (DType::U8, 1, 1),
            (DType::I32, 2, 4),
            (DType::I64, 4, 8),
            (DType::F16, 6, 2),
            (DType::F32, 7, 4),
            (DType::F64, 8, 8),
            (DType::Bf16, 9, 2),
        ];
        for (dtype, code, size_bytes) in dtypes {
            assert_eq!((dtype.code(), dtype.size_bytes()), (code, size_bytes), "{dtype:?}");
        }
        let ops = [ReduceOp::Sum, ReduceOp::Prod, ReduceOp::Max, ReduceOp::Min, ReduceOp::Avg];
        assert_eq!(ops.map(ReduceOp::code), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn a_buffer_is_refused_where_it_cannot_be_one() {
        let at = without_provenance_mut::<c_void>;
        assert!(buffer(at(0), 1, DType::U8).is_err());
        assert!(buffer(at(0), 0, DType::U8).is_ok());
        assert!(buffer(at(0x1004), 1, DType::F64).is_err());
        assert!(buffer(at(0x1004), 1, DType::F32).is_ok());
    }

    #[test]
    fn pieces_lie_side_by_side() {
        let whole = buffer(without_provenance_mut(0x1000), 6, DType::Bf16).unwrap();
        let piece = whole.piece(2, 3).unwrap();
        assert_eq!((piece.address, piece.count, piece.dtype), (0x1008, 2, DType::Bf16));
        for (index, num_pieces) in [(3, 3), (0, 4), (0, 0)] {
            assert!(whole.piece(index, num_pieces).is_err(), "{index} of {num_pieces}");
        }
    }
}
