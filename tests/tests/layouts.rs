//! Real processes over Gloo: every pair of parallel forms trains as one rank does, and a run goes
//! on from its checkpoint at any other layout.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use checkpoint_format::{Checkpoint, TensorBox};
use end_to_end::losses::assert_close;
use end_to_end::sandbox::Sandbox;

const STEPS: usize = 10;

/// Relative difference that rounding in FP64 may make in ten steps.
const LIMIT: f64 = 1e-10;

/// The model and the numbers in which layouts are proven equal.
const BASE: [&str; 5] = [
    "precision.compute=fp64",
    "model.layers=4",
    "training.steps=10",
    "schedule.kind=constant",
    "cluster.threads_per_rank=1",
];

fn sandbox() -> Sandbox {
    let sandbox = Sandbox::real(env!("CARGO_BIN_EXE_phalanx-under-test"));
    sandbox.train("straight", &[&BASE[..], &["cluster.ranks_per_node=1"]].concat());
    sandbox
}

/// All weights of a run's last checkpoint are those of the run on one rank, by the norm of each.
fn assert_same_weights(sandbox: &Sandbox, run: &str) {
    let open =
        |run: &str| Checkpoint::open(&sandbox.run_dir_of(run).checkpoint(STEPS as u64)).unwrap();
    let (found, expected) = (open(run), open("straight"));
    assert!(found.tensors().keys().eq(expected.tensors().keys()));
    for name in expected.tensors().keys() {
        let values = |checkpoint: &Checkpoint| -> Vec<f64> {
            let entry = checkpoint.tensor(name).unwrap();
            let whole = TensorBox::whole(&entry.shape);
            let mut bytes = vec![0; 8 * whole.num_elements().unwrap() as usize];
            checkpoint.read_box(name, &whole, &mut bytes).unwrap();
            bytes.as_chunks::<8>().0.iter().map(|word| f64::from_le_bytes(*word)).collect()
        };
        let norm = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>().sqrt();
        let (found, expected) = (values(&found), values(&expected));
        let difference: Vec<f64> = found.iter().zip(&expected).map(|(a, b)| a - b).collect();
        let relative = norm(&difference) / norm(&expected);
        assert!(relative < LIMIT, "{run}: {name} is off by {relative:e}");
    }
}

fn check(sandbox: &Sandbox, run: &str, sets: &[&str]) {
    sandbox.train(run, &[&BASE[..], sets].concat());
    let largest = assert_close(sandbox, "straight", run, STEPS, LIMIT);
    eprintln!("{run}: losses and norms within {largest:e}");
    assert_same_weights(sandbox, run);
}

const EIGHT: &str = "cluster.ranks_per_node=8";
const FOUR: &str = "cluster.ranks_per_node=4";

#[test]
fn tensor_context_and_pipeline() {
    check(
        &sandbox(),
        "tcp",
        &[EIGHT, "parallelism={tensor: 2, context: 2, pipeline: {stages: 2}}"],
    );
}

#[test]
fn tensor_replicas_and_shards() {
    check(
        &sandbox(),
        "trs",
        &[EIGHT, "parallelism={tensor: 2, shard: {ranks: 2, level: parameters}, replicate: 2}"],
    );
}

#[test]
fn context_replicas_and_shards() {
    check(
        &sandbox(),
        "crs",
        &[EIGHT, "parallelism={context: 2, shard: {ranks: 2, level: gradients}, replicate: 2}"],
    );
}

#[test]
fn pipeline_replicas_and_shards() {
    check(
        &sandbox(),
        "prs",
        &[
            EIGHT,
            "parallelism={pipeline: {stages: 2, schedule: zero-bubble}, replicate: 2, shard: \
             {ranks: 2, level: parameters, reshard_after_forward: true}, recompute: full}",
        ],
    );
}

#[test]
fn interleaved_stages_and_optimizer_shards() {
    check(
        &sandbox(),
        "ps",
        &[
            FOUR,
            "parallelism={pipeline: {stages: 2, schedule: interleaved-1f1b, virtual_stages: 2}, \
             shard: {ranks: 2, level: optimizer}, recompute: selective}",
        ],
    );
}

/// From one layout to the next, three times: the losses are those of a run that stayed on one rank.
#[test]
fn a_run_goes_on_at_any_other_layout() {
    let sandbox = sandbox();
    let layouts = [
        ("3", FOUR, "parallelism={tensor: 2, shard: {ranks: 2, level: parameters}}"),
        ("6", FOUR, "parallelism={pipeline: {stages: 2}, context: 2}"),
        ("10", "cluster.ranks_per_node=2", "parallelism={tensor: 2, sequence: false}"),
    ];
    let (steps, ranks, layout) = layouts[0];
    let until = |steps: &str| format!("training.steps={steps}");
    sandbox.train("test", &[&BASE[..], &[&until(steps), ranks, layout]].concat());
    for (steps, ranks, layout) in &layouts[1..] {
        let steps = until(steps);
        let sets = ["--set", &steps, "--set", ranks, "--set", layout];
        sandbox.expect(0, &[&["resume", "test"], &sets[..]].concat());
    }
    // Validation comes at the last step of each part too.
    let without = |report: &rank_protocol::StepReport| (report.loss, report.grad_norm);
    let read = |run| end_to_end::losses::metrics(&sandbox, run);
    let (found, expected) = (read("test"), read("straight"));
    assert_eq!(found.len(), STEPS);
    for (found, expected) in found.iter().zip(&expected) {
        let ((loss, norm), (loss_expected, norm_expected)) = (without(found), without(expected));
        let step = expected.step;
        assert!((loss / loss_expected - 1.0).abs() < LIMIT, "step {step}: {loss}");
        assert!((norm / norm_expected - 1.0).abs() < LIMIT, "step {step}: {norm}");
    }
    assert_same_weights(&sandbox, "test");
}
