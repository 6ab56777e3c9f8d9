//! The messages between an agent and a rank.

use crate::bundle::{Copied, NodePlace};
use crate::store::{StoreReply, StoreRequest};
use run_config::SampleRange;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// From the agent to a rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToRank {
    /// The rank's place; the answer to [`FromRank::Hello`], and to [`FromRank::Released`] its place
    /// in a later generation.
    Assignment(Box<Assignment>),
    /// Stop at the next step boundary, save, and exit with 75.
    Stop {
        /// Do not even finish the step or save.
        now: bool,
    },
    /// The generation is over (another rank failed): abort the communicators; the process ends
    /// within 0.5 s.
    Abort {
        /// Why, in words.
        reason: String,
    },
    /// The generation is over (another rank failed), and the process stays: abort the
    /// communicators, let go of all that belongs to the generation, and answer with
    /// [`FromRank::Released`].
    Release {
        /// The generation; to a rank that is at another one it says nothing.
        generation: u64,
        /// Why, in words.
        reason: String,
    },
    /// Say where it is, with [`FromRank::Here`]: nothing has moved for long.
    Where,
    /// The answer to a [`FromRank::Store`].
    Store {
        /// The request's id.
        id: u64,
        /// What came of it.
        reply: StoreReply,
    },
    /// The answer to a [`FromRank::BundleWritten`].
    BundleCopied {
        /// Its step.
        step: u64,
        /// What became of the copy.
        copied: Copied,
    },
}

/// From a rank to its agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromRank {
    /// The first message.
    Hello {
        /// Process id.
        pid: u32,
        /// Version of the trainer's build.
        build: String,
        /// The rank, where the agent cannot know which one it hears: under `mpirun`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rank: Option<usize>,
    },
    /// Under `mpirun`, the first and only message of a connection that then carries an output of
    /// the rank as it is.
    Output {
        /// The rank.
        rank: usize,
        /// Standard error; else standard output.
        is_error: bool,
    },
    /// What the rank does from now on.
    Phase(Phase),
    /// An optimizer step is done. Every rank reports; rank 0's is shown.
    Step(Box<StepReport>),
    /// A checkpoint is committed. Rank 0 reports it, after COMMIT is durable.
    CheckpointCommitted {
        /// Its step.
        step: u64,
    },
    /// The answer to [`ToRank::Where`], which needs no help of the thread that trains.
    Here(Position),
    /// Something for `events.jsonl`.
    Event(Event),
    /// The rank is about to fail, and why.
    Failure(Box<FailureReport>),
    /// The rank holds nothing of its generation any more, and waits for a place in a later one: it
    /// was told to by [`ToRank::Release`], or fails as it said right before.
    Released,
    /// The rank has taken its place in a later generation: what it said before is of an earlier
    /// one, and what follows of this.
    Joined {
        /// The generation.
        generation: u64,
    },
    /// Under `mpirun`, the last message: the code that the rank ends with, which the agent cannot
    /// see, as the process is not its child.
    Exiting {
        /// The code.
        code: i32,
    },
    /// The last step is done and saved.
    Finished {
        /// The last step.
        step: u64,
    },
    /// The rank was told to stop by a signal of its own: all ranks must.
    StopRequested {
        /// Name of the signal.
        signal: String,
    },
    /// A request to the rendezvous store.
    Store {
        /// Unique within the rank; the reply carries it.
        id: u64,
        /// What is asked.
        request: StoreRequest,
    },
    /// The ranks of this node have their part of a checkpoint in its memory, and so have those of
    /// all nodes: it is to be copied. The first rank of a node says so to its agent alone.
    BundleWritten {
        /// Its step.
        step: u64,
        /// The node's place.
        place: NodePlace,
    },
    /// All nodes have done with copying it: what is older is not needed any more. As above.
    BundleKept {
        /// Its step.
        step: u64,
    },
}

/// A rank's place in its generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignment {
    /// Identity of the run; differs for two runs of one name.
    pub run_id: String,
    /// Generation, from 1; grows with every change of membership.
    pub generation: u64,
    /// Rank, from 0.
    pub rank: usize,
    /// Number of ranks.
    pub world_size: usize,
    /// Rank within the node, from 0.
    pub local_rank: usize,
    /// Ranks on this node.
    pub local_world_size: usize,
    /// Address of this node, at which the ranks of others reach this one.
    pub address: String,
    /// CPU threads the rank may use.
    pub threads: usize,
    /// The run's directory, absolute; its `config.yaml` is the resolved config.
    pub run_dir: PathBuf,
    /// Step of the checkpoint to continue from; `None`: start from the initial weights.
    pub resume_step: Option<u64>,
    /// Data-parallel replicas of the generation, where they may be fewer than the config's: nodes
    /// are missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<usize>,
    /// Step after which to save and stop, as if it had been asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_after: Option<u64>,
    /// Steps that the run went back behind: their samples are left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub roll_backs: Vec<RollBack>,
    /// The folder of checkpoints in memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_dir: Option<PathBuf>,
    /// Set where that is each node's own: it holds what the ranks of this one wrote alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodePlace>,
    /// The folder of checkpoints that holds the one to continue from; `None`: the run's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume_dir: Option<PathBuf>,
    /// Failures so far of what the run runs on; numeric trouble is none.
    #[serde(default)]
    pub failures: u64,
    /// Seconds that the run has been up and down so far.
    #[serde(default)]
    pub observed_s: u64,
    /// Steps of which a timeline is to be written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<Steps>,
    /// Whether the rank's process may outlive the generation.
    #[serde(default)]
    pub may_stay: bool,
}

/// Some steps, one after another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Steps {
    /// 1-based step.
    pub first: u64,
    /// The last, included.
    pub last: u64,
}

/// A step in numeric trouble, behind which the run went back to go on without its samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RollBack {
    /// 1-based step.
    pub step: u64,
    /// The samples that it read.
    #[serde(flatten)]
    pub samples: SampleRange,
}

/// Where a rank is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// What it does.
    pub phase: Phase,
    /// The last step that it did.
    pub step: Option<u64>,
    /// The collectives that it waits in, with their groups.
    pub waits: Vec<String>,
}

/// What a rank does; a deadline belongs to each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Setting up devices, communicators and the model.
    Init,
    /// Reading a checkpoint.
    Load,
    /// Waiting for data.
    Data,
    /// Training steps.
    Train,
    /// Evaluating.
    Validate,
    /// Writing a checkpoint.
    Save,
    /// Taking down.
    Exit,
}

impl Phase {
    /// The name it is written as.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Init => "init",
            Phase::Load => "load",
            Phase::Data => "data",
            Phase::Train => "train",
            Phase::Validate => "validate",
            Phase::Save => "save",
            Phase::Exit => "exit",
        }
    }
}

/// One optimizer step: a line of `metrics.jsonl`.
///
/// A number that is not finite is written as `null` and read back as NaN.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// 1-based step.
    pub step: u64,
    /// Mean loss per target token, over all ranks.
    #[serde(with = "null_is_nan")]
    pub loss: f64,
    /// Global gradient norm before clipping.
    #[serde(with = "null_is_nan")]
    pub grad_norm: f64,
    /// Learning rate of this step.
    #[serde(with = "null_is_nan")]
    pub learning_rate: f64,
    /// Tokens seen by the run so far, this step included.
    pub tokens: u64,
    /// Tokens of this step, over all ranks, per second.
    #[serde(with = "null_is_nan")]
    pub tokens_per_second: f64,
    /// Wall time of the step, in seconds.
    #[serde(with = "null_is_nan")]
    pub step_time_s: f64,
    /// Part of it spent waiting for data, in seconds.
    #[serde(with = "null_is_nan")]
    pub data_wait_s: f64,
    /// Part of it spent waiting for other ranks, in seconds; absent on a GPU, where the host does
    /// not wait. Each rank has its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comm_wait_s: Option<f64>,
    /// Generation that did the step.
    pub generation: u64,
    /// Whether the update was skipped: the loss or a gradient was not finite, or jumped.
    #[serde(default, skip_serializing_if = "is_false")]
    pub skipped: bool,
    /// Loss on held-out documents, where this step was followed by an evaluation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_loss: Option<f64>,
    /// TFLOP/s per GPU, attention counted in full.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tflops_full: Option<f64>,
    /// TFLOP/s per GPU, causal attention counted as half.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tflops_half: Option<f64>,
    /// Share of the GPU's peak of dense BF16 products, attention counted in full; `null` where the
    /// GPU's peak is not known, or the run computes in another format.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "null_is_some_nan")]
    pub mfu_full: Option<f64>,
    /// The same, causal attention counted as half.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "null_is_some_nan")]
    pub mfu_half: Option<f64>,
    /// Memory of the GPU that tensors took at once since the report before, the most of it, in GiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_gib: Option<f64>,
}

/// Something that happened in a rank, for `events.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Kind, in snake case.
    pub kind: String,
    /// What belongs to it; the names `time`, `kind`, `generation` and `rank` are taken.
    #[serde(default)]
    pub fields: serde_json::Map<String, serde_json::Value>,
}

/// Classes of failure; each has its own consequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureClass {
    /// A link; also what a rank reports whose peer went away.
    Transient,
    /// The process itself: a crash, out of memory, an internal error.
    Process,
    /// The node or its GPU.
    Node,
    /// No progress.
    Hang,
    /// The config or its inputs: trying again is of no use.
    Config,
    /// Loss or gradients not finite, or too high: too often, or so that the run goes back.
    Numeric,
    /// Stopped from outside.
    Preemption,
    /// A file could not be read or written.
    Storage,
}

impl FailureClass {
    /// The name it is written as.
    pub fn name(self) -> &'static str {
        match self {
            FailureClass::Transient => "transient",
            FailureClass::Process => "process",
            FailureClass::Node => "node",
            FailureClass::Hang => "hang",
            FailureClass::Config => "config",
            FailureClass::Numeric => "numeric",
            FailureClass::Preemption => "preemption",
            FailureClass::Storage => "storage",
        }
    }

    /// Whether it comes of what a run runs on, so that more of them are to be expected in more
    /// time: not of what it was told or what it learns.
    pub fn is_of_the_machines(self) -> bool {
        match self {
            FailureClass::Transient
            | FailureClass::Process
            | FailureClass::Node
            | FailureClass::Hang
            | FailureClass::Storage => true,
            FailureClass::Config | FailureClass::Numeric | FailureClass::Preemption => false,
        }
    }
}

/// Why a rank fails, in its own words.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FailureReport {
    /// Class.
    pub class: FailureClass,
    /// What the rank was doing.
    pub phase: Phase,
    /// Step it was at, where it was at one.
    pub step: Option<u64>,
    /// Collective it was in, such as `all_reduce #37 of data`.
    #[serde(default)]
    pub collective: Option<String>,
    /// The message and its causes, one a line; the first says what happened.
    pub lines: Vec<String>,
    /// Set where the run shall go on from the newest checkpoint without some samples.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub roll_back: Option<RollBack>,
}

fn is_false(value: &bool) -> bool {
    !value
}

/// JSON has no NaN: `null` stands for every number that is not finite.
mod null_is_nan {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        value.is_finite().then_some(*value).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
    }
}

/// The same where there may be no number at all.
mod null_is_some_nan {
    use serde::{Deserializer, Serializer};

    pub fn serialize<S: Serializer>(value: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
        super::null_is_nan::serialize(&value.unwrap_or(f64::NAN), serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<f64>, D::Error> {
        super::null_is_nan::deserialize(deserializer).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_an_unknown_peak_is_null_and_on_a_cpu_there_is_none() {
        let text = |report: &StepReport| serde_json::to_string(report).unwrap();
        let cpu = StepReport { step: 3, ..StepReport::default() };
        assert!(!text(&cpu).contains("mfu"), "{}", text(&cpu));
        let unknown = StepReport { mfu_full: Some(f64::NAN), mfu_half: Some(0.5), ..cpu };
        assert!(text(&unknown).contains(r#""mfu_full":null,"mfu_half":0.5"#), "{}", text(&unknown));
        let back: StepReport = serde_json::from_str(&text(&unknown)).unwrap();
        assert!(back.mfu_full.is_some_and(f64::is_nan) && back.mfu_half == Some(0.5));
    }
}
