//! Where the parts of each tensor of a checkpoint lie in the buffers of what a rank owns.

use crate::error::{CheckpointError, Result};
use checkpoint_format::{Dtype, TensorBox};
use model_spec::LocalParameter;
use torch_shim::params::{Owned, Parameter, ParameterSet};
use torch_shim::tch::{Kind, Tensor};

/// A part of a tensor of a checkpoint as a run of elements of the buffers of what is owned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct View {
    /// Its Hugging Face name.
    pub name: String,
    /// The whole tensor's shape.
    pub shape: Vec<u64>,
    /// Which part of it.
    pub region: TensorBox,
    /// First element.
    pub start: usize,
    /// Whether this rank's copy is the one that is saved.
    pub counts: bool,
}

impl View {
    /// Number of rows; a scalar is one.
    pub fn rows(&self) -> u64 {
        self.region.lengths.first().copied().unwrap_or(1)
    }

    /// Elements of a row.
    pub fn row_elements(&self) -> usize {
        self.region.lengths.iter().skip(1).product::<u64>() as usize
    }

    /// Number of elements.
    pub fn num_elements(&self) -> usize {
        self.rows() as usize * self.row_elements()
    }

    /// `count` rows of the part from its row `first` on.
    pub fn rows_of(&self, first: u64, count: u64) -> TensorBox {
        let mut region = self.region.clone();
        if let (Some(offset), Some(length)) =
            (region.offsets.first_mut(), region.lengths.first_mut())
        {
            (*offset, *length) = (*offset + first, count);
        }
        region
    }
}

/// The views of all that is owned of `held`, which `parameters` was allocated from, in the order of
/// the buffers.
pub(crate) fn views(held: &[LocalParameter], parameters: &ParameterSet) -> Vec<View> {
    let owned = parameters.owned();
    let pairs = held.iter().zip(parameters.iter());
    pairs.flat_map(|(local, parameter)| parameter_views(local, parameter, &owned)).collect()
}

fn parameter_views(local: &LocalParameter, parameter: &Parameter, owned: &[Owned]) -> Vec<View> {
    let width: usize = local.shape.iter().skip(1).product();
    let mut views = Vec::new();
    for part in &local.parts {
        let first = parameter.range.start as usize + part.row_start * width;
        let last = first + part.num_elements();
        for run in owned {
            let (from, to) = (run.elements.start as usize, run.elements.end as usize);
            let (low, high) = (first.max(from), last.min(to));
            if low >= high {
                continue;
            }
            let to_start = |element: usize| run.start as usize + first + element - from;
            let rectangles = part.rectangles(low - first..high - first);
            views.extend(rectangles.into_iter().map(|rectangle| View {
                name: part.hf_name.clone(),
                shape: part.shape.iter().map(|&size| size as u64).collect(),
                region: region(part.shape.len(), &rectangle),
                start: to_start(rectangle.start),
                counts: part.counts,
            }));
        }
    }
    views
}

fn region(dimensions: usize, rectangle: &model_spec::Rectangle) -> TensorBox {
    let ranges = [&rectangle.rows, &rectangle.columns];
    let ranges = ranges.into_iter().take(dimensions);
    TensorBox {
        offsets: ranges.clone().map(|range| range.start as u64).collect(),
        lengths: ranges.map(|range| range.len() as u64).collect(),
    }
}

/// The element type of a tensor.
pub(crate) fn dtype_of(tensor: &Tensor) -> Result<Dtype> {
    dtype(tensor.kind())
}

/// The element type of a kind.
pub(crate) fn dtype(kind: Kind) -> Result<Dtype> {
    match kind {
        Kind::Double => Ok(Dtype::F64),
        Kind::Float => Ok(Dtype::F32),
        Kind::Half => Ok(Dtype::F16),
        Kind::BFloat16 => Ok(Dtype::Bf16),
        Kind::Int64 => Ok(Dtype::I64),
        Kind::Uint8 => Ok(Dtype::U8),
        other => Err(CheckpointError::Request(format!("a checkpoint holds no {other:?} tensors"))),
    }
}

/// Checks that an optimizer's buffer is laid out like the master weights that are owned.
pub(crate) fn check_owned(parameters: &ParameterSet, name: &str, buffer: &Tensor) -> Result<()> {
    let expected = parameters.owned_master().size();
    if buffer.size() == expected {
        return Ok(());
    }
    Err(CheckpointError::Request(format!(
        "the buffer {name} has shape {:?}, the parameters' is {expected:?}",
        buffer.size()
    )))
}
