//! What is done with a trained run: it writes, its checkpoints travel, people look at it.

use end_to_end::losses::metrics;
use end_to_end::sandbox::Sandbox;
use serde_json::Value;
use std::process::{Command, Stdio};

/// A sandbox in which `test` has trained for 20 steps.
fn sandbox() -> Sandbox {
    let sandbox = Sandbox::real(env!("CARGO_BIN_EXE_phalanx-under-test"));
    sandbox.expect(0, &["run", "config.yaml"]);
    sandbox
}

fn generate(sandbox: &Sandbox, args: &[&str]) -> String {
    sandbox.expect(0, &[&["generate", "test", "--prompt", "the people"], args].concat()).0
}

#[test]
fn a_model_writes() {
    let sandbox = sandbox();
    let greedy = ["--temperature", "0", "--max-new-tokens", "12"];
    let text = generate(&sandbox, &greedy);
    assert!(text.starts_with("the people") && text.len() > 12, "{text:?}");
    assert_eq!(text, generate(&sandbox, &greedy), "greedy twice");
    assert_eq!(text, generate(&sandbox, &[&greedy[..], &["--seed", "5"]].concat()));
    let seeded = |seed| generate(&sandbox, &["--temperature", "1.5", "--seed", seed]);
    assert_eq!(seeded("1"), seeded("1"), "the same seed twice");
    assert_ne!(seeded("1"), seeded("2"));
    assert_ne!(text, generate(&sandbox, &[&greedy[..], &["--step", "5"]].concat()), "less learned");
    // As much as fits: the model has 32 positions.
    generate(&sandbox, &["--max-new-tokens", "1000"]);
}

#[test]
fn mistakes_in_generate_are_refused_with_64() {
    let sandbox = sandbox();
    let check = |args: &[&str], expected: &str| {
        let (stdout, stderr) = sandbox.expect(64, &[&["generate"], args].concat());
        assert_eq!(stdout, "", "{args:?}");
        assert!(stderr.contains(expected) && !stderr.contains("panicked"), "{args:?}: {stderr}");
    };
    check(&["absent", "--prompt", "a"], "there is no run \"absent\"");
    check(&["test"], "--prompt");
    check(&["test", "--prompt", ""], "--prompt is empty");
    let long = "people ".repeat(80);
    check(&["test", "--prompt", &long], "expected 1 to 32 tokens");
    let with = |name, value| ["test", "--prompt", "a", name, value];
    check(&with("--temperature", "-1"), "temperature is -1.0");
    check(&with("--temperature", "nan"), "temperature is NaN");
    check(&with("--temperature", "warm"), "--temperature");
    check(&with("--top-p", "0"), "top_p is 0.0, expected above 0, at most 1");
    check(&with("--top-p", "2"), "top_p is 2.0");
    check(&with("--step", "7"), "steps 5, 10, 15, 20");
}

#[test]
fn checkpoints_are_listed_and_verified() {
    let sandbox = sandbox();
    let (list, _) = sandbox.expect(0, &["checkpoint", "list", "test"]);
    assert_eq!(list.lines().count(), 4, "{list}");
    sandbox.expect(0, &["checkpoint", "verify", "test"]);
    let path = sandbox.run_dir().checkpoint(10).join("rank-00000-000.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    sandbox.expect(0, &["checkpoint", "verify", "test@20"]);
    let (stdout, stderr) = sandbox.expect(1, &["checkpoint", "verify", "test"]);
    let text = stdout + &stderr;
    assert!(text.contains("DAMAGED") && text.contains("rank-00000-000.safetensors"), "{text}");
    sandbox.expect(1, &["checkpoint", "diff", "test@15", "test@20"]);
    sandbox.expect(0, &["checkpoint", "diff", "test", "test@20"]);
    sandbox.expect(64, &["checkpoint", "diff", "test@7", "test"]);
}

/// Loss of the first step of a run that begins with these weights, as bits.
fn first_loss(sandbox: &Sandbox, name: &str, source: &str) -> u64 {
    sandbox.train(name, &[&format!("model.init_from={source}"), "training.steps=1"]);
    metrics(sandbox, name)[0].loss.to_bits()
}

#[test]
fn weights_go_out_and_come_back_to_the_last_bit() {
    let sandbox = sandbox();
    let export = |target, out| {
        sandbox.expect(0, &["checkpoint", "export", target, "--format", "hf", "--out", out]);
        std::fs::read(sandbox.path().join(out).join("model.safetensors")).unwrap()
    };
    let out = export("test", "weights");
    assert!(sandbox.path().join("weights/config.json").exists());
    assert!(sandbox.path().join("weights/tokenizer.json").exists());
    let import = ["checkpoint", "import", "--format", "hf", "weights", "--out", "imported"];
    sandbox.expect(0, &import);
    assert_eq!(export("imported", "again"), out, "import, then export");
    let from_run = first_loss(&sandbox, "from-run", "run:test");
    assert_eq!(first_loss(&sandbox, "from-hf", "hf:weights"), from_run);
    assert_eq!(first_loss(&sandbox, "from-import", "run:imported"), from_run);
    assert_ne!(first_loss(&sandbox, "from-older", "run:test@5"), from_run);
    let existing = ["checkpoint", "export", "test", "--format", "hf", "--out", "weights"];
    let (_, stderr) = sandbox.expect(64, &existing);
    assert!(stderr.contains("weights"), "{stderr}");
}

#[test]
fn a_run_can_be_looked_at() {
    let sandbox = sandbox();
    let (text, _) = sandbox.expect(0, &["status", "test"]);
    for expected in ["test: finished", "20 of 20", "loss", "checkpoint  step 20"] {
        assert!(text.contains(expected), "{text} lacks {expected:?}");
    }
    let json: Value =
        serde_json::from_str(&sandbox.expect(0, &["status", "test", "--json"]).0).unwrap();
    let last = metrics(&sandbox, "test").pop().unwrap();
    assert_eq!(json["loss"].as_f64(), Some(last.loss));
    assert_eq!(json["validation_loss"].as_f64(), last.validation_loss);
    assert!(sandbox.expect(0, &["why", "test"]).0.contains("no rank has failed"));
    sandbox.expect(0, &["logs", "test"]);
    assert_eq!(last.tokens, 20 * 8 * 32);
    let tensorboard = std::fs::read_dir(sandbox.run_dir().tensorboard()).unwrap();
    assert_eq!(tensorboard.count(), 1);
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let sandbox = sandbox();
    let phalanx = env!("CARGO_BIN_EXE_phalanx-under-test");
    for verb in ["status test --json", "checkpoint list test", "why test", "logs test", "status"] {
        let mut child = Command::new(phalanx)
            .args(verb.split(' '))
            .current_dir(sandbox.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), &*stderr), (Some(0), ""), "{verb}");
    }
}
