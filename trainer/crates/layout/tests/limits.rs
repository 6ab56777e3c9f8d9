//! The largest values that a config may hold go through all of the layout's arithmetic: tests are
//! built with overflow checks, so that a sum over 64 bits panics.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use layout::communication::{Step, communication};
use layout::memory::memory_of_stage;
use layout::plan_table::plan_table;
use layout::{Axis, Communication, Mesh, memory_per_rank};
use model_spec::{FlopConvention, flops_per_token};
use proptest::prelude::*;
use run_config::batch_plan::step_batch;
use run_config::{ConfigErrors, RunConfig};
use std::path::Path;

const MODEL: &str = "{dim: 64, layers: 4, heads: 4, kv_heads: 4, ffn_dim: 64, vocab_size: 512}";
/// The largest values of the keys.
const LARGE_MODEL: &str = "{dim: 262144, layers: 4096, heads: 4096, kv_heads: 4096, \
                           head_dim: 64, ffn_dim: 1048576, vocab_size: 16777216}";

fn load(sets: &[String]) -> Result<RunConfig, ConfigErrors> {
    let text = format!(
        "name: x\nmodel: {MODEL}\ndata: {{tokenizer: t, sources: [{{name: a, path: b}}]}}\n\
         training: {{steps: 1, global_batch: 1}}\n\
         cluster: {{ranks_per_node: 1, device: cuda}}\n"
    );
    Ok(RunConfig::from_yaml_str(&text, Path::new("/"), sets)?.config)
}

/// Everything that `phalanx check` computes; returns the bytes of memory and those sent.
fn compute(config: &RunConfig) -> (u64, u64) {
    let mesh = Mesh::new(&config.parallelism, config.num_ranks().unwrap()).unwrap();
    let inner = mesh.degree(Axis::Tensor) * mesh.degree(Axis::Context);
    let mut sent = 0;
    let last = mesh.degree(Axis::Pipeline) - 1;
    // Stages between the first and the last are alike.
    for stage in [0, last / 2, last] {
        memory_of_stage(config, &mesh, stage).unwrap();
        for batch in &config.training.batch_stages {
            let step = Step::of(batch);
            let communication = communication(config, &mesh, stage * inner, &step).unwrap();
            check_sums(&communication);
            sent = sent.max(communication.sent());
        }
    }
    let memory = memory_per_rank(config, &mesh).unwrap().total();
    // Sums of memory stay at the largest number, which nothing may come to.
    assert!(memory < u64::MAX, "{config:?}");
    let rows = plan_table(config, &mesh).unwrap();
    assert!(rows.iter().map(|row| row.bytes.total()).sum::<u64>() > 0);
    let stages = &config.training.batch_stages;
    for convention in [FlopConvention::FullAttention, FlopConvention::CausalHalf] {
        flops_per_token(&config.model, stages[0].sequence_length, convention);
    }
    step_batch(stages, config.training.steps).end_token();
    (memory, sent)
}

/// What is sent is the sum of all calls, in numbers that cannot overflow; none sends more than its
/// tensor to each other rank.
fn check_sums(communication: &Communication) {
    let mut all = 0;
    for call in &communication.calls {
        let (sent, bytes) = (u128::from(call.sent), u128::from(call.bytes));
        assert!(sent <= bytes * (call.ranks as u128 - 1), "{call:?}");
        all += sent * u128::from(call.times);
    }
    assert_eq!(u128::from(communication.sent()), all);
}

/// The largest `value` of `set(value)` that is taken goes through, as does the one refused not.
fn check_largest(sets: &[&str], most: u64, set: impl Fn(u64) -> String) -> (u64, (u64, u64)) {
    let load = |value| {
        let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
        load(&[&sets[..], &[set(value)]].concat())
    };
    let (mut taken, mut refused) = (0, most + 1);
    while refused - taken > 1 {
        let middle = taken + (refused - taken) / 2;
        if load(middle).is_ok() { taken = middle } else { refused = middle }
    }
    let config = load(taken).unwrap_or_else(|error| panic!("{}: {error}", set(taken)));
    (taken, compute(&config))
}

#[test]
fn the_largest_micro_batch() {
    let tokens = |tokens: u64| {
        format!("training={{steps: 4, global_batch: {tokens}, micro_batch: {tokens}}}")
    };
    let (most, _) = check_largest(&["data.sequence_length=1"], 1 << 24, tokens);
    assert_eq!(most, 1 << 24);
    let (most, _) = check_largest(&["data.sequence_length=16777216"], 1 << 24, tokens);
    assert_eq!(most, 1);
}

/// The largest model, with as many tokens as it is taken with, in each parallel form: what a rank
/// holds or sends is near to what 64 bits hold.
#[test]
fn the_largest_model() {
    let model = format!("model={LARGE_MODEL}");
    let base = [&model, "precision.compute=fp64"];
    let check = |sets: &[&str], least: u32| {
        let batch = |batch: u64| format!("training.global_batch={}", 4 * batch);
        let (most, bytes) = check_largest(&[&base[..], sets].concat(), 1 << 22, batch);
        assert!(most > 0 && bytes.0.max(bytes.1) >= 1 << least, "{sets:?}: {most}, {bytes:?}");
    };
    let four = "cluster.ranks_per_node=4";
    let tokens = ["training.micro_batch=4", "data.sequence_length=16384"];
    let with = |sets: &[&'static str]| [&tokens[..], &[four], sets].concat();
    check(&[&tokens[..], &["parallelism.pipeline.schedule=gpipe"]].concat(), 58);
    check(&with(&["parallelism.tensor=4", "parallelism.recompute=full"]), 55);
    check(&with(&["parallelism.context=4", "parallelism.recompute=full"]), 57);
    check(&with(&["parallelism.pipeline={stages: 4, schedule: gpipe}"]), 56);
    let shard = "parallelism.shard={ranks: 4, level: parameters, reshard_after_forward: true}";
    check(&[four, shard, "data.sequence_length=16"], 60);
    check(&[four, shard, "parallelism.recompute=full", "model.layers=2"], 59);
}

#[test]
fn the_most_actions() {
    let batch = |batch: u64| format!("training.global_batch={batch}");
    let pipeline = |text: &str| format!("parallelism.pipeline={{{text}}}");
    let check = |sets: &[&str], expected| {
        let (most, _) = check_largest(sets, 1 << 24, batch);
        assert_eq!(most, expected, "{sets:?}");
    };
    let level = "parallelism.shard={ranks: 2, level: parameters, reshard_after_forward: true}";
    check(&["cluster.ranks_per_node=1"], 1 << 19);
    check(&["cluster.ranks_per_node=2", level, "training.micro_batch=4"], 1 << 22);
    let zero_bubble = pipeline("stages: 2, schedule: zero-bubble, virtual_stages: 2");
    check(&["cluster.ranks_per_node=2", &zero_bubble], 174_762);
    let interleaved = pipeline("stages: 2, schedule: interleaved-1f1b, virtual_stages: 64");
    check(&["cluster.ranks_per_node=2", &interleaved, "model.layers=128"], 8192);
}

/// Tensor-parallel ranks that send small tensors to one another, as many as can be.
#[test]
fn the_most_ranks() {
    let sets = [
        "model={dim: 2, layers: 4096, heads: 4096, kv_heads: 4096, head_dim: 2, ffn_dim: 4096, \
         vocab_size: 4096}",
        "parallelism={tensor: 4096, sequence: false, recompute: full}",
        "cluster.ranks_per_node=4096",
        "precision.compute=fp64",
        "data.sequence_length=1024",
    ];
    let batch = |batch: u64| format!("training.global_batch={batch}");
    let (_, (_, sent)) = check_largest(&sets, 1 << 24, batch);
    assert!(sent > 1 << 51, "{sent}");
}

#[test]
fn the_longest_run() {
    let sets = ["data.sequence_length=65536", "training.global_batch=65536"];
    let steps = |steps: u64| format!("training.steps={steps}");
    let (most, _) = check_largest(&sets, 1_000_000_000, steps);
    assert_eq!(most, 1 << 28);
}

/// A key and its values: small ones and the largest.
fn any_set(key: &'static str, values: &'static [usize]) -> impl Strategy<Value = String> {
    prop::sample::select(values).prop_map(move |value| format!("{key}={value}"))
}

prop_compose! {
    fn any_sets()(
        dim in any_set("model.dim", &[2, 64, 4096, 1 << 18]),
        layers in any_set("model.layers", &[1, 4, 64]),
        head_dim in any_set("model.head_dim", &[2, 64, 4096]),
        (heads, kv_heads) in prop::sample::select(vec![(4, 1), (4, 4), (4096, 4), (4096, 4096)]),
        ffn in any_set("model.ffn_dim", &[4, 1 << 10, 1 << 20]),
        vocab in any_set("model.vocab_size", &[4, 1 << 17, 1 << 24]),
        tied in any::<bool>(),
        length in any_set("data.sequence_length", &[16, 1 << 13, 1 << 20, 1 << 24]),
        batch in any_set("training.global_batch", &[16, 512, 1 << 14]),
        micro_batch in any_set("training.micro_batch", &[1, 4, 1 << 10, 1 << 14]),
        compute in prop::sample::select(vec!["fp32", "bf16", "fp64"]),
        recompute in prop::sample::select(vec!["none", "selective", "full"]),
        (tensor, context, stages, shard, replicate) in prop::sample::select(vec![
            (1, 1, 1, 1, 1), (4, 1, 1, 1, 1), (1, 2, 1, 1, 1), (1, 1, 4, 1, 1), (1, 1, 1, 4, 1),
            (1, 1, 1, 1, 4), (2, 2, 2, 2, 2), (4, 4, 4, 1, 1), (1, 1, 1, 512, 1),
        ]),
        schedule in prop::sample::select(vec![
            "{schedule: gpipe}", "{schedule: 1f1b}",
            "{schedule: interleaved-1f1b, virtual_stages: 4}",
            "{schedule: interleaved-1f1b, virtual_stages: 4, contiguous_micro_batches: 4}",
            "{schedule: zero-bubble, virtual_stages: 4}", "{schedule: zero-bubble}",
        ]),
        level in prop::sample::select(vec!["optimizer", "gradients", "parameters"]),
        flags in any::<(bool, bool)>(),
    ) -> Vec<String> {
        let ranks = tensor * context * stages * shard * replicate;
        let level = if shard > 1 { level } else { "none" };
        let schedule = if stages > 1 { schedule } else { "{schedule: gpipe}" };
        vec![
            dim, layers, head_dim, format!("model.heads={heads}"),
            format!("model.kv_heads={kv_heads}"), ffn, vocab,
            format!("model.tied_embeddings={tied}"), length, batch, micro_batch,
            format!("precision.compute={compute}"), format!("parallelism.tensor={tensor}"),
            format!("parallelism.context={context}"), format!("parallelism.pipeline={schedule}"),
            format!("parallelism.pipeline.stages={stages}"),
            format!("parallelism.shard.ranks={shard}"), format!("parallelism.shard.level={level}"),
            format!("parallelism.shard.reshard_after_forward={}", flags.0),
            format!("parallelism.sequence={}", flags.1),
            format!("parallelism.recompute={recompute}"),
            format!("cluster.ranks_per_node={ranks}"),
        ]
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        max_global_rejects: 20_000,
        ..ProptestConfig::with_cases(64)
    })]

    #[test]
    fn whatever_is_taken_can_be_computed(sets in any_sets()) {
        let config = load(&sets);
        prop_assume!(config.is_ok());
        compute(&config.unwrap());
    }
}
