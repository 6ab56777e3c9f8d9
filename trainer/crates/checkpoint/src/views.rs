//! Where each tensor of a checkpoint lies in a flat buffer of a parameter set.

use crate::error::{CheckpointError, Result};
use checkpoint_format::Dtype;
use torch_shim::params::ParameterSet;
use torch_shim::tch::{Kind, Tensor};

/// A tensor of a checkpoint as a run of elements of the flat buffers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct View {
    /// Its Hugging Face name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<u64>,
    /// First element.
    pub start: usize,
    /// Elements of a row; a scalar is one row.
    pub row_elements: usize,
}

impl View {
    /// Number of rows.
    pub fn rows(&self) -> u64 {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Number of elements.
    pub fn num_elements(&self) -> usize {
        self.rows() as usize * self.row_elements
    }
}

/// The views of all parts of all parameters, in the order of the buffers.
pub(crate) fn views(parameters: &ParameterSet) -> Vec<View> {
    let mut views = Vec::new();
    for parameter in parameters.iter() {
        let row_elements: i64 = parameter.shape.iter().skip(1).product();
        for part in &parameter.parts {
            let mut shape: Vec<u64> = parameter.shape.iter().map(|size| *size as u64).collect();
            if let Some(rows) = shape.first_mut() {
                *rows = part.row_count as u64;
            }
            views.push(View {
                name: part.hf_name.clone(),
                shape,
                start: (parameter.range.start + part.row_start * row_elements) as usize,
                row_elements: row_elements as usize,
            });
        }
    }
    views
}

/// The element type of a tensor.
pub(crate) fn dtype_of(tensor: &Tensor) -> Result<Dtype> {
    match tensor.kind() {
        Kind::Double => Ok(Dtype::F64),
        Kind::Float => Ok(Dtype::F32),
        Kind::Half => Ok(Dtype::F16),
        Kind::BFloat16 => Ok(Dtype::Bf16),
        Kind::Int64 => Ok(Dtype::I64),
        Kind::Uint8 => Ok(Dtype::U8),
        other => Err(CheckpointError::Request(format!("a checkpoint holds no {other:?} tensors"))),
    }
}

/// Checks that an optimizer's flat buffer is laid out like the parameters'.
pub(crate) fn check_flat(parameters: &ParameterSet, name: &str, flat: &Tensor) -> Result<()> {
    let expected = parameters.flat_master().size();
    if flat.size() == expected {
        return Ok(());
    }
    Err(CheckpointError::Request(format!(
        "the buffer {name} has shape {:?}, the parameters' is {expected:?}",
        flat.size()
    )))
}
