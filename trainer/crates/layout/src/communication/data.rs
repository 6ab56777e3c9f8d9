//! Communication of gradients and weights: buckets, shards, copies, what the ranks of a
//! tensor-parallel group share, and the few numbers of a step.

use super::{Counter, Dtype, Group, Operation};
use crate::mesh::Axis;
use crate::plan::{SumOver, partial_sums};
use crate::sharded::sharded_step;
use run_config::ShardLevel;
use std::ops::Range;

impl Counter<'_> {
    pub(super) fn gradients_and_weights(&mut self) {
        if self.mesh.degree(Axis::Shard) > 1 { self.shards() } else { self.buckets() }
    }

    /// Gradients of replicas, filled from the last parameter on.
    fn buckets(&mut self) {
        let dtype = self.state();
        let limit = (self.step.bucket_bytes as u64 / dtype.width()).max(1);
        for size in bucket_sizes(&self.held.ranges, limit) {
            let reduce = (Operation::AllReduce, Group::Data);
            self.add(reduce, (size, dtype), 1, "sum a bucket of gradients");
        }
    }

    /// Units of sharded data parallelism.
    fn shards(&mut self) {
        let stage = self.mesh.coordinate(self.rank, Axis::Pipeline);
        let counted = sharded_step(self.config, &self.held, stage, &self.schedule);
        let (compute, state) = (self.compute(), self.state());
        let sizes: Vec<u64> = self.held.units.iter().map(|unit| unit.num_elements()).collect();
        let why = match self.config.parallelism.shard.level {
            ShardLevel::Parameters => "gather a unit's weights where they are needed",
            _ => "gather a unit's weights after the update",
        };
        for (&size, &times) in sizes.iter().zip(&counted.gathers) {
            self.add((Operation::AllGather, Group::Shard), (size, compute), times, why);
        }
        for (&size, &times) in sizes.iter().zip(&counted.reductions) {
            let scatter = (Operation::ReduceScatter, Group::Shard);
            self.add(scatter, (size, state), times, "sum a unit's gradients");
        }
        for size in sizes {
            let owned = size / self.mesh.degree(Axis::Shard) as u64;
            let reduce = (Operation::AllReduce, Group::Copies);
            self.add(reduce, (owned, state), 1, "sum a unit's owned gradients over the copies");
        }
    }

    /// Gradients of which each rank has only a summand, of what it owns of them.
    pub(super) fn partial_sums(&mut self) {
        // Stages between the first and the last hold no embedding, and have nothing to sum.
        let tied = self.config.model.tied_embeddings && self.mesh.degree(Axis::Pipeline) > 1;
        let held = &self.held;
        let sums = partial_sums(&self.config.model, held.tensor, &held.parameters, tied);
        let dtype = self.state();
        for (over, group, why) in [
            (SumOver::Tensor, Group::Tensor, "sum the gradients of norms"),
            (SumOver::KvCopies, Group::KvCopies, "sum the gradients of repeated KV heads"),
            (SumOver::TiedStages, Group::TiedStages, "sum the gradients of the tied embedding"),
        ] {
            let owned = sums.iter().filter(|sum| sum.over == over).map(|sum| {
                let shape = &self.held.parameters[sum.parameter].shape;
                let width: u64 = shape.iter().skip(1).map(|&size| size as u64).product();
                let start = self.held.ranges[sum.parameter].start;
                let row = |row: usize| start + row as u64 * width;
                self.held.num_owned(&(row(sum.rows.start)..row(sum.rows.end)))
            });
            let elements = owned.sum();
            self.add((Operation::AllReduce, group), (elements, dtype), 1, why);
        }
    }

    /// The number of targets before the passes; loss, wish to stop and gradient norm after them.
    pub(super) fn scalars(&mut self) {
        let reduce = (Operation::AllReduce, Group::World);
        self.add(reduce, (1, Dtype::Fp64), 1, "number of targets");
        self.add(reduce, (3, Dtype::Fp64), 1, "loss, gradient norm, wish to stop");
    }
}

/// Elements of the buckets that parameters are cut in, of about `limit` elements each.
fn bucket_sizes(parameters: &[Range<u64>], limit: u64) -> Vec<u64> {
    let mut buckets: Vec<Range<u64>> = Vec::new();
    for range in parameters.iter().rev() {
        match buckets.last_mut() {
            Some(last) if last.end - range.start <= limit => last.start = range.start,
            _ => buckets.push(range.clone()),
        }
    }
    buckets.into_iter().map(|bucket| bucket.end - bucket.start).collect()
}
