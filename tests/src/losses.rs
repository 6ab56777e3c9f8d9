//! What a run learned, and how it compares with another.

use crate::sandbox::Sandbox;
use rank_protocol::StepReport;
use rank_protocol::jsonl::read_metrics;

/// The step reports of a run, each step once.
///
/// # Panics
/// Where they cannot be read.
pub fn metrics(sandbox: &Sandbox, run: &str) -> Vec<StepReport> {
    let path = sandbox.run_dir_of(run).metrics();
    read_metrics(&path).unwrap_or_else(|error| panic!("{error}"))
}

/// Loss, gradient norm and validation loss of a step.
fn columns(report: &StepReport) -> [Option<f64>; 3] {
    [Some(report.loss), Some(report.grad_norm), report.validation_loss]
}

/// Both runs did `steps` steps, and their losses, gradient norms and validation losses are equal
/// bit for bit.
///
/// # Panics
/// Where they are not.
pub fn assert_bit_equal(sandbox: &Sandbox, a: &str, b: &str, steps: usize) {
    let (left, right) = (metrics(sandbox, a), metrics(sandbox, b));
    assert_eq!((left.len(), right.len()), (steps, steps), "steps of {a} and {b}");
    for (left, right) in left.iter().zip(&right) {
        let bits = |report| columns(report).map(|value| value.map(f64::to_bits));
        assert_eq!(left.step, right.step);
        assert_eq!(
            bits(left),
            bits(right),
            "step {}: {left:?} in {a}, {right:?} in {b}",
            left.step
        );
    }
}

/// Both runs did `steps` steps, with the same losses and gradient norms but for this relative
/// difference; returns the largest that was found.
///
/// # Panics
/// Where they differ by more.
pub fn assert_close(sandbox: &Sandbox, a: &str, b: &str, steps: usize, tolerance: f64) -> f64 {
    let (left, right) = (metrics(sandbox, a), metrics(sandbox, b));
    assert_eq!((left.len(), right.len()), (steps, steps), "steps of {a} and {b}");
    let mut largest = 0.0;
    for (left, right) in left.iter().zip(&right) {
        for (x, y) in columns(left).into_iter().zip(columns(right)) {
            let (Some(x), Some(y)) = (x, y) else {
                assert_eq!(x, y, "step {}", left.step);
                continue;
            };
            let difference = (x - y).abs() / x.abs();
            assert!(difference <= tolerance, "step {}: {x} in {a}, {y} in {b}", left.step);
            largest = f64::max(largest, difference);
        }
    }
    largest
}
