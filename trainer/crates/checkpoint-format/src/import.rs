//! Writing a source of weights as the checkpoint of step 0 of a new run, without changing a bit.

use crate::boxes::TensorBox;
use crate::dtype::Dtype;
use crate::error::{FormatError, Result};
use crate::manifest::TrainState;
use crate::names;
use crate::save::{Piece, Save};
use crate::source::WeightSource;
use std::path::{Path, PathBuf};

/// Bytes of weights held in memory at a time.
const AT_ONCE: u64 = 1 << 30;

/// Writes all weights of `source` as step 0 in `run_dir/checkpoints`; `extra` goes to the state.
/// Returns the checkpoint's folder and its bytes.
///
/// # Errors
/// [`FormatError::Refused`] where the run has checkpoints; whatever the source or the disk says.
pub fn import(
    source: &dyn WeightSource,
    run_dir: &Path,
    extra: serde_json::Value,
) -> Result<(PathBuf, u64)> {
    let checkpoints = run_dir.join(names::CHECKPOINTS);
    let found = crate::scan::scan(&checkpoints)?;
    if let Some(found) = found.committed.last() {
        let reason = format!("it has a checkpoint of step {}; name a new run", found.step);
        return Err(FormatError::refused(run_dir, reason));
    }
    let mut weights = Vec::new();
    for name in source.names() {
        let (shape, dtype) = source.info(&name)?;
        let size = shape.iter().product::<u64>() * dtype.size() as u64;
        weights.push((name, shape, dtype, size));
    }
    let save = Save::new(&checkpoints, 0, 0);
    let mut state = TrainState::at(0);
    state.model = serde_json::to_value(source.model())
        .map_err(|error| FormatError::Request(format!("cannot write the model: {error}")))?;
    state.extra = extra;
    save.begin(weights.iter().map(|weight| weight.3).sum())?;
    let written =
        write_groups(source, &save, &weights).and_then(|groups| save.commit(groups, &state));
    match written {
        Ok(bytes) => Ok((save.folder(), bytes)),
        Err(error) => {
            save.abandon();
            Err(error)
        }
    }
}

type Listed = (String, Vec<u64>, Dtype, u64);

/// Each group of at most [`AT_ONCE`] bytes is written as the share of a rank of its own.
fn write_groups(source: &dyn WeightSource, save: &Save, weights: &[Listed]) -> Result<usize> {
    let mut rank = 0;
    let mut group: Vec<Listed> = Vec::new();
    let mut bytes = 0;
    for weight in weights {
        if !group.is_empty() && bytes + weight.3 > AT_ONCE {
            write_group(source, save, rank, &std::mem::take(&mut group))?;
            rank += 1;
            bytes = 0;
        }
        bytes += weight.3;
        group.push(weight.clone());
    }
    write_group(source, save, rank, &group)?;
    Ok(rank + 1)
}

fn write_group(
    source: &dyn WeightSource,
    save: &Save,
    rank: usize,
    group: &[Listed],
) -> Result<()> {
    let mut buffers = Vec::with_capacity(group.len());
    for (name, shape, _, size) in group {
        let mut buffer = vec![0; *size as usize];
        source.read_rows(name, 0, shape.first().copied().unwrap_or(1), &mut buffer)?;
        buffers.push(buffer);
    }
    let pieces: Vec<Piece<'_>> = group
        .iter()
        .zip(&buffers)
        .map(|((name, shape, dtype, _), data)| Piece {
            name: name.clone(),
            dtype: *dtype,
            shape: shape.clone(),
            region: TensorBox::whole(shape),
            data,
        })
        .collect();
    save.write_rank(rank, &pieces).map(|_| ())
}
