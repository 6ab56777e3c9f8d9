//! Element types, and conversions between floating types on bytes.

use serde::{Deserialize, Serialize};

/// Type of a tensor's elements; stored little-endian, named as safetensors names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Dtype {
    /// 64-bit float.
    F64,
    /// Signed 64-bit integer.
    I64,
    /// 32-bit float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// 16-bit brain float.
    #[serde(rename = "BF16")]
    Bf16,
    /// Unsigned byte.
    U8,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Dtype::F64 | Dtype::I64 => 8,
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
            Dtype::U8 => 1,
        }
    }

    /// The name in a safetensors header.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F64 => "F64",
            Dtype::I64 => "I64",
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::Bf16 => "BF16",
            Dtype::U8 => "U8",
        }
    }

    /// The name in a Hugging Face `config.json` (`dtype`, `torch_dtype`).
    pub fn torch_name(self) -> &'static str {
        match self {
            Dtype::F64 => "float64",
            Dtype::I64 => "int64",
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            Dtype::Bf16 => "bfloat16",
            Dtype::U8 => "uint8",
        }
    }

    /// The type of a safetensors entry, where it is one of ours.
    pub fn from_safetensors(dtype: safetensors::Dtype) -> Option<Dtype> {
        match dtype {
            safetensors::Dtype::F64 => Some(Dtype::F64),
            safetensors::Dtype::I64 => Some(Dtype::I64),
            safetensors::Dtype::F32 => Some(Dtype::F32),
            safetensors::Dtype::F16 => Some(Dtype::F16),
            safetensors::Dtype::BF16 => Some(Dtype::Bf16),
            safetensors::Dtype::U8 => Some(Dtype::U8),
            _ => None,
        }
    }

    /// Whether it is a floating type.
    pub fn is_float(self) -> bool {
        !matches!(self, Dtype::I64 | Dtype::U8)
    }

    /// One element's value as FP64 (exact for all but large `I64`); 0 where `bytes` is too short.
    pub fn value(self, bytes: &[u8]) -> f64 {
        match self {
            Dtype::F64 => array(bytes).map_or(0.0, f64::from_le_bytes),
            Dtype::F32 => array(bytes).map_or(0.0, |b| f64::from(f32::from_le_bytes(b))),
            Dtype::F16 => array(bytes).map_or(0.0, |b| half::f16::from_le_bytes(b).to_f64()),
            Dtype::Bf16 => array(bytes).map_or(0.0, |b| half::bf16::from_le_bytes(b).to_f64()),
            Dtype::I64 => array(bytes).map_or(0.0, |b| i64::from_le_bytes(b) as f64),
            Dtype::U8 => bytes.first().map_or(0.0, |b| f64::from(*b)),
        }
    }
}

fn array<const N: usize>(bytes: &[u8]) -> Option<[u8; N]> {
    bytes.get(..N)?.try_into().ok()
}

/// Converts elements of `from` in `source` to `to` in `target`, rounding to nearest even.
///
/// # Errors
/// Says so where the two hold different numbers of elements, or where an integer type would be
/// converted to another type.
pub fn convert(from: Dtype, source: &[u8], to: Dtype, target: &mut [u8]) -> Result<(), String> {
    if source.len() / from.size() != target.len() / to.size() {
        return Err(format!(
            "{} elements do not fit in a buffer of {}",
            source.len() / from.size(),
            target.len() / to.size()
        ));
    }
    if from == to {
        target.copy_from_slice(source);
        return Ok(());
    }
    if !from.is_float() || !to.is_float() {
        return Err(format!("{} cannot be converted to {}", from.name(), to.name()));
    }
    match (from, to) {
        (Dtype::Bf16, Dtype::F32) => {
            each::<2, 4>(source, target, |b| half::bf16::from_le_bytes(b).to_f32().to_le_bytes())
        }
        (Dtype::F16, Dtype::F32) => {
            each::<2, 4>(source, target, |b| half::f16::from_le_bytes(b).to_f32().to_le_bytes())
        }
        (Dtype::F32, Dtype::Bf16) => each::<4, 2>(source, target, |b| {
            half::bf16::from_f32(f32::from_le_bytes(b)).to_le_bytes()
        }),
        (Dtype::F32, Dtype::F64) => {
            each::<4, 8>(source, target, |b| f64::from(f32::from_le_bytes(b)).to_le_bytes());
        }
        _ => {
            let elements = source.chunks_exact(from.size());
            for (element, out) in elements.zip(target.chunks_exact_mut(to.size())) {
                store(to, from.value(element), out);
            }
        }
    }
    Ok(())
}

fn each<const F: usize, const T: usize>(
    source: &[u8],
    target: &mut [u8],
    convert: impl Fn([u8; F]) -> [u8; T],
) {
    let (elements, _) = source.as_chunks::<F>();
    let (out, _) = target.as_chunks_mut::<T>();
    for (element, out) in elements.iter().zip(out) {
        *out = convert(*element);
    }
}

fn store(dtype: Dtype, value: f64, out: &mut [u8]) {
    match dtype {
        Dtype::F64 => out.copy_from_slice(&value.to_le_bytes()),
        Dtype::F32 => out.copy_from_slice(&(value as f32).to_le_bytes()),
        Dtype::F16 => out.copy_from_slice(&half::f16::from_f64(value).to_le_bytes()),
        Dtype::Bf16 => out.copy_from_slice(&half::bf16::from_f64(value).to_le_bytes()),
        Dtype::I64 | Dtype::U8 => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(from: Dtype, source: &[u8], to: Dtype, expected: &[u8]) {
        let mut target = vec![0; source.len() / from.size() * to.size()];
        convert(from, source, to, &mut target).unwrap();
        assert_eq!(target, expected);
    }

    #[test]
    fn converts_known_values() {
        // 1.5 is 0x3FC0 in BF16, 0x3E00 in FP16, 0x3FC00000 in FP32.
        check(Dtype::Bf16, &[0xC0, 0x3F], Dtype::F32, &1.5f32.to_le_bytes());
        check(Dtype::F16, &[0x00, 0x3E], Dtype::F32, &1.5f32.to_le_bytes());
        check(Dtype::F16, &[0x00, 0x3E], Dtype::F64, &1.5f64.to_le_bytes());
        check(Dtype::F32, &1.5f32.to_le_bytes(), Dtype::Bf16, &[0xC0, 0x3F]);
        check(Dtype::F32, &0.1f32.to_le_bytes(), Dtype::F64, &f64::from(0.1f32).to_le_bytes());
        // Halfway between 1 and the next BF16 goes to the even one, 1.
        check(Dtype::F32, &f32::from_bits(0x3F80_8000).to_le_bytes(), Dtype::Bf16, &[0x80, 0x3F]);
        check(Dtype::I64, &7i64.to_le_bytes(), Dtype::I64, &7i64.to_le_bytes());
    }

    #[test]
    fn refuses_integers_and_wrong_sizes() {
        assert!(convert(Dtype::I64, &[0; 8], Dtype::F32, &mut [0; 4]).is_err());
        assert!(convert(Dtype::F32, &[0; 8], Dtype::F32, &mut [0; 4]).is_err());
    }
}
