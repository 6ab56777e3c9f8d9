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

/// Names of the token that begins a text, in the order in which they are looked for.
const BOS_NAMES: [&str; 3] = ["<|begin_of_text|>", "<s>", "<|startoftext|>"];
/// Names of the token that ends a text.
const EOS_NAMES: [&str; 3] = ["<|end_of_text|>", "</s>", "<|endoftext|>"];

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

/// Writes the weights, `config.json`, `generation_config.json`, and, with a tokenizer,
/// `tokenizer.json` and `tokenizer_config.json` to `out`, which must not exist or be empty. The
/// folder is made beside its name and renamed when complete.
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
    let tokenizer = options.tokenizer.as_deref().map(AddedTokens::read).transpose()?;
    let extras = extras(options, dtype, tokenizer.as_ref());
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
    if let (Some(path), Some(tokenizer)) = (&options.tokenizer, &tokenizer) {
        std::fs::copy(path, folder.join("tokenizer.json"))
            .map_err(|error| FormatError::io("copy", path, error))?;
        let config = tokenizer.config(&extras);
        write("tokenizer_config.json", &format!("{config:#}\n"))?;
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

/// What transformers is told of a model beside its dimensions: the ids of begin and end of text are
/// the tokenizer's own, where it has them.
fn extras(options: &ExportOptions, dtype: Dtype, tokenizer: Option<&AddedTokens>) -> HfExtras {
    let find = |names| tokenizer.and_then(|tokenizer| tokenizer.first_of(names));
    HfExtras {
        max_positions: options.max_positions,
        dtype: dtype.torch_name().to_string(),
        bos_token_id: find(BOS_NAMES).or(options.bos_token_id),
        eos_token_ids: match find(EOS_NAMES) {
            Some(end) => vec![end],
            None => options.eos_token_ids.clone(),
        },
    }
}

/// The added tokens of a `tokenizer.json`: their text and id.
struct AddedTokens(Vec<(String, u32)>);

impl AddedTokens {
    fn read(path: &Path) -> Result<AddedTokens> {
        let text = std::fs::read(path).map_err(|error| FormatError::io("read", path, error))?;
        let tokenizer: Value = serde_json::from_slice(&text).map_err(|error| {
            FormatError::refused(path, format!("not a tokenizer.json: {error}"))
        })?;
        let added = tokenizer["added_tokens"].as_array().into_iter().flatten();
        let tokens = added.filter_map(|token| {
            let id = u32::try_from(token["id"].as_u64()?).ok()?;
            Some((token["content"].as_str()?.to_string(), id))
        });
        Ok(AddedTokens(tokens.collect()))
    }

    /// Id of the first of `names` that there is.
    fn first_of(&self, names: [&str; 3]) -> Option<u32> {
        names
            .iter()
            .find_map(|name| self.0.iter().find(|(text, _)| text == name))
            .map(|(_, id)| *id)
    }

    fn text_of(&self, id: u32) -> Option<&str> {
        self.0.iter().find(|(_, known)| *known == id).map(|(text, _)| text.as_str())
    }

    /// `tokenizer_config.json`. Without it transformers takes its Llama tokenizer by the model's
    /// type, which adds tokens of its own, with ids that the model has no embedding for.
    fn config(&self, extras: &HfExtras) -> Value {
        let mut config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": extras.max_positions,
            "clean_up_tokenization_spaces": false,
            // Without it token types come too, which a Llama's `generate` refuses.
            "model_input_names": ["input_ids", "attention_mask"],
        });
        let end = extras.eos_token_ids.first().copied();
        for (key, id) in [("bos_token", extras.bos_token_id), ("eos_token", end)] {
            if let Some(text) = id.and_then(|id| self.text_of(id)) {
                config[key] = json!(text);
            }
        }
        config
    }
}
