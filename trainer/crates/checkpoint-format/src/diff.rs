//! Comparing two checkpoints: all tensors, bit by bit. Names of runs, generations and times do not
//! count.

use crate::boxes::TensorBox;
use crate::error::Result;
use crate::parallel;
use crate::read::Checkpoint;
use serde::Serialize;
use std::sync::Mutex;

/// Bytes compared at a time.
const PIECE: u64 = 8 << 20;

/// How two checkpoints differ.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Diff {
    /// Tensors compared (names that both have).
    pub compared: usize,
    /// Elements compared.
    pub elements: u64,
    /// Tensors with another shape, type or content, by name.
    pub different: Vec<TensorDiff>,
    /// Names only the first has.
    pub only_in_a: Vec<String>,
    /// Names only the second has.
    pub only_in_b: Vec<String>,
}

/// How one tensor differs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TensorDiff {
    /// Name.
    pub name: String,
    /// What is different, in words.
    pub what: String,
    /// Elements whose bits differ; 0 where shape or type differ.
    pub elements: u64,
    /// Flat index of the first of them.
    pub first_element: Option<u64>,
    /// Largest absolute difference, `inf` where one is not a number; `None` where shape or type
    /// differ.
    pub max_abs_difference: Option<f64>,
}

impl Diff {
    /// Whether every tensor of both is in the other, with the same bits.
    pub fn is_equal(&self) -> bool {
        self.different.is_empty() && self.only_in_a.is_empty() && self.only_in_b.is_empty()
    }
}

/// Compares all tensors of two checkpoints.
///
/// # Errors
/// [`crate::FormatError::Damaged`] where either is found to be.
pub fn diff(a: &Checkpoint, b: &Checkpoint) -> Result<Diff> {
    let only = |a: &Checkpoint, b: &Checkpoint| -> Vec<String> {
        a.tensors().keys().filter(|name| !b.tensors().contains_key(*name)).cloned().collect()
    };
    let names: Vec<&String> =
        a.tensors().keys().filter(|name| b.tensors().contains_key(*name)).collect();
    let different = Mutex::new(Vec::new());
    parallel::for_each(&names, |name| {
        if let Some(found) = diff_tensor(a, b, name)? {
            different.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(found);
        }
        Ok(())
    })?;
    let mut different = different.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    different.sort_by(|a, b| a.name.cmp(&b.name));
    let elements =
        names.iter().filter_map(|name| crate::boxes::num_elements(&a.tensors()[*name].shape)).sum();
    let compared = names.len();
    Ok(Diff { compared, elements, different, only_in_a: only(a, b), only_in_b: only(b, a) })
}

fn diff_tensor(a: &Checkpoint, b: &Checkpoint, name: &str) -> Result<Option<TensorDiff>> {
    let (in_a, in_b) = (a.tensor(name)?, b.tensor(name)?);
    if in_a.shape != in_b.shape || in_a.dtype != in_b.dtype {
        let what = format!(
            "{:?} {} against {:?} {}",
            in_a.shape,
            in_a.dtype.name(),
            in_b.shape,
            in_b.dtype.name()
        );
        let name = name.to_string();
        let max_abs_difference = None;
        let (elements, first_element) = (0, None);
        return Ok(Some(TensorDiff { name, what, elements, first_element, max_abs_difference }));
    }
    let (shape, dtype) = (&in_a.shape, in_a.dtype);
    let rows = shape.first().copied().unwrap_or(1);
    let row_elements = TensorBox::rows(shape, 0, 1.min(rows)).num_elements().unwrap_or(0);
    let row_bytes = row_elements * dtype.size() as u64;
    if rows == 0 || row_bytes == 0 {
        return Ok(None);
    }
    let at_once = (PIECE / row_bytes).clamp(1, rows);
    let (mut from_a, mut from_b) = (Vec::new(), Vec::new());
    let mut counted = Counted::default();
    for start in (0..rows).step_by(at_once as usize) {
        let count = at_once.min(rows - start);
        let region = TensorBox::rows(shape, start, count);
        from_a.resize((count * row_bytes) as usize, 0);
        from_b.resize((count * row_bytes) as usize, 0);
        a.read_box(name, &region, &mut from_a)?;
        b.read_box(name, &region, &mut from_b)?;
        if from_a != from_b {
            counted.add(dtype, start * row_elements, &from_a, &from_b);
        }
    }
    let Counted { elements, first, max } = counted;
    Ok(first.map(|first| TensorDiff {
        name: name.to_string(),
        what: format!("{elements} elements differ, first at {first}, by at most {max:e}"),
        elements,
        first_element: Some(first),
        max_abs_difference: Some(max),
    }))
}

#[derive(Default)]
struct Counted {
    elements: u64,
    first: Option<u64>,
    max: f64,
}

impl Counted {
    /// Adds the elements of two pieces that begin at flat index `start`.
    fn add(&mut self, dtype: crate::Dtype, start: u64, a: &[u8], b: &[u8]) {
        let pairs = a.chunks_exact(dtype.size()).zip(b.chunks_exact(dtype.size()));
        for (index, (a, b)) in pairs.enumerate().filter(|(_, (a, b))| a != b) {
            self.elements += 1;
            self.first.get_or_insert(start + index as u64);
            let difference = (dtype.value(a) - dtype.value(b)).abs();
            let difference = if difference.is_nan() { f64::INFINITY } else { difference };
            self.max = self.max.max(difference);
        }
    }
}
