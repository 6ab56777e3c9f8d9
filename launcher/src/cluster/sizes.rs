//! The sizes at which a run can work: whole data-parallel replicas, and the nodes that hold them.
//!
//! Ranks are numbered replica by replica and filled into nodes in that order, so that a size of
//! fewer replicas is the beginning of the whole.

use run_config::RunConfig;

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Data-parallel replicas.
    pub replicas: usize,
    /// Ranks of all of them.
    pub ranks: usize,
    /// Nodes that hold these; the last may have room for more.
    pub nodes: usize,
}

/// All sizes of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Rising.
    smaller: Vec<Size>,
    whole: Size,
}

impl Sizes {
    /// One size alone: no node may be missing.
    pub fn fixed(nodes: usize, ranks_per_node: usize) -> Self {
        let whole = Size { replicas: 1, ranks: nodes * ranks_per_node, nodes };
        Self { smaller: Vec::new(), whole }
    }

    /// All of so many `replicas`, of `replica_ranks` ranks each, or one of these `smaller` numbers
    /// of them, which rise.
    pub fn new(
        (smaller, replicas): (&[usize], usize),
        replica_ranks: usize,
        ranks_per_node: usize,
    ) -> Self {
        let size = |replicas: usize| {
            let ranks = replicas * replica_ranks;
            Size { replicas, ranks, nodes: ranks.div_ceil(ranks_per_node) }
        };
        Self { smaller: smaller.iter().copied().map(size).collect(), whole: size(replicas) }
    }

    /// Those that a config allows whose ranks per node are known.
    pub fn of(config: &RunConfig) -> Self {
        let replicas = config.replicas().unwrap_or(1);
        let mut smaller = config.elastic_replicas();
        smaller.retain(|smaller| *smaller < replicas);
        let per_node = config.cluster.ranks_per_node.unwrap_or(1).max(1);
        Self::new((&smaller, replicas), config.replica_ranks(), per_node)
    }

    /// All replicas, on all nodes.
    pub fn whole(&self) -> Size {
        self.whole
    }

    /// The largest that so many nodes hold.
    pub fn within(&self, nodes: usize) -> Option<Size> {
        let all = std::iter::once(&self.whole).chain(self.smaller.iter().rev());
        all.copied().find(|size| size.nodes <= nodes)
    }

    /// The one of so many ranks.
    pub fn of_ranks(&self, ranks: usize) -> Option<Size> {
        self.smaller.iter().chain([&self.whole]).copied().find(|size| size.ranks == ranks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// Replicas and ranks of the size for each number of nodes from 0 on.
    fn check(parallelism: &str, batch: usize, expected: &[Option<(usize, usize)>]) {
        let nodes = expected.len() - 1;
        let text = format!(
            "name: test\n\
             model: {{dim: 32, layers: 4, heads: 4, kv_heads: 4, ffn_dim: 64, vocab_size: 512}}\n\
             data: {{tokenizer: t, sequence_length: 32, sources: [{{name: a, path: a}}]}}\n\
             parallelism: {parallelism}\n\
             training: {{steps: 10, global_batch: {batch}}}\n\
             restart: {{elastic: {{min_replicas: 1}}}}\n\
             cluster: {{nodes: {nodes}, ranks_per_node: 4, device: cpu}}\n"
        );
        let loaded = RunConfig::from_yaml_str(&text, Path::new("/"), &[]);
        let sizes = Sizes::of(&loaded.unwrap_or_else(|errors| panic!("{errors}")).config);
        let found: Vec<Option<(usize, usize)>> = (0..=nodes)
            .map(|nodes| sizes.within(nodes).map(|size| (size.replicas, size.ranks)))
            .collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn nodes_hold_whole_replicas() {
        // A node holds a replica.
        check("{tensor: 4}", 6, &[None, Some((1, 4)), Some((2, 8)), Some((3, 12))]);
        // A replica takes two nodes; a batch of 2 does not divide over 3, were there as many.
        check(
            "{tensor: 4, pipeline: {stages: 2}}",
            2,
            &[None, None, Some((1, 8)), Some((1, 8)), Some((2, 16))],
        );
        // A node holds four, and not every number of them divides the batch.
        check("{}", 12, &[None, Some((4, 4)), Some((6, 6)), Some((12, 12))]);
        // Three halves of a node.
        check(
            "{shard: {ranks: 3, level: gradients}, tensor: 2}",
            6,
            &[None, None, Some((1, 6)), Some((2, 12))],
        );
    }

    #[test]
    fn a_fixed_size_has_no_smaller_one() {
        let sizes = Sizes::fixed(3, 8);
        assert_eq!(sizes.whole(), Size { replicas: 1, ranks: 24, nodes: 3 });
        assert_eq!((sizes.within(2), sizes.within(5)), (None, Some(sizes.whole())));
        assert_eq!((sizes.of_ranks(24), sizes.of_ranks(8)), (Some(sizes.whole()), None));
    }
}
