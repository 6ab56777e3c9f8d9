//! Writing a source of weights as a Hugging Face folder, byte for byte as transformers itself
//! would.

use crate::disk::{self, Points};
use crate::dtype::Dtype;
use crate::error::{FormatError, Result};
use crate::hf;
use crate::source::{WeightSource, read_rows_as};
use crate::tensor_file::{HeaderEntry, TensorFile};
use model_spec::hf_config::{self, HfExtras};
use run_config::ModelConfig;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Bytes converted and written at a time.
const PIECE: u64 = 8 << 20;
/// Exports have no failpoints.
const NO_POINTS: Points = Points { write: "", fsync: "" };

/// How to export.
#[derive(Clone, Debug)]
pub struct ExportOptions {
    /// The model, for `config.json`.
    pub model: ModelConfig,
    /// Type of the weights; `None`: as they are stored.
    pub dtype: Option<Dtype>,
    /// Largest file in bytes; a larger model is written as several with an index.
    pub max_shard_bytes: u64,
    /// `max_position_embeddings`: the longest sequence the model was trained on.
    pub max_positions: usize,
    /// Id of the token that begins a text, where the tokenizer does not tell.
    pub bos_token_id: Option<u32>,
    /// Ids of the tokens that end a text, where the tokenizer does not tell.
    pub eos_token_ids: Vec<u32>,
    /// `tokenizer.json`, copied where given; the ids of begin and end of text are looked up in it.
    pub tokenizer: Option<PathBuf>,
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exported {
    /// Weights.
    pub tensors: usize,
    /// Files they are in.
    pub files: usize,
    /// Bytes of those.
    pub bytes: u64,
}

struct Weight {
    rows: u64,
    entry: HeaderEntry,
}

/// Writes the weights, `config.json`, `generation_config.json` and `tokenizer.json` to `out`, which
/// must not exist or be empty. The folder is made beside its name and renamed when complete.
///
/// # Errors
/// [`FormatError::Refused`] where `out` has files in it; whatever the source or the disk says.
pub fn export_hf(
    source: &dyn WeightSource,
    out: &Path,
    options: &ExportOptions,
) -> Result<Exported> {
    crate::source::check_model(source, &options.model)?;
    if out.read_dir().is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(FormatError::refused(out, "the folder is not empty; name another"));
    }
    let mut name = out.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.tmp", std::process::id()));
    let unfinished = out.with_file_name(name);
    std::fs::create_dir_all(&unfinished)
        .map_err(|error| FormatError::io("create", &unfinished, error))?;
    let exported = write_folder(source, &unfinished, options);
    let renamed = exported.and_then(|exported| {
        std::fs::rename(&unfinished, out).map_err(|error| FormatError::io("create", out, error))?;
        Ok(exported)
    });
    if renamed.is_err() {
        let _ = std::fs::remove_dir_all(&unfinished);
    }
    renamed
}

fn write_folder(
    source: &dyn WeightSource,
    folder: &Path,
    options: &ExportOptions,
) -> Result<Exported> {
    let mut weights = Vec::new();
    for name in source.names() {
        let (shape, stored) = source.info(&name)?;
        let dtype = options.dtype.unwrap_or(stored);
        let rows = shape.first().copied().unwrap_or(1);
        let size = shape.iter().product::<u64>() * dtype.size() as u64;
        weights.push(Weight { rows, entry: HeaderEntry { name, dtype, shape, size } });
    }
    // The order of transformers' writer: larger elements first, then by name.
    weights.sort_by(|a, b| {
        let key = |weight: &Weight| std::cmp::Reverse(weight.entry.dtype.size());
        key(a).cmp(&key(b)).then_with(|| a.entry.name.cmp(&b.entry.name))
    });
    let tensors = weights.len();
    let dtype = weights.first().map_or(Dtype::F32, |weight| weight.entry.dtype);
    let files = write_weights(source, folder, weights, options.max_shard_bytes)?;
    let extras = extras(options, dtype)?;
    let write = |name: &str, text: &str| {
        disk::write_file(&folder.join(name), text.as_bytes(), NO_POINTS).map(|_| ())
    };
    write(hf::CONFIG, &hf_config::to_json(&options.model, &extras))?;
    let mut generation = json!({ "_from_model_config": true });
    if let Some(bos) = extras.bos_token_id {
        generation["bos_token_id"] = json!(bos);
    }
    match extras.eos_token_ids.as_slice() {
        [] => {}
        [one] => generation["eos_token_id"] = json!(one),
        several => generation["eos_token_id"] = json!(several),
    }
    write("generation_config.json", &format!("{generation:#}\n"))?;
    if let Some(tokenizer) = &options.tokenizer {
        std::fs::copy(tokenizer, folder.join("tokenizer.json"))
            .map_err(|error| FormatError::io("copy", tokenizer, error))?;
    }
    Ok(Exported { tensors, files: files.len(), bytes: files.iter().sum() })
}

/// Returns the sizes of the files.
fn write_weights(
    source: &dyn WeightSource,
    folder: &Path,
    weights: Vec<Weight>,
    max_shard_bytes: u64,
) -> Result<Vec<u64>> {
    let total: u64 = weights.iter().map(|weight| weight.entry.size).sum();
    let mut shards: Vec<Vec<Weight>> = Vec::new();
    let mut shard_bytes = 0;
    for weight in weights {
        match shards.last_mut() {
            Some(shard) if shard_bytes + weight.entry.size <= max_shard_bytes => {
                shard_bytes += weight.entry.size;
                shard.push(weight);
            }
            _ => {
                shard_bytes = weight.entry.size;
                shards.push(vec![weight]);
            }
        }
    }
    if let [shard] = &shards[..] {
        return Ok(vec![write_shard(source, &folder.join(hf::SINGLE), shard)?]);
    }
    let mut sizes = Vec::new();
    let mut weight_map = serde_json::Map::new();
    for (number, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", number + 1, shards.len());
        sizes.push(write_shard(source, &folder.join(&name), shard)?);
        for weight in shard {
            weight_map.insert(weight.entry.name.clone(), Value::from(name.clone()));
        }
    }
    let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    let text = format!("{index:#}\n");
    disk::write_file(&folder.join(hf::SHARD_INDEX), text.as_bytes(), NO_POINTS)?;
    Ok(sizes)
}

fn write_shard(source: &dyn WeightSource, path: &Path, shard: &[Weight]) -> Result<u64> {
    let entries: Vec<HeaderEntry> = shard.iter().map(|weight| weight.entry.clone()).collect();
    let mut file = TensorFile::create(path, &entries, &[("format", "pt")], NO_POINTS)?;
    let mut buffer = Vec::new();
    for Weight { rows, entry } in shard {
        let row_bytes = entry.size.checked_div(*rows).unwrap_or(0);
        let at_once = PIECE.checked_div(row_bytes).unwrap_or(1).clamp(1, (*rows).max(1));
        for start in (0..*rows).step_by(at_once as usize) {
            let count = at_once.min(rows - start);
            buffer.resize((count * row_bytes) as usize, 0);
            read_rows_as(source, &entry.name, (start, count), entry.dtype, &mut buffer)?;
            file.write(&buffer)?;
        }
    }
    Ok(file.finish()?.0)
}

/// Token ids of the tokenizer's own begin and end of text.
fn extras(options: &ExportOptions, dtype: Dtype) -> Result<HfExtras> {
    let mut extras = HfExtras {
        max_positions: options.max_positions,
        dtype: dtype.torch_name().to_string(),
        bos_token_id: options.bos_token_id,
        eos_token_ids: options.eos_token_ids.clone(),
    };
    let Some(path) = &options.tokenizer else { return Ok(extras) };
    let text = std::fs::read(path).map_err(|error| FormatError::io("read", path, error))?;
    let tokenizer: Value = serde_json::from_slice(&text)
        .map_err(|error| FormatError::refused(path, format!("not a tokenizer.json: {error}")))?;
    let id_of = |content: &str| {
        let added = tokenizer["added_tokens"].as_array()?;
        let token = added.iter().find(|token| token["content"] == content)?;
        token["id"].as_u64().and_then(|id| u32::try_from(id).ok())
    };
    let (begin, end) = (id_of("<|begin_of_text|>"), id_of("<|end_of_text|>"));
    extras.bos_token_id = begin.or_else(|| id_of("<s>")).or(extras.bos_token_id);
    if let Some(end) = end.or_else(|| id_of("</s>")) {
        extras.eos_token_ids = vec![end];
    }
    Ok(extras)
}
