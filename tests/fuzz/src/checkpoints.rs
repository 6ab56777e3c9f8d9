//! Checkpoints of ours, and weights of other programs.

use crate::{fixture, folder};
use checkpoint_format::bundle::{BUNDLE_VERSION, BundleManifest, NodeRanks};
use checkpoint_format::checksum::{Checksum, sha256_hex};
use checkpoint_format::hf::HfSource;
use checkpoint_format::manifest::FileEntry;
use checkpoint_format::meta::MetaSource;
use checkpoint_format::scan::scan;
use checkpoint_format::{Checkpoint, Dtype, Piece, Save, TensorBox, TrainState, WeightSource};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::OnceLock;
use tempfile::TempDir;

pub const INDEX: &str = "index.json";
pub const STATE: &str = "state.json";
pub const MANIFEST: &str = "MANIFEST.json";
pub const COMMIT: &str = "COMMIT";
pub const TENSORS: &str = "rank-00001-000.safetensors";
/// Most bytes of a tensor that are read.
const MAX_READ: u64 = 1 << 20;

/// A checkpoint of two ranks.
fn save(folder: &Path) {
    let data: Vec<u8> = (0..64).collect();
    let save = Save::new(folder, 1, 1);
    save.begin(4096).unwrap();
    for rank in 0..2 {
        let half = &data[rank * 32..(rank + 1) * 32];
        let region = TensorBox { offsets: vec![4 * rank as u64, 0], lengths: vec![4, 4] };
        let name = "model.norm.weight".to_owned();
        let mut pieces =
            vec![Piece { name, dtype: Dtype::Bf16, shape: vec![8, 4], region, data: half }];
        if rank == 0 {
            let region = TensorBox { offsets: vec![], lengths: vec![] };
            let (name, dtype) = ("scalar".to_owned(), Dtype::I64);
            pieces.push(Piece { name, dtype, shape: vec![], region, data: &data[..8] });
        }
        save.write_rank(rank, &pieces).unwrap();
    }
    save.commit(2, &TrainState { world_size: 2, ..TrainState::at(1) }).unwrap();
}

fn checkpoints() -> &'static Path {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    folder(&FOLDER, save)
}

/// What stood in a file of the checkpoint before anything was changed.
fn original(name: &str) -> Vec<u8> {
    static KEPT: OnceLock<TempDir> = OnceLock::new();
    std::fs::read(folder(&KEPT, save).join("step-0000001").join(name)).unwrap()
}

/// The checkpoint with these bytes in the place of a file, and with the hashes that follow.
pub fn with(name: &str, bytes: &[u8]) -> bool {
    let is_valid = forged(name, bytes);
    for name in [name, MANIFEST, COMMIT] {
        std::fs::write(checkpoints().join("step-0000001").join(name), original(name)).unwrap();
    }
    is_valid
}

fn forged(name: &str, bytes: &[u8]) -> bool {
    let newest = checkpoints().join("step-0000001");
    std::fs::write(newest.join(name), bytes).unwrap();
    let manifest = match name {
        COMMIT | MANIFEST => None,
        _ => {
            let mut manifest: Value = serde_json::from_slice(&original(MANIFEST)).unwrap();
            let (size, checksum) = (bytes.len(), Checksum::of(bytes).to_string());
            manifest["files"][name] = json!({ "size": size, "checksum": checksum });
            Some(serde_json::to_vec(&manifest).unwrap())
        }
    };
    if let Some(manifest) = &manifest {
        std::fs::write(newest.join(MANIFEST), manifest).unwrap();
    }
    if name != COMMIT {
        let manifest = manifest.as_deref().unwrap_or(bytes);
        std::fs::write(newest.join(COMMIT), format!("{}\n", sha256_hex(manifest))).unwrap();
    }
    drop(scan(checkpoints()));
    let Ok(checkpoint) = Checkpoint::open(&newest) else { return false };
    for (name, entry) in checkpoint.tensors() {
        let size = entry.num_bytes().filter(|size| *size <= MAX_READ);
        let mut target = vec![0; size.unwrap_or(0) as usize];
        drop(checkpoint.read_box(name, &TensorBox::whole(&entry.shape), &mut target));
    }
    checkpoint.verify().is_ok()
}

pub fn seeds(name: &str) -> Vec<Vec<u8>> {
    vec![original(name)]
}

/// The manifest of a bundle that comes from another node, with the hash that follows.
pub fn bundle(bytes: &[u8]) -> bool {
    let commit = format!("{}\n", sha256_hex(bytes));
    let Ok(manifest) = BundleManifest::sealed(Path::new("x"), commit.as_bytes(), bytes) else {
        return false;
    };
    let name = manifest.folder();
    assert!(manifest.files.keys().all(|name| !name.contains('/')) && !name.contains('/'));
    drop((manifest.bytes(), manifest.check(Path::new("x"), INDEX, bytes)));
    true
}

pub fn bundle_seeds() -> Vec<Vec<u8>> {
    let node = NodeRanks { place: 1, places: 2, first: 1, count: 1, world_size: 2 };
    let entry = FileEntry { size: 5, checksum: Checksum::of(b"bytes") };
    let files = [INDEX, STATE, TENSORS].map(|name| (name.to_owned(), entry)).into();
    let (version, run) = (BUNDLE_VERSION, "run-1".to_owned());
    let manifest = BundleManifest { version, run, step: 5, generation: 3, node, files };
    vec![serde_json::to_vec(&manifest).unwrap()]
}

const META: &str = "trainer/crates/checkpoint-format/tests/meta";

fn read_all(source: &dyn WeightSource) {
    for name in source.names() {
        let Ok((shape, dtype)) = source.info(&name) else { continue };
        let bytes = shape.iter().try_fold(dtype.size() as u64, |all, n| all.checked_mul(*n));
        let Some(bytes) = bytes.filter(|bytes| *bytes <= MAX_READ) else { continue };
        let rows = shape.first().copied().unwrap_or(1);
        drop(source.read_rows(&name, 0, rows, &mut vec![0; bytes as usize]));
    }
}

/// What `body` says while these bytes stand in the place of a file.
fn replaced(folder: &Path, name: &str, bytes: &[u8], body: impl FnOnce() -> bool) -> bool {
    let before = std::fs::read(folder.join(name)).unwrap_or_default();
    std::fs::write(folder.join(name), bytes).unwrap();
    let is_valid = body();
    std::fs::write(folder.join(name), before).unwrap();
    is_valid
}

/// A Hugging Face folder with these bytes in the place of a file.
pub fn hf(name: &str, bytes: &[u8]) -> bool {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let folder = folder(&FOLDER, |folder| {
        for file in ["model.safetensors", "config.json"] {
            std::fs::write(folder.join(file), fixture(&format!("{META}/hf/{file}"))).unwrap();
        }
    });
    let is_valid = replaced(folder, name, bytes, || {
        HfSource::open(folder).inspect(|source| read_all(source)).is_ok()
    });
    let _ = std::fs::remove_file(folder.join("model.safetensors.index.json"));
    is_valid
}

pub fn hf_seeds(name: &str) -> Vec<Vec<u8>> {
    vec![fixture(&format!("{META}/hf/{name}"))]
}

/// All tensors in the one file.
pub fn hf_index_seeds() -> Vec<Vec<u8>> {
    let file = fixture(&format!("{META}/hf/model.safetensors"));
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&file[8..8 + length]).unwrap();
    let names = header.as_object().unwrap().keys().filter(|name| *name != "__metadata__");
    let map: serde_json::Map<String, Value> =
        names.map(|name| (name.clone(), "model.safetensors".into())).collect();
    vec![serde_json::to_vec(&json!({ "metadata": {}, "weight_map": map })).unwrap()]
}

/// Meta's folder with these bytes in the place of a file.
pub fn meta(name: &str, bytes: &[u8]) -> bool {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let folder = folder(&FOLDER, |folder| {
        for file in ["consolidated.00.pth", "params.json"] {
            std::fs::write(folder.join(file), fixture(&format!("{META}/one/{file}"))).unwrap();
        }
    });
    replaced(folder, name, bytes, || {
        MetaSource::open(folder).inspect(|source| read_all(source)).is_ok()
    })
}

pub fn meta_seeds(name: &str) -> Vec<Vec<u8>> {
    vec![fixture(&format!("{META}/one/{name}"))]
}
