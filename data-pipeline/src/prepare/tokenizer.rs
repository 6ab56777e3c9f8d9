//! Loading a tokenizer and encoding documents with it.
//!
//! Hugging Face's `tokenizer.json` is brought in its canonical form and read by the pipeline of the
//! `tokenizers` crate; Meta's `tokenizer.model` is rewritten as such a file first, so that there is
//! one way to encode.

use super::{chunk, tiktoken};
use crate::digest::file_sha256;
use crate::error::{DataError, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};
use tokenizers::pipeline::{EncodeOptions, PipelineToken, PipelineTokenizer};

/// Names of the token that begins a document, in the order in which they are looked for.
const BOS_NAMES: [&str; 3] = ["<|begin_of_text|>", "<s>", "<|startoftext|>"];
/// Ids that a tokenizer can have, as many as `model.vocab_size` allows.
const MAX_VOCAB_SIZE: usize = 1 << 24;
/// Names of the token that ends a document.
const EOS_NAMES: [&str; 3] = ["<|end_of_text|>", "</s>", "<|endoftext|>"];

/// A tokenizer with the facts that shards record.
#[derive(Clone)]
pub struct Tokenizer {
    pipeline: PipelineTokenizer,
    options: EncodeOptions,
    /// Its file.
    pub path: PathBuf,
    /// SHA-256 of its file.
    pub sha256: String,
    /// Number of ids: one more than the largest.
    pub vocab_size: usize,
    /// Id that begins a document.
    pub bos_id: Option<u32>,
    /// Id that ends a document.
    pub eos_id: Option<u32>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` or, by its name's end, Meta's `tokenizer.model`.
    pub fn load(path: &Path) -> Result<Self> {
        let fail = |detail: String| DataError::Tokenizer { path: path.to_path_buf(), detail };
        if !path.is_file() {
            return Err(DataError::NotFound {
                what: "the tokenizer",
                path: path.to_path_buf(),
                hint: "make one with `phalanx data train-tokenizer`, or correct the path",
            });
        }
        let text = if path.extension().is_some_and(|end| end == "model") {
            tiktoken::to_tokenizer_json(path)?
        } else {
            std::fs::read_to_string(path)
                .map_err(|error| fail(format!("cannot be read as text: {error}")))?
        };
        let json = tokenizers::canonicalize_str(&text)
            .map_err(|error| fail(format!("is not a tokenizer.json: {error}")))?;
        Tokenizer::from_json(path, &json, file_sha256(path)?)
    }

    fn from_json(path: &Path, json: &str, sha256: String) -> Result<Self> {
        let fail = |detail: String| DataError::Tokenizer { path: path.to_path_buf(), detail };
        let value: Value =
            serde_json::from_str(json).map_err(|error| fail(format!("is no JSON: {error}")))?;
        let vocab_size = vocab_size(&value);
        if vocab_size == 0 {
            return Err(fail("has no vocabulary; only byte-pair encodings can be used".into()));
        }
        // The reader makes room for all of them.
        if vocab_size > MAX_VOCAB_SIZE {
            let largest = vocab_size - 1;
            return Err(fail(format!(
                "has an id of {largest}; the largest possible is {}",
                MAX_VOCAB_SIZE - 1
            )));
        }
        let pipeline = tokenizers::from_json(json)
            .map_err(|error| fail(format!("cannot be used: {error}")))?;
        let added = pipeline.get_added_vocabulary();
        let find = |names: [&str; 3]| names.iter().find_map(|name| added.token_to_id(name));
        let (bos_id, eos_id) = (find(BOS_NAMES), find(EOS_NAMES));
        // A special token spelled out in a document is text: it must not end the document.
        let options = EncodeOptions { encode_special_tokens: true, ..EncodeOptions::no_specials() };
        let path = path.to_path_buf();
        Ok(Tokenizer { pipeline, options, path, sha256, vocab_size, bos_id, eos_id })
    }

    /// Appends the ids of `text`, cut as Llama 3 cuts long texts, without special tokens.
    pub fn encode_into(&self, text: &str, ids: &mut Vec<PipelineToken>) -> Result<()> {
        chunk::chunks(text).try_for_each(|chunk| self.encode_chunk(chunk, ids))
    }

    /// Appends the ids of one chunk of a text.
    pub(super) fn encode_chunk(&self, chunk: &str, ids: &mut Vec<PipelineToken>) -> Result<()> {
        self.pipeline.encode_into(chunk, &self.options, ids).map_err(|error| DataError::Tokenizer {
            path: self.path.clone(),
            detail: format!("cannot encode a text of {} bytes: {error}", chunk.len()),
        })
    }

    /// The ids of `text`.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        self.encode_into(text, &mut ids)?;
        Ok(ids.into_iter().map(PipelineToken::id).collect())
    }

    /// The text of `ids`, special tokens spelled out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.pipeline.decode(ids, false).map_err(|error| DataError::Tokenizer {
            path: self.path.clone(),
            detail: format!("cannot decode {} ids: {error}", ids.len()),
        })
    }
}

/// One more than the largest id of a `tokenizer.json`, added tokens included.
fn vocab_size(json: &Value) -> usize {
    let vocab = json["model"]["vocab"].as_object();
    let ids = vocab.into_iter().flat_map(|vocab| vocab.values().filter_map(Value::as_u64));
    let added = json["added_tokens"].as_array();
    let added = added.into_iter().flatten().filter_map(|token| token["id"].as_u64());
    ids.chain(added)
        .max()
        .map_or(0, |largest| usize::try_from(largest).unwrap_or(usize::MAX).saturating_add(1))
}
