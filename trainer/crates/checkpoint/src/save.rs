//! Saving: every rank writes its share of what all of them hold.

use crate::error::Result;
use crate::views::{check_flat, dtype_of, views};
use checkpoint_format::share::{SharedTensor, rows_of_rank};
use checkpoint_format::{
    Barrier, Dtype, JointSave, Piece, Save, SaveReport, TensorBox, TrainState, names,
};
use std::path::Path;
use torch_shim::bytes::as_bytes;
use torch_shim::params::ParameterSet;
use torch_shim::tch::{Device, Tensor};

/// What to save. All ranks hold all of it (data parallelism), and each writes a share of equal
/// size.
#[derive(Debug)]
pub struct SaveRequest<'a> {
    /// The run's folder of checkpoints.
    pub checkpoints_dir: &'a Path,
    /// Optimizer steps done.
    pub step: u64,
    /// Generation of the run; an older one than another writer's is refused.
    pub generation: u64,
    /// This rank among those that save together.
    pub rank: usize,
    /// How many they are.
    pub world_size: usize,
    /// The weights.
    pub params: &'a ParameterSet,
    /// The optimizer's flat buffers, laid out like the parameters', by name (`m`, `v`).
    pub moments: &'a [(&'a str, &'a Tensor)],
    /// All that is not a tensor; rank 0's is written.
    pub state: TrainState,
    /// Newest checkpoints kept; at least 1.
    pub keep_last: usize,
    /// Checkpoints of every so many steps are kept for good; 0: none.
    pub keep_every_steps: u64,
}

/// A tensor that is to be written, in a flat buffer.
struct Source<'a> {
    flat: &'a Tensor,
    dtype: Dtype,
    name: String,
    shape: Vec<u64>,
    start: usize,
    row_elements: usize,
}

/// A part of a tensor that this rank writes, in CPU memory.
struct Share {
    elements: Tensor,
    dtype: Dtype,
    name: String,
    shape: Vec<u64>,
    region: TensorBox,
}

/// Writes a checkpoint together with the other ranks, commits it and removes old ones. `barrier`
/// waits for all ranks and is called the same number of times on each; it must be bounded in time.
///
/// # Errors
/// On the rank that failed its own error, with path and bytes; on the others
/// [`checkpoint_format::FormatError::NotCommitted`]. Nothing is left behind then, and older
/// checkpoints stay.
pub fn save(request: &SaveRequest<'_>, barrier: &mut Barrier<'_>) -> Result<SaveReport> {
    let mut result = Ok(());
    let (shares, total_bytes) = match shares(request) {
        Ok(shares) => shares,
        // The others must not wait for a rank whose tensors cannot be read: it takes part, with
        // nothing.
        Err(error) => {
            result = Err(error);
            (Vec::new(), 0)
        }
    };
    let mut pieces = Vec::with_capacity(shares.len());
    for share in &shares {
        match as_bytes(&share.elements) {
            Ok(data) => pieces.push(Piece {
                name: share.name.clone(),
                dtype: share.dtype,
                shape: share.shape.clone(),
                region: share.region.clone(),
                data,
            }),
            Err(error) => result = result.and(Err(error.into())),
        }
    }
    let mut state = request.state.clone();
    (state.step, state.generation) = (request.step, request.generation);
    state.world_size = request.world_size;
    let joint = JointSave {
        save: Save::new(request.checkpoints_dir, request.step, request.generation),
        rank: request.rank,
        world_size: request.world_size,
        total_bytes,
        pieces,
        state: &state,
        keep_last: request.keep_last,
        keep_every_steps: request.keep_every_steps,
    };
    let report = joint.run(barrier);
    result?;
    Ok(report?)
}

/// This rank's share, and the bytes of all.
fn shares(request: &SaveRequest<'_>) -> Result<(Vec<Share>, u64)> {
    let sources = sources(request)?;
    let shared: Vec<SharedTensor> = sources
        .iter()
        .map(|source| SharedTensor {
            rows: source.shape.first().copied().unwrap_or(1),
            row_bytes: (source.row_elements * source.dtype.size()) as u64,
        })
        .collect();
    let total_bytes = shared.iter().map(|tensor| tensor.rows * tensor.row_bytes).sum();
    let rows = rows_of_rank(&shared, request.rank, request.world_size);
    let mut shares = Vec::new();
    for (source, (first, count)) in sources.into_iter().zip(rows).filter(|(_, rows)| rows.1 > 0) {
        let start = source.start + first as usize * source.row_elements;
        let length = count as usize * source.row_elements;
        let elements = source.flat.f_narrow(0, start as i64, length as i64);
        let elements = elements.and_then(|elements| elements.f_to_device(Device::Cpu));
        shares.push(Share {
            elements: elements.map_err(torch_shim::ShimError::from)?,
            dtype: source.dtype,
            region: TensorBox::rows(&source.shape, first, count),
            name: source.name,
            shape: source.shape,
        });
    }
    Ok((shares, total_bytes))
}

/// All tensors of the checkpoint, in the same order on every rank.
fn sources<'a>(request: &SaveRequest<'a>) -> Result<Vec<Source<'a>>> {
    let params = request.params;
    let mut buffers = vec![(String::new(), params.flat_compute())];
    if params.has_compute_copy() {
        buffers.push((names::MASTER.to_string(), params.flat_master()));
    }
    for (name, flat) in request.moments {
        check_flat(params, name, flat)?;
        buffers.push((format!("{name}/"), flat));
    }
    let views = views(params);
    let mut sources = Vec::with_capacity(buffers.len() * views.len());
    for (prefix, flat) in buffers {
        let dtype = dtype_of(flat)?;
        sources.extend(views.iter().map(|view| Source {
            flat,
            dtype,
            name: format!("{prefix}{}", view.name),
            shape: view.shape.clone(),
            start: view.start,
            row_elements: view.row_elements,
        }));
    }
    Ok(sources)
}
