//! Products in FP8 in each parallel form. Where a form cuts what is summed, each rank scales its
//! own part, so that two layouts round differently: they are compared as far as FP8 goes, and to
//! the last bit where the roundings are the same.

use crate::harness::{Trained, config, train};

/// Sizes that FP8 takes, whole and cut in two.
const SIZES: [&str; 4] =
    ["model.head_dim=16", "model.ffn_dim=96", "data.sequence_length=64", "training.global_batch=4"];
const BF16: &str = "precision={compute: bf16, matmul: same}";
const FP8: &str = "precision={compute: bf16, matmul: fp8}";
/// Steps compared.
const STEPS: usize = 6;

fn trained(sets: &[&str], steps: usize) -> Trained {
    train(&config(&[&SIZES[..], sets].concat()), steps)
}

#[track_caller]
fn assert_same_bits(found: &Trained, expected: &Trained, what: &str) {
    assert_eq!(found.losses, expected.losses, "{what}");
    assert_eq!(found.norms, expected.norms, "{what}");
    for (name, weight) in &expected.weights {
        assert!(found.weights[name].equal(weight), "{what}: {name}");
    }
}

/// What is computed again is rounded again to the same bits.
#[test]
fn recomputation_in_fp8() {
    for layout in [
        "",
        "tensor: 2",
        "tensor: 2, sequence: false",
        "context: 2",
        "shard: {ranks: 2, level: parameters}",
        "pipeline: {stages: 2, schedule: zero-bubble}",
    ] {
        let with = |recompute: &str| {
            let comma = if layout.is_empty() { "" } else { ", " };
            trained(&[FP8, &format!("parallelism={{{layout}{comma}recompute: {recompute}}}")], 3)
        };
        let expected = with("none");
        for recompute in ["selective", "full"] {
            assert_same_bits(&with(recompute), &expected, &format!("{layout}: {recompute}"));
        }
    }
}

/// Weight gradients that wait are the same: what they read was rounded before.
#[test]
fn deferred_weight_gradients_in_fp8() {
    let with = |schedule: &str| {
        let pipeline = format!("parallelism.pipeline={{stages: 2, schedule: {schedule}}}");
        trained(&[FP8, &pipeline], STEPS)
    };
    assert_same_bits(&with("zero-bubble"), &with("1f1b"), "zero-bubble");
}

/// The largest relative difference of losses, step by step.
fn distance(a: &Trained, b: &Trained) -> f64 {
    let pairs = a.losses.iter().zip(&b.losses);
    pairs.map(|(a, b)| (a - b).abs() / b).fold(0.0, f64::max)
}

/// A layout's roundings are at worst all others than one rank's. Both are draws of the same noise
/// around BF16's losses, whose difference is sqrt(2) times as large as each; three times is allowed.
/// The noise itself is that of two operands of relative error 2^-4 at most, averaged over a step's
/// 256 tokens: more than BF16's own, and less than a hundredth.
#[test]
fn layouts_in_fp8() {
    let (exact, one) = (trained(&[BF16], STEPS), trained(&[FP8], STEPS));
    let noise = distance(&one, &exact);
    println!("FP8 differs from BF16 by at most {noise:.2e}");
    assert!(noise > 1e-5 && noise < 1e-2, "{noise}");
    for layout in [
        "tensor: 2",
        "tensor: 2, sequence: false",
        "context: 2",
        "shard: {ranks: 2, level: parameters}",
        "pipeline: {stages: 2, schedule: 1f1b}",
        "tensor: 2, pipeline: {stages: 2, schedule: zero-bubble}",
    ] {
        let found = trained(&[FP8, &format!("parallelism={{{layout}}}")], STEPS);
        let (from_one, from_exact) = (distance(&found, &one), distance(&found, &exact));
        println!("{layout}: {from_one:.2e} from one rank, {from_exact:.2e} from BF16");
        assert!(from_one < 3.0 * noise, "{layout}: {from_one}, of noise {noise}");
        assert!(from_exact > noise / 4.0, "{layout} is not in FP8: {from_exact}");
    }
}
