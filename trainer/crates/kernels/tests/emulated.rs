//! The kernels' own text on the CPU, thread by thread, against their plain forms.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(unsafe_code, reason = "the emulator calls what the host compiler made of a kernel")]

mod emulator;
#[path = "emulated/planted.rs"]
mod planted;
mod suite;

use suite::Extent;

/// Within tolerance, and not by so much that the tolerance says nothing.
fn used(worst: f64) {
    println!("the largest share of a tolerance that was used: {worst:.3}");
    assert!(worst > 0.01 && worst <= 1.0, "{worst}");
}

#[test]
fn rms_norm() {
    used(suite::rms_norm::check(&emulator::kernels(None), Extent::Small));
}

#[test]
fn rope() {
    used(suite::rope::check(&emulator::kernels(None), Extent::Small));
}

#[test]
fn swiglu() {
    used(suite::swiglu::check(&emulator::kernels(None), Extent::Small));
}

#[test]
fn cross_entropy() {
    used(suite::cross_entropy::check(&emulator::kernels(None), Extent::Small));
}

#[test]
fn embedding() {
    used(suite::embedding::check(&emulator::kernels(None), Extent::Small));
}

#[test]
fn adamw() {
    used(suite::optimizer::check_adamw(&emulator::kernels(None), Extent::Small));
}

#[test]
fn gradient_norm() {
    used(suite::optimizer::check_norm(&emulator::kernels(None), Extent::Small));
}

#[test]
fn fp8() {
    suite::fp8::check(&emulator::kernels(None), Extent::Small);
}

/// On a CPU sums are those of FP32: each of the additions, and two scales.
#[test]
fn fp8_products() {
    let unit = |summed: i64| (summed + 2) as f64 / f64::from(1 << 24);
    used(suite::fp8::products(&emulator::kernels(None), Extent::Small, unit));
}

#[test]
fn accumulate() {
    suite::accumulate::check(&emulator::kernels(None), Extent::Small);
}

#[test]
fn autograd_functions() {
    suite::graph::check(&emulator::kernels(None));
}
