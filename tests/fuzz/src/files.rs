//! Configs, data, tokenizers, and a run's own files.

use crate::{fixture, folder};
use data_pipeline::prepare::{DocumentOptions, Tokenizer, documents, inspect};
use data_pipeline::shards::manifest::ScanParams;
use data_pipeline::shards::{Manifest, ShardInfo, ShardWriter};
use launcher::runs;
use rank_protocol::jsonl::{Appender, read, read_metrics};
use rank_protocol::{RunDir, StepReport};
use run_config::RunConfig;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use tempfile::TempDir;

/// Lines after the first `--set` are overrides. A config that is taken comes back as it was.
pub fn config(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let mut parts = text.split("\n--set ");
    let text = parts.next().unwrap_or_default();
    let overrides: Vec<String> = parts.map(str::to_owned).collect();
    match RunConfig::from_yaml_str(text, Path::new("/base"), &overrides) {
        Err(problems) => {
            drop(problems.to_string());
            false
        }
        Ok(loaded) => {
            let yaml = loaded.config.to_yaml();
            let again = RunConfig::from_yaml_str(&yaml, Path::new("/base"), &[]);
            let again = again.unwrap_or_else(|problems| panic!("{yaml}\n{problems}"));
            assert!(again.config.to_yaml() == yaml, "it does not come back:\n{yaml}");
            true
        }
    }
}

pub fn config_seeds() -> Vec<Vec<u8>> {
    let quickstart = fixture("configs/runs/quickstart.yaml");
    let sets = b"\n--set training.steps=7\n--set parallelism={tensor: 2}\n--set a.b=c";
    vec![quickstart.clone(), [&quickstart[..], sets].concat()]
}

/// Writes a file of a folder that this process has, and gives its path.
fn file(name: &str, bytes: &[u8]) -> PathBuf {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let path = folder(&FOLDER, |_| {}).join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, bytes).unwrap();
    path
}

/// A shard, every token of which is read.
pub fn shard(bytes: &[u8]) -> bool {
    let path = file("shard/a.parquet", bytes);
    let pattern = path.to_string_lossy().into_owned();
    drop(inspect::inspect(&pattern));
    let verified = inspect::verify(&pattern, None, Some(512)).unwrap_or_default();
    !verified.is_empty() && verified.iter().all(|shard| shard.outcome.is_ok())
}

pub fn shard_seeds() -> Vec<Vec<u8>> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let info = ShardInfo {
        layout: 1,
        writer: "phalanx".into(),
        tokenizer_sha256: "0".repeat(64),
        vocab_size: 512,
        bos_id: Some(0),
        eos_id: Some(1),
        packing: "document".into(),
    };
    let mut writer = ShardWriter::create(&path, &info, 64).unwrap();
    for document in 1..20_u32 {
        writer.push((0..document).map(|at| (at * 7 + document) % 512)).unwrap();
    }
    writer.finish().unwrap();
    vec![std::fs::read(path).unwrap()]
}

fn all_documents(path: &Path) -> bool {
    let Ok(documents) = documents::open(path, &DocumentOptions::default()) else { return false };
    let mut count = 0;
    for document in documents {
        if document.is_err() {
            return false;
        }
        count += 1;
    }
    count > 0
}

/// A parquet file of another program, with a column of texts; our own shards have none.
pub fn documents(bytes: &[u8]) -> bool {
    let path = file("documents/a.parquet", bytes);
    // A file without the column is read as far as its schema.
    all_documents(&path) | inspect::inspect(&path.to_string_lossy()).is_ok()
}

pub fn document_seeds() -> Vec<Vec<u8>> {
    shard_seeds()
}

pub fn json_lines(bytes: &[u8]) -> bool {
    all_documents(&file("documents/a.jsonl", bytes))
}

pub fn json_line_seeds() -> Vec<Vec<u8>> {
    vec![b"{\"text\": \"one\"}\n{\"id\": 3, \"text\": \"t\\u0077o\"}\n".to_vec()]
}

/// A shard, and the file that its manifest is cached in.
fn cached() -> (PathBuf, PathBuf, ScanParams) {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let params = ScanParams { validation_fraction: 0.1, bin_len: None, vocab_size: 512 };
    let folder = folder(&FOLDER, |folder| {
        let shard = folder.join("a.parquet");
        std::fs::write(&shard, &shard_seeds()[0]).unwrap();
        Manifest::load(&[shard], &params).unwrap();
    });
    let shard = folder.join("a.parquet");
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false if path != shard => return (shard, path, params),
                false => {}
            }
        }
    }
    panic!("the manifest is not cached")
}

/// The cache of a manifest, with the checksum that it ends with.
pub fn manifest(bytes: &[u8]) -> bool {
    let (shard, cache, params) = cached();
    let checksum = xxhash_rust::xxh3::xxh3_64(bytes).to_le_bytes();
    std::fs::write(cache, [bytes, &checksum].concat()).unwrap();
    Manifest::load(&[shard], &params).is_ok()
}

pub fn manifest_seeds() -> Vec<Vec<u8>> {
    let (_, cache, _) = cached();
    let bytes = std::fs::read(cache).unwrap();
    vec![bytes[..bytes.len().saturating_sub(8)].to_vec()]
}

fn tokenizer(name: &str, bytes: &[u8]) -> bool {
    let Ok(tokenizer) = Tokenizer::load(&file(name, bytes)) else { return false };
    drop(tokenizer.encode("The war is over. \u{1f600} 1234 <|endoftext|>"));
    drop(tokenizer.decode(&[0, 1, 300, u32::MAX]));
    true
}

pub fn tokenizer_json(bytes: &[u8]) -> bool {
    tokenizer("tokenizer.json", bytes)
}

pub fn tokenizer_model(bytes: &[u8]) -> bool {
    tokenizer("tokenizer.model", bytes)
}

/// All bytes, and three tokens of several.
pub fn model_seeds() -> Vec<Vec<u8>> {
    let bytes = (0..=255_u8).map(|byte| vec![byte]);
    let tokens = bytes.chain(["th", "the", " t"].map(|token| token.as_bytes().to_vec()));
    let line = |(rank, token): (usize, Vec<u8>)| format!("{} {rank}\n", base64(&token));
    vec![tokens.enumerate().map(line).collect::<String>().into_bytes()]
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for piece in bytes.chunks(3) {
        let at = |index: usize| u32::from(piece.get(index).copied().unwrap_or(0));
        let word = at(0) << 16 | at(1) << 8 | at(2);
        for digit in 0..4 {
            let is_there = digit <= piece.len();
            let value = (word >> (18 - 6 * digit) & 63) as usize;
            out.push(if is_there { char::from(DIGITS[value]) } else { '=' });
        }
    }
    out
}

/// What stands for each byte in a byte-level vocabulary: itself where it can be seen, else the next
/// character after all bytes.
fn byte_characters() -> impl Iterator<Item = char> {
    let is_seen = |byte: &u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let num_unseen = (0..256).filter(|byte| !is_seen(byte)).count() as u32;
    (0..256).filter(is_seen).chain(256..256 + num_unseen).filter_map(char::from_u32)
}

pub fn tokenizer_seeds() -> Vec<Vec<u8>> {
    let bytes = byte_characters().map(String::from);
    let tokens = ["<|endoftext|>", "ab", "abc"].map(str::to_owned).into_iter().chain(bytes);
    let vocab: serde_json::Map<String, Value> =
        tokens.zip(0_u32..).map(|(token, id)| (token, id.into())).collect();
    let special = json!({
        "id": 0, "content": "<|endoftext|>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true,
    });
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special],
        "normalizer": null,
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": true },
        "post_processor": null,
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
            "use_regex": true },
        "model": { "type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "vocab": vocab, "merges": [["a", "b"], ["ab", "c"]] },
    });
    vec![serde_json::to_vec(&tokenizer).unwrap()]
}

/// A run's events, and its past as they tell it.
pub fn events(bytes: &[u8]) -> bool {
    let path = file("run/events.jsonl", bytes);
    let run = RunDir::new(path.parent().unwrap());
    drop(runs::history(&run));
    drop(Appender::open(&path));
    read::<Value>(&path).is_ok_and(|events| !events.is_empty())
}

pub fn event_seeds() -> Vec<Vec<u8>> {
    let events = [
        json!({"time": "2026-01-02T03:04:05.678Z", "kind": "run_started", "generation": 0,
            "run_id": "x", "steps": 20, "has_auto_threads": true}),
        json!({"time": "2026-01-02T03:04:06Z", "kind": "nodes_placed", "generation": 1,
            "nodes": ["a", "b"]}),
        json!({"kind": "checkpoint_committed", "generation": 1, "step": 5}),
        json!({"kind": "went_back", "generation": 1, "step": 5, "first_generation": 2}),
        json!({"kind": "ledger", "generation": 1, "step": 7, "until": "2026-01-02T03:04:07Z",
            "wall_s": 3.5, "seconds": {"first_time_steps": 2.5}}),
        json!({"kind": "run_finished", "generation": 1, "exit_code": 0, "reason": "done"}),
    ];
    vec![events.map(|event| format!("{event}\n")).concat().into_bytes()]
}

pub fn metrics(bytes: &[u8]) -> bool {
    let path = file("run/metrics.jsonl", bytes);
    let is_valid = read_metrics(&path).is_ok_and(|reports| !reports.is_empty());
    drop(Appender::open(&path));
    is_valid
}

pub fn metric_seeds() -> Vec<Vec<u8>> {
    let line = |(step, generation): (u64, u64)| {
        let report = StepReport { step, generation, loss: 2.5, ..StepReport::default() };
        format!("{}\n", serde_json::to_string(&report).unwrap())
    };
    vec![[(1, 1), (2, 1), (2, 2)].map(line).concat().into_bytes()]
}
