//! Saving: every rank writes its share of what it and its copies own, of the tensors themselves or
//! of a copy of them, so that training can go on meanwhile.

use crate::error::Result;
use crate::views::{View, check_owned, dtype, dtype_of, views};
use checkpoint_format::bundle::{BundleReport, HandOver, JointBundle, Meeting, NodeRanks};
use checkpoint_format::share::{SharedTensor, rows_of_rank};
use checkpoint_format::{
    Barrier, Dtype, JointSave, Piece, Save, SaveReport, TensorBox, TrainState, names,
};
use model_spec::LocalParameter;
use std::path::Path;
use torch_shim::bytes::as_bytes;
use torch_shim::params::ParameterSet;
use torch_shim::tch::{Device, Kind, TchError, Tensor, no_grad};

/// What to save. Ranks that own the same elements (replicas) each write a share of equal size.
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
    /// Which of the ranks that own the same elements this is.
    pub replica: usize,
    /// How many those are.
    pub replicas: usize,
    /// Elements of the whole model, for the check of free space.
    pub num_elements: u64,
    /// What the parameters were allocated from.
    pub held: &'a [LocalParameter],
    /// The weights.
    pub params: &'a ParameterSet,
    /// The optimizer's buffers, laid out like the master weights that are owned, by name (`m`,
    /// `v`).
    pub moments: &'a [(&'a str, &'a Tensor)],
    /// All that is not a tensor; rank 0's is written.
    pub state: TrainState,
    /// Newest checkpoints kept; at least 1.
    pub keep_last: usize,
    /// Checkpoints of every so many steps are kept for good; 0: none.
    pub keep_every_steps: u64,
}

/// Parts that are to be written of one buffer, under names with a prefix.
struct Source<'a> {
    buffer: &'a Tensor,
    kind: Kind,
    dtype: Dtype,
    prefix: String,
}

/// A part of a tensor that this rank writes, in CPU memory.
#[derive(Debug)]
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
    Snapshot::view(request).write(barrier)
}

/// What a rank writes of a checkpoint, ready to be written.
#[derive(Debug)]
pub struct Snapshot {
    save: Save,
    rank: usize,
    world_size: usize,
    shares: Vec<Share>,
    total_bytes: u64,
    /// Why the tensors could not be read.
    failed: Option<crate::CheckpointError>,
    state: TrainState,
    keep_last: usize,
    keep_every_steps: u64,
}

impl Snapshot {
    /// All that is to be saved, without a copy: the tensors must not change until it is written.
    pub fn view(request: &SaveRequest<'_>) -> Self {
        Self::new(request, false)
    }

    /// A copy of all that is to be saved: the tensors may change from then on.
    pub fn take(request: &SaveRequest<'_>) -> Self {
        Self::new(request, true)
    }

    fn new(request: &SaveRequest<'_>, is_copy: bool) -> Self {
        // The others must not wait for a rank whose tensors cannot be read: it takes part, with
        // nothing.
        let ((shares, total_bytes), failed) = match shares(request, is_copy) {
            Ok(shares) => (shares, None),
            Err(error) => ((Vec::new(), 0), Some(error)),
        };
        let mut state = request.state.clone();
        (state.step, state.generation) = (request.step, request.generation);
        state.world_size = request.world_size;
        Self {
            save: Save::new(request.checkpoints_dir, request.step, request.generation),
            rank: request.rank,
            world_size: request.world_size,
            shares,
            total_bytes,
            failed,
            state,
            keep_last: request.keep_last,
            keep_every_steps: request.keep_every_steps,
        }
    }

    /// As [`save`].
    ///
    /// # Errors
    /// As [`save`].
    pub fn write(self, barrier: &mut Barrier<'_>) -> Result<SaveReport> {
        let (pieces, result) = pieces(&self.shares, self.failed);
        let joint = JointSave {
            save: self.save,
            rank: self.rank,
            world_size: self.world_size,
            total_bytes: self.total_bytes,
            pieces,
            state: &self.state,
            keep_last: self.keep_last,
            keep_every_steps: self.keep_every_steps,
        };
        let report = joint.run(barrier);
        result?;
        Ok(report?)
    }

    /// Writes it into the memory of this rank's node, which has these ranks of the run, where each
    /// node keeps its own ranks' part.
    ///
    /// # Errors
    /// As [`save`].
    pub fn write_bundle(
        self,
        run: &str,
        node: NodeRanks,
        meet: &mut Meeting<'_>,
        hand_over: &mut HandOver<'_>,
    ) -> Result<BundleReport> {
        let (pieces, result) = pieces(&self.shares, self.failed);
        let joint = JointBundle {
            run,
            save: self.save,
            rank: self.rank,
            node,
            total_bytes: self.total_bytes,
            pieces,
            state: &self.state,
        };
        // One that could not be read must not be taken for one that has nothing to write.
        let is_whole = result.is_ok();
        let report = joint.run(&mut |is_well| meet(is_well && is_whole), hand_over);
        result?;
        Ok(report?)
    }
}

/// What is written of the shares, and why not all of it.
fn pieces(
    shares: &[Share],
    failed: Option<crate::CheckpointError>,
) -> (Vec<Piece<'_>>, Result<()>) {
    let mut result = failed.map_or(Ok(()), Err);
    let mut pieces = Vec::with_capacity(shares.len());
    for share in shares {
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
    (pieces, result)
}

/// This rank's share, and the bytes of the whole checkpoint.
fn shares(request: &SaveRequest<'_>, is_copy: bool) -> Result<(Vec<Share>, u64)> {
    let sources = sources(request)?;
    let views = views(request.held, request.params);
    let views: Vec<&View> = views.iter().filter(|view| view.counts).collect();
    let all: Vec<(&Source<'_>, &View)> =
        sources.iter().flat_map(|source| views.iter().map(move |view| (source, *view))).collect();
    let shared = |&(source, view): &(&Source<'_>, &View)| SharedTensor {
        rows: view.rows(),
        row_bytes: (view.row_elements() * source.dtype.size()) as u64,
    };
    let shared: Vec<SharedTensor> = all.iter().map(shared).collect();
    let rows = rows_of_rank(&shared, request.replica, request.replicas);
    let mut shares = Vec::new();
    for ((source, view), (first, count)) in all.into_iter().zip(rows).filter(|(_, rows)| rows.1 > 0)
    {
        let start = view.start + first as usize * view.row_elements();
        let length = count as usize * view.row_elements();
        let elements = source.buffer.f_narrow(0, start as i64, length as i64);
        let elements = elements.and_then(|elements| elements.f_to_kind(source.kind));
        let elements = elements.and_then(|elements| elements.f_to_device(Device::Cpu));
        let is_shared =
            source.kind == source.buffer.kind() && source.buffer.device() == Device::Cpu;
        let elements = elements.and_then(|elements| match is_copy && is_shared {
            true => copied(&elements),
            false => Ok(elements),
        });
        shares.push(Share {
            elements: elements.map_err(torch_shim::ShimError::from)?,
            dtype: source.dtype,
            region: view.rows_of(first, count),
            name: format!("{}{}", source.prefix, view.name),
            shape: view.shape.clone(),
        });
    }
    let element_bytes: usize = sources.iter().map(|source| source.dtype.size()).sum();
    Ok((shares, request.num_elements * element_bytes as u64))
}

fn copied(elements: &Tensor) -> std::result::Result<Tensor, TchError> {
    let mut copy = elements.f_empty_like()?;
    no_grad(|| copy.f_copy_(elements))?;
    Ok(copy)
}

/// All buffers of the checkpoint, in the same order on every rank.
fn sources<'a>(request: &SaveRequest<'a>) -> Result<Vec<Source<'a>>> {
    let params = request.params;
    let (master, compute) = (params.owned_master(), params.compute_kind());
    let source = |prefix: String, buffer: &'a Tensor, kind| -> Result<Source<'a>> {
        Ok(Source { buffer, kind, dtype: dtype(kind)?, prefix })
    };
    // What computes is the master weights, rounded.
    let mut sources = vec![source(String::new(), master, compute)?];
    if params.has_compute_copy() {
        sources.push(source(names::MASTER.to_string(), master, master.kind())?);
    }
    for (name, buffer) in request.moments {
        check_owned(params, name, buffer)?;
        dtype_of(buffer)?;
        sources.push(source(format!("{name}/"), buffer, buffer.kind())?);
    }
    Ok(sources)
}
