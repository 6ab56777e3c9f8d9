//! Where weights come from: a Hugging Face folder, a Meta folder or a checkpoint, all under unfused
//! Hugging Face names.

use crate::boxes::TensorBox;
use crate::disk::Folder;
use crate::dtype::{Dtype, convert};
use crate::error::{FormatError, Result};
use crate::mapped::Mapped;
use crate::names;
use crate::read::Checkpoint;
use run_config::ModelConfig;
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::Path;

/// A source of weights.
pub trait WeightSource: Send + Sync {
    /// For messages: where it is.
    fn path(&self) -> &Path;

    /// The model it says it holds, where it says so.
    fn model(&self) -> Option<&ModelConfig>;

    /// Names of all weights.
    fn names(&self) -> Vec<String>;

    /// Shape and type of a weight.
    ///
    /// # Errors
    /// [`FormatError::NotFound`].
    fn info(&self, name: &str) -> Result<(Vec<u64>, Dtype)>;

    /// Fills `target` with rows `row_start..row_start + row_count` of a weight, in its own type.
    ///
    /// # Errors
    /// [`FormatError::NotFound`]; [`FormatError::Request`] where rows or buffer do not fit;
    /// [`FormatError::Damaged`].
    fn read_rows(
        &self,
        name: &str,
        row_start: u64,
        row_count: u64,
        target: &mut [u8],
    ) -> Result<()>;

    /// Fills `target` with a part of a weight, in its own type.
    ///
    /// # Errors
    /// As [`WeightSource::read_rows`].
    fn read_box(&self, name: &str, region: &TensorBox, target: &mut [u8]) -> Result<()> {
        let (shape, dtype) = self.info(name)?;
        let first = region.offsets.first().copied().unwrap_or(0);
        let count = region.lengths.first().copied().unwrap_or(1);
        let rows = TensorBox::rows(&shape, first, count);
        if rows == *region {
            return self.read_rows(name, first, count, target);
        }
        let bytes = rows.num_elements().and_then(|n| n.checked_mul(dtype.size() as u64));
        let fits = region.fits(&shape) && shape.len() > 1;
        let bytes = bytes.filter(|_| fits).ok_or_else(|| {
            FormatError::Request(format!("{name}: {region:?} is not in shape {shape:?}"))
        })?;
        let mut whole = vec![0; bytes as usize];
        self.read_rows(name, first, count, &mut whole)?;
        crate::boxes::copy_part(region, (&whole, &rows), (target, region), dtype.size())
            .map_err(|reason| FormatError::Request(format!("{name}: {reason}")))
    }
}

/// As [`WeightSource::read_box`], converted to `dtype`.
///
/// # Errors
/// As there; [`FormatError::Request`] where the types cannot be converted.
pub fn read_box_as(
    source: &dyn WeightSource,
    name: &str,
    region: &TensorBox,
    dtype: Dtype,
    target: &mut [u8],
) -> Result<()> {
    let (_, stored) = source.info(name)?;
    if stored == dtype {
        return source.read_box(name, region, target);
    }
    let mut raw = vec![0; target.len() / dtype.size() * stored.size()];
    source.read_box(name, region, &mut raw)?;
    convert(stored, &raw, dtype, target)
        .map_err(|reason| FormatError::Request(format!("{name}: {reason}")))
}

/// As [`WeightSource::read_rows`], converted to `dtype`.
///
/// # Errors
/// As there; [`FormatError::Request`] where the types cannot be converted.
pub fn read_rows_as(
    source: &dyn WeightSource,
    name: &str,
    (row_start, row_count): (u64, u64),
    dtype: Dtype,
    target: &mut [u8],
) -> Result<()> {
    let (_, stored) = source.info(name)?;
    if stored == dtype {
        return source.read_rows(name, row_start, row_count, target);
    }
    let mut raw = vec![0; target.len() / dtype.size() * stored.size()];
    source.read_rows(name, row_start, row_count, &mut raw)?;
    convert(stored, &raw, dtype, target)
        .map_err(|reason| FormatError::Request(format!("{name}: {reason}")))
}

/// Checks that a source holds exactly the weights of a model.
///
/// # Errors
/// [`FormatError::Refused`], naming the first weight that is absent, of another shape, or unknown.
pub fn check_model(source: &dyn WeightSource, model: &ModelConfig) -> Result<()> {
    let expected: BTreeMap<String, Vec<u64>> = model_spec::hf_tensors(model)
        .into_iter()
        .map(|tensor| (tensor.name, tensor.shape.into_iter().map(|size| size as u64).collect()))
        .collect();
    let refused = |reason: String| {
        FormatError::refused(
            source.path(),
            format!("{reason}; is it a checkpoint of another model?"),
        )
    };
    for (name, shape) in &expected {
        let found = source.info(name).map_err(|_| {
            let tied = name == "lm_head.weight";
            let hint = if tied {
                " (set model.tied_embeddings where it shares its embedding)"
            } else {
                ""
            };
            refused(format!("tensor {name} of shape {shape:?} is missing{hint}"))
        })?;
        if found.0 != *shape {
            return Err(refused(format!(
                "tensor {name} has shape {:?}, the model's has {shape:?}",
                found.0
            )));
        }
    }
    match source.names().into_iter().find(|name| !expected.contains_key(name)) {
        Some(name) => Err(refused(format!("tensor {name} is not in the model"))),
        None => Ok(()),
    }
}

/// Tensors of one file in memory, by name.
#[derive(Debug)]
pub(crate) struct TensorsInFile {
    mapped: Mapped,
    tensors: BTreeMap<String, RawTensor>,
}

/// A tensor without gaps in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RawTensor {
    pub shape: Vec<u64>,
    pub dtype: Dtype,
    pub range: [usize; 2],
}

impl TensorsInFile {
    /// Of a safetensors file.
    pub fn safetensors(folder: &Folder, name: &str) -> Result<TensorsInFile> {
        let path = folder.path().join(name);
        let mapped = Mapped::new(&folder.open_file(name)?, &path)?;
        let (header_size, header) = SafeTensors::read_metadata(mapped.bytes())
            .map_err(|error| FormatError::refused(&path, format!("not safetensors: {error}")))?;
        let mut tensors = BTreeMap::new();
        for (name, info) in header.tensors() {
            let dtype = Dtype::from_safetensors(info.dtype).ok_or_else(|| {
                FormatError::refused(&path, format!("{name} has the type {:?}", info.dtype))
            })?;
            let shape = info.shape.iter().map(|size| *size as u64).collect();
            let start = 8 + header_size;
            let range = [start + info.data_offsets.0, start + info.data_offsets.1];
            tensors.insert(name, RawTensor { shape, dtype, range });
        }
        Ok(TensorsInFile { mapped, tensors })
    }

    /// Of a file that torch saved.
    pub fn torch(folder: &Folder, name: &str) -> Result<TensorsInFile> {
        let path = folder.path().join(name);
        let mapped = Mapped::new(&folder.open_file(name)?, &path)?;
        let tensors = crate::torch_file::tensors(mapped.bytes())
            .map_err(|reason| FormatError::refused(&path, reason))?;
        Ok(TensorsInFile { mapped, tensors })
    }

    /// Names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// A tensor and its bytes.
    pub fn get(&self, name: &str) -> Option<(&RawTensor, &[u8])> {
        let tensor = self.tensors.get(name)?;
        Some((tensor, self.mapped.bytes().get(tensor.range[0]..tensor.range[1])?))
    }
}

/// The bytes of rows of a tensor that lies whole in memory.
pub(crate) fn rows<'a>(
    name: &str,
    (tensor, bytes): (&RawTensor, &'a [u8]),
    (row_start, row_count): (u64, u64),
) -> Result<&'a [u8]> {
    let all = tensor.shape.first().copied().unwrap_or(1);
    let row_bytes = (bytes.len() as u64).checked_div(all).unwrap_or(0);
    let end = row_start.checked_add(row_count).filter(|end| *end <= all);
    end.and_then(|end| bytes.get((row_start * row_bytes) as usize..(end * row_bytes) as usize))
        .ok_or_else(|| {
            FormatError::Request(format!(
                "{name}: rows {row_start}, {row_count} of them, are not in shape {:?}",
                tensor.shape
            ))
        })
}

/// Copies where sizes agree.
pub(crate) fn fill(name: &str, target: &mut [u8], source: &[u8]) -> Result<()> {
    if target.len() != source.len() {
        return Err(FormatError::Request(format!(
            "{name}: a buffer of {} bytes for {} bytes",
            target.len(),
            source.len()
        )));
    }
    target.copy_from_slice(source);
    Ok(())
}

/// The error for a weight that is not there.
pub(crate) fn not_found(path: &Path, name: &str) -> FormatError {
    let path = path.to_path_buf();
    FormatError::NotFound { what: format!("tensor {name}"), path, hint: String::new() }
}

/// The weights of a checkpoint: the master copy where there is one, else what was computed with.
#[derive(Debug)]
pub struct CheckpointSource {
    checkpoint: Checkpoint,
    model: Option<ModelConfig>,
}

impl CheckpointSource {
    /// Of an open checkpoint.
    pub fn new(checkpoint: Checkpoint) -> CheckpointSource {
        let model = serde_json::from_value(checkpoint.state().model.clone()).ok();
        CheckpointSource { checkpoint, model }
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    fn stored_name(&self, name: &str) -> String {
        let master = format!("{}{name}", names::MASTER);
        if self.checkpoint.tensors().contains_key(&master) { master } else { name.to_string() }
    }
}

impl WeightSource for CheckpointSource {
    fn path(&self) -> &Path {
        self.checkpoint.path()
    }

    fn model(&self) -> Option<&ModelConfig> {
        self.model.as_ref()
    }

    fn names(&self) -> Vec<String> {
        let prefixes = [names::MASTER, names::FIRST_MOMENT, names::SECOND_MOMENT];
        let is_weight = |name: &&String| !prefixes.iter().any(|prefix| name.starts_with(prefix));
        self.checkpoint.tensors().keys().filter(is_weight).cloned().collect()
    }

    fn info(&self, name: &str) -> Result<(Vec<u64>, Dtype)> {
        let entry = self.checkpoint.tensor(&self.stored_name(name))?;
        Ok((entry.shape.clone(), entry.dtype))
    }

    fn read_rows(
        &self,
        name: &str,
        row_start: u64,
        row_count: u64,
        target: &mut [u8],
    ) -> Result<()> {
        let name = self.stored_name(name);
        let region = TensorBox::rows(&self.checkpoint.tensor(&name)?.shape, row_start, row_count);
        self.checkpoint.read_box(&name, &region, target)
    }

    fn read_box(&self, name: &str, region: &TensorBox, target: &mut [u8]) -> Result<()> {
        self.checkpoint.read_box(&self.stored_name(name), region, target)
    }
}
