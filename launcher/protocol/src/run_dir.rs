//! Where the files of a run are. Names are a contract; scripts rely on them.

use std::path::{Path, PathBuf};

/// A run's directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunDir {
    root: PathBuf,
}

impl RunDir {
    /// The run in `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The resolved config; a run's directory is one because this file is there.
    pub fn config(&self) -> PathBuf {
        self.root.join("config.yaml")
    }

    /// What happened, one JSON object a line; the launcher writes it.
    pub fn events(&self) -> PathBuf {
        self.root.join("events.jsonl")
    }

    /// One JSON object per optimizer step; rank 0 writes it.
    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// The launcher's last word on the state of the run.
    pub fn status(&self) -> PathBuf {
        self.root.join("status.json")
    }

    /// Locked by the launcher that runs the run; holds its process id.
    pub fn lock(&self) -> PathBuf {
        self.root.join("lock")
    }

    /// Folder of what agents need to reach the coordinator; where several nodes run the run.
    pub fn cluster(&self) -> PathBuf {
        self.root.join("cluster")
    }

    /// Where the coordinator listens.
    pub fn coordinator(&self) -> PathBuf {
        self.cluster().join("coordinator.json")
    }

    /// The token that agents show; only the owner can read it.
    pub fn token(&self) -> PathBuf {
        self.cluster().join("token")
    }

    /// The coordinator's certificate, which agents trust and no other.
    pub fn certificate(&self) -> PathBuf {
        self.cluster().join("certificate.pem")
    }

    /// The certificate and the key of the doors at which agents reach each other's memories; only
    /// the owner can read it.
    pub fn doors(&self) -> PathBuf {
        self.cluster().join("doors.pem")
    }

    /// The run's identity: who finds another here than a store in etcd names has another folder
    /// before it.
    pub fn identity(&self) -> PathBuf {
        self.cluster().join("identity")
    }

    /// Folder of the checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// Folder of one checkpoint.
    pub fn checkpoint(&self, step: u64) -> PathBuf {
        self.checkpoints().join(format!("step-{step:07}"))
    }

    /// Folder of TensorBoard's event files.
    pub fn tensorboard(&self) -> PathBuf {
        self.root.join("tensorboard")
    }

    /// Folder of the logs of all generations.
    pub fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    /// Log of one rank in one generation, JSON lines.
    pub fn log(&self, generation: u64, rank: usize) -> PathBuf {
        self.logs().join(format!("gen-{generation:04}/rank-{rank:05}.log"))
    }

    /// Timeline of one rank in one generation, as JSON that Chrome's viewer reads.
    pub fn profile(&self, generation: u64, rank: usize) -> PathBuf {
        self.root.join(format!("profiles/gen-{generation:04}/rank-{rank:05}.json"))
    }

    /// Folder of the error files of one generation.
    pub fn errors(&self, generation: u64) -> PathBuf {
        self.root.join(format!("errors/gen-{generation:04}"))
    }

    /// Why one rank failed in one generation.
    pub fn error(&self, generation: u64, rank: usize) -> PathBuf {
        self.errors(generation).join(format!("rank-{rank:05}.json"))
    }
}
