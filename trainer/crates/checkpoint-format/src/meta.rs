//! A folder in Meta's layout as a source of weights: `params.json` and `consolidated.NN.pth` (or
//! `.safetensors`), one file per tensor-parallel rank of Meta's own code.
//!
//! Meta's RoPE turns neighbouring pairs, Hugging Face's the two halves of a head. So row `(head,
//! half, i)` of Hugging Face's q and k projections is row `(head, i, half)` of Meta's; rows are
//! reordered as they are read.

use crate::dtype::Dtype;
use crate::error::{FormatError, Result};
use crate::hf::{open_folder, read_text};
use crate::source::{self, RawTensor, TensorsInFile, WeightSource};
use crate::{boxes, disk::Folder};
use run_config::ModelConfig;
use std::collections::BTreeMap;
use std::path::Path;

/// A model's dimensions.
const PARAMS: &str = "params.json";

/// A folder in Meta's layout.
#[derive(Debug)]
pub struct MetaSource {
    folder: Folder,
    model: ModelConfig,
    files: Vec<TensorsInFile>,
    weights: BTreeMap<String, Weight>,
}

/// A weight, under its Hugging Face name.
#[derive(Debug)]
struct Weight {
    meta_name: String,
    shape: Vec<u64>,
    dtype: Dtype,
    split: Split,
    /// Rows of a head, where they are reordered.
    head_dim: Option<u64>,
}

/// How the files share a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Split {
    /// Each holds all of it.
    Whole,
    /// Each holds some rows.
    Rows,
    /// Each holds some columns.
    Columns,
}

impl MetaSource {
    /// Opens the folder and checks that it holds exactly the weights its `params.json` describes.
    ///
    /// # Errors
    /// [`FormatError::Io`], [`FormatError::Damaged`], [`FormatError::Refused`], naming the file or
    /// tensor.
    pub fn open(path: &Path) -> Result<MetaSource> {
        let folder = open_folder(path)?;
        let files = open_files(&folder)?;
        let mut source_names: Vec<&str> =
            files[0].names().filter(|name| *name != "rope.freqs").collect();
        let tied = is_tied(&files);
        if tied {
            source_names.retain(|name| *name != "output.weight");
        }
        let vocab_rows = files[0].get("tok_embeddings.weight").and_then(|(t, _)| t.shape.first());
        let vocab_rows = vocab_rows.map_or(0, |rows| *rows as usize * files.len());
        let params = read_text(&folder, PARAMS)?;
        let model =
            model_spec::meta_params::from_json(&params, tied, vocab_rows).map_err(|error| {
                FormatError::refused(&folder.path().join(PARAMS), error.to_string())
            })?;
        let mut weights = BTreeMap::new();
        for tensor in model_spec::hf_tensors(&model) {
            let shape: Vec<u64> = tensor.shape.iter().map(|size| *size as u64).collect();
            let weight = Weight::find(&folder, &files, &tensor.name, shape, model.head_dim as u64)?;
            source_names.retain(|name| *name != weight.meta_name);
            weights.insert(tensor.name, weight);
        }
        if let Some(name) = source_names.first() {
            return Err(FormatError::refused(
                folder.path(),
                format!("tensor {name} is not in a model with the dimensions of {PARAMS}"),
            ));
        }
        Ok(MetaSource { folder, model, files, weights })
    }
}

fn open_files(folder: &Folder) -> Result<Vec<TensorsInFile>> {
    for extension in ["safetensors", "pth"] {
        let name = |number: usize| format!("consolidated.{number:02}.{extension}");
        let single = format!("consolidated.{extension}");
        let names: Vec<String> = if folder.has(&single) {
            vec![single]
        } else {
            (0..100).map(name).take_while(|name| folder.has(name)).collect()
        };
        if names.is_empty() {
            continue;
        }
        return names
            .iter()
            .map(|name| match extension {
                "pth" => TensorsInFile::torch(folder, name),
                _ => TensorsInFile::safetensors(folder, name),
            })
            .collect();
    }
    let reason =
        "it has no consolidated.00.pth, consolidated.safetensors or consolidated.00.safetensors";
    Err(FormatError::refused(folder.path(), reason))
}

/// Whether the head is absent or repeats the embedding.
fn is_tied(files: &[TensorsInFile]) -> bool {
    files.iter().all(|file| match (file.get("output.weight"), file.get("tok_embeddings.weight")) {
        (None, _) => true,
        (Some(head), Some(embedding)) => head.1 == embedding.1,
        (Some(_), None) => false,
    })
}

/// Meta's name of a weight, and whether its rows are reordered.
fn meta_name(hf_name: &str) -> Option<(String, bool)> {
    let fixed = match hf_name {
        "model.embed_tokens.weight" => Some("tok_embeddings.weight"),
        "model.norm.weight" => Some("norm.weight"),
        "lm_head.weight" => Some("output.weight"),
        _ => None,
    };
    if let Some(fixed) = fixed {
        return Some((fixed.to_string(), false));
    }
    let (layer, rest) = hf_name.strip_prefix("model.layers.")?.split_once('.')?;
    let (meta, reordered) = match rest {
        "self_attn.q_proj.weight" => ("attention.wq.weight", true),
        "self_attn.k_proj.weight" => ("attention.wk.weight", true),
        "self_attn.v_proj.weight" => ("attention.wv.weight", false),
        "self_attn.o_proj.weight" => ("attention.wo.weight", false),
        "mlp.gate_proj.weight" => ("feed_forward.w1.weight", false),
        "mlp.up_proj.weight" => ("feed_forward.w3.weight", false),
        "mlp.down_proj.weight" => ("feed_forward.w2.weight", false),
        "input_layernorm.weight" => ("attention_norm.weight", false),
        "post_attention_layernorm.weight" => ("ffn_norm.weight", false),
        _ => return None,
    };
    Some((format!("layers.{layer}.{meta}"), reordered))
}

impl Weight {
    fn find(
        folder: &Folder,
        files: &[TensorsInFile],
        hf_name: &str,
        shape: Vec<u64>,
        head_dim: u64,
    ) -> Result<Weight> {
        let refused = |reason: String| FormatError::refused(folder.path(), reason);
        let (meta_name, reordered) = meta_name(hf_name)
            .ok_or_else(|| refused(format!("{hf_name} has no name in Meta's layout")))?;
        let mut shards = Vec::new();
        for (number, file) in files.iter().enumerate() {
            let (tensor, _) = file.get(&meta_name).ok_or_else(|| {
                refused(format!(
                    "tensor {meta_name} of shape {shape:?} is missing in file {number}"
                ))
            })?;
            shards.push(tensor);
        }
        let first = shards[0];
        let split = split_of(&first.shape, &shape, shards.len() as u64).ok_or_else(|| {
            refused(format!(
                "tensor {meta_name} has shape {:?} in each of {} files, the model's is {shape:?}",
                first.shape,
                shards.len()
            ))
        })?;
        let same = |shard: &&RawTensor| shard.shape == first.shape && shard.dtype == first.dtype;
        if !shards.iter().all(same) {
            return Err(refused(format!("the files disagree on shape or type of {meta_name}")));
        }
        let dtype = first.dtype;
        let head_dim = reordered.then_some(head_dim);
        Ok(Weight { meta_name, shape, dtype, split, head_dim })
    }

    /// The row in Meta's order.
    fn meta_row(&self, row: u64) -> u64 {
        let Some(head_dim) = self.head_dim else { return row };
        let (head, within) = (row / head_dim, row % head_dim);
        let (half, pair) = (within / (head_dim / 2), within % (head_dim / 2));
        head * head_dim + 2 * pair + half
    }
}

fn split_of(shard: &[u64], whole: &[u64], count: u64) -> Option<Split> {
    if shard == whole {
        return Some(Split::Whole);
    }
    match (shard, whole) {
        ([rows, columns], [all_rows, all_columns]) => {
            if columns == all_columns && rows.checked_mul(count) == Some(*all_rows) {
                Some(Split::Rows)
            } else if rows == all_rows && columns.checked_mul(count) == Some(*all_columns) {
                Some(Split::Columns)
            } else {
                None
            }
        }
        _ => None,
    }
}

impl WeightSource for MetaSource {
    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn model(&self) -> Option<&ModelConfig> {
        Some(&self.model)
    }

    fn names(&self) -> Vec<String> {
        self.weights.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Result<(Vec<u64>, Dtype)> {
        let weight = self.weights.get(name).ok_or_else(|| source::not_found(self.path(), name))?;
        Ok((weight.shape.clone(), weight.dtype))
    }

    fn read_rows(&self, name: &str, start: u64, count: u64, target: &mut [u8]) -> Result<()> {
        let absent = || source::not_found(self.path(), name);
        let weight = self.weights.get(name).ok_or_else(absent)?;
        let shards: Option<Vec<_>> =
            self.files.iter().map(|file| file.get(&weight.meta_name)).collect();
        let shards = shards.ok_or_else(absent)?;
        if weight.split == Split::Whole && weight.head_dim.is_none() {
            return source::fill(name, target, source::rows(name, shards[0], (start, count))?);
        }
        let row_elements: u64 = weight.shape.iter().skip(1).product();
        let row_bytes = row_elements as usize * weight.dtype.size();
        let all = boxes::TensorBox::rows(&weight.shape, start, count);
        if !all.fits(&weight.shape) || target.len() != row_bytes * count as usize {
            return Err(FormatError::Request(format!(
                "{name}: {count} rows from {start}, in a buffer of {} bytes, do not fit {:?}",
                target.len(),
                weight.shape
            )));
        }
        for (row, out) in (start..).zip(target.chunks_exact_mut(row_bytes.max(1))) {
            let row = weight.meta_row(row);
            match weight.split {
                Split::Whole => {
                    source::fill(name, out, source::rows(name, shards[0], (row, 1))?)?;
                }
                Split::Rows => {
                    let rows_each = shards[0].0.shape[0];
                    let shard = shards[(row / rows_each) as usize];
                    source::fill(name, out, source::rows(name, shard, (row % rows_each, 1))?)?;
                }
                Split::Columns => {
                    let piece = row_bytes / shards.len();
                    for (shard, out) in shards.iter().zip(out.chunks_exact_mut(piece)) {
                        source::fill(name, out, source::rows(name, *shard, (row, 1))?)?;
                    }
                }
            }
        }
        Ok(())
    }
}
