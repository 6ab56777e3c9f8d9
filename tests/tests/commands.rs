//! What users type: mistakes, resumes at other steps and configs, damaged checkpoints, logs.

use end_to_end::sandbox::Sandbox;
use rank_protocol::jsonl::read_metrics;
use serde_json::Value;
use std::process::Command;

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_phalanx-under-test"), env!("CARGO_BIN_EXE_fake-trainer"))
}

/// These arguments end with 64 and one message that holds all of `expected`.
fn check_refused(sandbox: &Sandbox, args: &[&str], expected: &[&str]) {
    let (stdout, stderr) = sandbox.expect(64, args);
    assert_eq!(stdout, "", "{args:?}");
    for expected in expected {
        assert!(stderr.contains(expected), "{args:?}: {stderr:?} lacks {expected:?}");
    }
    assert!(!stderr.contains("panicked"), "{stderr}");
}

#[test]
fn mistakes_are_refused_with_64() {
    let sandbox = sandbox();
    check_refused(&sandbox, &["rum"], &["rum"]);
    check_refused(&sandbox, &["run"], &["CONFIG"]);
    check_refused(&sandbox, &["run", "absent.yaml"], &["absent.yaml"]);
    check_refused(&sandbox, &["run", "config.yaml", "--set", "nme=x"], &["nme", "name"]);
    check_refused(&sandbox, &["status", "absent"], &["no run \"absent\""]);
    check_refused(&sandbox, &["resume", "absent"], &["no run \"absent\""]);
    let kind = ["run", "config.yaml", "--set", "cluster.kind=slurm"];
    check_refused(&sandbox, &kind, &["cluster.kind", "slurm"]);
    let nodes = ["run", "config.yaml", "--set", "cluster.nodes=2"];
    check_refused(&sandbox, &nodes, &["cluster.nodes"]);
    assert!(!sandbox.path().join("runs").exists(), "a refused run must leave nothing");
}

#[test]
fn a_missing_trainer_is_named() {
    let sandbox = Sandbox::new(env!("CARGO_BIN_EXE_phalanx-under-test"), "/nowhere/trainer");
    check_refused(&sandbox, &["run", "config.yaml"], &["/nowhere/trainer", "cargo build"]);
    let no_program = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    let sandbox = Sandbox::new(env!("CARGO_BIN_EXE_phalanx-under-test"), no_program);
    check_refused(&sandbox, &["run", "config.yaml"], &["cannot start rank 0", no_program]);
    sandbox.assert_nothing_left();
}

#[test]
fn help_and_version_are_no_mistakes() {
    let sandbox = sandbox();
    assert!(sandbox.expect(0, &["--help"]).0.contains("resume"));
    assert!(sandbox.expect(0, &["--version"]).0.starts_with("phalanx "));
}

#[test]
fn what_auto_came_to_is_kept_in_the_runs_config() {
    let sandbox = sandbox();
    let (_, stderr) =
        sandbox.expect(0, &["run", "config.yaml", "--set", "cluster.ranks_per_node=auto"]);
    assert!(!stderr.contains("warning"), "{stderr}");
    let loaded = run_config::RunConfig::load(&sandbox.run_dir().config(), &[]).unwrap();
    let cores = launcher::machine::num_cores();
    assert_eq!(loaded.config.cluster.ranks_per_node, Some(1));
    assert_eq!(loaded.config.cluster.threads_per_rank, Some(cores));
}

#[test]
fn more_ranks_than_cores_is_a_warning() {
    let ranks = (launcher::machine::num_cores() + 1).next_power_of_two();
    let sandbox = sandbox();
    let ranks_set = format!("cluster.ranks_per_node={ranks}");
    let batch_set = format!("training.global_batch={ranks}");
    let args = ["run", "config.yaml", "--set", &ranks_set, "--set", &batch_set];
    let (_, stderr) = sandbox.expect(0, &args);
    let warnings: Vec<&str> = stderr.lines().filter(|line| line.contains("warning")).collect();
    let [warning] = warnings[..] else { panic!("one warning: {stderr}") };
    assert!(warning.contains("cluster.ranks_per_node"), "{warning}");
    assert!(warning.contains(&format!("{ranks} ranks on")), "{warning}");
}

fn resumed_from(sandbox: &Sandbox) -> Vec<Value> {
    let started = sandbox.events_of("generation_started");
    started.iter().map(|event| event["resume_step"].clone()).collect()
}

#[test]
fn a_run_goes_on_with_more_steps_and_other_ranks() {
    let sandbox = sandbox();
    sandbox.expect(0, &["run", "config.yaml"]);
    let set = ["--set", "training.steps=30", "--set", "cluster.ranks_per_node=4"];
    sandbox.expect(0, &[&["resume", "test"], &set[..]].concat());
    assert_eq!(resumed_from(&sandbox), [Value::Null, 20.into()]);
    assert_eq!(sandbox.events_of("generation_started")[1]["world_size"], 4);
    let changes = sandbox.events_of("config_changed")[0]["changes"].clone();
    let steps = serde_json::json!({ "key": "training.steps", "old": 20, "new": 30 });
    assert!(changes.as_array().unwrap().contains(&steps), "{changes}");
    let metrics = read_metrics(&sandbox.run_dir().metrics()).unwrap();
    assert_eq!(metrics.last().unwrap().step, 30);
    let rename = ["resume", "test", "--set", "name=other"];
    check_refused(&sandbox, &rename, &["keeps its name"]);
}

#[test]
fn after_going_back_newer_checkpoints_of_the_past_no_longer_count() {
    let sandbox = sandbox();
    sandbox.expect(0, &["run", "config.yaml"]);
    let absent = ["resume", "test", "--step", "7"];
    check_refused(&sandbox, &absent, &["no good checkpoint of step 7", "5, 10, 15, 20"]);
    // Fails before it commits anything new: it must not jump to what was left behind.
    let faulty = sandbox.env("FAKE_FAULTS", "kill:0:8:2");
    faulty.expect(0, &["resume", "test", "--step", "5"]);
    assert_eq!(resumed_from(&faulty), [Value::Null, 5.into(), 5.into()]);
    let metrics = read_metrics(&faulty.run_dir().metrics()).unwrap();
    assert_eq!(metrics.len(), 20);
    assert!(metrics.iter().all(|r| r.step <= 5 || r.generation >= 2));
}

#[test]
fn a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used() {
    let sandbox = sandbox();
    sandbox.expect(0, &["run", "config.yaml"]);
    let damage = |step: u64| {
        let path = sandbox.run_dir().checkpoint(step).join("rank-00000-000.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, bytes).unwrap();
    };
    damage(20);
    let more = ["resume", "test", "--set", "training.steps=25"];
    let (_, stderr) = sandbox.expect(0, &more);
    assert!(stderr.contains("the checkpoint of step 20 is damaged"), "{stderr}");
    assert_eq!(sandbox.events_of("checkpoint_damaged")[0]["step"], 20);
    assert_eq!(resumed_from(&sandbox)[1], 15);
    for step in [5, 10, 15, 20, 25] {
        let _ = std::fs::remove_file(sandbox.run_dir().checkpoint(step).join("COMMIT"));
    }
    check_refused(&sandbox, &["resume", "test"], &["no good checkpoint is left", "--from-start"]);
    sandbox.expect(0, &["resume", "test", "--from-start"]);
}

#[test]
fn logs_show_what_ranks_wrote() {
    let sandbox = sandbox().env("FAKE_FAULTS", "report:1:3:*");
    sandbox.expect(93, &["run", "config.yaml"]);
    let refused = ["logs", "test", "--rank", "9"];
    check_refused(&sandbox, &refused, &["no logs of rank 9"]);
    let status = sandbox.expect(0, &["status"]).0;
    assert!(status.contains("test") && status.contains("failed"), "{status}");
    let json: Value =
        serde_json::from_str(&sandbox.expect(0, &["status", "test", "--json"]).0).unwrap();
    assert_eq!(json["exit_code"], 93);
    let (logs, _) = sandbox.expect(0, &["logs", "test", "--rank", "0"]);
    assert!(logs.contains("rank 0"), "{logs}");
}

#[test]
fn the_launcher_links_no_torch_and_generate_becomes_the_trainer() {
    let phalanx = env!("CARGO_BIN_EXE_phalanx-under-test");
    let output = Command::new("ldd").arg(phalanx).output().unwrap();
    let needed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(needed.contains("libc.so"), "{needed}");
    assert!(!needed.contains("torch") && !needed.contains("c10"), "{needed}");
    let sandbox = Sandbox::new(phalanx, "/bin/echo");
    let (stdout, _) =
        sandbox.expect(0, &["generate", "test", "--prompt", "Once", "--top-p", "0.9"]);
    assert_eq!(stdout, "generate test --prompt Once --top-p 0.9\n");
}
