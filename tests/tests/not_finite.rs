//! Losses and gradients that are not finite: steps are skipped and counted, and too many in a row
//! end the run, once.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use end_to_end::losses::metrics;
use end_to_end::sandbox::Sandbox;
use serde_json::Value;

/// A sandbox with `weights/`: what one step of training came to, in Hugging Face's layout.
fn sandbox() -> Sandbox {
    let sandbox = Sandbox::real(env!("CARGO_BIN_EXE_phalanx-under-test"));
    sandbox.train("source", &["training.steps=1"]);
    sandbox.expect(0, &["checkpoint", "export", "source", "--format", "hf", "--out", "weights"]);
    sandbox
}

/// Overwrites a number of an FP32 tensor of `weights/` with NaN.
fn poison(sandbox: &Sandbox, tensor: &str, index: usize) {
    let path = sandbox.path().join("weights/model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let header_end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..header_end]).unwrap();
    assert_eq!(header[tensor]["dtype"], "F32");
    let start = header[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
    let at = header_end + start + 4 * index;
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(path, bytes).unwrap();
}

const RUN: [&str; 4] = ["run", "config.yaml", "--set", "model.init_from=hf:weights"];

#[test]
fn too_many_skipped_steps_in_a_row_end_the_run_once() {
    let sandbox = sandbox();
    poison(&sandbox, "model.norm.weight", 3);
    let args = [&RUN[..], &["--set", "training.max_skipped_steps=3", "--json"]].concat();
    let (stdout, stderr) = sandbox.expect(1, &args);
    assert_eq!(sandbox.events_of("generation_started").len(), 1, "no restart");
    for expected in [
        "3 steps in a row (limit training.max_skipped_steps = 3)",
        "step 3 had loss NaN",
        "samples 16 to 23 of the data order",
        "failed at step 3 (numeric)",
        "optimizer.learning_rate",
    ] {
        assert!(stderr.contains(expected), "{stderr} lacks {expected:?}");
    }
    // Every line is JSON, in the file and on standard output, and reads back.
    let file = std::fs::read_to_string(sandbox.run_dir().metrics()).unwrap();
    for text in [&file, &stdout] {
        let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines.len(), 3);
        let is_null = |line: &Value| line["loss"].is_null() && line["skipped"] == true;
        assert!(lines.iter().all(is_null), "{text}");
    }
    let reports = metrics(&sandbox, "test");
    assert!(reports.iter().all(|report| report.loss.is_nan() && report.grad_norm.is_nan()));
    let json: Value =
        serde_json::from_str(&sandbox.expect(0, &["status", "test", "--json"]).0).unwrap();
    assert_eq!(
        (&json["step"], &json["loss"], &json["exit_code"]),
        (&3.into(), &Value::Null, &1.into())
    );
    assert!(sandbox.expect(0, &["status"]).0.contains("failed"));
    assert!(sandbox.expect(0, &["why", "test"]).0.contains("numeric failure, step 3"));
    sandbox.assert_nothing_left();
}

#[test]
fn a_step_now_and_then_is_skipped_and_the_run_goes_on() {
    let sandbox = sandbox();
    // Only batches that hold this token meet the number that is none.
    poison(&sandbox, "model.embed_tokens.weight", token(&sandbox, RARE_TOKEN) * 32);
    sandbox.expect(
        0,
        &[
            &RUN[..],
            &["--set", "training.max_skipped_steps=10", "--set", "validation.every_steps=0"],
        ]
        .concat(),
    );
    let reports = metrics(&sandbox, "test");
    assert_eq!(reports.len(), 20);
    let skipped: Vec<u64> = reports.iter().filter(|r| r.skipped).map(|r| r.step).collect();
    assert!((1..=15).contains(&skipped.len()), "{skipped:?}");
    assert!(reports.iter().all(|report| report.loss.is_finite() != report.skipped));
    let path = sandbox.run_dir().checkpoint(20).join("state.json");
    let state: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!(state["skipped_steps"], skipped.len());
    let good: Vec<f64> = reports.iter().map(|r| r.loss).filter(|loss| loss.is_finite()).collect();
    assert!(good.last() < good.first(), "still learns: {good:?}");
    // The count survives a resume.
    sandbox.expect(0, &["resume", "test", "--set", "training.steps=21"]);
    let path = sandbox.run_dir().checkpoint(21).join("state.json");
    let state: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert!(state["skipped_steps"].as_u64().unwrap() >= skipped.len() as u64);
}

/// A token that a few batches hold, and most do not: the word without a space before it, as at the
/// start of a document.
const RARE_TOKEN: &str = "there";

/// The id of a token.
fn token(sandbox: &Sandbox, text: &str) -> usize {
    let file = std::fs::read(sandbox.path().join("tokenizer.json")).unwrap();
    let tokenizer: Value = serde_json::from_slice(&file).unwrap();
    tokenizer["model"]["vocab"][text].as_u64().unwrap() as usize
}
