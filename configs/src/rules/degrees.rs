//! The degrees of parallelism against the ranks and against what they must divide.

use super::{Rules, counted, multiples, nearest, would_do};
use crate::problem::NoteLevel;
use crate::resolved::*;

const TENSOR: &str = "parallelism.tensor";
const CONTEXT: &str = "parallelism.context";
const STAGES: &str = "parallelism.pipeline.stages";
const VIRTUAL_STAGES: &str = "parallelism.pipeline.virtual_stages";
const CONTIGUOUS: &str = "parallelism.pipeline.contiguous_micro_batches";
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
    /// The product of the degrees against the ranks.
    pub(super) fn ranks(&mut self) {
        let p = &self.config.parallelism;
        let degrees = [p.tensor, p.context, p.pipeline.stages, p.shard.ranks];
        let product: u128 = degrees.iter().map(|degree| *degree as u128).product();
        let spelled = degrees.map(|degree| degree.to_string()).join(" x ");
        let keys = [
            "cluster.ranks_per_node",
            "cluster.nodes",
            TENSOR,
            CONTEXT,
            STAGES,
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

    /// Whether the ranks, where they are known, go in `degree` in place of `current` on one axis:
    /// beside the other degrees, or by itself where those do not go either.
    fn fits_ranks(&self, degree: usize, current: usize) -> bool {
        let Some(ranks) = self.config.num_ranks() else { return true };
        let p = &self.config.parallelism;
        let others = p.model_ranks() / current * p.shard.ranks;
        let left = if ranks.is_multiple_of(others) { ranks / others } else { ranks };
        left.is_multiple_of(degree)
    }

    /// What tensor and context parallelism must divide.
    pub(super) fn splits(&mut self) {
        let t = &self.config.training;
        let mut lengths: Vec<usize> = t.batch_stages.iter().map(|s| s.sequence_length).collect();
        lengths.sort_unstable();
        lengths.dedup();
        if self.resolver.is_bad(LENGTH) || self.resolver.is_bad(BATCH) {
            lengths.clear();
        }
        self.tensor(&lengths);
        self.context(&lengths);
    }

    /// One problem for all that the tensor-parallel ranks do not divide.
    fn tensor(&mut self, lengths: &[usize]) {
        let (ranks, m) = (self.config.parallelism.tensor, &self.config.model);
        let divided = self.divided_by_tensor(lengths);
        let kv_heads = Some(m.kv_heads).filter(|_| !self.resolver.is_bad("model.kv_heads"));
        let goes_with_kv_heads = |degree: usize| {
            kv_heads.is_none_or(|kv| kv.is_multiple_of(degree) || degree.is_multiple_of(kv))
        };
        let undivided: Vec<&Divided> =
            divided.iter().filter(|divided| !divided.size.is_multiple_of(ranks)).collect();
        if undivided.is_empty() && goes_with_kv_heads(ranks) {
            return;
        }
        let works = |degree: usize| {
            divided.iter().all(|divided| divided.size.is_multiple_of(degree))
                && goes_with_kv_heads(degree)
                && self.fits_ranks(degree, ranks)
        };
        let mut hint = would_do(TENSOR, &nearest(ranks, m.heads, works));
        if goes_with_kv_heads(ranks) && undivided.iter().all(|divided| divided.key == LENGTH) {
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
        if let Some(kv_heads) = kv_heads.filter(|_| !goes_with_kv_heads(ranks)) {
            keys.push("model.kv_heads");
            let and = format!("{ranks} ranks and model.kv_heads {kv_heads}");
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
        // The hints leave whole tokens to the ranks of sequence parallelism too, where they can.
        let by_tensor = if p.sequence { p.tensor } else { 1 };
        let is_split = |by: usize| lengths.iter().all(|length| length.is_multiple_of(by));
        let by_tensor = if is_split(by_tensor) { by_tensor } else { 1 };
        let tokens = unsplit.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let message = format!(
            "a sequence of {tokens} tokens does not split in 2 x {} = {chunks} chunks, 2 for each \
             context-parallel rank",
            p.context
        );
        let degrees = nearest(p.context, (1 << 12).min(*first), |context| {
            is_split(num_chunks(context) * by_tensor) && self.fits_ranks(context, p.context)
        });
        let mut hints = vec![would_do(CONTEXT, &degrees)];
        if let [length] = unsplit[..] {
            let near = multiples(length, chunks * by_tensor);
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
        if chunks > layers {
            let message = format!(
                "{layers} layers for {} stages x {} virtual stages = {chunks} chunks",
                p.stages, p.virtual_stages
            );
            let limit = format!("at most {layers} chunks: each holds a layer or more");
            let fits = |stages| self.fits_ranks(stages, p.stages);
            let near = nearest(p.stages, layers / p.virtual_stages, fits);
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
        let shard = &self.config.parallelism.shard;
        if shard.level == ShardLevel::None && shard.ranks > 1 {
            let message = format!("{} ranks share nothing while level is none", shard.ranks);
            let keys = ["parallelism.shard.ranks", "parallelism.shard.level"];
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
