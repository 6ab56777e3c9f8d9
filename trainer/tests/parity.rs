//! Numerics against transformers: every case folder of `tests/references/`, and every one under
//! `$PHALANX_REFERENCES`, must agree in logits, hidden states, gradients and training losses.
//!
//! A case folder is what `tests/references/make_cases.py` writes. Finding no case is a failure.

#![expect(non_snake_case, reason = "tensor variables end in their shape")]
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[path = "parity/case.rs"]
mod case;

use case::{Case, Measured, Precise, all_cases};
use run_config::ComputeDtype;

/// Bounds of one format.
const FP32: Precise = Precise {
    compute: ComputeDtype::Fp32,
    section: "fp32",
    forward: 2e-5,
    gradient: 1e-4,
    loss: 5e-5,
};
const FP64: Precise = Precise {
    compute: ComputeDtype::Fp64,
    section: "fp64",
    forward: 1e-9,
    gradient: 1e-9,
    loss: 1e-9,
};
/// BF16 keeps 8 bits, so its losses only stay near those of another BF16 implementation.
const BF16_LOSS: f64 = 2e-2;

/// Runs `measure` on every case, prints the largest deviations, and fails on those out of bounds.
fn check(what: &str, measure: impl Fn(&Case) -> Vec<Measured>) {
    let mut failures = Vec::new();
    for case in all_cases() {
        for measured in measure(&case) {
            println!("{what} {:<20} {measured}", case.name);
            if !measured.holds() {
                failures.push(format!("{}: {measured}", case.folder.display()));
            }
        }
    }
    assert!(failures.is_empty(), "{what}:\n{}", failures.join("\n"));
}

#[test]
fn fp32_forward_and_gradients() {
    check("fp32", |case| case.forward_and_gradients(&FP32));
}

#[test]
fn fp64_forward_and_gradients() {
    check("fp64", |case| case.forward_and_gradients(&FP64));
}

#[test]
fn fp32_training() {
    check("fp32", |case| case.training(&FP32));
}

#[test]
fn fp64_training() {
    check("fp64", |case| case.training(&FP64));
}

#[test]
fn bf16_training_stays_near() {
    check("bf16", |case| case.bf16_training(BF16_LOSS));
}
