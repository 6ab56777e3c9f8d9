//! One target for each parser of what comes from outside: configs, messages, checkpoints, weights
//! of other programs, shards, tokenizers, a run's own files. A target takes any bytes and must not
//! panic, hang or take memory without bound; it says whether they were valid.
//!
//! Files go through a folder, as in use. Where a hash stands before what is of interest, the target
//! makes it right, as an attacker would.
#![expect(clippy::unwrap_used, reason = "a target that cannot be set up must stop")]

mod checkpoints;
mod files;
mod messages;

/// A parser under test.
pub struct Target {
    /// Its name: that of its folder in `corpus/` too.
    pub name: &'static str,
    /// Takes an input; whether it was valid.
    pub run: fn(&[u8]) -> bool,
    /// Valid inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "config", run: files::config, seeds: files::config_seeds },
    Target { name: "frames", run: messages::frames, seeds: messages::frame_seeds },
    Target { name: "sessions", run: messages::sessions, seeds: messages::session_seeds },
    Target { name: "joins", run: messages::joins, seeds: messages::join_seeds },
    Target { name: "store", run: messages::store, seeds: messages::store_seeds },
    Target {
        name: "checkpoint_index",
        run: |bytes| checkpoints::with(checkpoints::INDEX, bytes),
        seeds: || checkpoints::seeds(checkpoints::INDEX),
    },
    Target {
        name: "checkpoint_state",
        run: |bytes| checkpoints::with(checkpoints::STATE, bytes),
        seeds: || checkpoints::seeds(checkpoints::STATE),
    },
    Target {
        name: "checkpoint_manifest",
        run: |bytes| checkpoints::with(checkpoints::MANIFEST, bytes),
        seeds: || checkpoints::seeds(checkpoints::MANIFEST),
    },
    Target {
        name: "checkpoint_commit",
        run: |bytes| checkpoints::with(checkpoints::COMMIT, bytes),
        seeds: || checkpoints::seeds(checkpoints::COMMIT),
    },
    Target {
        name: "checkpoint_tensors",
        run: |bytes| checkpoints::with(checkpoints::TENSORS, bytes),
        seeds: || checkpoints::seeds(checkpoints::TENSORS),
    },
    Target { name: "bundle_manifest", run: checkpoints::bundle, seeds: checkpoints::bundle_seeds },
    Target {
        name: "hf_safetensors",
        run: |bytes| checkpoints::hf("model.safetensors", bytes),
        seeds: || checkpoints::hf_seeds("model.safetensors"),
    },
    Target {
        name: "hf_config",
        run: |bytes| checkpoints::hf("config.json", bytes),
        seeds: || checkpoints::hf_seeds("config.json"),
    },
    Target {
        name: "hf_index",
        run: |bytes| checkpoints::hf("model.safetensors.index.json", bytes),
        seeds: checkpoints::hf_index_seeds,
    },
    Target {
        name: "torch_pickle",
        run: |bytes| checkpoints::meta("consolidated.00.pth", bytes),
        seeds: || checkpoints::meta_seeds("consolidated.00.pth"),
    },
    Target {
        name: "meta_params",
        run: |bytes| checkpoints::meta("params.json", bytes),
        seeds: || checkpoints::meta_seeds("params.json"),
    },
    Target { name: "parquet_shard", run: files::shard, seeds: files::shard_seeds },
    Target { name: "parquet_documents", run: files::documents, seeds: files::document_seeds },
    Target { name: "json_documents", run: files::json_lines, seeds: files::json_line_seeds },
    Target { name: "data_manifest", run: files::manifest, seeds: files::manifest_seeds },
    Target { name: "tokenizer_json", run: files::tokenizer_json, seeds: files::tokenizer_seeds },
    Target { name: "tokenizer_model", run: files::tokenizer_model, seeds: files::model_seeds },
    Target { name: "events", run: files::events, seeds: files::event_seeds },
    Target { name: "metrics", run: files::metrics, seeds: files::metric_seeds },
];

/// The target of a name.
pub fn find(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

/// A folder of this process, made by `make` when it is first used.
fn folder(
    kept: &'static std::sync::OnceLock<tempfile::TempDir>,
    make: impl FnOnce(&std::path::Path),
) -> &'static std::path::Path {
    let made = kept.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        make(folder.path());
        folder
    });
    made.path()
}

/// A file of the repository.
fn fixture(path: &str) -> Vec<u8> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let path = root.join(path);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
