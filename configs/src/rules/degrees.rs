//! The degrees of parallelism against what they must divide.

use super::{Rules, multiples, would_do};
use crate::problem::NoteLevel;
use crate::resolved::*;

pub(super) const TENSOR: &str = "parallelism.tensor";
pub(super) const CONTEXT: &str = "parallelism.context";
pub(super) const STAGES: &str = "parallelism.pipeline.stages";
pub(super) const SHARD: &str = "parallelism.shard.ranks";
const VIRTUAL_STAGES: &str = "parallelism.pipeline.virtual_stages";
const CONTIGUOUS: &str = "parallelism.pipeline.contiguous_micro_batches";
const KV_HEADS: &str = "model.kv_heads";
const LENGTH: &str = "data.sequence_length";
const BATCH: &str = "training.global_batch";

/// What the tensor-parallel ranks must divide.
struct Divided {
    key: &'static str,
    size: usize,
    /// Words for it.
    name: String,
}

impl Rules<'_, '_> {
    /// What tensor and context parallelism must divide.
    pub(super) fn splits(&mut self) {
        let lengths = self.lengths();
        self.tensor(&lengths);
        self.context(&lengths);
    }

    /// Lengths of the sequences that there are, as far as they are known.
    fn lengths(&self) -> Vec<usize> {
        if self.resolver.is_bad(LENGTH) || self.resolver.is_bad(BATCH) {
            return Vec::new();
        }
        let stages = self.config.training.batch_stages.iter();
        let mut lengths: Vec<usize> = stages.map(|stage| stage.sequence_length).collect();
        lengths.sort_unstable();
        lengths.dedup();
        lengths
    }

    /// Whether `degree` keeps the rules of its own `key`, which those above report.
    pub(super) fn keeps_own_rules(&self, key: &str, degree: usize) -> bool {
        let p = &self.config.parallelism;
        match key {
            TENSOR => self.tensor_works(degree, &self.lengths()),
            CONTEXT => self.context_works(degree, &self.lengths()),
            STAGES => {
                let chunks = p.pipeline.virtual_stages;
                degree * chunks <= self.config.model.layers && (degree > 1 || chunks == 1)
            }
            SHARD => degree == 1 || p.shard.level != ShardLevel::None,
            _ => true,
        }
    }

    fn tensor_works(&self, degree: usize, lengths: &[usize]) -> bool {
        let divided = self.divided_by_tensor(lengths);
        divided.iter().all(|divided| divided.size.is_multiple_of(degree))
            && self.goes_with_kv_heads(degree)
    }

    fn goes_with_kv_heads(&self, degree: usize) -> bool {
        let kv_heads = self.config.model.kv_heads;
        self.resolver.is_bad(KV_HEADS)
            || kv_heads.is_multiple_of(degree)
            || degree.is_multiple_of(kv_heads)
    }

    /// Whether all sequences split in the chunks, and these, where they can, over the ranks of
    /// sequence parallelism.
    fn context_works(&self, degree: usize, lengths: &[usize]) -> bool {
        let chunks = num_chunks(degree) * self.whole_over_tensor(lengths);
        lengths.iter().all(|length| length.is_multiple_of(chunks))
    }

    /// The ranks of sequence parallelism, where they get whole tokens of every sequence; else 1.
    fn whole_over_tensor(&self, lengths: &[usize]) -> usize {
        let p = &self.config.parallelism;
        let is_whole = lengths.iter().all(|length| length.is_multiple_of(p.tensor));
        if p.sequence && is_whole { p.tensor } else { 1 }
    }

    /// One problem for all that the tensor-parallel ranks do not divide.
    fn tensor(&mut self, lengths: &[usize]) {
        let (ranks, m) = (self.config.parallelism.tensor, &self.config.model);
        let divided = self.divided_by_tensor(lengths);
        let goes_with_kv_heads = self.goes_with_kv_heads(ranks);
        let undivided: Vec<&Divided> =
            divided.iter().filter(|divided| !divided.size.is_multiple_of(ranks)).collect();
        if undivided.is_empty() && goes_with_kv_heads {
            return;
        }
        let mut hint = would_do(TENSOR, &self.degrees_that_work(TENSOR, ranks, m.heads));
        if goes_with_kv_heads && undivided.iter().all(|divided| divided.key == LENGTH) {
            hint.push_str("; with parallelism.sequence=false sequences are not split");
        }
        let mut keys = vec![TENSOR];
        let (mut messages, mut limits) = (Vec::new(), Vec::new());
        if !undivided.is_empty() {
            keys.extend(undivided.iter().map(|divided| divided.key));
            let arithmetic = |divided: &&Divided| {
                let (times, left) = (divided.size / ranks, divided.size % ranks);
                format!("{} = {ranks} x {times} + {left}", divided.name)
            };
            let all: Vec<String> = undivided.iter().map(arithmetic).collect();
            messages.push(format!("{ranks} ranks do not divide {}", all.join(", ")));
            let sizes: Vec<String> = undivided.iter().map(|d| d.size.to_string()).collect();
            limits.push(format!("a divisor of {}", sizes.join(", ")));
        }
        if !goes_with_kv_heads {
            let kv_heads = m.kv_heads;
            keys.push(KV_HEADS);
            let and = format!("{ranks} ranks and {KV_HEADS} {kv_heads}");
            messages.push(format!("{and} do not divide one another"));
            limits.push(format!("a divisor or a multiple of {kv_heads}"));
        }
        self.conflict(&keys, messages.join("; "), &limits.join("; "), &hint);
    }

    /// What is known of what the tensor-parallel ranks must divide, but for the heads of keys and
    /// values.
    fn divided_by_tensor(&self, lengths: &[usize]) -> Vec<Divided> {
        let (p, m) = (&self.config.parallelism, &self.config.model);
        let model = [
            ("model.heads", m.heads),
            ("model.ffn_dim", m.ffn_dim),
            ("model.vocab_size", m.vocab_size),
        ];
        let known = model.into_iter().filter(|(key, _)| !self.resolver.is_bad(key));
        let mut divided: Vec<Divided> =
            known.map(|(key, size)| Divided { key, size, name: format!("{key} {size}") }).collect();
        if p.sequence {
            let chunks = num_chunks(p.context);
            // A length that does not even split in chunks is context parallelism's to report.
            let whole = lengths.iter().filter(|length| length.is_multiple_of(chunks));
            divided.extend(whole.map(|length| {
                let (key, size) = (LENGTH, length / chunks);
                let of = match p.context {
                    1 => "a sequence".to_owned(),
                    _ => format!("each of the {chunks} chunks of a sequence of {length}"),
                };
                Divided { key, size, name: format!("the {size} tokens of {of}") }
            }));
        }
        divided
    }

    /// One problem for all sequences that do not split in the chunks of context parallelism.
    fn context(&mut self, lengths: &[usize]) {
        let p = &self.config.parallelism;
        let chunks = num_chunks(p.context);
        let unsplit: Vec<usize> =
            lengths.iter().copied().filter(|length| !length.is_multiple_of(chunks)).collect();
        let Some(first) = unsplit.first() else { return };
        let tokens = unsplit.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let message = format!(
            "a sequence of {tokens} tokens does not split in 2 x {} = {chunks} chunks, 2 for each \
             context-parallel rank",
            p.context
        );
        let degrees = self.degrees_that_work(CONTEXT, p.context, (1 << 12).min(*first));
        let mut hints = vec![would_do(CONTEXT, &degrees)];
        if let [length] = unsplit[..] {
            let near = multiples(length, chunks * self.whole_over_tensor(lengths));
            hints.push(format!("a sequence of {near} tokens would do"));
        }
        hints.retain(|hint| !hint.is_empty());
        let limit = format!("a multiple of {chunks}");
        self.conflict(&[CONTEXT, LENGTH, BATCH], message, &limit, &hints.join("; "));
    }

    pub(super) fn pipeline(&mut self) {
        let p = &self.config.parallelism.pipeline;
        let layers = self.config.model.layers;
        let chunks = p.stages * p.virtual_stages;
        if p.stages == 1 && chunks > 1 {
            let message = format!("{chunks} model chunks on 1 stage, which holds the whole model");
            let hint = format!("set {STAGES} to 2 or more, with interleaved-1f1b or zero-bubble");
            self.conflict(&[VIRTUAL_STAGES, STAGES], message, "1 while stages is 1", &hint);
            return self.shard_level();
        }
        if chunks > layers {
            let message = format!(
                "{layers} layers for {} stages x {} virtual stages = {chunks} chunks",
                p.stages, p.virtual_stages
            );
            let limit = format!("at most {layers} chunks: each holds a layer or more");
            let near = self.degrees_that_work(STAGES, p.stages, layers / p.virtual_stages);
            let mut hints = vec![would_do(STAGES, &near)];
            if p.virtual_stages > 1 && layers >= p.stages {
                hints.push(would_do(VIRTUAL_STAGES, &(layers / p.stages).to_string()));
            }
            hints.retain(|hint| !hint.is_empty());
            let keys = [STAGES, VIRTUAL_STAGES, "model.layers"];
            self.conflict(&keys, message, &limit, &hints.join("; "));
        }
        let schedule = "parallelism.pipeline.schedule";
        let plain =
            matches!(p.schedule, PipelineSchedule::Gpipe | PipelineSchedule::OneForwardOneBackward);
        if p.virtual_stages > 1 && plain {
            let message = format!("{} model chunks per rank in this schedule", p.virtual_stages);
            let limit = "1 with gpipe and 1f1b";
            let hint = "schedule: interleaved-1f1b or zero-bubble";
            self.conflict(&[VIRTUAL_STAGES, schedule], message, limit, hint);
        }
        if let Some(number) = p.contiguous_micro_batches {
            self.contiguous_micro_batches(number);
        }
        self.shard_level();
    }

    fn shard_level(&mut self) {
        let shard = &self.config.parallelism.shard;
        if shard.level == ShardLevel::None && shard.ranks > 1 {
            let message = format!("{} ranks share nothing while level is none", shard.ranks);
            let keys = [SHARD, "parallelism.shard.level"];
            let hint = "set parallelism.shard.level, or count the ranks as replicas";
            self.conflict(&keys, message, "1 with level: none", hint);
        }
    }

    /// Any number of contiguous micro-batches that a step has can be run, where a rank has another
    /// chunk to turn to after them.
    fn contiguous_micro_batches(&mut self, number: usize) {
        let p = &self.config.parallelism.pipeline;
        if p.virtual_stages == 1 {
            let message = format!(
                "{number} micro-batches before the next chunk, where a rank has 1 chunk of the \
                 model"
            );
            let limit = "auto while virtual_stages is 1";
            let hint = format!("set {VIRTUAL_STAGES} to 2 or more, with interleaved-1f1b");
            self.conflict(&[CONTIGUOUS, VIRTUAL_STAGES], message, limit, &hint);
            return;
        }
        match self.most_micro_batches() {
            Some(most) if number > most => {
                let message = format!(
                    "{number} micro-batches in a row, where a rank has {most} micro-batch(es) in \
                     a step"
                );
                let limit = format!("at most {most}");
                let hint = would_do(CONTIGUOUS, &most.to_string());
                let keys = [CONTIGUOUS, BATCH, "training.micro_batch"];
                self.conflict(&keys, message, &limit, &hint);
            }
            _ if number < p.stages => {
                let message = format!(
                    "{number} in a row are fewer than the {} stages: fewer activations are held, \
                     and every round has a bubble",
                    p.stages
                );
                self.note(NoteLevel::Info, CONTIGUOUS, message);
            }
            _ => {}
        }
    }
}

/// Chunks that context parallelism cuts a sequence in.
fn num_chunks(context: usize) -> usize {
    if context > 1 { 2 * context } else { 1 }
}
