//! `phalanx run` and `phalanx resume` on several nodes, each played by a process on this machine:
//! the first node typed by hand, and all of them by Slurm's `srun`, whose variables are set here.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use end_to_end::sandbox::{Running, Sandbox};
use rank_protocol::jsonl::read_metrics;
use rustix::process::Signal;
use serde_json::{Value, json};

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_phalanx-under-test"), env!("CARGO_BIN_EXE_fake-trainer"))
        .env("FAKE_STEP_MS", 50)
}

const RUN: [&str; 6] =
    ["run", "config.yaml", "--listen", "127.0.0.1:0", "--set", "cluster.nodes=2"];
const RESUME: [&str; 4] = ["resume", "test", "--listen", "127.0.0.1:0"];

/// As `srun` starts task `task` of `tasks`.
fn task(sandbox: &Sandbox, (task, tasks): (usize, usize), args: &[&str]) -> Running {
    let variables = [
        format!("SLURM_PROCID={task}"),
        format!("SLURM_NODEID={task}"),
        "SLURM_LOCALID=0".to_owned(),
        format!("SLURM_STEP_NUM_TASKS={tasks}"),
        format!("SLURMD_NODENAME=node{task}"),
    ];
    let before: Vec<&str> =
        ["env"].into_iter().chain(variables.iter().map(String::as_str)).collect();
    sandbox.start_by(&before, args)
}

fn assert_all_steps(sandbox: &Sandbox) {
    let metrics = read_metrics(&sandbox.run_dir().metrics()).unwrap();
    let steps: Vec<u64> = metrics.iter().map(|report| report.step).collect();
    assert_eq!(steps, (1..=20).collect::<Vec<u64>>());
}

fn placed(sandbox: &Sandbox) -> Vec<Value> {
    sandbox.events_of("nodes_placed").iter().map(|event| event["nodes"].clone()).collect()
}

#[test]
fn the_first_node_says_what_to_type_on_the_others() {
    let sandbox = sandbox();
    let first = sandbox.start(&[&RUN[..], &["--node", "z"]].concat());
    let second = sandbox.start(&["agent", "test", "--name", "b"]);
    let (stdout, stderr) = first.expect(0);
    second.expect(0);
    assert_eq!(stdout, "");
    let run = sandbox.run_dir();
    let what = format!("type: phalanx agent {}", run.root().display());
    assert!(stderr.contains(&what), "{stderr}");
    assert_eq!(placed(&sandbox), [json!(["z", "b"])], "the first node is the first");
    assert_all_steps(&sandbox);
    sandbox.assert_nothing_left();
}

#[test]
fn a_first_node_that_was_killed_is_resumed_and_the_others_wait_for_it() {
    let sandbox = sandbox();
    let first = sandbox.start(&[&RUN[..], &["--node", "a"]].concat());
    let second = sandbox.start(&["agent", "test", "--name", "b"]);
    sandbox.wait_for_step(7);
    first.signal(Signal::KILL);
    drop(first);
    sandbox.start(&[&RESUME[..], &["--node", "a"]].concat()).expect(0);
    second.expect(0);
    assert_eq!(placed(&sandbox), [json!(["a", "b"]), json!(["a", "b"])]);
    let resumed = &sandbox.events_of("generation_started")[1]["resume_step"];
    assert!(resumed.as_u64().unwrap() >= 5, "{resumed}");
    assert_all_steps(&sandbox);
    sandbox.assert_nothing_left();
}

#[test]
fn under_srun_every_node_finds_its_part() {
    let sandbox = sandbox();
    // The one that is last may be there first.
    let spare = task(&sandbox, (2, 3), &RUN);
    let others = [1, 0].map(|number| task(&sandbox, (number, 3), &RUN));
    for node in others {
        let (_, stderr) = node.expect(0);
        assert!(!stderr.contains("type: phalanx agent"), "{stderr}");
    }
    spare.expect(0);
    assert_eq!(placed(&sandbox), [json!(["node0", "node1"])]);
    assert_all_steps(&sandbox);
    sandbox.assert_nothing_left();
}

/// A signal to these nodes of a job saves the run and ends all with 75; the same command on all of
/// them goes on.
fn check_preemption(which: Signal, nodes: &[usize]) {
    let sandbox = sandbox();
    let started = [0, 1].map(|number| task(&sandbox, (number, 2), &RUN));
    sandbox.wait_for_step(3);
    for node in nodes {
        started[*node].signal(which);
    }
    for node in started {
        node.expect(75);
    }
    let saved = sandbox.events_of("preempted")[0]["committed"].as_u64().unwrap();
    assert!(saved >= 3);
    // The agents must not take the end of the job before for that of this one.
    let second = task(&sandbox, (1, 2), &RESUME);
    std::thread::sleep(std::time::Duration::from_secs(6));
    task(&sandbox, (0, 2), &RESUME).expect(0);
    second.expect(0);
    assert_eq!(sandbox.events_of("generation_started")[1]["resume_step"], saved);
    assert_all_steps(&sandbox);
    sandbox.assert_nothing_left();
}

#[test]
fn sigterm_to_one_node_of_a_job_saves_the_run() {
    check_preemption(Signal::TERM, &[1]);
}

#[test]
fn sigusr2_to_all_nodes_of_a_job_saves_the_run() {
    check_preemption(Signal::USR2, &[0, 1]);
}

#[test]
fn tasks_that_do_not_go_with_the_nodes_are_refused() {
    let sandbox = sandbox();
    let (_, stderr) = task(&sandbox, (0, 1), &RUN).expect(64);
    assert!(stderr.contains("cluster.nodes: 2, and srun started 1 task(s)"), "{stderr}");
    // Mistakes in the config are told by every node.
    let wrong = [&RUN[..], &["--set", "model.dim=x"]].concat();
    for number in [0, 1] {
        let (_, stderr) = task(&sandbox, (number, 2), &wrong).expect(64);
        assert!(stderr.contains("model.dim"), "{stderr}");
    }
    sandbox.assert_nothing_left();
}
