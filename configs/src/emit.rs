//! A resolved config as YAML text and as hashes.

use crate::resolved::{ModelConfig, RunConfig};
use sha2::{Digest, Sha256};

impl RunConfig {
    /// The resolved config as YAML, with every key given; it loads again to an equal config.
    pub fn to_yaml(&self) -> String {
        serde_yaml::to_string(self).unwrap_or_default()
    }

    /// SHA-256 in hex of the whole config's canonical form.
    pub fn hash(&self) -> String {
        hex(&serde_json::to_vec(self).unwrap_or_default())
    }

    /// SHA-256 in hex of what defines the model's function: its dimensions, not how it starts.
    pub fn model_hash(&self) -> String {
        self.model.hash()
    }
}

impl ModelConfig {
    /// SHA-256 in hex of what defines the model's function: its dimensions, not how it starts.
    pub fn hash(&self) -> String {
        let shape = Self { preset: None, init_from: None, init_std: 0.0, ..self.clone() };
        hex(&serde_json::to_vec(&shape).unwrap_or_default())
    }
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}
