//! Hints about degrees, ranks and batches: each value that they name is one that works.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use run_config::{ConfigErrors, Loaded, RunConfig};
use std::path::Path;

/// A model that divides by 2, 3 and 4, and a batch for up to 24 ranks.
const DIVISIBLE: &str = "\
name: test
model: {dim: 96, layers: 4, heads: 12, kv_heads: 12, ffn_dim: 192, vocab_size: 480}
data:
  tokenizer: tokenizer.json
  sources: [{name: web, path: shards/*.parquet}]
  sequence_length: 96
training: {steps: 100, global_batch: 24}
";

fn load(sets: &[&str]) -> Result<Loaded, ConfigErrors> {
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    RunConfig::from_yaml_str(DIVISIBLE, Path::new("/runs"), &sets)
}

/// The only problem of the config with sets: its message and its hint.
#[track_caller]
fn check_only(sets: &[&str], message: &str, hint: &str) {
    let problems = load(sets).unwrap_err().problems;
    let found: Vec<(&str, Option<&str>)> =
        problems.iter().map(|p| (p.message.as_str(), p.hint.as_deref())).collect();
    assert_eq!(found, [(message, Some(hint))]);
}

/// Every degree above 1 is named with its values that go with all the others, and so are the ranks.
#[test]
fn degrees_that_make_the_ranks_are_named() {
    let check = check_only;
    check(
        &["cluster.ranks_per_node=6", "parallelism.pipeline.stages=4"],
        "the degrees tensor x context x pipeline x shard = 1 x 1 x 4 x 1 = 4 do not divide the 6 \
         ranks",
        "parallelism.pipeline.stages=3 would do; cluster.ranks_per_node=4 or 8 would do",
    );
    check(
        &["cluster.ranks_per_node=8", "parallelism.shard={ranks: 3, level: gradients}"],
        "the degrees tensor x context x pipeline x shard = 1 x 1 x 1 x 3 = 3 do not divide the 8 \
         ranks",
        "parallelism.shard.ranks=2 or 4 would do; cluster.ranks_per_node=6 or 12 would do",
    );
    check(
        &["cluster.ranks_per_node=8", "parallelism={tensor: 3, replicate: 2}"],
        "the degrees tensor x context x pipeline x shard x replicate = 3 x 1 x 1 x 1 x 2 = 6 are \
         not the 8 ranks",
        "parallelism.tensor=4 would do; cluster.ranks_per_node=6 would do",
    );
    // 8 ranks of which 4 are the model's need as many on each of 2 nodes.
    check(
        &["cluster={nodes: 2, ranks_per_node: 3}", "parallelism={tensor: 2, context: 2}"],
        "the degrees tensor x context x pipeline x shard = 2 x 2 x 1 x 1 = 4 do not divide the 6 \
         ranks",
        "parallelism.tensor=1 or 3 would do; parallelism.context=1 or 3 would do; \
         cluster.ranks_per_node=2 or 4 would do",
    );
    // What would do by the product and breaks another rule is not named: 3 layers, 12 / 5 heads,
    // and a batch of 24 for 10 ranks.
    check(
        &["cluster.ranks_per_node=10", "parallelism.tensor=4"],
        "the degrees tensor x context x pipeline x shard = 4 x 1 x 1 x 1 = 4 do not divide the 10 \
         ranks",
        "cluster.ranks_per_node=8 or 12 would do",
    );
}

/// Two hints that contradict one another help nobody.
#[test]
fn a_degree_with_a_problem_of_its_own_has_no_other() {
    let check = check_only;
    check(
        &["cluster.ranks_per_node=4", "parallelism.pipeline.stages=16"],
        "4 layers for 16 stages x 1 virtual stages = 16 chunks",
        "parallelism.pipeline.stages=4 would do",
    );
    check(
        &["cluster.ranks_per_node=8", "parallelism.tensor=5"],
        "5 ranks do not divide model.heads 12 = 5 x 2 + 2, model.ffn_dim 192 = 5 x 38 + 2, the \
         96 tokens of a sequence = 5 x 19 + 1; 5 ranks and model.kv_heads 12 do not divide one \
         another",
        "parallelism.tensor=4 would do",
    );
    check(
        &["cluster.ranks_per_node=8", "parallelism={tensor: 5, replicate: 4}"],
        "5 ranks do not divide model.heads 12 = 5 x 2 + 2, model.ffn_dim 192 = 5 x 38 + 2, the \
         96 tokens of a sequence = 5 x 19 + 1; 5 ranks and model.kv_heads 12 do not divide one \
         another",
        "parallelism.tensor=2 would do",
    );
    // The shards do not go with the ranks whatever becomes of the stages.
    let both = load(&[
        "cluster.ranks_per_node=8",
        "parallelism.pipeline.stages=16",
        "parallelism.shard={ranks: 3, level: gradients}",
    ]);
    let both = both.unwrap_err().to_string();
    assert!(both.contains("has 2 problems") && both.contains("16 x 3 = 48 do not"), "{both}");
    assert!(both.ends_with("hint: parallelism.shard.ranks=2 or 4 would do"), "{both}");
}

#[test]
fn batches_micro_batches_and_ranks_are_named() {
    let check = check_only;
    check(
        &["cluster.ranks_per_node=8", "training.global_batch=6"],
        "6 sequences are not a multiple of 8 data-parallel ranks x micro_batch 1 = 8",
        "training.global_batch=8 would do; cluster.ranks_per_node=6 would do",
    );
    check(
        &["cluster.ranks_per_node=4", "training.micro_batch=4"],
        "24 sequences are not a multiple of 4 data-parallel ranks x micro_batch 4 = 16",
        "training.global_batch=16 or 32 would do; training.micro_batch=3 or 6 would do; \
         cluster.ranks_per_node=3 or 6 would do",
    );
}

/// Every degree and number in these hints gives a config without problems.
#[test]
fn what_would_do_does() {
    let check = |sets: &[&str], mended: &[&str]| {
        load(sets).unwrap_err();
        for set in mended {
            let loaded = load(&[sets, &[set]].concat());
            loaded.unwrap_or_else(|errors| panic!("{set}: {errors}"));
        }
    };
    let stages = ["cluster.ranks_per_node=6", "parallelism.pipeline.stages=4"];
    let ranks = ["cluster.ranks_per_node=4", "cluster.ranks_per_node=8"];
    check(&stages, &[&["parallelism.pipeline.stages=3"], &ranks[..]].concat());
    let shards = ["cluster.ranks_per_node=8", "parallelism.shard={ranks: 3, level: gradients}"];
    check(&shards, &["parallelism.shard.ranks=2", "parallelism.shard.ranks=4"]);
    let replicas = ["cluster.ranks_per_node=8", "parallelism={tensor: 3, replicate: 2}"];
    check(&replicas, &["parallelism.tensor=4", "cluster.ranks_per_node=6"]);
    let batch = ["cluster.ranks_per_node=4", "training.micro_batch=4"];
    let sizes = ["training.micro_batch=3", "training.micro_batch=6", "cluster.ranks_per_node=3"];
    check(&batch, &[&["training.global_batch=16"], &sizes[..]].concat());
}
