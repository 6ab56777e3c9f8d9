//! Rules over several keys, and what is worth noting. A rule that involves a value already known
//! to be wrong stays silent.

use crate::batch_plan::first_steps;
use crate::problem::{Note, NoteLevel, Place, Problem, ProblemKind};
use crate::resolve::Resolver;
use crate::resolved::*;
use crate::walk::Leaf;

/// Total tokens of a run, with room left in 64 bits.
const MAX_TOTAL_TOKENS: u128 = 1 << 60;

/// Checks a typed config and gathers problems and notes.
pub(crate) struct Rules<'a, 'b> {
    pub config: &'a RunConfig,
    pub resolver: &'a mut Resolver<'b>,
    pub notes: Vec<Note>,
}

impl RunConfig {
    /// Ranks over all nodes; `None` while `cluster.ranks_per_node` is `auto`.
    pub fn num_ranks(&self) -> Option<usize> {
        self.cluster.ranks_per_node.map(|ranks| ranks * self.cluster.nodes)
    }
}

impl Parallelism {
    /// Ranks of one data-parallel replica, without sharding: tensor x context x pipeline.
    pub fn model_ranks(&self) -> usize {
        self.tensor * self.context * self.pipeline.stages
    }

    /// Data-parallel size, shard x replicate, of `num_ranks` ranks.
    pub fn data_ranks(&self, num_ranks: usize) -> usize {
        num_ranks / self.model_ranks()
    }
}

impl Rules<'_, '_> {
    pub fn check(&mut self) {
        self.model();
        self.data();
        self.ranks();
        self.batches();
        self.splits();
        self.pipeline();
        self.unused();
        self.times();
        crate::support::check(self);
    }

    /// A problem of `keys` (the first is named), unless one of them is already known to be wrong.
    pub fn report(
        &mut self,
        kind: ProblemKind,
        keys: &[&str],
        message: String,
        limit: &str,
        hint: &str,
    ) {
        if keys.iter().any(|key| self.resolver.is_bad(key)) {
            return;
        }
        let some = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        // Where the first key is a default, the place is that of another which was given.
        let given = keys.iter().find_map(|key| self.resolver.places.get(*key));
        let place = given.unwrap_or(&self.resolver.whole).clone();
        let key = keys.first().copied().unwrap_or_default().to_owned();
        let (limit, hint) = (some(limit), some(hint));
        self.resolver.problems.push(Problem { kind, place, key, message, limit, hint });
    }

    fn conflict(&mut self, keys: &[&str], message: String, limit: &str, hint: &str) {
        self.report(ProblemKind::Conflict, keys, message, limit, hint);
    }

    fn note(&mut self, level: NoteLevel, key: &str, message: String) {
        if self.resolver.is_bad(key) {
            return;
        }
        let place = self.resolver.places.get(key).cloned().unwrap_or(Place::Default);
        self.notes.push(Note { level, place, key: key.to_owned(), message });
    }

    fn model(&mut self) {
        let m = &self.config.model;
        if !m.heads.is_multiple_of(m.kv_heads) {
            let keys = ["model.kv_heads", "model.heads"];
            let message = format!("{} does not divide the {} heads", m.kv_heads, m.heads);
            self.conflict(&keys, message, "a divisor of model.heads", "");
        }
        if !m.head_dim.is_multiple_of(2) {
            let keys = ["model.head_dim", "model.dim", "model.heads"];
            let message = format!("{} is odd", m.head_dim);
            let hint =
                "rotary embedding turns pairs; where head_dim is not given it is dim / heads";
            self.conflict(&keys, message, "an even number", hint);
        }
        if let Some(RopeScaling::Llama3 { low_freq_factor, high_freq_factor, .. }) = m.rope.scaling
            && high_freq_factor <= low_freq_factor
        {
            let low = "model.rope.scaling.low_freq_factor";
            let keys = ["model.rope.scaling.high_freq_factor", low, "model.rope.scaling"];
            let message = format!("{high_freq_factor} is not above {low_freq_factor}");
            self.conflict(&keys, message, "above low_freq_factor", "Llama 3.1 has 1 and 4");
        }
    }

    fn data(&mut self) {
        let sources = &self.config.data.sources;
        for (index, source) in sources.iter().enumerate() {
            let earlier = sources.iter().take(index).any(|other| other.name == source.name);
            if earlier && !source.name.is_empty() {
                let key = format!("data.sources[{index}].name");
                let message = format!("a second source is called \"{}\"", source.name);
                self.conflict(&[&key], message, "unique names", "metrics are kept by name");
            }
        }
        let held_out = self.config.data.validation_fraction;
        if self.config.validation.every_steps > 0 && held_out == 0.0 {
            let keys = ["validation.every_steps", "data.validation_fraction"];
            let message = "validation is on and data.validation_fraction is 0".to_owned();
            let hint = "hold documents out, or set validation.every_steps to 0";
            self.conflict(&keys, message, "a fraction above 0", hint);
        }
    }

    /// The product of the degrees against the ranks.
    fn ranks(&mut self) {
        let p = &self.config.parallelism;
        let degrees = [p.tensor, p.context, p.pipeline.stages, p.shard.ranks];
        let product: u128 = degrees.iter().map(|degree| *degree as u128).product();
        let spelled = degrees.map(|degree| degree.to_string()).join(" x ");
        let keys = [
            "cluster.ranks_per_node",
            "cluster.nodes",
            "parallelism.tensor",
            "parallelism.context",
            "parallelism.pipeline.stages",
            "parallelism.shard.ranks",
            "parallelism.replicate",
        ];
        let Some(ranks) = self.config.num_ranks() else { return };
        let ranks_are = "ranks are cluster.nodes x cluster.ranks_per_node";
        match p.replicate {
            Some(replicate) if product * replicate as u128 != ranks as u128 => {
                let all = product * replicate as u128;
                let message = format!(
                    "the degrees tensor x context x pipeline x shard x replicate = \
                     {spelled} x {replicate} = {all} are not the {ranks} ranks"
                );
                let replicas = ranks as u128 / product;
                let hint = if replicas > 0 && (ranks as u128).is_multiple_of(product) {
                    format!("parallelism.replicate={replicas} would do; {ranks_are}")
                } else {
                    ranks_are.to_owned()
                };
                self.conflict(&keys, message, &format!("{all} ranks"), &hint);
            }
            None if !(ranks as u128).is_multiple_of(product) => {
                let message = format!(
                    "the degrees tensor x context x pipeline x shard = {spelled} = {product} \
                     do not divide the {ranks} ranks"
                );
                let near = usize::try_from(product).map_or(String::new(), |p| multiples(ranks, p));
                let hint = format!("{near} ranks would do; {ranks_are}");
                let limit = format!("a multiple of {product} ranks");
                self.conflict(&keys, message, &limit, &hint);
            }
            _ => {}
        }
        self.cores(ranks);
    }

    fn cores(&mut self, ranks: usize) {
        let c = &self.config.cluster;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let local = c.kind == ClusterKind::Local && c.device != DeviceKind::Cuda;
        let on_node = ranks / c.nodes.max(1);
        if local && on_node > cores {
            let message =
                format!("{on_node} ranks on {}: they will take turns", counted(cores, "core"));
            self.note(NoteLevel::Warning, "cluster.ranks_per_node", message);
        } else if let Some(threads) = c.threads_per_rank
            && local
            && threads * on_node > cores
        {
            let (ranks, threads) = (counted(on_node, "rank"), counted(threads, "thread"));
            let cores = counted(cores, "core");
            let message = format!("{ranks} of {threads} on {cores}: they will take turns");
            self.note(NoteLevel::Warning, "cluster.threads_per_rank", message);
        }
    }

    fn batches(&mut self) {
        let t = &self.config.training;
        let is_ramp = t.batch_stages.len() > 1;
        let longest = t.batch_stages.iter().map(|s| s.sequence_length).max().unwrap_or(1);
        let mut from = None;
        for (index, stage) in t.batch_stages.iter().enumerate() {
            let key = |name: &str| format!("training.global_batch[{index}].{name}");
            let whole = "training.global_batch";
            self.divides_over_ranks(stage, &key("global_batch"));
            if !longest.is_multiple_of(stage.sequence_length) {
                let message = format!(
                    "{} does not divide {longest}, the longest of all stages",
                    stage.sequence_length
                );
                let limit = "a divisor of the longest sequence";
                self.conflict(&[&key("sequence_length"), whole], message, limit, "");
            }
            let in_order = match from {
                None => stage.from_tokens == 0,
                Some(from) => stage.from_tokens > from,
            };
            if !in_order {
                let limit = "0 in the first stage, then rising";
                let message = format!("{} is out of order", stage.from_tokens);
                self.conflict(&[&key("from_tokens"), whole], message, limit, "");
            }
            from = Some(stage.from_tokens);
        }
        if is_ramp {
            self.stage_starts();
        }
        self.total_tokens();
    }

    fn divides_over_ranks(&mut self, stage: &BatchStage, key: &str) {
        let (p, t) = (&self.config.parallelism, &self.config.training);
        let least = p.shard.ranks * p.replicate.unwrap_or(1);
        let data_ranks = self.config.num_ranks().map_or(least, |ranks| p.data_ranks(ranks)).max(1);
        let per_pass = data_ranks as u128 * t.micro_batch as u128;
        if !(stage.global_batch as u128).is_multiple_of(per_pass) {
            let message = format!(
                "{} sequences are not a multiple of {data_ranks} data-parallel ranks x \
                 micro_batch {} = {per_pass}",
                stage.global_batch, t.micro_batch
            );
            let keys = [key, "training.global_batch", "training.micro_batch"];
            let named: &[&str] = if t.batch_stages.len() > 1 { &keys } else { &keys[1..] };
            let limit = format!("a multiple of {per_pass}");
            let near = usize::try_from(per_pass).map_or(String::new(), |per_pass| {
                format!("{} would do, or ", multiples(stage.global_batch, per_pass))
            });
            let hint = format!("{near}change training.micro_batch or the ranks");
            self.conflict(named, message, &limit, &hint);
        }
    }

    fn stage_starts(&mut self) {
        let t = &self.config.training;
        for (index, first) in first_steps(&t.batch_stages).into_iter().enumerate() {
            let key = format!("training.global_batch[{index}].from_tokens");
            match first {
                None => {
                    let message = "the stage can never begin on a whole sequence".to_owned();
                    let hint = "let each sequence_length divide the next stage's, or the reverse";
                    self.conflict(&[&key, "training.global_batch"], message, "", hint);
                }
                Some(first) if first > t.steps => {
                    let message =
                        format!("the stage begins at step {first}, the run ends at {}", t.steps);
                    self.note(NoteLevel::Warning, &key, message);
                }
                Some(_) => {}
            }
        }
    }

    fn total_tokens(&mut self) {
        let t = &self.config.training;
        let largest = t.batch_stages.iter().map(|s| s.sequence_length * s.global_batch).max();
        let most = u128::from(t.steps) * largest.unwrap_or(0) as u128;
        if most > MAX_TOTAL_TOKENS {
            let message = format!("{} steps may see {most} tokens", t.steps);
            let keys = ["training.steps", "training.global_batch"];
            self.conflict(&keys, message, &format!("{MAX_TOTAL_TOKENS} tokens"), "");
        }
    }

    /// What tensor and context parallelism must divide.
    fn splits(&mut self) {
        let (p, m) = (&self.config.parallelism, &self.config.model);
        let tensor = "parallelism.tensor";
        let sizes = [("heads", m.heads), ("ffn_dim", m.ffn_dim), ("vocab_size", m.vocab_size)];
        let goes_with_kv_heads = |degree: usize| {
            let (small, large) = (m.kv_heads.min(degree), m.kv_heads.max(degree));
            large.is_multiple_of(small)
        };
        let works = |degree: usize| {
            sizes.iter().all(|(_, size)| size.is_multiple_of(degree)) && goes_with_kv_heads(degree)
        };
        let hint = would_do(tensor, &nearest(p.tensor, m.heads, works));
        for (name, size) in sizes {
            if !size.is_multiple_of(p.tensor) {
                let key = format!("model.{name}");
                let message = format!("{} ranks do not divide {key} {size}", p.tensor);
                let limit = format!("a divisor of {size}");
                self.conflict(&[tensor, &key], message, &limit, &hint);
            }
        }
        if !goes_with_kv_heads(p.tensor) {
            let message = format!(
                "{} ranks and model.kv_heads {} do not divide one another",
                p.tensor, m.kv_heads
            );
            let limit = format!("a divisor or a multiple of {}", m.kv_heads);
            self.conflict(&[tensor, "model.kv_heads"], message, &limit, &hint);
        }
        let by_tensor = if p.sequence { p.tensor } else { 1 };
        let chunks = if p.context > 1 { 2 * p.context } else { 1 } * by_tensor;
        for stage in &self.config.training.batch_stages {
            if !stage.sequence_length.is_multiple_of(chunks) {
                let message = format!(
                    "a sequence of {} tokens does not split in {chunks} (2 chunks per \
                     context-parallel rank, times the ranks of sequence parallelism)",
                    stage.sequence_length
                );
                let by = if p.context > 1 { "parallelism.context" } else { tensor };
                let keys = [by, "parallelism.sequence", "data.sequence_length"];
                let length = stage.sequence_length;
                let near = multiples(length, chunks);
                let degrees = nearest(p.context, length.min(1 << 16), |context| {
                    length.is_multiple_of(if context > 1 { 2 * context } else { 1 } * by_tensor)
                });
                let degrees = match would_do("parallelism.context", &degrees) {
                    degrees if degrees.is_empty() || p.context == 1 => String::new(),
                    degrees => format!("; {degrees}"),
                };
                let hint = format!("a sequence of {near} tokens would do{degrees}");
                self.conflict(&keys, message, &format!("a multiple of {chunks}"), &hint);
            }
        }
    }

    fn pipeline(&mut self) {
        let p = &self.config.parallelism.pipeline;
        let layers = self.config.model.layers;
        let chunks = p.stages * p.virtual_stages;
        let stages = "parallelism.pipeline.stages";
        let virtual_stages = "parallelism.pipeline.virtual_stages";
        if chunks > layers {
            let message = format!(
                "{layers} layers for {} stages x {} virtual stages = {chunks} chunks",
                p.stages, p.virtual_stages
            );
            let limit = format!("at most {layers} chunks: each holds a layer or more");
            let most = layers / p.virtual_stages.max(1);
            let hint = if most > 0 { would_do(stages, &most.to_string()) } else { String::new() };
            self.conflict(&[stages, virtual_stages, "model.layers"], message, &limit, &hint);
        }
        let schedule = "parallelism.pipeline.schedule";
        let plain =
            matches!(p.schedule, PipelineSchedule::Gpipe | PipelineSchedule::OneForwardOneBackward);
        if p.virtual_stages > 1 && plain {
            let message = format!("{} model chunks per rank in this schedule", p.virtual_stages);
            let limit = "1 with gpipe and 1f1b";
            let hint = "schedule: interleaved-1f1b or zero-bubble";
            self.conflict(&[virtual_stages, schedule], message, limit, hint);
        }
        let shard = &self.config.parallelism.shard;
        if shard.level == ShardLevel::None && shard.ranks > 1 {
            let message = format!("{} ranks share nothing while level is none", shard.ranks);
            let keys = ["parallelism.shard.ranks", "parallelism.shard.level"];
            let hint = "set parallelism.shard.level, or count the ranks as replicas";
            self.conflict(&keys, message, "1 with level: none", hint);
        }
    }

    /// Keys that were given and have no effect beside the others.
    fn unused(&mut self) {
        let (c, p) = (self.config, &self.config.parallelism);
        let number = |rules: &Self, key: &str| match rules
            .resolver
            .built_in
            .defaults
            .get(key)
            .map(|given| &given.leaf)
        {
            Some(Leaf::Number(number)) => Some(*number),
            _ => None,
        };
        let default_decay = number(self, "schedule.decay_fraction");
        let default_final = number(self, "schedule.final_fraction");
        let idle = [
            (
                c.schedule.kind != ScheduleKind::Wsd
                    && Some(c.schedule.decay_fraction) != default_decay,
                "schedule.decay_fraction",
                "belongs to kind: wsd and has no effect",
            ),
            (
                c.schedule.kind == ScheduleKind::Constant
                    && Some(c.schedule.final_fraction) != default_final,
                "schedule.final_fraction",
                "has no effect with kind: constant",
            ),
            (
                p.pipeline.stages == 1
                    && matches!(
                        p.pipeline.schedule,
                        PipelineSchedule::Interleaved | PipelineSchedule::ZeroBubble
                    ),
                "parallelism.pipeline.schedule",
                "has no effect while stages is 1",
            ),
            (
                p.shard.reshard_after_forward && p.shard.level != ShardLevel::Parameters,
                "parallelism.shard.reshard_after_forward",
                "belongs to level: parameters and has no effect",
            ),
        ];
        for (applies, key, message) in idle {
            if applies {
                self.note(NoteLevel::Info, key, message.to_owned());
            }
        }
    }

    /// Steps that do not go together.
    fn times(&mut self) {
        let c = self.config;
        let (steps, warmup) = (c.training.steps, c.schedule.warmup_steps);
        let known = !self.resolver.is_bad("training.steps");
        if warmup > steps && known {
            let message = format!("the warm-up of {warmup} steps is longer than the {steps} steps");
            self.note(NoteLevel::Warning, "schedule.warmup_steps", message);
        } else if c.schedule.kind == ScheduleKind::Wsd && known {
            let decay = (steps as f64 * c.schedule.decay_fraction).ceil() as u64;
            if warmup + decay > steps {
                let message = format!(
                    "the warm-up of {warmup} and the decay of {decay} steps overlap in {steps}"
                );
                self.note(NoteLevel::Warning, "schedule.warmup_steps", message);
            }
        }
        let (every, keep) = (c.checkpoint.every_steps, c.checkpoint.keep_every_steps);
        if keep > 0 && (every == 0 || !keep.is_multiple_of(every)) {
            let message = format!("checkpoints come every {every} steps, so few of every {keep}");
            self.note(NoteLevel::Warning, "checkpoint.keep_every_steps", message);
        }
    }
}

/// `1 core`, `2 cores`.
fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// The nearest numbers below and above `value` that work, from 1 to `most`: "2 or 4".
fn nearest(value: usize, most: usize, works: impl Fn(usize) -> bool) -> String {
    let below = (1..value.min(most.saturating_add(1))).rev().find(|number| works(*number));
    let above = (value.saturating_add(1)..=most).find(|number| works(*number));
    let found: Vec<String> = below.into_iter().chain(above).map(|n| n.to_string()).collect();
    found.join(" or ")
}

/// The multiples of `unit` below and above `value`.
fn multiples(value: usize, unit: usize) -> String {
    let below = value / unit.max(1) * unit;
    let above = below.saturating_add(unit);
    if below == 0 { above.to_string() } else { format!("{below} or {above}") }
}

fn would_do(key: &str, numbers: &str) -> String {
    if numbers.is_empty() { String::new() } else { format!("{key}={numbers} would do") }
}
