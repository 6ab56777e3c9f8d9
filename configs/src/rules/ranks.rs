//! The product of the degrees against the ranks, and the batch against the data-parallel ranks,
//! each with the values of every key that would mend it by itself.

use super::degrees::{CONTEXT, SHARD, STAGES, TENSOR};
use super::{Rules, counted, multiples, nearest, would_do};
use crate::problem::NoteLevel;
use crate::resolved::*;

const REPLICATE: &str = "parallelism.replicate";
const RANKS_PER_NODE: &str = "cluster.ranks_per_node";
const BATCH: &str = "training.global_batch";
const MICRO_BATCH: &str = "training.micro_batch";

/// The most ranks of a node that a hint names: as many as the key takes.
const MOST_RANKS_PER_NODE: usize = 4096;

/// Whether so many ranks and the degrees go together.
type Goes = fn(&RunConfig, Degrees, usize) -> bool;

/// The degrees by key: those of a model's ranks, and then those of data.
#[derive(Clone, Copy)]
struct Degrees([(&'static str, usize); 5]);

impl Degrees {
    /// Of a config; replicas that follow from the ranks are one.
    fn of(p: &Parallelism) -> Self {
        let replicas = p.replicate.unwrap_or(1);
        let model = [(TENSOR, p.tensor), (CONTEXT, p.context), (STAGES, p.pipeline.stages)];
        let [tensor, context, stages] = model;
        Self([tensor, context, stages, (SHARD, p.shard.ranks), (REPLICATE, replicas)])
    }

    /// With another one of `key`.
    fn with(self, key: &str, degree: usize) -> Self {
        Self(self.0.map(|(own, old)| (own, if own == key { degree } else { old })))
    }

    /// Without those of `keys`.
    fn without(self, keys: &[&str]) -> Self {
        keys.iter().fold(self, |degrees, key| degrees.with(key, 1))
    }

    fn product(&self) -> u128 {
        self.0.iter().map(|(_, degree)| *degree as u128).product()
    }

    /// What is left of `ranks` for data.
    fn data_ranks(&self, ranks: usize) -> usize {
        ranks / self.0[..3].iter().map(|(_, degree)| degree).product::<usize>().max(1)
    }
}

impl RunConfig {
    /// Whether every global batch is a multiple of what so many data-parallel ranks read in a pass
    /// of so large a micro-batch.
    pub(super) fn batch_divides(&self, data_ranks: usize, micro_batch: usize) -> bool {
        let per_pass = data_ranks as u128 * micro_batch as u128;
        let stages = &self.training.batch_stages;
        stages.iter().all(|stage| (stage.global_batch as u128).is_multiple_of(per_pass))
    }

    /// Whether the degrees make `ranks`: their product divides them, and is all of them where the
    /// replicas are given.
    fn makes(&self, degrees: Degrees, ranks: usize) -> bool {
        let (product, ranks) = (degrees.product(), ranks as u128);
        ranks.is_multiple_of(product) && (self.parallelism.replicate.is_none() || product == ranks)
    }

    /// Whether the degrees make `ranks`, and the batch divides over what is left for data.
    fn makes_with_batch(&self, degrees: Degrees, ranks: usize) -> bool {
        let micro_batch = self.training.micro_batch;
        self.makes(degrees, ranks) && self.batch_divides(degrees.data_ranks(ranks), micro_batch)
    }
}

impl Rules<'_, '_> {
    /// The product of the degrees against the ranks. Silent where a degree that has a problem of
    /// its own is all that stands in the way: that one's hint goes with the ranks.
    pub(super) fn ranks(&mut self) {
        let Some(ranks) = self.config.num_ranks() else { return };
        let (p, degrees) = (&self.config.parallelism, Degrees::of(&self.config.parallelism));
        let has_own = |key: &&str| self.resolver.problems.iter().any(|problem| problem.key == *key);
        let with_own: Vec<&str> = [TENSOR, CONTEXT, STAGES].into_iter().filter(has_own).collect();
        let others = degrees.without(&with_own).product();
        let is_told = !with_own.is_empty() && (ranks as u128).is_multiple_of(others);
        if is_told || self.config.makes(degrees, ranks) {
            return;
        }
        let product = degrees.product();
        let spelled = [p.tensor, p.context, p.pipeline.stages, p.shard.ranks];
        let spelled = spelled.map(|degree| degree.to_string()).join(" x ");
        let (message, limit) = match p.replicate {
            Some(replicate) => (
                format!(
                    "the degrees tensor x context x pipeline x shard x replicate = {spelled} x \
                     {replicate} = {product} are not the {ranks} ranks"
                ),
                format!("{product} ranks"),
            ),
            None => (
                format!(
                    "the degrees tensor x context x pipeline x shard = {spelled} = {product} do \
                     not divide the {ranks} ranks"
                ),
                format!("a multiple of {product} ranks"),
            ),
        };
        let hint = if with_own.is_empty() {
            let hint = self.mends_of_ranks(degrees, ranks, RunConfig::makes_with_batch);
            if hint.is_empty() {
                self.mends_of_ranks(degrees, ranks, RunConfig::makes)
            } else {
                hint
            }
        } else {
            // What the others come to is still open: those named leave them a share of the ranks.
            self.mends_of_degrees(degrees.without(&with_own), ranks, |_, degrees, ranks| {
                (ranks as u128).is_multiple_of(degrees.product())
            })
        };
        let keys = [RANKS_PER_NODE, "cluster.nodes", TENSOR, CONTEXT, STAGES, SHARD, REPLICATE];
        self.conflict(&keys, message, &limit, &hint);
    }

    /// As [`Self::mends_of_degrees`], and the ranks of a node that go with all of them.
    fn mends_of_ranks(&self, degrees: Degrees, ranks: usize, goes: Goes) -> String {
        let of_degrees = self.mends_of_degrees(degrees, ranks, goes);
        joined([of_degrees, self.ranks_that_go(degrees, goes)])
    }

    /// The values of each degree above 1, and of given replicas, that go with all the others.
    fn mends_of_degrees(&self, degrees: Degrees, ranks: usize, goes: Goes) -> String {
        let (c, has_replicas) = (self.config, self.config.parallelism.replicate.is_some());
        let tried = degrees.0.into_iter();
        let tried = tried.filter(|(key, n)| *n > 1 || *key == REPLICATE && has_replicas);
        let of_degree = |(key, degree): (&'static str, usize)| {
            let goes = |degree| {
                goes(c, degrees.with(key, degree), ranks) && self.keeps_own_rules(key, degree)
            };
            would_do(key, &nearest(degree, ranks, goes))
        };
        joined(tried.map(of_degree))
    }

    /// The ranks of a node that go with the degrees.
    fn ranks_that_go(&self, degrees: Degrees, goes: Goes) -> String {
        let c = self.config;
        let Some(current) = c.cluster.ranks_per_node else { return String::new() };
        let goes = |ranks| goes(c, degrees, ranks * c.cluster.nodes);
        would_do(RANKS_PER_NODE, &nearest(current, MOST_RANKS_PER_NODE, goes))
    }

    /// The degrees of `key` nearest to `current` that keep its own rules and, where the ranks are
    /// known, go with them and the other degrees: with the batch too, or at least with these, or by
    /// itself.
    pub(super) fn degrees_that_work(&self, key: &str, current: usize, most: usize) -> String {
        let c = self.config;
        let is_sound = |degree| self.keeps_own_rules(key, degree);
        let Some(ranks) = c.num_ranks() else { return nearest(current, most, is_sound) };
        let with = |degree| Degrees::of(&c.parallelism).with(key, degree);
        let tries: [&dyn Fn(usize) -> bool; 3] = [
            &|degree| c.makes_with_batch(with(degree), ranks),
            &|degree| c.makes(with(degree), ranks),
            &|degree| ranks.is_multiple_of(degree),
        ];
        let mut found = tries
            .into_iter()
            .map(|goes| nearest(current, most, |degree| goes(degree) && is_sound(degree)));
        found.find(|found| !found.is_empty()).unwrap_or_default()
    }

    /// A global batch against the data-parallel ranks. Degrees that do not make the ranks are
    /// another rule's.
    pub(super) fn divides_over_ranks(&mut self, stage: &BatchStage, key: &str) {
        let (c, p, t) = (self.config, &self.config.parallelism, &self.config.training);
        let degrees = Degrees::of(p);
        let data_ranks = match c.num_ranks() {
            Some(ranks) if !c.makes(degrees, ranks) => return,
            Some(ranks) => p.data_ranks(ranks),
            None => p.shard.ranks * p.replicate.unwrap_or(1),
        };
        let per_pass = data_ranks as u128 * t.micro_batch as u128;
        if (stage.global_batch as u128).is_multiple_of(per_pass) {
            return;
        }
        let message = format!(
            "{} sequences are not a multiple of {} x micro_batch {} = {per_pass}",
            stage.global_batch,
            counted(data_ranks, "data-parallel rank"),
            t.micro_batch
        );
        let keys = [key, BATCH, MICRO_BATCH];
        let named: &[&str] = if t.batch_stages.len() > 1 { &keys } else { &keys[1..] };
        let near = usize::try_from(per_pass)
            .map_or(String::new(), |per_pass| multiples(stage.global_batch, per_pass));
        let micro_batches = nearest(t.micro_batch, stage.global_batch / data_ranks, |size| {
            c.batch_divides(data_ranks, size)
        });
        let hint = joined([
            would_do(named[0], &near),
            would_do(MICRO_BATCH, &micro_batches),
            self.ranks_that_go(degrees, RunConfig::makes_with_batch),
        ]);
        self.conflict(named, message, &format!("a multiple of {per_pass}"), &hint);
    }

    pub(super) fn cores(&mut self) {
        let Some(ranks) = self.config.num_ranks() else { return };
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
}

/// The hints that there are.
fn joined(hints: impl IntoIterator<Item = String>) -> String {
    let hints: Vec<String> = hints.into_iter().filter(|hint| !hint.is_empty()).collect();
    hints.join("; ")
}
