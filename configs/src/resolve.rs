//! From merged layers to the typed config. A value that is absent or unusable is stood in for, so
//! that the rules can still look at the rest; the problem is kept and the config never leaves.

use crate::keys::{self, Key, Kind};
use crate::layers::BuiltIn;
use crate::problem::{Place, Problem, ProblemKind};
use crate::resolved::*;
use crate::walk::{Given, Layer, Leaf};
use crate::yaml::quoted;
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

/// Merged values, and what is known to be wrong with them.
pub(crate) struct Resolver<'a> {
    pub built_in: &'a BuiltIn,
    pub base_dir: &'a Path,
    /// Place of the file as a whole, for what is absent.
    pub whole: Place,
    pub problems: Vec<Problem>,
    /// Paths, as in messages, that rules must not look at.
    pub bad: BTreeSet<String>,
    /// Where each value was given.
    pub places: BTreeMap<String, Place>,
}

/// A layer under its path in messages.
struct View<'a> {
    layer: &'a Layer,
    table: String,
    path: String,
}

impl Resolver<'_> {
    /// The whole config; `None` only where the table and the types disagree.
    pub fn config(&mut self, merged: &Layer) -> Option<RunConfig> {
        let v = View { layer: merged, table: String::new(), path: String::new() };
        let longest = self.integer(&v, "data.sequence_length")?;
        Some(RunConfig {
            name: self.text(&v, "name")?,
            seed: self.integer(&v, "seed")?,
            model: self.model(&v)?,
            data: self.data(&v)?,
            parallelism: self.parallelism(&v)?,
            precision: Precision {
                compute: self.choice(&v, "precision.compute")?,
                matmul: self.choice(&v, "precision.matmul")?,
                attention: self.choice(&v, "precision.attention")?,
            },
            training: self.training(&v, longest)?,
            numeric: self.numeric(&v)?,
            optimizer: Optimizer {
                kind: self.choice(&v, "optimizer.kind")?,
                learning_rate: self.number(&v, "optimizer.learning_rate")?,
                betas: self.betas(&v, "optimizer.betas")?,
                eps: self.number(&v, "optimizer.eps")?,
                weight_decay: self.number(&v, "optimizer.weight_decay")?,
                decay_norms: self.boolean(&v, "optimizer.decay_norms")?,
            },
            schedule: Schedule {
                kind: self.choice(&v, "schedule.kind")?,
                warmup_steps: self.integer(&v, "schedule.warmup_steps")?,
                final_fraction: self.number(&v, "schedule.final_fraction")?,
                decay_fraction: self.number(&v, "schedule.decay_fraction")?,
            },
            validation: Validation {
                every_steps: self.integer(&v, "validation.every_steps")?,
                steps: self.integer(&v, "validation.steps")?,
            },
            checkpoint: Checkpoint {
                every_steps: self.optional_integer(&v, "checkpoint.every_steps"),
                failures_per_node_day: self.number(&v, "checkpoint.failures_per_node_day")?,
                keep_last: self.size(&v, "checkpoint.keep_last")?,
                keep_every_steps: self.integer(&v, "checkpoint.keep_every_steps")?,
                remote: self.remote(&v),
                memory: Memory {
                    every_steps: self.integer(&v, "checkpoint.memory.every_steps")?,
                    folder: self.memory_folder(&v)?,
                },
            },
            restart: Restart {
                max_no_progress: self.count(&v, "restart.max_no_progress")?,
                max_per_hour: self.count(&v, "restart.max_per_hour")?,
                hang_timeout_s: self.integer(&v, "restart.hang_timeout_s")?,
                store: self.store(&v)?,
                health_check: self.boolean(&v, "restart.health_check")?,
                keep_processes: self.boolean(&v, "restart.keep_processes")?,
                warm_spares: self.boolean(&v, "restart.warm_spares")?,
                elastic: Elastic {
                    min_replicas: self.optional_size(&v, "restart.elastic.min_replicas"),
                    wait_s: self.integer(&v, "restart.elastic.wait_s")?,
                    grow_pause_s: self.integer(&v, "restart.elastic.grow_pause_s")?,
                },
            },
            cluster: self.cluster(&v)?,
            metrics: Metrics { tensorboard: self.boolean(&v, "metrics.tensorboard")? },
            checked: Checked::new(),
        })
    }

    fn cluster(&mut self, v: &View) -> Option<Cluster> {
        Some(Cluster {
            kind: self.choice(v, "cluster.kind")?,
            nodes: self.size(v, "cluster.nodes")?,
            ranks_per_node: self.optional_size(v, "cluster.ranks_per_node"),
            threads_per_rank: self.optional_size(v, "cluster.threads_per_rank"),
            device: self.choice(v, "cluster.device")?,
            expandable_segments: self.boolean(v, "cluster.expandable_segments")?,
            timeout_s: self.integer(v, "cluster.timeout_s")?,
            check_collectives: self.choice(v, "cluster.check_collectives")?,
        })
    }

    fn model(&mut self, v: &View) -> Option<ModelConfig> {
        let (dim, heads) = (self.size(v, "model.dim")?, self.size(v, "model.heads")?);
        let head_dim = self.optional_size(v, "model.head_dim");
        let usable = !self.is_bad("model.dim") && !self.is_bad("model.heads");
        if head_dim.is_none() && usable && !dim.is_multiple_of(heads) {
            let message = format!("{heads} heads do not divide dim {dim}");
            let limit = Some("dim a multiple of heads, where head_dim is not given".to_owned());
            let hint = Some("give model.head_dim".to_owned());
            self.problem(ProblemKind::Conflict, "model.heads", message, limit, hint);
        }
        Some(ModelConfig {
            preset: self.optional_text(v, "model.preset"),
            dim,
            layers: self.size(v, "model.layers")?,
            heads,
            kv_heads: self.optional_size(v, "model.kv_heads").unwrap_or(heads),
            head_dim: head_dim.unwrap_or(dim / heads),
            ffn_dim: self.size(v, "model.ffn_dim")?,
            vocab_size: self.size(v, "model.vocab_size")?,
            norm_eps: self.number(v, "model.norm_eps")?,
            tied_embeddings: self.boolean(v, "model.tied_embeddings")?,
            init_std: self.number(v, "model.init_std")?,
            rope: Rope {
                theta: self.number(v, "model.rope.theta")?,
                frequencies: self.choice(v, "model.rope.frequencies")?,
                scaling: self.scaling(v)?,
            },
            init_from: self.init_from(v),
        })
    }

    /// `Some(None)`: no scaling.
    fn scaling(&mut self, v: &View) -> Option<Option<RopeScaling>> {
        let path = "model.rope.scaling";
        let Some(Given { leaf: Leaf::Item(given), .. }) = v.layer.get(path) else {
            return Some(None);
        };
        let layer = self.item_layer(path, given);
        let v = View { layer: &layer, table: keys::item_path(path), path: path.to_owned() };
        Some(Some(RopeScaling::Llama3 {
            factor: self.number(&v, "factor")?,
            low_freq_factor: self.number(&v, "low_freq_factor")?,
            high_freq_factor: self.number(&v, "high_freq_factor")?,
            original_context: self.size(&v, "original_context")?,
        }))
    }

    fn init_from(&mut self, v: &View) -> Option<InitFrom> {
        let path = "model.init_from";
        let text = self.optional_text(v, path)?;
        let parsed = match text.split_once(':') {
            Some((_, "")) => None,
            Some(("hf", dir)) => self.local_path(path, dir).map(InitFrom::HuggingFace),
            Some(("meta", dir)) => self.local_path(path, dir).map(InitFrom::Meta),
            Some(("run", run)) => match run.rsplit_once('@') {
                Some(("", _)) => None,
                Some((run, step)) => {
                    let step = step.parse().ok();
                    step.map(|s| InitFrom::Run { run: run.to_owned(), step: Some(s) })
                }
                None => Some(InitFrom::Run { run: run.to_owned(), step: None }),
            },
            _ => None,
        };
        if parsed.is_none() && !self.is_bad(path) {
            let limit = keys::find(path).map(keys::limit);
            let message = format!("{} is no source of weights", quoted(&text));
            self.problem(ProblemKind::OutOfRange, path, message, limit, None);
        }
        parsed
    }

    fn store(&mut self, v: &View) -> Option<RestartStore> {
        let path = "restart.store";
        let text = self.text(v, path)?;
        Some(RestartStore::parse(&text).unwrap_or_else(|(why, hint)| {
            if !self.is_bad(path) {
                let limit = keys::find(path).map(keys::limit);
                // It may hold a password, which is not repeated.
                let shown = if text.contains('@') { "the value".to_owned() } else { quoted(&text) };
                let (message, hint) = (format!("{shown}: {why}"), hint.map(str::to_owned));
                self.problem(ProblemKind::OutOfRange, path, message, limit, hint);
            }
            RestartStore::File
        }))
    }

    fn data(&mut self, v: &View) -> Option<DataConfig> {
        let tokenizer = self.text(v, "data.tokenizer")?;
        let tokenizer = self.local_path("data.tokenizer", &tokenizer).unwrap_or_default();
        Some(DataConfig {
            tokenizer,
            sources: self.sources(v)?,
            packing: self.choice(v, "data.packing")?,
            document_mask: self.boolean(v, "data.document_mask")?,
            shuffle: self.boolean(v, "data.shuffle")?,
            validation_fraction: self.number(v, "data.validation_fraction")?,
            buffer_mib: self.size(v, "data.buffer_mib")?,
            skip_samples: self.skip_samples(v)?,
        })
    }

    fn sources(&mut self, v: &View) -> Option<Vec<Source>> {
        let list = "data.sources";
        let mut sources = Vec::new();
        for (index, given) in self.items(v, list).into_iter().enumerate() {
            let layer = self.item_layer(list, &given);
            let path = format!("{list}[{index}]");
            let v = View { layer: &layer, table: keys::item_path(list), path };
            let text = self.text(&v, "path")?;
            let key = format!("{}.path", v.path);
            sources.push(Source {
                name: self.text(&v, "name")?,
                path: self.data_path(&key, &text).unwrap_or_default(),
                weight: self.number(&v, "weight")?,
            });
        }
        Some(sources)
    }

    fn skip_samples(&mut self, v: &View) -> Option<Vec<SampleRange>> {
        let list = "data.skip_samples";
        let Some(Given { leaf: Leaf::Items(items), .. }) = v.layer.get(list) else {
            return Some(Vec::new());
        };
        let mut ranges = Vec::new();
        for (index, given) in items.iter().enumerate() {
            let layer = self.item_layer(list, given);
            let path = format!("{list}[{index}]");
            let v = View { layer: &layer, table: keys::item_path(list), path };
            let (first, last) = (self.integer(&v, "first")?, self.integer(&v, "last")?);
            ranges.push(SampleRange { first, last });
        }
        Some(ranges)
    }

    fn numeric(&mut self, v: &View) -> Option<Numeric> {
        Some(Numeric {
            window: self.size(v, "numeric.window")?,
            loss_zscore: self.optional_number(v, "numeric.loss_zscore"),
            grad_norm_zscore: self.optional_number(v, "numeric.grad_norm_zscore"),
            on_spike: self.choice(v, "numeric.on_spike")?,
            on_non_finite: self.choice(v, "numeric.on_non_finite")?,
            replay: self.boolean(v, "numeric.replay")?,
            max_interventions: self.size(v, "numeric.max_interventions")?,
            interventions_within_steps: self.integer(v, "numeric.interventions_within_steps")?,
        })
    }

    fn parallelism(&mut self, v: &View) -> Option<Parallelism> {
        Some(Parallelism {
            tensor: self.size(v, "parallelism.tensor")?,
            sequence: self.boolean(v, "parallelism.sequence")?,
            context: self.size(v, "parallelism.context")?,
            pipeline: Pipeline {
                stages: self.size(v, "parallelism.pipeline.stages")?,
                schedule: self.choice(v, "parallelism.pipeline.schedule")?,
                virtual_stages: self.size(v, "parallelism.pipeline.virtual_stages")?,
                contiguous_micro_batches: self
                    .optional_size(v, "parallelism.pipeline.contiguous_micro_batches"),
            },
            shard: Shard {
                ranks: self.size(v, "parallelism.shard.ranks")?,
                level: self.choice(v, "parallelism.shard.level")?,
                reshard_after_forward: self
                    .boolean(v, "parallelism.shard.reshard_after_forward")?,
            },
            replicate: self.optional_size(v, "parallelism.replicate"),
            recompute: self.choice(v, "parallelism.recompute")?,
        })
    }

    fn training(&mut self, v: &View, longest: u64) -> Option<Training> {
        let steps = self.optional_integer(v, "training.steps");
        let tokens = self.optional_integer(v, "training.tokens");
        let stages = self.batch_stages(v, longest)?;
        let steps = match (steps, tokens) {
            (Some(steps), None) => steps,
            (None, Some(tokens)) => crate::batch_plan::steps_for_tokens(&stages, tokens),
            (steps, tokens) => {
                self.steps_xor_tokens(steps.is_some() && tokens.is_some());
                steps.unwrap_or(1)
            }
        };
        Some(Training {
            steps,
            batch_stages: stages,
            micro_batch: self.size(v, "training.micro_batch")?,
            clip_norm: self.optional_number(v, "training.clip_norm"),
            max_skipped_steps: self.count(v, "training.max_skipped_steps")?,
        })
    }

    fn steps_xor_tokens(&mut self, both: bool) {
        let (steps, tokens) = ("training.steps", "training.tokens");
        let silent = self.is_bad(steps) || self.is_bad(tokens);
        self.bad.insert(steps.to_owned());
        if silent {
            return;
        }
        let hint = "set the other to null, or remove it".to_owned();
        if both {
            let message = "both `steps` and `tokens` are given".to_owned();
            let limit = Some("one of the two".to_owned());
            self.problem(ProblemKind::Conflict, tokens, message, limit, Some(hint));
        } else {
            let message = "neither `steps` nor `tokens` is given".to_owned();
            let limit = keys::find(steps).map(keys::limit);
            self.problem(ProblemKind::Missing, steps, message, limit, None);
        }
    }

    fn batch_stages(&mut self, v: &View, longest: u64) -> Option<Vec<BatchStage>> {
        let path = "training.global_batch";
        let one = |global_batch: usize| BatchStage {
            from_tokens: 0,
            global_batch,
            sequence_length: longest as usize,
        };
        if !matches!(v.layer.get(path), Some(Given { leaf: Leaf::Items(_), .. })) {
            return Some(vec![one(self.size(v, path)?)]);
        }
        let mut stages = Vec::new();
        for (index, given) in self.items(v, path).into_iter().enumerate() {
            let layer = self.item_layer(path, &given);
            let item = format!("{path}[{index}]");
            let v = View { layer: &layer, table: keys::item_path(path), path: item };
            let length = self.optional_size(&v, "sequence_length");
            stages.push(BatchStage {
                from_tokens: self.integer(&v, "from_tokens")?,
                global_batch: self.size(&v, "global_batch")?,
                sequence_length: length.unwrap_or(longest as usize),
            });
        }
        Some(stages)
    }

    /// A path or a URL, absolute. `s3://` is kept; other schemes are refused.
    fn data_path(&mut self, key: &str, text: &str) -> Option<String> {
        if text.starts_with("s3://") {
            return Some(text.to_owned());
        }
        self.local_path(key, text).map(|path| path.to_string_lossy().into_owned())
    }

    /// The URL of an object store's folder, without slashes at its end.
    fn remote(&mut self, v: &View) -> Option<String> {
        let path = "checkpoint.remote";
        let text = self.optional_text(v, path)?;
        let url = text.trim_end_matches('/');
        if is_remote(url) {
            return Some(url.to_owned());
        }
        if !self.is_bad(path) {
            let message = format!("{} is no folder of an object store", quoted(&text));
            let limit = keys::find(path).map(keys::limit);
            let plain = "plain names between the slashes: no spaces, `%`, `?`, `#`, `.` or `..`";
            let hint = Some(plain.to_owned());
            self.problem(ProblemKind::OutOfRange, path, message, limit, hint);
        }
        None
    }

    fn memory_folder(&mut self, v: &View) -> Option<PathBuf> {
        let key = "checkpoint.memory.folder";
        let text = self.text(v, key)?;
        Some(self.local_path(key, &text).unwrap_or_default())
    }

    fn local_path(&mut self, key: &str, text: &str) -> Option<PathBuf> {
        if self.is_bad(key) {
            return None;
        }
        if let Some((scheme, _)) = text.split_once("://") {
            let message = format!("{} is no path: scheme {}", quoted(text), quoted(scheme));
            let limit = Some("a path on this machine".to_owned());
            self.problem(ProblemKind::OutOfRange, key, message, limit, None);
            return None;
        }
        Some(absolute(self.base_dir, Path::new(text)))
    }

    /// Whether the value at `path`, or something it is part of, is known to be unusable.
    pub fn is_bad(&self, path: &str) -> bool {
        self.bad.iter().any(|bad| {
            path.strip_prefix(bad.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        })
    }

    pub fn problem(
        &mut self,
        kind: ProblemKind,
        key: &str,
        message: String,
        limit: Option<String>,
        hint: Option<String>,
    ) {
        let place = self.places.get(key).cloned().unwrap_or_else(|| self.whole.clone());
        self.problems.push(Problem { kind, place, key: key.to_owned(), message, limit, hint });
        self.bad.insert(key.to_owned());
    }
}

/// `text` from `base`, leading `.` and `..` taken off; later ones stay, for links may cross them.
pub(crate) fn absolute(base: &Path, path: &Path) -> PathBuf {
    let mut out = base.to_owned();
    let mut leading = true;
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir if leading => {
                out.pop();
            }
            other => {
                leading = false;
                out.push(other);
            }
        }
    }
    out
}

/// Whether it is a URL that [`keys::REMOTES`] describes.
fn is_remote(url: &str) -> bool {
    let plain = |part: &str| {
        let is_forbidden = |c: char| c.is_whitespace() || c.is_control() || "%?#*\\\"".contains(c);
        !part.is_empty() && part != "." && part != ".." && !part.contains(is_forbidden)
    };
    match url.split_once("://") {
        Some(("s3" | "gs" | "az", rest)) => rest.split('/').all(plain) && !rest.contains('@'),
        Some(("file", path)) => {
            path.strip_prefix('/').is_some_and(|path| path.split('/').all(plain))
        }
        _ => false,
    }
}

/// Reading single values.
impl Resolver<'_> {
    fn item_layer(&self, list: &str, given: &Layer) -> Layer {
        let mut layer = self.built_in.item(list);
        crate::layers::overlay(&mut layer, given.clone());
        layer
    }

    /// The leaf of `name` in the view, with its row and its path in messages.
    fn get<'v>(&mut self, v: &'v View, name: &str) -> Option<(&'static Key, &'v Given, String)> {
        let key = keys::find(&crate::yaml::join(&v.table, name))?;
        let given = v.layer.get(key.path)?;
        let path = crate::yaml::join(&v.path, name);
        if given.place != Place::Default {
            self.places.insert(path.clone(), given.place.clone());
        }
        Some((key, given, path))
    }

    /// As `get`; a null where null may not be is reported as missing.
    fn required<'v>(&mut self, v: &'v View, name: &str) -> Option<(&'static Key, &'v Given)> {
        let (key, given, path) = self.get(v, name)?;
        if matches!(given.leaf, Leaf::Null) && !self.is_bad(&path) {
            let by_preset = key.parent() == "model";
            let hint = by_preset.then(|| {
                let presets = keys::PRESETS.join(", ");
                format!("give it, or `model.preset` (one of {presets})")
            });
            let message = "the key is required and not given".to_owned();
            let place = self.places.get(&v.path).cloned();
            if let Some(place) = place.or_else(|| item_place(v)) {
                self.places.insert(path.clone(), place);
            }
            let limit = Some(keys::limit(key));
            self.problem(ProblemKind::Missing, &path, message, limit, hint);
        }
        Some((key, given))
    }

    fn integer(&mut self, v: &View, name: &str) -> Option<u64> {
        let (key, given) = self.required(v, name)?;
        match (&given.leaf, key.kind) {
            (Leaf::Integer(integer), _) => Some(*integer),
            (_, Kind::Integer { min, .. } | Kind::IntegerOrItems { min, .. }) => Some(min),
            _ => None,
        }
    }

    fn size(&mut self, v: &View, name: &str) -> Option<usize> {
        self.integer(v, name).and_then(|i| usize::try_from(i).ok())
    }

    fn count(&mut self, v: &View, name: &str) -> Option<u32> {
        self.integer(v, name).and_then(|i| u32::try_from(i).ok())
    }

    /// `None`: null or auto.
    fn optional_integer(&mut self, v: &View, name: &str) -> Option<u64> {
        match self.get(v, name)?.1.leaf {
            Leaf::Integer(integer) => Some(integer),
            _ => None,
        }
    }

    fn optional_size(&mut self, v: &View, name: &str) -> Option<usize> {
        self.optional_integer(v, name).and_then(|i| usize::try_from(i).ok())
    }

    fn number(&mut self, v: &View, name: &str) -> Option<f64> {
        let (key, given) = self.required(v, name)?;
        match (&given.leaf, key.kind) {
            (Leaf::Number(number), _) => Some(*number),
            (_, Kind::Number { max, .. }) => Some(max),
            _ => None,
        }
    }

    fn optional_number(&mut self, v: &View, name: &str) -> Option<f64> {
        match self.get(v, name)?.1.leaf {
            Leaf::Number(number) => Some(number),
            _ => None,
        }
    }

    fn boolean(&mut self, v: &View, name: &str) -> Option<bool> {
        match self.required(v, name)?.1.leaf {
            Leaf::Bool(b) => Some(b),
            _ => Some(false),
        }
    }

    fn betas(&mut self, v: &View, name: &str) -> Option<[f64; 2]> {
        match self.required(v, name)?.1.leaf {
            Leaf::Betas(betas) => Some(betas),
            _ => None,
        }
    }

    fn text(&mut self, v: &View, name: &str) -> Option<String> {
        match &self.required(v, name)?.1.leaf {
            Leaf::Text(text) => Some(text.clone()),
            _ => Some(String::new()),
        }
    }

    fn optional_text(&mut self, v: &View, name: &str) -> Option<String> {
        match &self.get(v, name)?.1.leaf {
            Leaf::Text(text) => Some(text.clone()),
            _ => None,
        }
    }

    /// The words of the table are those of the type's serde names; a test reads each.
    fn choice<T: DeserializeOwned>(&mut self, v: &View, name: &str) -> Option<T> {
        let text = self.text(v, name)?;
        serde_json::from_value(serde_json::Value::String(text)).ok()
    }

    fn items(&mut self, v: &View, name: &str) -> Vec<Layer> {
        match self.required(v, name) {
            Some((_, Given { leaf: Leaf::Items(items), .. })) => items.clone(),
            _ => Vec::new(),
        }
    }
}

/// The place of the first key given in an item, where one is.
fn item_place(v: &View) -> Option<Place> {
    if v.path.is_empty() {
        return None;
    }
    v.layer.values().map(|given| &given.place).find(|place| **place != Place::Default).cloned()
}
