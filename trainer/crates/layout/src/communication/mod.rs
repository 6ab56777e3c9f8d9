//! What one rank communicates in an optimizer step: which operation, with whom, why, how often, and
//! how many bytes the ring algorithms really send.
//!
//! It says what the parallel forms do, call by call; a test holds the two against each other. Not
//! in it: the comparison of operations on their first use, validation, checkpoints, and the
//! gathering of sharded weights before the first step.

mod data;
mod model;
mod ring;

pub use model::LOSS_CHUNK_TOKENS;
pub use ring::SMALL_BYTES;

use crate::held::Held;
use crate::mesh::{Axis, Mesh};
use crate::plan::PlanError;
use crate::schedule::{Schedule, ScheduleError};
use run_config::{BatchStage, ComputeDtype, RunConfig};
use serde::Serialize;
use std::collections::BTreeMap;
use thiserror::Error;

/// Bytes of a bucket of gradients.
pub const BUCKET_BYTES: usize = 8 << 20;

/// A collective operation or a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// All ranks get the sum (or the maximum) of what each has.
    AllReduce,
    /// All ranks get the pieces of all.
    AllGather,
    /// Each rank gets its piece of the sum.
    ReduceScatter,
    /// To one rank.
    Send,
}

impl Operation {
    /// Its name, as in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all-reduce",
            Self::AllGather => "all-gather",
            Self::ReduceScatter => "reduce-scatter",
            Self::Send => "send",
        }
    }
}

/// Who communicates with one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// A tensor-parallel group.
    Tensor,
    /// Its ranks with the same key and value heads.
    KvCopies,
    /// A context-parallel group.
    Context,
    /// The stages of a pipeline.
    Pipeline,
    /// The first and the last stage, which share a tied embedding.
    TiedStages,
    /// Ranks that cut one copy of the weights or of their state among them.
    Shard,
    /// Ranks that own the same elements: context parallelism and replicas.
    Copies,
    /// Ranks with the same parameters that see other tokens.
    Data,
    /// All ranks.
    World,
}

impl Group {
    /// Its name, as in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tensor => "tensor",
            Self::KvCopies => "kv copies",
            Self::Context => "context",
            Self::Pipeline => "pipeline",
            Self::TiedStages => "tied stages",
            Self::Shard => "shard",
            Self::Copies => "copies",
            Self::Data => "data",
            Self::World => "world",
        }
    }
}

/// A number format on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    /// 2 bytes.
    Bf16,
    /// 4 bytes.
    Fp32,
    /// 8 bytes.
    Fp64,
}

impl Dtype {
    /// Of activations and of the weights used in compute.
    pub fn of_compute(compute: ComputeDtype) -> Self {
        match compute {
            ComputeDtype::Bf16 => Self::Bf16,
            ComputeDtype::Fp32 => Self::Fp32,
            ComputeDtype::Fp64 => Self::Fp64,
        }
    }

    /// Of master weights, gradients, optimizer state and the loss.
    pub fn of_state(compute: ComputeDtype) -> Self {
        match compute {
            ComputeDtype::Bf16 | ComputeDtype::Fp32 => Self::Fp32,
            ComputeDtype::Fp64 => Self::Fp64,
        }
    }

    /// Bytes of an element.
    pub fn width(self) -> u64 {
        match self {
            Self::Bf16 => 2,
            Self::Fp32 => 4,
            Self::Fp64 => 8,
        }
    }

    /// Its name, as in the config.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::Fp32 => "fp32",
            Self::Fp64 => "fp64",
        }
    }
}

/// Equal calls of one operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Call {
    /// What is done.
    pub operation: Operation,
    /// With whom.
    pub group: Group,
    /// Ranks of the group.
    pub ranks: usize,
    /// What for.
    pub why: &'static str,
    /// Number format.
    pub dtype: Dtype,
    /// Bytes of the whole tensor of one call.
    pub bytes: u64,
    /// Bytes that this rank sends in one call.
    pub sent: u64,
    /// Calls in a step.
    pub times: u64,
}

impl Call {
    /// Bytes that this rank sends in a step.
    pub fn sent_per_step(&self) -> u64 {
        self.sent * self.times
    }
}

/// What a step is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Sequences over all ranks.
    pub global_batch: usize,
    /// Tokens of a sequence.
    pub sequence_length: usize,
    /// Bytes of a bucket of gradients.
    pub bucket_bytes: usize,
}

impl Step {
    /// A step of a batch stage.
    pub fn of(batch: &BatchStage) -> Self {
        let BatchStage { global_batch, sequence_length, .. } = *batch;
        Self { global_batch, sequence_length, bucket_bytes: BUCKET_BYTES }
    }

    /// Micro-batches of each rank.
    pub fn micro_batches(&self, config: &RunConfig, mesh: &Mesh) -> usize {
        let per_pass = mesh.data_size().max(1) * config.training.micro_batch.max(1);
        (self.global_batch / per_pass).max(1)
    }
}

/// A layout that cannot be; a checked config has none.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LayoutError {
    /// A parameter does not split over the ranks.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The pipeline has no schedule.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
}

/// The communication of one rank in a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Communication {
    /// The calls, equal ones together, by group.
    pub calls: Vec<Call>,
}

impl Communication {
    /// Bytes that the rank sends in each group.
    pub fn sent_by_group(&self) -> BTreeMap<Group, u64> {
        let mut sums = BTreeMap::new();
        for call in &self.calls {
            *sums.entry(call.group).or_default() += call.sent_per_step();
        }
        sums
    }

    /// Bytes that the rank sends.
    pub fn sent(&self) -> u64 {
        self.calls.iter().map(Call::sent_per_step).sum()
    }
}

/// What `rank` communicates in a step.
///
/// # Errors
/// Where the layout cannot be.
pub fn communication(
    config: &RunConfig,
    mesh: &Mesh,
    rank: usize,
    step: &Step,
) -> Result<Communication, LayoutError> {
    let held = Held::new(config, mesh, rank)?;
    let micro_batches = step.micro_batches(config, mesh);
    let schedule = Schedule::of(&config.parallelism.pipeline, micro_batches)?;
    let mut counter = Counter { config, mesh, rank, step, held, schedule, calls: Vec::new() };
    counter.model();
    counter.pipeline();
    counter.gradients_and_weights();
    counter.partial_sums();
    counter.scalars();
    let mut calls = counter.calls;
    calls.sort_by_key(|call| call.group);
    Ok(Communication { calls })
}

/// Counts the calls of one rank.
struct Counter<'a> {
    config: &'a RunConfig,
    mesh: &'a Mesh,
    rank: usize,
    step: &'a Step,
    held: Held,
    schedule: Schedule,
    calls: Vec<Call>,
}

impl Counter<'_> {
    /// `times` operations on `elements` elements; nothing where the rank is alone.
    fn add(
        &mut self,
        (operation, group): (Operation, Group),
        (elements, dtype): (u64, Dtype),
        times: u64,
        why: &'static str,
    ) {
        let (ranks, position) = self.place(group);
        if ranks < 2 || elements == 0 || times == 0 {
            return;
        }
        let sent = ring::elements_sent(operation, elements, dtype.width(), (ranks, position));
        let (bytes, sent) = (elements * dtype.width(), sent * dtype.width());
        let call = Call { operation, group, ranks, why, dtype, bytes, sent, times };
        let same = |other: &&mut Call| Call { times: other.times, ..call.clone() } == **other;
        match self.calls.iter_mut().rev().find(same) {
            Some(other) => other.times += times,
            None => self.calls.push(call),
        }
    }

    /// Ranks of a group, and which of them this is.
    fn place(&self, group: Group) -> (usize, usize) {
        let axes: &[Axis] = match group {
            Group::Tensor => &[Axis::Tensor],
            Group::KvCopies => {
                let copies = self.held.tensor.kv_copies(&self.config.model);
                return (copies, self.held.tensor.rank % copies);
            }
            Group::TiedStages => {
                return (2, usize::from(self.mesh.coordinate(self.rank, Axis::Pipeline) > 0));
            }
            Group::Context => &[Axis::Context],
            Group::Pipeline => &[Axis::Pipeline],
            Group::Shard => &[Axis::Shard],
            Group::Copies => &[Axis::Context, Axis::Replicate],
            Group::Data => &[Axis::Context, Axis::Shard, Axis::Replicate],
            Group::World => &Axis::ALL,
        };
        // The innermost axis counts fastest, as ranks do.
        axes.iter().fold((1, 0), |(ranks, position), &axis| {
            let coordinate = self.mesh.coordinate(self.rank, axis);
            (ranks * self.mesh.degree(axis), position + ranks * coordinate)
        })
    }

    fn compute(&self) -> Dtype {
        Dtype::of_compute(self.config.precision.compute)
    }

    fn state(&self) -> Dtype {
        Dtype::of_state(self.config.precision.compute)
    }
}
