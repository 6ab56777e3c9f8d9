//! The real trainer: the same run twice, and the same run on other numbers of ranks.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use end_to_end::losses::{assert_bit_equal, assert_close, metrics};
use end_to_end::sandbox::Sandbox;

fn sandbox() -> Sandbox {
    Sandbox::real(env!("CARGO_BIN_EXE_phalanx-under-test"))
}

fn check_repeats(precision: &str) {
    let sandbox = sandbox();
    let precision = format!("precision.compute={precision}");
    for name in ["first", "second"] {
        sandbox.train(name, &[&precision, "training.steps=40"]);
    }
    assert_bit_equal(&sandbox, "first", "second", 40);
    sandbox.expect(0, &["checkpoint", "diff", "first", "second"]);
    let metrics = metrics(&sandbox, "first");
    assert!(metrics[0].loss > 6.0, "starts near ln 512 = 6.24: {}", metrics[0].loss);
    let last = metrics.last().unwrap();
    assert!(last.loss < 5.0, "the loss falls: {}", last.loss);
    let validation = last.validation_loss.unwrap();
    assert!((validation - last.loss).abs() < 0.5, "held-out text is alike: {validation}");
    sandbox.assert_nothing_left();
}

#[test]
fn the_same_seed_gives_the_same_bits_in_fp32() {
    check_repeats("fp32");
}

#[test]
fn the_same_seed_gives_the_same_bits_in_bf16() {
    check_repeats("bf16");
}

/// The losses of FP8 stay by those of BF16, and repeat to the bit.
///
/// Each product errs by at most 0.051 of itself in the root mean square (`U sqrt(2 / 3)`, see the
/// tests of the model), a branch of two products by 0.072, and so the stream of branches, and the
/// logits, which are of the order of one. A cross-entropy changes by that times the root of one
/// over the tokens (256 a step) at first order, and by half of its square at second: below 0.01 of
/// a loss of 5. Twice that is left for what the weights of 40 steps make of it.
#[test]
fn losses_in_fp8_stay_by_those_in_bf16() {
    let sandbox = sandbox();
    let [bf16_set, fp8_set] =
        ["same", "fp8"].map(|matmul| format!("precision={{compute: bf16, matmul: {matmul}}}"));
    for (name, set) in [("bf16", &bf16_set), ("fp8", &fp8_set), ("again", &fp8_set)] {
        sandbox.train(name, &[set, "training.steps=40"]);
    }
    assert_bit_equal(&sandbox, "fp8", "again", 40);
    let (bf16, fp8) = (metrics(&sandbox, "bf16"), metrics(&sandbox, "fp8"));
    let mut largest: f64 = 0.0;
    for (bf16, fp8) in bf16.iter().zip(&fp8) {
        let difference = (fp8.loss - bf16.loss).abs() / bf16.loss;
        assert!(difference < 0.02, "step {}: {} for {}", bf16.step, fp8.loss, bf16.loss);
        largest = largest.max(difference);
    }
    println!("the largest difference is {largest:.1e} of a loss");
    assert!(largest > 1e-5, "FP8 is used: {largest}");
    let (plan, _) = sandbox.expect(0, &["check", "config.yaml", "--set", &fp8_set]);
    assert!(plan.contains("bf16; products of blocks in FP8 (e4m3, a scale a row)"), "{plan}");
    assert!(fp8.last().unwrap().loss < 5.0, "the loss falls");
    sandbox.assert_nothing_left();
}

#[test]
fn another_seed_gives_another_run() {
    let sandbox = sandbox();
    sandbox.train("first", &["training.steps=1"]);
    sandbox.train("second", &["training.steps=1", "seed=1"]);
    assert_ne!(metrics(&sandbox, "first")[0].loss, metrics(&sandbox, "second")[0].loss);
    sandbox.expect(1, &["checkpoint", "diff", "first", "second"]);
}

/// 1, 2 and 4 ranks train alike, on documents packed with a mask: each rank's share of the targets
/// differs from step to step.
fn check_ranks(precision: &str, tolerance: f64) {
    let sandbox = sandbox();
    let precision = format!("precision.compute={precision}");
    for (name, ranks) in [("one", 1), ("two", 2), ("four", 4)] {
        let ranks = format!("cluster.ranks_per_node={ranks}");
        sandbox.train(name, &[&precision, &ranks, "cluster.threads_per_rank=1"]);
    }
    for name in ["two", "four"] {
        let largest = assert_close(&sandbox, "one", name, 20, tolerance);
        println!("{precision}: {name} ranks differ from one by at most {largest:e}");
    }
}

#[test]
fn one_two_and_four_ranks_train_alike_in_fp32() {
    check_ranks("fp32", 1e-5);
}

#[test]
fn one_two_and_four_ranks_train_alike_in_fp64() {
    check_ranks("fp64", 1e-12);
}

#[test]
fn a_rank_that_takes_several_micro_batches_trains_as_one_that_takes_them_at_once() {
    let sandbox = sandbox();
    let sets = ["precision.compute=fp64", "cluster.ranks_per_node=1"];
    sandbox.train("one-by-one", &sets);
    sandbox.train("at-once", &[&sets[..], &["training.micro_batch=8"]].concat());
    assert_close(&sandbox, "one-by-one", "at-once", 20, 1e-12);
}
