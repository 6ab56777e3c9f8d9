//! Loading: any checkpoint into any rank's tensors, whatever ranks wrote it.

use crate::error::{CheckpointError, Result};
use crate::views::{View, check_owned, dtype_of, views};
use checkpoint_format::source::{CheckpointSource, read_box_as};
use checkpoint_format::{Checkpoint, Dtype, TensorBox, TrainState, WeightSource, parallel};
use model_spec::{HfTensor, LocalParameter};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Mutex;
use torch_shim::ShimError;
use torch_shim::bytes::as_bytes_mut;
use torch_shim::params::ParameterSet;
use torch_shim::tch::{Device, Tensor, no_grad_guard};

/// Rows are read in pieces of about this many bytes, so that a large tensor is shared by all
/// threads.
const PIECE_BYTES: usize = 16 << 20;

/// What a rank loads into.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// The whole model's tensors: a checkpoint of another one is refused.
    pub whole: &'a [HfTensor],
    /// What the parameters were allocated from.
    pub held: &'a [LocalParameter],
    /// The weights.
    pub params: &'a ParameterSet,
}

/// Loads what a rank owns of a checkpoint, whatever ranks wrote it: master weights (from
/// `master/NAME` where there is one, else from `NAME`, converted where the types differ), the
/// compute copy, and the optimizer's buffers (`m`, `v`), each element's bytes checked on the way.
///
/// # Errors
/// [`CheckpointError::OtherModel`], [`CheckpointError::NoOptimizerState`], or what the files say.
pub fn load(
    step_dir: &Path,
    target: Target<'_>,
    moments: &[(&str, &Tensor)],
) -> Result<TrainState> {
    let source = CheckpointSource::new(Checkpoint::open(step_dir)?);
    let checkpoint = source.checkpoint();
    check_model(&source, target.whole)?;
    for (name, buffer) in moments {
        check_owned(target.params, name, buffer)?;
        for HfTensor { name: weight, .. } in target.whole {
            let tensor = format!("{name}/{weight}");
            if !checkpoint.tensors().contains_key(&tensor) {
                let path = step_dir.to_path_buf();
                return Err(CheckpointError::NoOptimizerState { path, tensor });
            }
        }
    }
    load_weights(&source, target)?;
    let views = views(target.held, target.params);
    for (name, buffer) in moments {
        // A moment is never kept as a master copy: its name is its own.
        fill(&source, &views, &format!("{name}/"), buffer)?;
    }
    Ok(checkpoint.state().clone())
}

/// Loads only the weights, from a checkpoint or another model's files, into what is owned of the
/// master weights, and refreshes the compute copy.
///
/// # Errors
/// [`CheckpointError::OtherModel`], or what the files say.
pub fn load_weights(source: &dyn WeightSource, target: Target<'_>) -> Result<()> {
    check_model(source, target.whole)?;
    let views = views(target.held, target.params);
    fill(source, &views, "", target.params.owned_master())?;
    target.params.refresh_compute()?;
    Ok(())
}

/// Both have the same tensors with the same shapes.
fn check_model(source: &dyn WeightSource, expected: &[HfTensor]) -> Result<()> {
    let other = |tensor: &str, found: String, expected: String| {
        let (path, tensor) = (source.path().to_path_buf(), tensor.to_string());
        Err(CheckpointError::OtherModel { path, tensor, found, expected })
    };
    for HfTensor { name, shape, .. } in expected {
        let shape: Vec<u64> = shape.iter().map(|&size| size as u64).collect();
        match source.info(name) {
            Ok((found, _)) if found == shape => {}
            Ok((found, _)) => {
                let found = format!("has shape {found:?}");
                return other(name, found, format!("its shape is {shape:?}"));
            }
            Err(_) => {
                return other(name, "is missing".to_string(), format!("its shape is {shape:?}"));
            }
        }
    }
    let known: BTreeSet<&str> = expected.iter().map(|tensor| tensor.name.as_str()).collect();
    match source.names().iter().find(|name| !known.contains(name.as_str())) {
        Some(name) => {
            let found = match source.info(name) {
                Ok((shape, _)) => format!("has shape {shape:?}"),
                Err(_) => "exists".to_string(),
            };
            other(name, found, "it does not exist".to_string())
        }
        None => Ok(()),
    }
}

/// A part of a tensor, and the memory it goes to.
struct Destination<'a> {
    name: String,
    region: TensorBox,
    memory: Mutex<&'a mut [u8]>,
}

/// Fills a buffer, all threads reading.
fn fill(source: &dyn WeightSource, views: &[View], prefix: &str, buffer: &Tensor) -> Result<()> {
    let dtype = dtype_of(buffer)?;
    let on_cpu = buffer.device() == Device::Cpu;
    let mut memory = if on_cpu {
        buffer.shallow_clone()
    } else {
        buffer
            .f_zeros_like()
            .and_then(|zeros| zeros.f_to_device(Device::Cpu))
            .map_err(ShimError::from)?
    };
    let destinations = destinations(views, prefix, dtype, as_bytes_mut(&mut memory)?);
    parallel::for_each(&destinations, |part| {
        let mut memory = part.memory.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        read_box_as(source, &part.name, &part.region, dtype, &mut memory)
    })?;
    drop(destinations);
    if !on_cpu {
        let _guard = no_grad_guard();
        buffer.shallow_clone().f_copy_(&memory).map_err(ShimError::from)?;
    }
    Ok(())
}

/// Cuts a buffer's bytes into the parts to be read; views rise and do not overlap.
fn destinations<'a>(
    views: &[View],
    prefix: &str,
    dtype: Dtype,
    memory: &'a mut [u8],
) -> Vec<Destination<'a>> {
    let mut destinations = Vec::new();
    let mut rest = memory;
    let mut at = 0;
    for view in views {
        let start = view.start * dtype.size();
        let (_, tail) = std::mem::take(&mut rest).split_at_mut(start - at);
        let (mut mine, tail) = tail.split_at_mut(view.num_elements() * dtype.size());
        (at, rest) = (start + mine.len(), tail);
        let row_bytes = view.row_elements() * dtype.size();
        let at_once = (PIECE_BYTES / row_bytes.max(1)).clamp(1, view.rows().max(1) as usize);
        let mut first = 0;
        while first < view.rows() {
            let count = (at_once as u64).min(view.rows() - first);
            let (piece, tail) = mine.split_at_mut(count as usize * row_bytes);
            mine = tail;
            let name = format!("{prefix}{}", view.name);
            let region = view.rows_of(first, count);
            destinations.push(Destination { name, region, memory: Mutex::new(piece) });
            first += count;
        }
    }
    destinations
}
