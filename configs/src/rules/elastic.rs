//! With how many data-parallel replicas a run can go on while nodes are missing.

use super::Rules;
use crate::load::Loaded;
use crate::problem::{ConfigErrors, NoteLevel};
use crate::resolved::RunConfig;
use std::path::Path;

const LEAST: &str = "restart.elastic.min_replicas";

impl RunConfig {
    /// Ranks of a replica: tensor x context x pipeline x shard.
    pub fn replica_ranks(&self) -> usize {
        self.parallelism.model_ranks() * self.parallelism.shard.ranks
    }

    /// Data-parallel replicas; `None` while the number of ranks is not known.
    pub fn replicas(&self) -> Option<usize> {
        Some(self.num_ranks()? / self.replica_ranks())
    }

    /// The numbers of replicas, rising, with which the run may go on: from
    /// `restart.elastic.min_replicas` to all, those that every rule of the config allows. Without
    /// it, all alone. Empty while the number of ranks is not known.
    pub fn elastic_replicas(&self) -> Vec<usize> {
        let Some(all) = self.replicas() else { return Vec::new() };
        let least = self.restart.elastic.min_replicas.unwrap_or(all);
        let works = |replicas: &usize| {
            self.batch_divides_over(*replicas) && self.with_replicas(*replicas).is_ok()
        };
        (least..all).filter(works).chain([all]).collect()
    }

    /// Whether every global batch is a multiple of what so many replicas read in a pass.
    fn batch_divides_over(&self, replicas: usize) -> bool {
        let data_ranks = replicas * self.parallelism.shard.ranks;
        self.batch_divides(data_ranks, self.training.micro_batch)
    }

    /// The same config with so many replicas, on as many ranks as they have.
    fn with_replicas(&self, replicas: usize) -> Result<Loaded, ConfigErrors> {
        let overrides = [
            format!("parallelism.replicate={replicas}"),
            format!("cluster.nodes={}", replicas * self.replica_ranks()),
            "cluster.ranks_per_node=1".to_owned(),
            format!("{LEAST}=null"),
        ];
        Self::from_yaml_str(&self.to_yaml(), Path::new("/"), &overrides)
    }
}

impl Rules<'_, '_> {
    /// The least number of replicas against all.
    pub(super) fn elastic(&mut self) {
        let c = self.config;
        let (Some(least), Some(ranks)) = (c.restart.elastic.min_replicas, c.num_ranks()) else {
            return;
        };
        let keys = [LEAST, "parallelism.replicate", "cluster.nodes", "cluster.ranks_per_node"];
        // Degrees that do not make the ranks are another rule's.
        let Some(all) = c.replicas().filter(|all| *all > 0 && all * c.replica_ranks() == ranks)
        else {
            return;
        };
        if least > all {
            let message = format!("{least} is more than the {all} data-parallel replica(s)");
            self.conflict(&keys, message, &format!("at most {all}"), "null: all of them");
        } else if c.cluster.nodes == 1 {
            let message = "has no effect on one node: there is none to lose".to_owned();
            self.note(NoteLevel::Info, LEAST, message);
        } else if least < all && !(least..all).any(|replicas| c.batch_divides_over(replicas)) {
            let message = format!(
                "the batch divides over no number of replicas from {least} to {}: missing nodes \
                 are waited for",
                all - 1
            );
            self.note(NoteLevel::Warning, LEAST, message);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(sets: &[&str]) -> Result<Loaded, ConfigErrors> {
        let text = "name: test\n\
            model: {dim: 32, layers: 4, heads: 4, kv_heads: 2, ffn_dim: 64, vocab_size: 512}\n\
            data: {tokenizer: t.json, sequence_length: 32, sources: [{name: a, path: a}]}\n\
            training: {steps: 10, global_batch: 24}\n\
            restart: {elastic: {min_replicas: 1}}\n\
            cluster: {nodes: 6, ranks_per_node: 4, device: cpu}\n";
        let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
        RunConfig::from_yaml_str(text, Path::new("/"), &sets)
    }

    /// The numbers of replicas that a config allows.
    fn check(sets: &[&str], expected: &[usize]) {
        let config = config(sets).unwrap_or_else(|errors| panic!("{errors}")).config;
        assert_eq!(config.elastic_replicas(), expected, "{sets:?}");
    }

    #[test]
    fn the_batch_divides_over_the_replicas() {
        check(&[], &[1, 2, 3, 4, 6, 8, 12, 24]);
        check(&["restart.elastic.min_replicas=4"], &[4, 6, 8, 12, 24]);
        check(&["restart.elastic.min_replicas=null"], &[24]);
        let shard = "parallelism={tensor: 2, shard: {ranks: 2, level: gradients}}";
        check(&[shard], &[1, 2, 3, 4, 6]);
        check(&["parallelism={tensor: 4, replicate: 6}", "training.micro_batch=4"], &[1, 2, 3, 6]);
        let ramp = "training.global_batch=[{from_tokens: 0, global_batch: 24}, \
                    {from_tokens: 4000, global_batch: 30}]";
        check(&[ramp, "parallelism.tensor=4", "model.kv_heads=4"], &[1, 2, 3, 6]);
        check(&["cluster.ranks_per_node=auto", "parallelism.replicate=auto"], &[]);
    }

    /// Fewer replicas have more micro-batches in a step, of which there is a limit too.
    #[test]
    fn the_other_rules_hold_too() {
        let sets = [
            "training={steps: 10, global_batch: 16777216, micro_batch: 1}",
            "data.sequence_length=1",
            "cluster.nodes=4096",
            "model.layers=4096",
        ];
        let config = config(&sets).unwrap_or_else(|errors| panic!("{errors}")).config;
        let replicas = config.elastic_replicas();
        assert!(replicas[0] > 1, "{replicas:?}");
        assert!(config.with_replicas(1).is_err() && config.batch_divides_over(1));
        assert_eq!(replicas.last(), Some(&16384));
    }

    #[test]
    fn a_minimum_that_is_none_is_told() {
        let refused = config(&["restart.elastic.min_replicas=25"]).unwrap_err().to_string();
        assert!(refused.contains("25 is more than the 24 data-parallel replica(s)"), "{refused}");
        let note = |sets: &[&str]| {
            let loaded = config(sets).unwrap_or_else(|errors| panic!("{errors}"));
            loaded.notes.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
        };
        assert!(note(&["cluster.nodes=1"]).contains("there is none to lose"));
        let close = ["restart.elastic.min_replicas=13"];
        assert!(note(&close).contains("over no number of replicas from 13 to 23"));
        assert!(!note(&[]).contains("elastic"));
    }
}
