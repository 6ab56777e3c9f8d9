//! The one table of keys: path, type and range. Defaults and descriptions stand in
//! `defaults.yaml`; the checks, the JSON schema and the reference page all read both.

/// The type of a key's value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    /// A mapping of further keys of the table.
    Section,
    /// true or false.
    Bool,
    /// A whole number, both ends included.
    Integer { min: u64, max: u64 },
    /// A finite number; the lower end may be excluded.
    Number { min: f64, above: bool, max: f64 },
    /// Two numbers from 0 up to and without 1.
    Betas,
    /// The name of a run or of a source.
    Name,
    /// A path or URL.
    Path,
    /// `hf:DIR`, `meta:DIR` or `run:NAME[@STEP]`.
    InitFrom,
    /// `file`, `etcd://HOST:PORT/PREFIX` or `etcds://…`.
    Store,
    /// The URL of a folder in an object store.
    Remote,
    /// One of some words.
    Choice(&'static [&'static str]),
    /// A mapping whose keys are those of the table under `path[]`.
    Item,
    /// A list of such mappings.
    Items,
    /// A whole number, or a list of such mappings.
    IntegerOrItems { min: u64, max: u64 },
}

/// One row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Key {
    /// As `training.steps`; keys inside a list or an optional mapping are under `path[]`.
    pub path: &'static str,
    /// Type and range.
    pub kind: Kind,
    /// Whether null may be given.
    pub nullable: bool,
    /// Whether the word `auto` may be given.
    pub auto: bool,
}

const fn key(path: &'static str, kind: Kind) -> Key {
    Key { path, kind, nullable: false, auto: false }
}
const fn section(path: &'static str) -> Key {
    key(path, Kind::Section)
}
const fn boolean(path: &'static str) -> Key {
    key(path, Kind::Bool)
}
const fn integer(path: &'static str, min: u64, max: u64) -> Key {
    key(path, Kind::Integer { min, max })
}
const fn number(path: &'static str, min: f64, max: f64) -> Key {
    key(path, Kind::Number { min, above: false, max })
}
/// A number above `min`.
const fn above(path: &'static str, min: f64, max: f64) -> Key {
    key(path, Kind::Number { min, above: true, max })
}
const fn choice(path: &'static str, choices: &'static [&'static str]) -> Key {
    key(path, Kind::Choice(choices))
}

impl Key {
    const fn nullable(self) -> Self {
        Self { nullable: true, ..self }
    }
    const fn auto(self) -> Self {
        Self { auto: true, ..self }
    }
    /// The last part of the path.
    pub fn name(&self) -> &'static str {
        self.path.rsplit('.').next().unwrap_or(self.path)
    }
    /// The path without its last part; empty at the top.
    pub fn parent(&self) -> &'static str {
        self.path.rsplit_once('.').map_or("", |(parent, _)| parent)
    }
}

/// The presets, as in `presets.yaml`.
pub(crate) const PRESETS: &[&str] =
    &["llama3-8b", "llama3-70b", "llama3-405b", "llama3.2-1b", "llama3.2-3b"];

const MAX_STEPS: u64 = 1_000_000_000;
const MAX_TOKENS: u64 = 1_000_000_000_000_000;
const MAX_RANKS: u64 = 1 << 20;
const MAX_BATCH: u64 = 1 << 24;
const MAX_SEQUENCE: u64 = 1 << 24;

/// Every key, in the order of `defaults.yaml`.
pub(crate) const KEYS: &[Key] = &[
    key("name", Kind::Name),
    integer("seed", 0, u64::MAX),
    section("model"),
    choice("model.preset", PRESETS).nullable(),
    integer("model.dim", 2, 1 << 18),
    integer("model.layers", 1, 4096),
    integer("model.heads", 1, 4096),
    integer("model.kv_heads", 1, 4096).nullable(),
    integer("model.head_dim", 2, 4096).nullable(),
    integer("model.ffn_dim", 1, 1 << 20),
    integer("model.vocab_size", 2, 1 << 24),
    above("model.norm_eps", 0.0, 1.0),
    boolean("model.tied_embeddings"),
    above("model.init_std", 0.0, 10.0),
    section("model.rope"),
    number("model.rope.theta", 1.0, 1e12),
    choice("model.rope.frequencies", &["fp32", "exact"]),
    key("model.rope.scaling", Kind::Item).nullable(),
    choice("model.rope.scaling[].kind", &["llama3"]),
    number("model.rope.scaling[].factor", 1.0, 1e6),
    above("model.rope.scaling[].low_freq_factor", 0.0, 1e6),
    above("model.rope.scaling[].high_freq_factor", 0.0, 1e6),
    integer("model.rope.scaling[].original_context", 1, MAX_SEQUENCE),
    key("model.init_from", Kind::InitFrom).nullable(),
    section("data"),
    key("data.tokenizer", Kind::Path),
    key("data.sources", Kind::Items),
    key("data.sources[].name", Kind::Name),
    key("data.sources[].path", Kind::Path),
    above("data.sources[].weight", 0.0, 1e9),
    integer("data.sequence_length", 1, MAX_SEQUENCE),
    choice("data.packing", &["concatenate", "best_fit"]),
    boolean("data.document_mask"),
    boolean("data.shuffle"),
    number("data.validation_fraction", 0.0, 0.5),
    integer("data.buffer_mib", 1, 1 << 20),
    key("data.skip_samples", Kind::Items).nullable(),
    integer("data.skip_samples[].first", 0, MAX_TOKENS),
    integer("data.skip_samples[].last", 0, MAX_TOKENS),
    section("parallelism"),
    integer("parallelism.tensor", 1, 4096),
    boolean("parallelism.sequence"),
    integer("parallelism.context", 1, 4096),
    section("parallelism.pipeline"),
    integer("parallelism.pipeline.stages", 1, 256),
    choice("parallelism.pipeline.schedule", &["gpipe", "1f1b", "interleaved-1f1b", "zero-bubble"]),
    integer("parallelism.pipeline.virtual_stages", 1, 256),
    integer("parallelism.pipeline.contiguous_micro_batches", 1, MAX_BATCH).auto(),
    section("parallelism.shard"),
    integer("parallelism.shard.ranks", 1, MAX_RANKS),
    choice("parallelism.shard.level", &["none", "optimizer", "gradients", "parameters"]),
    boolean("parallelism.shard.reshard_after_forward"),
    integer("parallelism.replicate", 1, MAX_RANKS).auto(),
    choice("parallelism.recompute", &["none", "selective", "full"]),
    section("precision"),
    choice("precision.compute", &["fp32", "bf16", "fp64"]),
    choice("precision.matmul", &["same", "fp8"]),
    choice("precision.attention", &["auto", "flash", "cudnn"]),
    section("training"),
    integer("training.steps", 1, MAX_STEPS).nullable(),
    integer("training.tokens", 1, MAX_TOKENS).nullable(),
    key("training.global_batch", Kind::IntegerOrItems { min: 1, max: MAX_BATCH }),
    integer("training.global_batch[].from_tokens", 0, MAX_TOKENS),
    integer("training.global_batch[].global_batch", 1, MAX_BATCH),
    integer("training.global_batch[].sequence_length", 1, MAX_SEQUENCE).nullable(),
    integer("training.micro_batch", 1, MAX_BATCH),
    above("training.clip_norm", 0.0, 1e9).nullable(),
    integer("training.max_skipped_steps", 1, 1_000_000),
    section("numeric"),
    integer("numeric.window", 2, 10_000),
    above("numeric.loss_zscore", 0.0, 1e6).nullable(),
    above("numeric.grad_norm_zscore", 0.0, 1e6).nullable(),
    choice("numeric.on_spike", &["report", "skip", "rollback"]),
    choice("numeric.on_non_finite", &["skip", "rollback", "stop"]),
    boolean("numeric.replay"),
    integer("numeric.max_interventions", 1, 1_000_000),
    integer("numeric.interventions_within_steps", 1, MAX_STEPS),
    section("optimizer"),
    choice("optimizer.kind", &["adamw"]),
    above("optimizer.learning_rate", 0.0, 10.0),
    key("optimizer.betas", Kind::Betas),
    above("optimizer.eps", 0.0, 1.0),
    number("optimizer.weight_decay", 0.0, 10.0),
    boolean("optimizer.decay_norms"),
    section("schedule"),
    choice("schedule.kind", &["cosine", "linear", "wsd", "constant"]),
    integer("schedule.warmup_steps", 0, MAX_STEPS),
    number("schedule.final_fraction", 0.0, 1.0),
    above("schedule.decay_fraction", 0.0, 1.0),
    section("validation"),
    integer("validation.every_steps", 0, MAX_STEPS),
    integer("validation.steps", 1, 1_000_000),
    section("checkpoint"),
    integer("checkpoint.every_steps", 0, MAX_STEPS).auto(),
    above("checkpoint.failures_per_node_day", 0.0, 1e6),
    integer("checkpoint.keep_last", 1, 1_000_000),
    integer("checkpoint.keep_every_steps", 0, MAX_STEPS),
    key("checkpoint.remote", Kind::Remote).nullable(),
    section("checkpoint.memory"),
    integer("checkpoint.memory.every_steps", 0, MAX_STEPS),
    key("checkpoint.memory.folder", Kind::Path),
    section("restart"),
    integer("restart.max_no_progress", 1, 1_000_000),
    integer("restart.max_per_hour", 1, 1_000_000),
    integer("restart.hang_timeout_s", 1, 86_400),
    key("restart.store", Kind::Store),
    boolean("restart.health_check"),
    boolean("restart.keep_processes"),
    boolean("restart.warm_spares"),
    section("restart.elastic"),
    integer("restart.elastic.min_replicas", 1, MAX_RANKS).nullable(),
    integer("restart.elastic.wait_s", 0, 600),
    integer("restart.elastic.grow_pause_s", 0, 86_400),
    section("cluster"),
    choice("cluster.kind", &["local", "slurm", "kubernetes", "mpi"]),
    integer("cluster.nodes", 1, MAX_RANKS),
    integer("cluster.ranks_per_node", 1, 4096).auto(),
    integer("cluster.threads_per_rank", 1, 512).auto(),
    choice("cluster.device", &["auto", "cpu", "cuda"]),
    boolean("cluster.expandable_segments"),
    integer("cluster.timeout_s", 1, 3600),
    choice("cluster.check_collectives", &["first_use", "all", "off"]),
    section("metrics"),
    boolean("metrics.tensorboard"),
];

/// The row of a table path (list positions as `[]`).
pub(crate) fn find(path: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.path == path)
}

/// The rows directly under `parent` (empty: the top).
pub(crate) fn children(parent: &str) -> impl Iterator<Item = &'static Key> {
    KEYS.iter().filter(move |key| key.parent() == parent)
}

/// The parent of the rows of a list's items or of an optional mapping's keys.
pub(crate) fn item_path(list: &str) -> String {
    format!("{list}[]")
}

/// What a key takes, in words: `an integer from 1 to 4096, or auto`.
pub(crate) fn limit(key: &Key) -> String {
    let mut text = match key.kind {
        Kind::Section => "a mapping of keys".to_owned(),
        Kind::Bool => "true or false".to_owned(),
        Kind::Integer { min, max } => format!("an integer from {min} to {max}"),
        Kind::Number { min, above: false, max } => format!("a number from {min} to {max}"),
        Kind::Number { min, above: true, max } => format!("a number above {min}, at most {max}"),
        Kind::Betas => "two numbers from 0 to below 1, as [0.9, 0.95]".to_owned(),
        Kind::Name => "1 to 100 letters, digits, `.`, `_` and `-`, not `.` or `-` first".to_owned(),
        Kind::Path => "a path".to_owned(),
        Kind::InitFrom => "hf:DIR, meta:DIR or run:NAME[@STEP]".to_owned(),
        Kind::Store => "file, etcd://HOST:PORT[,HOST:PORT…]/PREFIX or etcds://…".to_owned(),
        Kind::Remote => REMOTES.to_owned(),
        Kind::Choice(choices) => format!("one of {}", choices.join(", ")),
        Kind::Item => format!("a mapping of {}", item_names(key.path)),
        Kind::Items => format!("a list of 1 to {MAX_ITEMS} mappings of {}", item_names(key.path)),
        Kind::IntegerOrItems { min, max } => format!(
            "an integer from {min} to {max}, or a list of 1 to {MAX_ITEMS} mappings of {}",
            item_names(key.path)
        ),
    };
    if key.auto {
        text.push_str(", or auto");
    }
    if key.nullable {
        text.push_str(", or null");
    }
    text
}

/// The URLs of object stores, in words.
pub(crate) const REMOTES: &str =
    "s3://BUCKET[/PREFIX], gs://BUCKET[/PREFIX], az://CONTAINER[/PREFIX] or file:///PATH";

/// Items in one list.
pub(crate) const MAX_ITEMS: usize = 1000;

fn item_names(path: &str) -> String {
    children(&item_path(path)).map(Key::name).collect::<Vec<_>>().join(", ")
}
