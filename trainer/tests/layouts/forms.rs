//! Each parallel form by itself, and some together, against one rank.

use crate::harness::{FUSED, compare, config, train};

/// Steps compared.
const STEPS: usize = 10;

/// Trains each layout and the unsharded model on one rank, both with `base`, and compares them.
#[track_caller]
fn check_with(base: &[&str], layouts: &[&[&str]]) {
    let expected = train(&config(base), STEPS);
    assert!(expected.losses[9] < expected.losses[0], "it learns: {:?}", expected.losses);
    for sets in layouts {
        let all = [base, sets].concat();
        compare(&train(&config(&all), STEPS), &expected, 1e-10, &all.join(" "));
    }
}

#[track_caller]
fn check(layouts: &[&[&str]]) {
    check_with(&[], layouts);
}

#[test]
fn replicas() {
    check(&[&["parallelism.replicate=2"], &["parallelism.replicate=4"]]);
}

#[test]
fn tensor_parallel() {
    check(&[
        &["parallelism.tensor=2"],
        &["parallelism.tensor=2", "parallelism.sequence=false"],
        // More ranks than key and value heads.
        &["parallelism.tensor=4"],
        &["parallelism.tensor=8", "parallelism.sequence=false"],
    ]);
}

#[test]
fn context_parallel() {
    check(&[&["parallelism.context=2"], &["parallelism.context=4"]]);
    check_with(&["data.document_mask=false"], &[&["parallelism.context=2"]]);
    check(&[&["parallelism.context=2", "training.micro_batch=2"]]);
}

#[test]
fn pipeline_parallel() {
    let stages = |schedule: &str| format!("parallelism.pipeline={{{schedule}}}");
    for schedule in [
        "stages: 2, schedule: gpipe",
        "stages: 4, schedule: 1f1b",
        "stages: 2, schedule: interleaved-1f1b, virtual_stages: 2",
        "stages: 2, schedule: zero-bubble",
    ] {
        check(&[&[&stages(schedule)]]);
    }
}

/// Stages of other numbers of blocks, and numbers of micro-batches that do not fit the stages.
#[test]
fn uneven_pipelines() {
    let seven = ["model.layers=7", "training.global_batch=3"];
    check_with(
        &seven,
        &[
            &["parallelism.pipeline={stages: 2, schedule: 1f1b}"],
            &["parallelism.pipeline={stages: 4, schedule: gpipe}"],
            &["parallelism.pipeline={stages: 4, schedule: 1f1b}"],
            &["parallelism.pipeline={stages: 4, schedule: zero-bubble}"],
            &["parallelism.pipeline={stages: 2, schedule: interleaved-1f1b, virtual_stages: 2}"],
            &["parallelism.pipeline={stages: 2, schedule: interleaved-1f1b, virtual_stages: 3}"],
            &["parallelism.pipeline={stages: 2, schedule: interleaved-1f1b, virtual_stages: 2, \
               contiguous_micro_batches: 3}"],
            &["parallelism.pipeline={stages: 2, schedule: zero-bubble, virtual_stages: 3}"],
        ],
    );
}

/// The embedding that is the output head too, on the first stage and on the last.
#[test]
fn tied_embeddings() {
    check_with(
        &["model.tied_embeddings=true"],
        &[
            &["parallelism={pipeline: {stages: 2, schedule: 1f1b}}"],
            &["parallelism={pipeline: {stages: 2, schedule: zero-bubble}, recompute: selective}"],
            &["parallelism={tensor: 2}"],
            &["parallelism={shard: {ranks: 2, level: parameters}}"],
            &["parallelism={tensor: 2, pipeline: {stages: 2}, replicate: 2}"],
            &["parallelism={pipeline: {stages: 2}, shard: {ranks: 2, level: parameters}}"],
            &["parallelism={pipeline: {stages: 2, schedule: interleaved-1f1b, \
               virtual_stages: 2}, shard: {ranks: 2, level: optimizer}}"],
        ],
    );
}

#[test]
fn sharded_data_parallel() {
    let shard =
        |ranks: usize, level: &str| format!("parallelism.shard={{ranks: {ranks}, level: {level}}}");
    for level in ["optimizer", "gradients", "parameters", "parameters, reshard_after_forward: true"]
    {
        check(&[&[&shard(2, level)], &[&shard(4, level)]]);
    }
    check(&[
        &[&shard(2, "parameters"), "parallelism.replicate=2"],
        &[&shard(2, "gradients"), "parallelism.context=2", "parallelism.tensor=2"],
        &[&shard(2, "parameters"), "parallelism.pipeline={stages: 2, schedule: zero-bubble}"],
        &[
            &shard(2, "parameters"),
            "parallelism.pipeline={stages: 2, schedule: 1f1b}",
            "parallelism.tensor=2",
        ],
        &[&shard(2, "gradients"), "parallelism.pipeline={stages: 2, schedule: gpipe}"],
        &[&shard(2, "parameters"), "parallelism.recompute=full"],
    ]);
}

/// What is computed again is the same to the last bit, in every form. In FP32 and BF16 it comes out
/// of the fused kernels.
#[track_caller]
fn check_recomputation(compute: &str) {
    let compute = format!("precision.compute={compute}");
    for layout in [
        "",
        "tensor: 2",
        "tensor: 2, sequence: false",
        "context: 2",
        "replicate: 2",
        "shard: {ranks: 2, level: parameters}",
        "pipeline: {stages: 2, schedule: 1f1b}",
        "pipeline: {stages: 2, schedule: zero-bubble}",
    ] {
        let with = |recompute: &str| {
            let comma = if layout.is_empty() { "" } else { ", " };
            let set = format!("parallelism={{{layout}{comma}recompute: {recompute}}}");
            train(&config(&[&FUSED[..], &[&compute, &set]].concat()), 3)
        };
        let expected = with("none");
        for recompute in ["selective", "full"] {
            let found = with(recompute);
            assert_eq!(found.losses, expected.losses, "{compute}, {layout}: {recompute}");
            assert_eq!(found.norms, expected.norms, "{compute}, {layout}: {recompute}");
            for (name, weight) in &expected.weights {
                let is_equal = found.weights[name].equal(weight);
                assert!(is_equal, "{compute}, {layout}: {recompute}: {name}");
            }
        }
    }
}

#[test]
fn recomputation() {
    check(&[&["parallelism.recompute=full"], &["parallelism.recompute=selective"]]);
    check_recomputation("fp64");
}

#[test]
fn recomputation_in_fp32() {
    check_recomputation("fp32");
}

#[test]
fn recomputation_in_bf16() {
    check_recomputation("bf16");
}

#[test]
fn combined() {
    check(&[
        &["parallelism.tensor=2", "parallelism.context=2", "parallelism.replicate=2"],
        &["parallelism.tensor=4", "parallelism.context=2", "parallelism.recompute=full"],
        &["parallelism.tensor=2", "parallelism.replicate=2", "training.micro_batch=2"],
        &["parallelism.tensor=2", "parallelism.pipeline.stages=2", "parallelism.replicate=2"],
        &["parallelism.context=2", "parallelism.pipeline={stages: 2, schedule: zero-bubble}"],
    ]);
}
