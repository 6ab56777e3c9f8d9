//! What users type: mistakes, resumes at other steps and configs, damaged checkpoints, logs.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

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
    let nodes = ["run", "config.yaml", "--set", "cluster={kind: mpi, nodes: 2}"];
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
    assert!(!needed.contains("libtorch") && !needed.contains("libc10"), "{needed}");
    let sandbox = Sandbox::new(phalanx, "/bin/echo");
    let (stdout, _) =
        sandbox.expect(0, &["generate", "test", "--prompt", "Once", "--top-p", "0.9"]);
    assert_eq!(stdout, "generate test --prompt Once --top-p 0.9\n");
}

#[test]
fn what_cannot_be_done_any_more_is_refused() {
    let sandbox = sandbox();
    sandbox.expect(0, &["run", "config.yaml"]);
    let fewer = ["resume", "test", "--set", "training.steps=10"];
    check_refused(&sandbox, &fewer, &["training.steps: 10", "20 steps that run test"]);
    let other = ["resume", "test", "--set", "cluster.ranks_per_node=4"];
    let (_, stderr) = sandbox.expect(0, &other);
    assert!(stderr.contains("has finished: step 20 of 20; nothing is left for --set"), "{stderr}");
    let (_, stderr) = sandbox.expect(0, &["logs", "test"]);
    assert!(stderr.contains("the ranks of test wrote nothing\n"), "{stderr}");
    for name in ["a", "b", "c", "d", "e"] {
        let folder = sandbox.run_dir_of(name).root().to_owned();
        std::fs::create_dir(&folder).unwrap();
        std::fs::copy(sandbox.run_dir().config(), folder.join("config.yaml")).unwrap();
    }
    check_refused(&sandbox, &["why", "x"], &["there are: a, b, c, d, e, …and 1 more"]);
}

#[test]
fn damaged_and_lost_files_of_a_run_are_named_or_made_up_for() {
    let sandbox = sandbox();
    sandbox.expect(0, &["run", "config.yaml"]);
    let run = sandbox.run_dir();
    let shown = || sandbox.expect(0, &["status", "test"]).0;
    std::fs::write(run.status(), "{").unwrap();
    let (_, stderr) = sandbox.expect(1, &["status", "test"]);
    assert!(stderr.contains("status.json is damaged") && stderr.contains("hint: remove it"));
    assert!(sandbox.expect(0, &["status"]).1.contains("status.json is damaged"));
    std::fs::remove_file(run.status()).unwrap();
    let status = shown();
    for expected in ["test: finished", "20 of 20", "loss        0.5000", "step 20\n"] {
        assert!(status.contains(expected), "{status:?} lacks {expected:?}");
    }
    let events = std::fs::read_to_string(run.events()).unwrap();
    std::fs::write(run.events(), format!("nonsense\n{events}")).unwrap();
    let path = run.events().display().to_string();
    for verb in ["resume", "why"] {
        let (_, stderr) = sandbox.expect(1, &[verb, "test"]);
        for expected in [&format!("{path} line 1"), &format!("sed -i 1d {path}")] {
            assert!(stderr.contains(expected), "{stderr:?} lacks {expected:?}");
        }
    }
    // Without any event, the checkpoints say which generation is next.
    std::fs::remove_file(run.events()).unwrap();
    sandbox.expect(0, &["resume", "test", "--set", "training.steps=30"]);
    assert_eq!(sandbox.events_of("generation_started")[0]["generation"], 2);
}

#[test]
fn a_folder_that_did_not_become_a_run_keeps_no_name() {
    let sandbox = sandbox();
    let run = sandbox.run_dir();
    std::fs::create_dir_all(run.root()).unwrap();
    std::fs::write(run.root().join("notes"), "").unwrap();
    check_refused(&sandbox, &["run", "config.yaml"], &["is no run", "move it away"]);
    std::fs::remove_file(run.root().join("notes")).unwrap();
    std::fs::write(run.lock(), "12").unwrap();
    std::fs::write(run.root().join("config.yaml.new"), "na").unwrap();
    sandbox.expect(0, &["run", "config.yaml"]);
    sandbox.assert_nothing_left();
}

/// A run of 2 ranks with `before` goes on with `after`, and then each rank has so many threads.
fn check_threads(before: &str, after: &[&str], expected: usize) {
    let sandbox = sandbox();
    sandbox.expect(0, &["run", "config.yaml", "--set", before]);
    let more = ["resume", "test", "--set", "training.steps=25"];
    sandbox.expect(0, &[&more[..], after].concat());
    let loaded = run_config::RunConfig::load(&sandbox.run_dir().config(), &[]).unwrap();
    assert_eq!(loaded.config.cluster.threads_per_rank, Some(expected), "{before}, {after:?}");
}

#[test]
fn threads_are_resolved_again_for_other_ranks_where_they_were_auto() {
    let cores = launcher::machine::num_cores();
    let (auto, given) = ("cluster.threads_per_rank=auto", "cluster.threads_per_rank=3");
    let whole = "cluster={kind: local, ranks_per_node: 1, device: cpu}";
    check_threads(auto, &["--set", "cluster.ranks_per_node=1"], cores);
    check_threads(auto, &["--set", whole], cores);
    check_threads(auto, &["--set", "cluster.ranks_per_node=1", "--set", given], 3);
    check_threads(given, &["--set", "cluster.ranks_per_node=1"], 3);
}

#[test]
fn a_run_whose_steps_were_all_skipped_shows_so() {
    let sandbox = sandbox().env("FAKE_SKIPS", 1);
    sandbox.expect(0, &["run", "config.yaml"]);
    let status = sandbox.expect(0, &["status", "test"]).0;
    assert!(status.contains("loss        -\n"), "{status}");
    assert!(status.contains("skipped     20 steps"), "{status}");
}

#[test]
fn an_item_of_a_list_is_set_by_the_name_that_messages_give_it() {
    let sandbox = sandbox();
    let set = "data.sources[0].path=nowhere/*.parquet";
    check_refused(&sandbox, &["run", "config.yaml", "--set", set], &["nowhere/*.parquet"]);
}
