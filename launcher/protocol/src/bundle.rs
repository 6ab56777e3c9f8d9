//! What nodes keep of checkpoints in their memories: each its own ranks' part, a *bundle*, and a
//! copy of another node's. How ranks, agents and the coordinator speak of it, and agents with each
//! other.
//!
//! An agent that wants something of another's memory connects over TLS to its [`Door`] and says
//! [`Knock`]; from then on it asks, one thing after another: [`Ask`], answered by [`Reply`].

use serde::{Deserialize, Serialize};

/// Most bytes of the first message to a door, from whoever has not shown its key.
pub const MAX_KNOCK_BYTES: usize = 1 << 10;
/// Most ranges of a file that are asked for at once.
pub const MAX_RANGES: usize = 4096;

/// Which bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BundleId {
    /// The generation that wrote it.
    pub generation: u64,
    /// Its step.
    pub step: u64,
    /// The place, in that generation, of the node whose ranks did.
    pub place: usize,
    /// Places in that generation.
    pub places: usize,
}

/// What a node has in its memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holding {
    /// Identity of the run that all of it is of: an agent may outlive one and join the next of its
    /// name. Empty before it has heard of one.
    pub run: String,
    /// All that is there.
    pub bundles: Vec<BundleId>,
}

impl Holding {
    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.bundles.is_empty()
    }
}

/// A node's place among those of a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodePlace {
    /// The place.
    pub place: usize,
    /// How many there are.
    pub places: usize,
}

/// What became of the copy of a bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Copied {
    /// Another node has it.
    Done,
    /// There is no other node.
    NoPeer,
    /// It does not.
    Failed {
        /// Why.
        reason: String,
    },
    /// It was not tried, because the last one has just failed, or is not waited for any more.
    NotTried,
}

/// Where an agent takes in copies and gives out what it has.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Door {
    /// The node's address; empty where its agent says so, as the coordinator knows it.
    #[serde(default)]
    pub host: String,
    /// Port.
    pub port: u16,
    /// What opens it.
    pub key: String,
}

impl std::fmt::Debug for Door {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // A key is for nobody's log.
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// What an agent must know of the memory tier for a generation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPlan {
    /// Where its bundles are copied to; `None`: there is no other node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<Door>,
    /// What its ranks go on from, where that is in memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume: Option<Resume>,
}

/// A checkpoint in the nodes' memories.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    /// Its step.
    pub step: u64,
    /// The generation that wrote it.
    pub generation: u64,
    /// By the places of that generation: who has the bundle, where it is not here.
    pub holders: Vec<Vec<Door>>,
}

/// The first message to a door.
#[derive(Clone, Serialize, Deserialize)]
pub struct Knock {
    /// What opens it.
    pub key: String,
}

/// What an agent asks of another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// Take this bundle in. After [`Reply::Go`] follow the bytes of all its files, in the order of
    /// the manifest, and then [`Reply::Taken`].
    Take {
        /// Its `COMMIT`.
        commit: String,
        /// Its manifest.
        manifest: String,
    },
    /// The seal of a bundle: [`Reply::Seal`].
    Seal(BundleId),
    /// Ranges of bytes of a file: [`Reply::Bytes`], and those.
    Give {
        /// Of which bundle.
        bundle: BundleId,
        /// Of which of its files.
        file: String,
        /// First byte and the one past the last of each, in order; none: all of it.
        ranges: Vec<[u64; 2]>,
    },
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// The files are waited for; after a [`Knock`]: the door is open.
    Go,
    /// The bundle is there, every byte checked.
    Taken,
    /// `COMMIT` and the manifest of the bundle.
    Seal {
        /// The first.
        commit: String,
        /// The second.
        manifest: String,
    },
    /// So many bytes follow.
    Bytes(u64),
    /// No, and why.
    Refused {
        /// Why.
        reason: String,
    },
}
