//! Rules over several keys, and what is worth noting. A rule that involves a value already known
//! to be wrong stays silent.

mod degrees;
mod elastic;
mod fp8;
mod ranks;
mod sizes;

use crate::batch_plan::first_steps;
use crate::problem::{Note, NoteLevel, Place, Problem, ProblemKind};
use crate::resolve::Resolver;
use crate::resolved::*;
use crate::walk::Leaf;

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
        self.cores();
        self.batches();
        self.sizes();
        self.splits();
        self.fp8();
        self.pipeline();
        // After the rules of each degree by itself.
        self.ranks();
        self.unused();
        self.times();
        self.elastic();
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
        for (index, samples) in self.config.data.skip_samples.iter().enumerate() {
            if samples.last < samples.first {
                let key = format!("data.skip_samples[{index}].last");
                let message = format!("{} is before the first, {}", samples.last, samples.first);
                self.conflict(&[&key, "data.skip_samples"], message, "at least first", "");
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

    fn batches(&mut self) {
        let t = &self.config.training;
        let longest = t.batch_stages.iter().map(|s| s.sequence_length).max().unwrap_or(1);
        let (mut from, mut is_sound) = (None, true);
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
                is_sound = false;
            }
            let in_order = match from {
                None => stage.from_tokens == 0,
                Some(from) => stage.from_tokens > from,
            };
            if !in_order {
                let limit = "0 in the first stage, then rising";
                let message = format!("{} is out of order", stage.from_tokens);
                self.conflict(&[&key("from_tokens"), whole], message, limit, "");
                is_sound = false;
            }
            from = Some(stage.from_tokens);
        }
        // Where the stages begin says nothing of lengths that do not go together.
        if t.batch_stages.len() > 1 && is_sound {
            self.stage_starts();
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
                "has no effect on the order while stages is 1",
            ),
            (
                c.numeric.on_spike != OnSpike::Report
                    && c.numeric.loss_zscore.is_none()
                    && c.numeric.grad_norm_zscore.is_none(),
                "numeric.on_spike",
                "has no effect while loss_zscore and grad_norm_zscore are null",
            ),
            (
                p.shard.reshard_after_forward && p.shard.level != ShardLevel::Parameters,
                "parallelism.shard.reshard_after_forward",
                "belongs to level: parameters and has no effect",
            ),
            (
                p.shard.ranks == 1 && p.shard.level != ShardLevel::None,
                "parallelism.shard.level",
                "has no effect while shard.ranks is 1",
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
        let n = &c.numeric;
        let goes_back = [
            (n.on_spike == OnSpike::Rollback, "numeric.on_spike"),
            (n.on_non_finite == OnNonFinite::Rollback, "numeric.on_non_finite"),
        ];
        for (_, key) in goes_back.into_iter().filter(|(asked, _)| *asked) {
            if c.checkpoint.every_steps == Some(0) {
                let message = "rollback begins from the start: checkpoint.every_steps is 0";
                self.note(NoteLevel::Warning, key, message.to_owned());
            }
        }
        // With `auto` there is a checkpoint at each of those steps too.
        let (every, keep) = (c.checkpoint.every_steps, c.checkpoint.keep_every_steps);
        if let Some(every) = every
            && keep > 0
            && (every == 0 || !keep.is_multiple_of(every))
        {
            let message = format!("checkpoints come every {every} steps, so few of every {keep}");
            self.note(NoteLevel::Warning, "checkpoint.keep_every_steps", message);
        }
        let in_memory = c.checkpoint.memory.every_steps;
        if let Some(every) = every.filter(|every| (1..=in_memory).contains(every)) {
            let message = format!("those on disk come every {every} steps, and are as new");
            self.note(NoteLevel::Warning, "checkpoint.memory.every_steps", message);
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
