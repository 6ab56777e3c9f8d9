//! The resolved config: valid by construction. Only the loader makes a [`RunConfig`].

pub use crate::store::{EtcdAddress, RestartStore};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A whole run, resolved. There is no other way to one than `RunConfig::load` and
/// `RunConfig::from_yaml_str`, which check it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RunConfig {
    /// Name of the run, which is also its folder's name under `runs/`.
    pub name: String,
    /// Seed of the initial weights and of the data order.
    pub seed: u64,
    /// The model.
    pub model: ModelConfig,
    /// What it is trained on.
    pub data: DataConfig,
    /// How it is split over ranks.
    pub parallelism: Parallelism,
    /// Number formats.
    pub precision: Precision,
    /// Length, batches, clipping.
    pub training: Training,
    /// What happens after numeric trouble.
    pub numeric: Numeric,
    /// The optimizer.
    pub optimizer: Optimizer,
    /// The learning rate over the steps.
    pub schedule: Schedule,
    /// Evaluation on held-out documents.
    pub validation: Validation,
    /// Checkpoints.
    pub checkpoint: Checkpoint,
    /// What happens after a failure.
    pub restart: Restart,
    /// Where the run runs.
    pub cluster: Cluster,
    /// What is written for people to look at.
    pub metrics: Metrics,
    #[serde(skip)]
    pub(crate) checked: Checked,
}

/// Proof that the loader made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checked(());

impl Checked {
    pub(crate) fn new() -> Self {
        Self(())
    }
}

/// A Llama-3-family model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Name of the preset the dimensions came from, if any.
    pub preset: Option<String>,
    /// Width of the residual stream.
    pub dim: usize,
    /// Number of transformer blocks.
    pub layers: usize,
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Inner width of the SwiGLU feed-forward.
    pub ffn_dim: usize,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Added to the mean square in RMSNorm.
    pub norm_eps: f64,
    /// Whether the output head is the embedding matrix.
    pub tied_embeddings: bool,
    /// Standard deviation of the initial weights.
    pub init_std: f64,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Where the initial weights come from; `None`: random.
    pub init_from: Option<InitFrom>,
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// How the frequencies are rounded before use.
    pub frequencies: RopeFrequencies,
    /// Long-context scaling.
    pub scaling: Option<RopeScaling>,
}

/// How RoPE's frequencies are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeFrequencies {
    /// Computed in FP32, as transformers and Meta's code do, and then widened.
    Fp32,
    /// Computed in FP64 throughout.
    Exact,
}

/// Long-context scaling of RoPE's frequencies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum RopeScaling {
    /// Llama 3.1's: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths over `original_context / low_freq_factor` are scaled in full.
        low_freq_factor: f64,
        /// Wavelengths under `original_context / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length of the unscaled model.
        original_context: usize,
    },
}

/// Where initial weights come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum InitFrom {
    /// A folder in Hugging Face's layout (`hf:DIR`).
    HuggingFace(PathBuf),
    /// A folder in Meta's layout (`meta:DIR`).
    Meta(PathBuf),
    /// A checkpoint of another run (`run:NAME[@STEP]`).
    Run {
        /// The run's directory or name.
        run: String,
        /// Step; `None`: the newest committed one.
        step: Option<u64>,
    },
}

/// What the model is trained on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataConfig {
    /// `tokenizer.json` (Hugging Face) or `tokenizer.model` (Meta).
    pub tokenizer: PathBuf,
    /// Weighted sources of tokenized shards.
    pub sources: Vec<Source>,
    /// How documents become sequences.
    pub packing: Packing,
    /// Whether attention is masked across documents of one sequence.
    pub document_mask: bool,
    /// Whether the order is shuffled.
    pub shuffle: bool,
    /// Share of the documents held out for validation, 0 to 0.5.
    pub validation_fraction: f64,
    /// Bound of the reader's memory in MiB, over all sources of one rank.
    pub buffer_mib: usize,
    /// Samples of the order that are left out.
    pub skip_samples: Vec<SampleRange>,
}

/// A run of samples of the data order, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SampleRange {
    /// The first, from 0.
    pub first: u64,
    /// The last.
    pub last: u64,
}

/// One source of tokenized parquet shards.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Source {
    /// Name, for metrics and messages.
    pub name: String,
    /// Absolute path or glob of parquet files.
    pub path: String,
    /// Relative weight, above 0.
    pub weight: f64,
}

/// How documents become sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Packing {
    /// Documents end to end, cut every `sequence_length` tokens.
    Concatenate,
    /// Documents kept whole where they fit.
    BestFit,
}

/// How the model is split over ranks. The product of the degrees is the number of ranks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parallelism {
    /// Tensor-parallel degree.
    pub tensor: usize,
    /// Sequence parallelism inside the tensor-parallel group.
    pub sequence: bool,
    /// Context-parallel degree.
    pub context: usize,
    /// Pipeline parallelism.
    pub pipeline: Pipeline,
    /// Sharded data parallelism.
    pub shard: Shard,
    /// Data-parallel replicas; `None` (`auto`): whatever is left of the ranks.
    pub replicate: Option<usize>,
    /// Recomputation of activations.
    pub recompute: Recompute,
}

/// Pipeline parallelism.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pipeline {
    /// Number of stages.
    pub stages: usize,
    /// Schedule.
    pub schedule: PipelineSchedule,
    /// Model chunks per rank.
    pub virtual_stages: usize,
    /// Micro-batches that a rank runs through one chunk before it turns to the next; `None`
    /// (`auto`): as many as there are stages.
    pub contiguous_micro_batches: Option<usize>,
}

/// Pipeline schedules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PipelineSchedule {
    /// All forwards, then all backwards.
    #[serde(rename = "gpipe")]
    Gpipe,
    /// One forward, one backward.
    #[serde(rename = "1f1b")]
    OneForwardOneBackward,
    /// 1F1B over several model chunks a rank.
    #[serde(rename = "interleaved-1f1b")]
    Interleaved,
    /// Backward split in input and weight gradients.
    #[serde(rename = "zero-bubble")]
    ZeroBubble,
}

/// Sharded data parallelism.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// Ranks that share one copy.
    pub ranks: usize,
    /// What is sharded.
    pub level: ShardLevel,
    /// With `parameters`: free the gathered weights between forward and backward.
    pub reshard_after_forward: bool,
}

/// What sharded data parallelism shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShardLevel {
    /// Nothing.
    None,
    /// Optimizer state (ZeRO 1).
    Optimizer,
    /// And gradients (ZeRO 2).
    Gradients,
    /// And parameters (ZeRO 3).
    Parameters,
}

/// Recomputation of activations in the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    /// None.
    None,
    /// The attention core.
    Selective,
    /// Whole blocks.
    Full,
}

/// Number formats.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Precision {
    /// Of activations and of the weights used in compute.
    pub compute: ComputeDtype,
    /// Of the matrix products of blocks.
    pub matmul: Matmul,
    /// Kernels of attention on GPUs; each rounds in its own way.
    pub attention: AttentionKernel,
}

/// Kernels of attention on GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttentionKernel {
    /// cuDNN's where they are found to be right, else FlashAttention's.
    Auto,
    /// FlashAttention's.
    Flash,
    /// cuDNN's.
    Cudnn,
}

/// Format of activations and of the weights used in compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ComputeDtype {
    /// FP32 throughout.
    Fp32,
    /// BF16 compute; FP32 master weights, gradient accumulation and reduction.
    Bf16,
    /// FP64 throughout: the mode in which layouts are proven equal.
    Fp64,
}

/// Format of matrix products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Matmul {
    /// As `compute`.
    Same,
    /// FP8 (e4m3) with a scale for each row of an operand.
    Fp8,
}

/// Length, batches, clipping.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Training {
    /// Number of optimizer steps (from `steps`, or from `tokens` over the batch stages).
    pub steps: u64,
    /// Batch size and sequence length by tokens seen; never empty, the first from token 0.
    pub batch_stages: Vec<BatchStage>,
    /// Sequences per rank and forward pass.
    pub micro_batch: usize,
    /// Global gradient norm is clipped to this; `None`: off.
    pub clip_norm: Option<f64>,
    /// Consecutive skipped steps after which the run stops.
    pub max_skipped_steps: u32,
}

/// Numeric trouble: steps whose loss or gradient norm is not finite, or jumps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Numeric {
    /// Applied steps with whose mean and standard deviation a step is compared.
    pub window: usize,
    /// Standard deviations above the mean from which on a loss is a spike; `None`: none is.
    pub loss_zscore: Option<f64>,
    /// The same for the logarithm of the gradient norm.
    pub grad_norm_zscore: Option<f64>,
    /// What follows a spike.
    pub on_spike: OnSpike,
    /// What follows a loss or gradient that is not finite.
    pub on_non_finite: OnNonFinite,
    /// Whether such a step is done again on another rank.
    pub replay: bool,
    /// Steps skipped or gone back behind after which the run stops.
    pub max_interventions: usize,
    /// Steps over which they are counted.
    pub interventions_within_steps: u64,
}

/// What follows a spike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnSpike {
    /// It is told of; the step counts.
    Report,
    /// The step changes no weight.
    Skip,
    /// Back to the newest checkpoint, and on without the step's samples.
    Rollback,
}

/// What follows a loss or gradient that is not finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnNonFinite {
    /// The step changes no weight.
    Skip,
    /// Back to the newest checkpoint, and on without the step's samples.
    Rollback,
    /// The run stops.
    Stop,
}

/// One stage of the batch ramp.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchStage {
    /// Tokens seen from which on the stage holds.
    pub from_tokens: u64,
    /// Sequences per optimizer step.
    pub global_batch: usize,
    /// Tokens per sequence; divides the longest of all stages.
    pub sequence_length: usize,
}

/// The optimizer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Optimizer {
    /// Kind.
    pub kind: OptimizerKind,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Decay of the first and second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, times the learning rate per step.
    pub weight_decay: f64,
    /// Whether norm weights decay too.
    pub decay_norms: bool,
}

/// Optimizers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerKind {
    /// AdamW (Loshchilov and Hutter 2019).
    Adamw,
}

/// The learning rate over the steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// Shape after the warm-up.
    pub kind: ScheduleKind,
    /// Steps of linear warm-up from 0.
    pub warmup_steps: u64,
    /// Learning rate at the end, as a fraction of the peak.
    pub final_fraction: f64,
    /// With `wsd`: the last fraction of the steps in which the rate falls.
    pub decay_fraction: f64,
}

/// Shape of the schedule after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// Half a cosine down to `final_fraction`.
    Cosine,
    /// A straight line down to `final_fraction`.
    Linear,
    /// Warm-up, stable, then a linear decay.
    Wsd,
    /// No decay.
    Constant,
}

/// Evaluation on held-out documents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Validation {
    /// Steps between evaluations; 0: never.
    pub every_steps: u64,
    /// Global batches per evaluation.
    pub steps: u64,
}

/// Checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Steps between checkpoints; 0: only the last step; `None` (`auto`): by what a save costs and
    /// how often something fails.
    pub every_steps: Option<u64>,
    /// Failures that are expected of a node in a day, until the run's own are known.
    pub failures_per_node_day: f64,
    /// Newest checkpoints kept; at least 1.
    pub keep_last: usize,
    /// Checkpoints of every so many steps are kept for good; 0: none.
    pub keep_every_steps: u64,
    /// URL of the folder of an object store to which checkpoints are copied; `None`: to none.
    pub remote: Option<String>,
    /// Checkpoints in memory.
    pub memory: Memory,
}

/// Checkpoints in memory, which outlive ranks and not their launcher.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Steps between two of them; 0: none.
    pub every_steps: u64,
    /// A folder of a file system in memory.
    pub folder: PathBuf,
}

/// What happens after a failure.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restart {
    /// Consecutive generations without a new committed step after which the run gives up.
    pub max_no_progress: u32,
    /// Least silence of all ranks that is a hang, in seconds.
    pub hang_timeout_s: u64,
    /// Where a coordinator keeps what its successor needs.
    pub store: RestartStore,
    /// Whether a node is looked at before ranks are started on it.
    pub health_check: bool,
    /// Whether ranks that are well keep their processes when another fails.
    pub keep_processes: bool,
    /// Whether agents whose node has no place start trainers that wait for one.
    pub warm_spares: bool,
    /// Going on with fewer replicas while nodes are missing.
    pub elastic: Elastic,
}

/// Going on with fewer data-parallel replicas while nodes are missing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Elastic {
    /// Least number of replicas; `None`: all, a missing node is waited for.
    pub min_replicas: Option<usize>,
    /// Wait for a spare before the run goes on with fewer replicas, in seconds.
    pub wait_s: u64,
    /// Least time between two returns to more replicas, in seconds.
    pub grow_pause_s: u64,
}

/// Where the run runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// Kind.
    pub kind: ClusterKind,
    /// Number of nodes.
    pub nodes: usize,
    /// Ranks per node; `None` (`auto`): one per GPU, or one on a CPU machine.
    pub ranks_per_node: Option<usize>,
    /// CPU threads per rank; `None` (`auto`): max(1, cores / ranks), resolved once by the launcher.
    pub threads_per_rank: Option<usize>,
    /// Device.
    pub device: DeviceKind,
    /// Whether the allocator's segments of GPU memory grow.
    pub expandable_segments: bool,
    /// Longest wait for one message of a peer, in seconds; a peer that takes longer is an error.
    pub timeout_s: u64,
    /// Which operations between ranks are compared before they start.
    pub check_collectives: CollectiveCheck,
}

/// Operations between ranks that are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CollectiveCheck {
    /// The first of each kind, format and shape.
    FirstUse,
    /// Every one.
    All,
    /// None.
    Off,
}

/// Kinds of cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClusterKind {
    /// This machine.
    Local,
    /// Slurm.
    Slurm,
    /// Kubernetes.
    Kubernetes,
    /// MPI.
    Mpi,
}

/// Devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// CUDA where there is one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// CUDA.
    Cuda,
}

/// What is written for people to look at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metrics {
    /// Whether TensorBoard event files are written.
    pub tensorboard: bool,
}
