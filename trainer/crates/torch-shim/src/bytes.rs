//! A tensor's memory as bytes, for files: no copy between the tensor and the disk.

use crate::error::{Result, ShimError};
use tch::{Device, Tensor};

/// The bytes of a contiguous CPU tensor, in the order of its elements.
///
/// No operator may write the tensor while the bytes are borrowed; that is up to the caller, because
/// tensors share storage.
///
/// # Errors
/// When the tensor is elsewhere or has gaps.
pub fn as_bytes(tensor: &Tensor) -> Result<&[u8]> {
    let size = size_of(tensor)?;
    if size == 0 {
        return Ok(&[]);
    }
    // SAFETY: the tensor is contiguous and on the CPU, so `size` bytes from its data pointer are
    // initialized memory of its storage, which lives as long as the tensor that is borrowed. Every
    // bit pattern is a valid byte.
    Ok(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<u8>(), size) })
}

/// The bytes of a contiguous CPU tensor, to be written.
///
/// No other use of the same storage may happen while the bytes are borrowed; that is up to the
/// caller, because tensors share storage.
///
/// # Errors
/// When the tensor is elsewhere or has gaps.
pub fn as_bytes_mut(tensor: &mut Tensor) -> Result<&mut [u8]> {
    let size = size_of(tensor)?;
    if size == 0 {
        return Ok(&mut []);
    }
    // SAFETY: as in `as_bytes`; the tensor is borrowed alone, and the caller keeps other owners of
    // its storage away. Every bit pattern is a valid value of a number.
    Ok(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<u8>(), size) })
}

fn size_of(tensor: &Tensor) -> Result<usize> {
    if tensor.device() != Device::Cpu || !tensor.is_contiguous() {
        return Err(ShimError::Invalid(format!(
            "no bytes of a tensor on {:?} (contiguous: {}): it must be contiguous and on the CPU",
            tensor.device(),
            tensor.is_contiguous()
        )));
    }
    Ok(tensor.numel() * tensor.kind().elt_size_in_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_those_of_the_elements() {
        let mut tensor = Tensor::from_slice(&[1.0f32, -2.0]);
        let expected = [1.0f32.to_le_bytes(), (-2.0f32).to_le_bytes()].concat();
        assert_eq!(as_bytes(&tensor).unwrap(), expected);
        as_bytes_mut(&mut tensor).unwrap()[4..].copy_from_slice(&3.0f32.to_le_bytes());
        assert_eq!(tensor.double_value(&[1]), 3.0);
        assert!(as_bytes(&Tensor::from_slice(&[1.0f32; 4]).view([2, 2]).tr()).is_err());
        assert!(as_bytes(&Tensor::from_slice::<f32>(&[])).unwrap().is_empty());
    }
}
