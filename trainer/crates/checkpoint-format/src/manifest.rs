//! `MANIFEST.json` and `state.json`.

use crate::checksum::Checksum;
use crate::error::Result;
use crate::index::Coverage;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// Version of `MANIFEST.json`.
pub const MANIFEST_VERSION: u32 = 1;
/// Version of `state.json`.
pub const STATE_VERSION: u32 = 1;

/// Every file of a checkpoint, and what the index adds up to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`MANIFEST_VERSION`].
    pub version: u32,
    /// The step.
    pub step: u64,
    /// The generation of the run that wrote it.
    pub generation: u64,
    /// Files by name; all but `MANIFEST.json` and `COMMIT`.
    pub files: BTreeMap<String, FileEntry>,
    /// What the index adds up to.
    pub coverage: Coverage,
}

impl Manifest {
    /// From the bytes of a `MANIFEST.json` and of its `COMMIT`, wherever they come from. `path` is
    /// its own, for messages.
    ///
    /// # Errors
    /// [`crate::FormatError::Damaged`] where `commit` is not its hash;
    /// [`crate::FormatError::Refused`] where it is no manifest, or names what is no plain file.
    pub fn sealed(path: &Path, commit: &[u8], bytes: &[u8]) -> Result<Manifest> {
        crate::read::checked_manifest(path, commit, bytes)
    }
}

/// A file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Bytes.
    pub size: u64,
    /// Of all of them.
    pub checksum: Checksum,
}

/// Where training stands: all that is not a tensor. Equal on all ranks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// [`STATE_VERSION`].
    pub version: u32,
    /// Optimizer steps done.
    pub step: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Where the data stream stands, in the words of the data pipeline.
    #[serde(default)]
    pub data_cursor: serde_json::Value,
    /// The mesh it was written on; for people, never read back.
    #[serde(default)]
    pub mesh: serde_json::Value,
    /// Generation of the run.
    #[serde(default)]
    pub generation: u64,
    /// Ranks it was written by.
    #[serde(default)]
    pub world_size: usize,
    /// Learning rate of the last step.
    #[serde(default)]
    pub learning_rate: f64,
    /// Seed of the run, from which all random numbers follow.
    #[serde(default)]
    pub seed: u64,
    /// Steps skipped so far: their loss or gradient was not finite, or jumped.
    #[serde(default)]
    pub skipped_steps: u64,
    /// Hash of the resolved config.
    #[serde(default)]
    pub config_hash: String,
    /// Hash of the model's dimensions.
    #[serde(default)]
    pub model_hash: String,
    /// The build that wrote it.
    #[serde(default)]
    pub build_hash: String,
    /// The resolved model config (a `run_config::ModelConfig`), for the export.
    #[serde(default)]
    pub model: serde_json::Value,
    /// What else a writer wants back.
    #[serde(default)]
    pub extra: serde_json::Value,
}

impl TrainState {
    /// The state after `step` updates, all else empty.
    pub fn at(step: u64) -> TrainState {
        TrainState {
            version: STATE_VERSION,
            step,
            tokens: 0,
            data_cursor: serde_json::Value::Null,
            mesh: serde_json::Value::Null,
            generation: 0,
            world_size: 1,
            learning_rate: 0.0,
            seed: 0,
            skipped_steps: 0,
            config_hash: String::new(),
            model_hash: String::new(),
            build_hash: String::new(),
            model: serde_json::Value::Null,
            extra: serde_json::Value::Null,
        }
    }
}
