//! Which piece of each parameter a rank of a tensor-parallel group holds.
//!
//! A parameter's logical axes say how it splits: a dimension of heads, of the feed-forward's inner
//! width or of the vocabulary is cut over the tensor axis of the mesh, one of the residual stream
//! is not (Shoeybi et al. 2019, "Megatron-LM"). So QKV, gate and up are cut by rows, the
//! attention's and the feed-forward's output by columns, embedding and head by tokens, and norms
//! not at all.

use crate::mesh;
use model_spec::{Axis, LocalParameter, LocalPart, ParameterSpec, Place, axis_unit};
use run_config::ModelConfig;
use std::ops::Range;
use thiserror::Error;

/// The mesh axis that a logical axis is cut over; `None`: every rank holds all of it.
pub fn mesh_axis(axis: Axis) -> Option<mesh::Axis> {
    match axis {
        Axis::Vocab | Axis::Heads | Axis::KvHeads | Axis::Ffn => Some(mesh::Axis::Tensor),
        Axis::Embed | Axis::Fused => None,
    }
}

/// A parameter that does not split over the ranks.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{units} {axis:?} units of {parameter} do not split over {ranks} tensor-parallel ranks")]
pub struct PlanError {
    parameter: String,
    axis: Axis,
    units: usize,
    ranks: usize,
}

/// A rank's place in a tensor-parallel group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorPlace {
    /// Ranks of the group.
    pub ranks: usize,
    /// Which of them.
    pub rank: usize,
    /// Whether norms work on a part of the sequence (sequence parallelism).
    pub sequence: bool,
}

impl TensorPlace {
    /// The only rank.
    pub const ALONE: Self = Self { ranks: 1, rank: 0, sequence: false };

    /// Ranks that hold the same key and value head: more than 1 where there are fewer heads than
    /// ranks.
    pub fn kv_copies(&self, model: &ModelConfig) -> usize {
        (self.ranks / model.kv_heads.max(1)).max(1)
    }
}

/// Ranks over which a gradient must still be summed, besides those that read other data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SumOver {
    /// The whole tensor-parallel group: with sequence parallelism each rank's norms saw a part of
    /// the tokens.
    Tensor,
    /// The ranks that hold the same key and value head: each has a part of its queries.
    KvCopies,
    /// The first and the last pipeline stage, which share a tied embedding.
    TiedStages,
}

/// Rows of a parameter whose gradient on each rank is only a part of a sum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartialSum {
    /// Which of the parameters.
    pub parameter: usize,
    /// Rows of what is held.
    pub rows: Range<usize>,
    /// Over whom.
    pub over: SumOver,
}

/// What must be summed of the gradients of `held`; `tied` where the embedding is on two stages.
pub fn partial_sums(
    model: &ModelConfig,
    place: TensorPlace,
    held: &[LocalParameter],
    tied: bool,
) -> Vec<PartialSum> {
    let mut sums = Vec::new();
    for (parameter, local) in held.iter().enumerate() {
        let mut push = |rows, over| sums.push(PartialSum { parameter, rows, over });
        if local.spec.norm && place.sequence && place.ranks > 1 {
            push(0..local.shape[0], SumOver::Tensor);
        }
        let kv = local.spec.parts.iter().zip(&local.parts);
        let kv = kv.filter(|(part, _)| part.axis == Axis::KvHeads).map(|(_, held)| held);
        if place.kv_copies(model) > 1 {
            for part in kv {
                push(part.row_start..part.row_start + part.rows.len(), SumOver::KvCopies);
            }
        }
        if tied && local.spec.place == Place::Embedding {
            push(0..local.shape[0], SumOver::TiedStages);
        }
    }
    sums
}

/// What a rank holds of one dimension.
struct Held {
    range: Range<usize>,
    copies: usize,
}

/// What a rank holds of `specs`.
///
/// # Errors
/// Where a dimension does not divide; a checked config has none.
pub fn local_parameters(
    model: &ModelConfig,
    place: TensorPlace,
    specs: &[ParameterSpec],
) -> Result<Vec<LocalParameter>, PlanError> {
    specs.iter().map(|spec| local_parameter(model, place, spec)).collect()
}

fn local_parameter(
    model: &ModelConfig,
    place: TensorPlace,
    spec: &ParameterSpec,
) -> Result<LocalParameter, PlanError> {
    let held = |axis: Axis, size: usize| {
        hold(size, axis_unit(model, axis), mesh_axis(axis), place).ok_or_else(|| PlanError {
            parameter: spec.name.clone(),
            axis,
            units: size / axis_unit(model, axis),
            ranks: place.ranks,
        })
    };
    let columns = match (spec.axes.get(1), spec.shape.get(1)) {
        (Some(&axis), Some(&size)) => held(axis, size)?,
        _ => Held { range: 0..1, copies: place.ranks },
    };
    let mut parts = Vec::with_capacity(spec.parts.len());
    let mut row_start = 0;
    for part in &spec.parts {
        let rows = held(part.axis, part.row_count)?;
        // What neither its rows nor its columns cut is on all ranks.
        let copies = rows.copies.min(columns.copies);
        let local = LocalPart {
            hf_name: part.hf_name.clone(),
            shape: spec.part_shape(part),
            columns: columns.range.clone(),
            row_start,
            counts: place.rank.is_multiple_of(copies),
            rows: rows.range,
        };
        row_start += local.rows.len();
        parts.push(local);
    }
    let mut shape = vec![row_start];
    shape.extend(spec.shape.get(1).map(|_| columns.range.len()));
    Ok(LocalParameter { spec: spec.clone(), shape, parts })
}

/// A dimension of `size`, in units that stay whole.
fn hold(size: usize, unit: usize, over: Option<mesh::Axis>, place: TensorPlace) -> Option<Held> {
    let TensorPlace { ranks, rank, .. } = place;
    if over.is_none() {
        return Some(Held { range: 0..size, copies: ranks });
    }
    let units = size / unit.max(1);
    let (piece, index, copies) = if units.is_multiple_of(ranks) {
        (size / ranks, rank, 1)
    } else if ranks.is_multiple_of(units.max(1)) && units > 0 {
        (unit, rank / (ranks / units), ranks / units)
    } else {
        return None;
    };
    Some(Held { range: index * piece..(index + 1) * piece, copies })
}
