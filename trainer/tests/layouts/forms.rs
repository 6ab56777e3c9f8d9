//! Each parallel form by itself, and some together, against one rank.

use crate::harness::{compare, config, train};

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
    check_with(&["model.tied_embeddings=true"], &[&[&stages("stages: 2")]]);
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
    check_with(&["model.tied_embeddings=true"], &[&[&shard(2, "parameters")]]);
}

#[test]
fn recomputation() {
    check(&[&["parallelism.recompute=full"], &["parallelism.recompute=selective"]]);
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
