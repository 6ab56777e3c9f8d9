//! The copy of what a rank writes of a checkpoint, which it keeps while training goes on.

use crate::held::Held;
use crate::mesh::{Axis, Mesh};
use model_spec::{LocalParameter, Place};
use run_config::{DeviceKind, RunConfig};

/// Bytes of the copy, and of what it keeps in the machine's memory (`checkpoint.memory`: the newest
/// checkpoint, the one being written, and its copy; on several nodes another's newest and the one
/// that arrives too), where bytes of an element are `compute` in compute and `state` in master
/// weights and optimizer state: its weights, master weights where they are others, and two moments.
/// Ranks that own the same elements write equal shares of them, to within one tensor or 1 MiB.
///
/// 0 where the only checkpoint is that after the last step, which is written without a copy, and
/// with `cluster.device: cuda`, where it is not in the memory of the rank's device.
pub(crate) fn copy_bytes(
    config: &RunConfig,
    mesh: &Mesh,
    held: &Held,
    (compute, state): (u64, u64),
) -> u64 {
    let steps = 1..config.training.steps;
    // With `auto` there is a checkpoint before the last step, where there are several steps.
    let has_copy = steps.contains(&config.checkpoint.every_steps.unwrap_or(1));
    let is_kept = steps.contains(&config.checkpoint.memory.every_steps);
    let in_memory = if config.cluster.nodes > 1 { 5 } else { 3 };
    let times = u64::from(has_copy) + in_memory * u64::from(is_kept);
    if config.cluster.device == DeviceKind::Cuda {
        return 0;
    }
    let master = if compute == state { 0 } else { state };
    let all = num_counted(held).saturating_mul(compute + master + 2 * state);
    let copies = mesh.degree(Axis::Context) * mesh.degree(Axis::Replicate);
    times * all.div_ceil(copies as u64)
}

/// Elements that the rank owns, and that no other pipeline stage or tensor-parallel rank writes.
fn num_counted(held: &Held) -> u64 {
    // A tied embedding is written by the stage that begins with it, and not by that of the head.
    let has_embedding = held.chunks.iter().any(|chunk| chunk.embedding);
    let is_written = |local: &LocalParameter| has_embedding || local.spec.place != Place::Embedding;
    let parameters = held.parameters.iter().zip(&held.ranges);
    let parameters = parameters.filter(|(local, _)| is_written(local));
    let parts = parameters.flat_map(|(local, range)| {
        let width: u64 = local.shape.iter().skip(1).map(|size| *size as u64).product();
        let counted = local.parts.iter().filter(|part| part.counts);
        counted.map(move |part| {
            let first = range.start + part.row_start as u64 * width;
            first..first + part.num_elements() as u64
        })
    });
    parts.map(|run| held.num_owned(&run)).sum()
}

#[cfg(test)]
mod tests {
    use crate::memory::memory_of_rank;
    use crate::mesh::Mesh;
    use model_spec::num_parameters;
    use run_config::RunConfig;
    use std::path::Path;

    /// Bytes of all ranks' copies for each parameter of the model.
    fn check(sets: &[&str], expected: u64) {
        let text = "name: x\nmodel: {preset: llama3-8b}\n\
                    data: {tokenizer: t, sources: [{name: a, path: b}]}\n\
                    training: {steps: 10, global_batch: 64}\n\
                    checkpoint: {every_steps: 5}\n\
                    cluster: {ranks_per_node: 8, device: cpu}\n";
        let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
        let config = RunConfig::from_yaml_str(text, Path::new("/"), &sets).unwrap().config;
        let mesh = Mesh::new(&config.parallelism, 8).unwrap();
        let of = |rank| memory_of_rank(&config, &mesh, rank).unwrap().checkpoint;
        let all: u64 = (0..8).map(of).sum();
        assert_eq!(all, expected * num_parameters(&config.model), "{sets:?}");
    }

    #[test]
    fn every_element_is_copied_once() {
        for layout in [
            "replicate: 8",
            "tensor: 8",
            "tensor: 2, pipeline: {stages: 2}, context: 2",
            "shard: {ranks: 8, level: parameters}",
            "shard: {ranks: 4, level: optimizer}, replicate: 2",
        ] {
            let layout = format!("parallelism={{{layout}}}");
            check(&[&layout, "precision.compute=bf16"], 2 + 4 + 4 + 4);
            check(&[&layout, "precision.compute=fp32"], 4 + 4 + 4);
        }
    }

    #[test]
    fn what_is_written_at_the_end_or_from_a_gpu_is_no_copy_of_the_rank() {
        check(&["checkpoint.every_steps=0"], 0);
        check(&["checkpoint.every_steps=10"], 0);
        check(&["cluster.device=cuda"], 0);
        check(&["checkpoint.every_steps=9", "precision.compute=fp64"], 3 * 8);
        check(&["checkpoint.every_steps=auto", "precision.compute=fp64"], 3 * 8);
        let kept = ["checkpoint.memory.every_steps=1", "precision.compute=fp64"];
        check(&kept, (1 + 3) * 3 * 8);
        check(&[kept[0], kept[1], "checkpoint.every_steps=0"], 3 * 3 * 8);
        let nodes = ["cluster.nodes=2", "cluster.ranks_per_node=4"];
        check(&[&kept[..], &nodes].concat(), (1 + 5) * 3 * 8);
    }

    #[test]
    fn a_tied_embedding_is_copied_on_its_first_stage() {
        let tied = "model={preset: llama3-8b, tied_embeddings: true}";
        check(&[tied, "parallelism.pipeline.stages=4", "precision.compute=bf16"], 14);
    }
}
