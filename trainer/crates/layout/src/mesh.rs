//! The device mesh: ranks on five named axes, the innermost first. Neighbours on an inner axis have
//! neighbouring ranks, so the axes that talk most come first.

use run_config::Parallelism;
use thiserror::Error;

/// An axis of the mesh, innermost first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Axis {
    /// Tensor parallelism: communicates in every layer.
    Tensor,
    /// Context parallelism: in every attention.
    Context,
    /// Pipeline parallelism: between stages.
    Pipeline,
    /// Sharded data parallelism: once per layer or step.
    Shard,
    /// Replicated data parallelism: once per step.
    Replicate,
}

impl Axis {
    /// All axes, innermost first.
    pub const ALL: [Self; 5] =
        [Self::Tensor, Self::Context, Self::Pipeline, Self::Shard, Self::Replicate];
    /// The axes over which the batch is split.
    pub const DATA: [Self; 2] = [Self::Shard, Self::Replicate];

    /// Its name, as in the config.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tensor => "tensor",
            Self::Context => "context",
            Self::Pipeline => "pipeline",
            Self::Shard => "shard",
            Self::Replicate => "replicate",
        }
    }
}

/// The degrees do not make the number of ranks.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "the degrees tensor x context x pipeline x shard x replicate = {degrees} are not {ranks} ranks"
)]
pub struct MeshError {
    degrees: String,
    ranks: usize,
}

/// Ranks on named axes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mesh {
    degrees: [usize; 5],
}

impl Mesh {
    /// The mesh of `num_ranks` ranks; `replicate: auto` is what the other degrees leave.
    ///
    /// # Errors
    /// Where the product of the degrees is not `num_ranks`.
    pub fn new(p: &Parallelism, num_ranks: usize) -> Result<Self, MeshError> {
        let inner = [p.tensor, p.context, p.pipeline.stages, p.shard.ranks];
        let product = inner.iter().try_fold(1usize, |all, degree| all.checked_mul(*degree));
        let left = product.filter(|product| *product > 0).map_or(0, |product| num_ranks / product);
        let replicate = p.replicate.unwrap_or(left);
        let degrees = [inner[0], inner[1], inner[2], inner[3], replicate];
        let all = product.and_then(|product| product.checked_mul(replicate));
        if all != Some(num_ranks) || num_ranks == 0 {
            let degrees = degrees.map(|degree| degree.to_string()).join(" x ");
            return Err(MeshError { degrees, ranks: num_ranks });
        }
        Ok(Self { degrees })
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.degrees.iter().product()
    }

    /// Ranks along `axis`.
    pub fn degree(&self, axis: Axis) -> usize {
        self.degrees[axis as usize]
    }

    /// Where `rank` is on `axis`.
    pub fn coordinate(&self, rank: usize, axis: Axis) -> usize {
        rank / self.stride(axis) % self.degree(axis)
    }

    /// The first rank of a pipeline stage.
    pub fn first_of_stage(&self, stage: usize) -> usize {
        stage * self.stride(Axis::Pipeline)
    }

    /// Ranks that differ from `rank` on `axis` alone, `rank` included, by coordinate.
    pub fn group(&self, rank: usize, axis: Axis) -> Vec<usize> {
        self.group_over(rank, &[axis])
    }

    /// Ranks that differ from `rank` on `axes` alone, rising.
    pub fn group_over(&self, rank: usize, axes: &[Axis]) -> Vec<usize> {
        let fixed = |axis: &Axis| !axes.contains(axis);
        let same = |other: usize, axis| self.coordinate(other, axis) == self.coordinate(rank, axis);
        let member = |other: &usize| Axis::ALL.into_iter().filter(fixed).all(|a| same(*other, a));
        (0..self.size()).filter(member).collect()
    }

    /// Data-parallel size: shard x replicate.
    pub fn data_size(&self) -> usize {
        self.degree(Axis::Shard) * self.degree(Axis::Replicate)
    }

    /// Data-parallel rank of `rank`: which part of the batch it reads.
    pub fn data_rank(&self, rank: usize) -> usize {
        rank / self.stride(Axis::Shard)
    }

    /// Ranks from one coordinate of `axis` to the next: the product of the degrees inside it.
    pub(crate) fn stride(&self, axis: Axis) -> usize {
        self.degrees.iter().take(axis as usize).product()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use run_config::{Pipeline, PipelineSchedule, Recompute, Shard, ShardLevel};

    pub(crate) fn parallelism(degrees: [usize; 4], replicate: Option<usize>) -> Parallelism {
        let [tensor, context, stages, ranks] = degrees;
        Parallelism {
            tensor,
            sequence: true,
            context,
            pipeline: Pipeline {
                stages,
                schedule: PipelineSchedule::OneForwardOneBackward,
                virtual_stages: 1,
                contiguous_micro_batches: None,
            },
            shard: Shard { ranks, level: ShardLevel::None, reshard_after_forward: false },
            replicate,
            recompute: Recompute::None,
        }
    }

    #[test]
    fn the_groups_of_a_small_mesh() {
        // tensor 2, pipeline 2, replicate 2: rank = t + 2 p + 4 r.
        let mesh = Mesh::new(&parallelism([2, 1, 2, 1], None), 8).unwrap();
        assert_eq!(mesh.group(5, Axis::Tensor), [4, 5]);
        assert_eq!(mesh.group(5, Axis::Context), [5]);
        assert_eq!(mesh.group(5, Axis::Pipeline), [5, 7]);
        assert_eq!(mesh.group(5, Axis::Replicate), [1, 5]);
        assert_eq!(mesh.group_over(5, &[Axis::Tensor, Axis::Replicate]), [0, 1, 4, 5]);
        assert_eq!((mesh.data_size(), mesh.data_rank(3), mesh.data_rank(4)), (2, 0, 1));
    }

    #[test]
    fn degrees_that_do_not_fit_are_refused() {
        let refused = |degrees, replicate, ranks| {
            Mesh::new(&parallelism(degrees, replicate), ranks).unwrap_err().to_string()
        };
        assert!(refused([2, 1, 2, 1], None, 6).contains("2 x 1 x 2 x 1 x 1 are not 6 ranks"));
        assert!(refused([1, 1, 1, 1], Some(3), 4).contains("1 x 1 x 1 x 1 x 3 are not 4 ranks"));
        assert!(refused([2, 1, 1, 1], None, 0).contains("0 ranks"));
        assert!(refused([usize::MAX, 2, 1, 1], None, 4).contains("4 ranks"));
    }

    proptest! {
        /// The groups of an axis part the ranks, and a rank is in its own.
        #[test]
        fn groups_partition_the_ranks(
            t in 1usize..4, c in 1usize..3, p in 1usize..4, s in 1usize..4, r in 1usize..3,
        ) {
            let mesh = Mesh::new(&parallelism([t, c, p, s], None), t * c * p * s * r).unwrap();
            prop_assert_eq!(mesh.degree(Axis::Replicate), r);
            for axis in Axis::ALL {
                for rank in 0..mesh.size() {
                    let group = mesh.group(rank, axis);
                    prop_assert_eq!(group.len(), mesh.degree(axis));
                    prop_assert_eq!(group[mesh.coordinate(rank, axis)], rank);
                    for peer in group.iter() {
                        prop_assert_eq!(&mesh.group(*peer, axis), &group);
                    }
                }
            }
            for rank in 0..mesh.size() {
                let data = mesh.group_over(rank, &Axis::DATA);
                prop_assert_eq!(data.len(), mesh.data_size());
                prop_assert_eq!(data[mesh.data_rank(rank)], rank);
            }
        }
    }
}
