//! A folder in Hugging Face's layout as a source of weights: `config.json` and `model.safetensors`,
//! or several files with `model.safetensors.index.json`. The files are mapped, not read.

use crate::disk::{Folder, is_plain_name};
use crate::dtype::Dtype;
use crate::error::{FormatError, Result};
use crate::source::{self, TensorsInFile, WeightSource};
use model_spec::hf_config::{self, HfExtras};
use run_config::ModelConfig;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// A model's dimensions.
pub const CONFIG: &str = "config.json";
/// All weights in one file.
pub const SINGLE: &str = "model.safetensors";
/// Which file holds which weight.
pub const SHARD_INDEX: &str = "model.safetensors.index.json";
/// Largest JSON file that is read.
pub(crate) const MAX_JSON: u64 = 64 << 20;

/// A folder in Hugging Face's layout.
#[derive(Debug)]
pub struct HfSource {
    folder: Folder,
    model: ModelConfig,
    extras: HfExtras,
    files: Vec<TensorsInFile>,
    /// File of each weight.
    places: BTreeMap<String, usize>,
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

impl HfSource {
    /// Opens the folder and checks that it holds exactly the weights its `config.json` describes.
    ///
    /// # Errors
    /// [`FormatError::Io`], [`FormatError::Damaged`], [`FormatError::Refused`], naming the file or
    /// tensor.
    pub fn open(path: &Path) -> Result<HfSource> {
        let folder = open_folder(path)?;
        let config = read_text(&folder, CONFIG)?;
        let (model, extras) = hf_config::from_json(&config).map_err(|error| {
            FormatError::refused(&folder.path().join(CONFIG), error.to_string())
        })?;
        let (files, mut places) = if folder.has(SHARD_INDEX) {
            sharded(&folder)?
        } else {
            let file = TensorsInFile::safetensors(&folder, SINGLE)?;
            let places = file.names().map(|name| (name.to_string(), 0)).collect();
            (vec![file], places)
        };
        // Old exports carry RoPE's frequencies, which follow from the config; a tied head repeats
        // the embedding.
        places.retain(|name, _| !name.ends_with(".rotary_emb.inv_freq"));
        if model.tied_embeddings {
            drop_tied_head(&folder, &files, &mut places)?;
        }
        let source = HfSource { folder, model, extras, files, places };
        source::check_model(&source, &source.model)?;
        Ok(source)
    }

    /// What `config.json` says beside the dimensions.
    pub fn extras(&self) -> &HfExtras {
        &self.extras
    }
}

pub(crate) fn open_folder(path: &Path) -> Result<Folder> {
    let path = path.canonicalize().map_err(|error| FormatError::io("open", path, error))?;
    Folder::open(&path)
}

pub(crate) fn read_text(folder: &Folder, name: &str) -> Result<String> {
    let bytes = folder.read(name, MAX_JSON)?;
    String::from_utf8(bytes)
        .map_err(|_| FormatError::refused(&folder.path().join(name), "it is not UTF-8"))
}

type Places = BTreeMap<String, usize>;

fn sharded(folder: &Folder) -> Result<(Vec<TensorsInFile>, Places)> {
    let path = folder.path().join(SHARD_INDEX);
    let index: ShardIndex = serde_json::from_str(&read_text(folder, SHARD_INDEX)?)
        .map_err(|error| FormatError::refused(&path, error.to_string()))?;
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    let mut files = Vec::new();
    let mut numbers = BTreeMap::new();
    for name in names {
        if !is_plain_name(name) {
            return Err(FormatError::refused(&path, format!("{name:?} is not a file name")));
        }
        numbers.insert(name, files.len());
        files.push(TensorsInFile::safetensors(folder, name)?);
    }
    let mut places = BTreeMap::new();
    for (tensor, file) in &index.weight_map {
        let number = numbers[file];
        if files[number].get(tensor).is_none() {
            return Err(FormatError::refused(&path, format!("{tensor} is not in {file}")));
        }
        places.insert(tensor.clone(), number);
    }
    Ok((files, places))
}

fn drop_tied_head(folder: &Folder, files: &[TensorsInFile], places: &mut Places) -> Result<()> {
    let Some(head) = places.remove("lm_head.weight") else { return Ok(()) };
    let head = files[head].get("lm_head.weight");
    let embedding = places
        .get("model.embed_tokens.weight")
        .and_then(|file| files[*file].get("model.embed_tokens.weight"));
    if head.map(|(_, bytes)| bytes) == embedding.map(|(_, bytes)| bytes) {
        return Ok(());
    }
    Err(FormatError::refused(
        folder.path(),
        "config.json ties the head to the embedding, but lm_head.weight is not equal to it",
    ))
}

impl WeightSource for HfSource {
    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn model(&self) -> Option<&ModelConfig> {
        Some(&self.model)
    }

    fn names(&self) -> Vec<String> {
        self.places.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Result<(Vec<u64>, Dtype)> {
        let file = self.places.get(name).and_then(|file| self.files[*file].get(name));
        let (tensor, _) = file.ok_or_else(|| source::not_found(self.path(), name))?;
        Ok((tensor.shape.clone(), tensor.dtype))
    }

    fn read_rows(&self, name: &str, start: u64, count: u64, target: &mut [u8]) -> Result<()> {
        let file = self.places.get(name).and_then(|file| self.files[*file].get(name));
        let tensor = file.ok_or_else(|| source::not_found(self.path(), name))?;
        source::fill(name, target, source::rows(name, tensor, (start, count))?)
    }
}
