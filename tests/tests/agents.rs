//! A run on several nodes, each played by an agent on this machine: joining, losing a node, losing
//! the coordinator for a while, and who is not let in.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use end_to_end::losses::assert_bit_equal;
use end_to_end::sandbox::{Running, Sandbox, signal};
use rank_protocol::jsonl::read_metrics;
use rustix::process::Signal;
use serde_json::Value;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_phalanx-under-test"), env!("CARGO_BIN_EXE_fake-trainer"))
}

/// Two nodes of two ranks.
fn coordinator(sandbox: &Sandbox) -> Running {
    let args = ["coordinator", "config.yaml", "--listen", "127.0.0.1:0"];
    sandbox.start(&[&args[..], &["--set", "cluster.nodes=2"]].concat())
}

/// The real trainer, with enough steps to be hit, and a run without agents beside it: `straight`.
fn real() -> Sandbox {
    let sandbox = Sandbox::real(env!("CARGO_BIN_EXE_phalanx-under-test"));
    let sets = ["cluster.ranks_per_node=4", REAL[1], REAL[3], REAL[5]];
    sandbox.train("straight", &sets);
    sandbox
}

const REAL: [&str; 6] = [
    "--set",
    "training.steps=40",
    "--set",
    "training.global_batch=16",
    "--set",
    "cluster.threads_per_rank=1",
];

fn real_coordinator(sandbox: &Sandbox) -> Running {
    let args = ["coordinator", "config.yaml", "--listen", "127.0.0.1:0"];
    sandbox.start(&[&args[..], &["--set", "cluster.nodes=2"], &REAL].concat())
}

fn assert_as_straight(sandbox: &Sandbox) {
    let (stdout, stderr) = sandbox.expect(0, &["checkpoint", "diff", "straight", "test"]);
    assert!(stdout.contains("equal"), "{stdout}{stderr}");
    assert_bit_equal(sandbox, "straight", "test", 40);
    sandbox.assert_nothing_left();
}

#[test]
fn two_nodes_train_as_one_machine_does() {
    let sandbox = real();
    let coordinator = real_coordinator(&sandbox);
    let agents = ["a", "b"].map(|name| agent(&sandbox, name));
    coordinator.expect(0);
    for agent in agents {
        agent.expect(0);
    }
    assert_as_straight(&sandbox);
}

/// A rank on one of two nodes is killed: those on both keep their processes.
#[test]
fn ranks_on_all_nodes_keep_their_processes() {
    let sandbox = real();
    let coordinator = real_coordinator(&sandbox);
    let agents = ["a", "b"].map(|name| agent(&sandbox, name));
    let pids = |generation: u64| {
        let pid = |rank: &Value| rank["pid"].as_u64().filter(|pid| *pid > 0);
        let has_begun = |rank: &Value| pid(rank).is_some() && rank["step"].is_u64();
        let status = sandbox.wait_for(|status| {
            let ranks = status["ranks"].as_array();
            let ranks = ranks.filter(|ranks| ranks.len() == 4 && ranks.iter().all(has_begun));
            status["generation"] == generation && ranks.is_some()
        });
        status["ranks"].as_array().unwrap().iter().map(|rank| pid(rank).unwrap()).collect()
    };
    let before: Vec<u64> = pids(1);
    sandbox.wait_for_metrics(7, 1);
    signal(u32::try_from(before[3]).unwrap(), Signal::KILL);
    let after: Vec<u64> = pids(2);
    assert_eq!(before[..3], after[..3]);
    assert_ne!(before[3], after[3]);
    coordinator.expect(0);
    for agent in agents {
        agent.expect(0);
    }
    assert_eq!(sandbox.events_of("generation_started")[1]["kept"], 3);
    assert_as_straight(&sandbox);
}

#[test]
fn a_lost_node_is_the_first_cause_although_its_peers_fail_first() {
    let sandbox = real();
    let coordinator = real_coordinator(&sandbox);
    let [first, second] = ["a", "b"].map(|name| agent(&sandbox, name));
    sandbox.wait_for_metrics(1, 1);
    let spare = agent(&sandbox, "spare");
    sandbox.wait_for_metrics(7, 1);
    second.signal(Signal::KILL);
    coordinator.expect(0);
    first.expect(0);
    spare.expect(0);
    let cause = &sandbox.events_of("first_cause")[0];
    assert_eq!(cause["class"], "node", "{cause}");
    assert!(cause["message"].as_str().unwrap().contains("node b is lost"), "{cause}");
    assert_as_straight(&sandbox);
}

/// A spare node has its processes ready before it is needed, and they become the ranks.
#[test]
fn a_spare_has_warm_processes() {
    let sandbox = real();
    let coordinator = real_coordinator(&sandbox);
    let [first, second] = ["a", "b"].map(|name| agent(&sandbox, name));
    sandbox.wait_for_metrics(1, 1);
    // The run stands still meanwhile, so that it does not end before the spare is ready.
    let status = sandbox.wait_for(|status| status["ranks"][0]["pid"].as_u64() > Some(0));
    let held = u32::try_from(status["ranks"][0]["pid"].as_u64().unwrap()).unwrap();
    signal(held, Signal::STOP);
    let spare = agent(&sandbox, "spare");
    let warm = || -> Vec<u64> {
        let is_warm = |pid: &u32| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            String::from_utf8_lossy(&environment).contains("PHALANX_WARM=")
        };
        let pids = sandbox.processes().into_iter().map(|(pid, _)| pid);
        pids.filter(is_warm).map(u64::from).collect()
    };
    // Those of the first nodes may be there from before the start, and be ranks now.
    let before = warm();
    let deadline = Instant::now() + Duration::from_secs(30);
    while warm().len() < before.len() + 2 {
        assert!(Instant::now() < deadline, "{:?}", warm());
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut waiting: Vec<u64> = warm().into_iter().filter(|pid| !before.contains(pid)).collect();
    waiting.sort_unstable();
    second.signal(Signal::KILL);
    signal(held, Signal::CONT);
    let is_there = |rank: &Value| rank["pid"].as_u64() > Some(0);
    let status = sandbox.wait_for(|status| {
        let ranks = status["ranks"].as_array();
        status["generation"] == 2 && ranks.is_some_and(|ranks| ranks[2..].iter().all(is_there))
    });
    let ranks = status["ranks"].as_array().unwrap();
    let mut moved: Vec<u64> = ranks[2..].iter().map(|rank| rank["pid"].as_u64().unwrap()).collect();
    moved.sort_unstable();
    assert_eq!(moved, waiting, "the ranks of the spare are the processes that waited");
    coordinator.expect(0);
    first.expect(0);
    spare.expect(0);
    let log = std::fs::read_to_string(sandbox.run_dir().log(2, 3)).unwrap();
    assert!(log.contains("rank 3 of 4 is ready"), "{log}");
    assert_as_straight(&sandbox);
}

/// A rank whose results are wrong twice: its node is not used again, although it is there.
#[test]
fn a_node_with_a_bad_device_is_quarantined() {
    let sandbox = real().env("PHALANX_NUMERIC_FAULT", "once:3:18:1e3;once:3:24:1e3");
    let args = ["coordinator", "config.yaml", "--listen", "127.0.0.1:0"];
    let watch = ["--set", "numeric={window: 4, loss_zscore: 100, grad_norm_zscore: 50}"];
    let nodes = ["--set", "cluster.nodes=2"];
    let coordinator = sandbox.start(&[&args[..], &nodes, &watch, &REAL].concat());
    let [first, second] = ["a", "b"].map(|name| agent(&sandbox, name));
    sandbox.wait_for_metrics(1, 1);
    let spare = agent(&sandbox, "spare");
    coordinator.expect(0);
    first.expect(0);
    spare.expect(0);
    let (_, stderr) = second.expect(76);
    assert!(stderr.contains("its device is bad"), "{stderr}");
    assert_eq!(sandbox.events_of("fault_injected").len(), 2);
    let unwell = sandbox.events_of("node_unhealthy");
    assert!(unwell.len() == 1 && unwell[0]["node"] == "b", "{unwell:?}");
    assert_eq!(names(&sandbox.events_of("nodes_placed")[1]), ["a", "spare"]);
    assert_as_straight(&sandbox);
}

fn agent(sandbox: &Sandbox, name: &str) -> Running {
    sandbox.start(&["agent", "test", "--name", name])
}

fn assert_all_steps(sandbox: &Sandbox) {
    let metrics = read_metrics(&sandbox.run_dir().metrics()).unwrap();
    let steps: Vec<u64> = metrics.iter().map(|report| report.step).collect();
    assert_eq!(steps, (1..=20).collect::<Vec<u64>>());
}

fn names(event: &Value) -> Vec<&str> {
    event["nodes"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect()
}

#[test]
fn ranks_of_two_nodes_train_together() {
    let sandbox = sandbox();
    // Agents may be there first.
    let agents = ["b", "a"].map(|name| agent(&sandbox, name));
    let coordinator = coordinator(&sandbox);
    coordinator.expect(0);
    for agent in agents {
        agent.expect(0);
    }
    assert_all_steps(&sandbox);
    assert_eq!(names(&sandbox.events_of("nodes_placed")[0]), ["a", "b"]);
    let status: Value =
        serde_json::from_str(&sandbox.expect(0, &["status", "test", "--json"]).0).unwrap();
    let nodes: Vec<&Value> =
        status["ranks"].as_array().unwrap().iter().map(|rank| &rank["node"]).collect();
    assert_eq!(nodes, ["a", "a", "b", "b"]);
    assert_eq!(sandbox.events_of("generation_started").len(), 1);
    sandbox.assert_nothing_left();
}

#[test]
fn a_spare_takes_the_place_of_a_node_that_is_lost() {
    let sandbox = sandbox().env("FAKE_STEP_MS", 100);
    let coordinator = coordinator(&sandbox);
    let [first, second] = ["a", "b"].map(|name| agent(&sandbox, name));
    sandbox.wait_for_step(2);
    let spare = agent(&sandbox, "spare");
    sandbox.wait_for_step(7);
    let killed = Instant::now();
    second.signal(Signal::KILL);
    let lost = loop {
        if let [lost] = &sandbox.events_of("node_lost")[..] {
            break lost.clone();
        }
        assert!(killed.elapsed() < Duration::from_secs(6), "a lost node is found within 5 s");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(lost["node"], "b");
    sandbox.wait_for_metrics(1, 2);
    assert!(killed.elapsed() < Duration::from_secs(80), "{:?}", killed.elapsed());
    coordinator.expect(0);
    first.expect(0);
    spare.expect(0);
    assert_all_steps(&sandbox);
    let placed = sandbox.events_of("nodes_placed");
    assert_eq!(placed.iter().map(names).collect::<Vec<_>>(), [["a", "b"], ["a", "spare"]]);
    let cause = &sandbox.events_of("first_cause")[0];
    assert_eq!((&cause["class"], &cause["generation"]), (&"node".into(), &1.into()));
    assert!(sandbox.events_of("generation_started")[1]["resume_step"].as_u64().unwrap() >= 5);
    sandbox.assert_nothing_left();
}

#[test]
fn ranks_go_on_while_the_coordinator_is_away() {
    let sandbox = sandbox().env("FAKE_STEP_MS", 50);
    let coordinator = coordinator(&sandbox);
    let agents = ["a", "b"].map(|name| agent(&sandbox, name));
    sandbox.wait_for_step(3);
    let before: Vec<u32> = sandbox.processes().into_iter().map(|(pid, _)| pid).collect();
    coordinator.signal(Signal::STOP);
    // Longer than the silence after which nodes are dead.
    std::thread::sleep(Duration::from_secs(7));
    let during: Vec<u32> = sandbox.processes().into_iter().map(|(pid, _)| pid).collect();
    assert_eq!(before, during, "no process ended");
    signal(coordinator.pid(), Signal::CONT);
    coordinator.expect(0);
    for agent in agents {
        agent.expect(0);
    }
    assert_all_steps(&sandbox);
    assert_eq!(sandbox.events_of("generation_started").len(), 1);
    assert_eq!(sandbox.events_of("node_lost").len(), 0);
    sandbox.assert_nothing_left();
}

fn rank_pids(sandbox: &Sandbox) -> Vec<u32> {
    let is_rank = |(_, command): &&(u32, String)| command.contains("fake-trainer");
    sandbox.processes().iter().filter(is_rank).map(|(pid, _)| *pid).collect()
}

fn new_coordinator(sandbox: &Sandbox) -> Running {
    sandbox.start(&["coordinator", "test", "--listen", "127.0.0.1:0"])
}

#[test]
fn a_new_coordinator_takes_over_the_ranks_of_one_that_was_killed() {
    let sandbox = sandbox().env("FAKE_STEP_MS", 150);
    let killed = coordinator(&sandbox);
    let agents = ["a", "b"].map(|name| agent(&sandbox, name));
    sandbox.wait_for_step(2);
    let before = rank_pids(&sandbox);
    assert_eq!(before.len(), 4);
    killed.signal(Signal::KILL);
    drop(killed);
    let since = Instant::now();
    let coordinator = new_coordinator(&sandbox);
    let stopped_at = read_metrics(&sandbox.run_dir().metrics()).unwrap().len() as u64;
    sandbox.wait_for_metrics(stopped_at + 2, 1);
    assert!(since.elapsed() < Duration::from_secs(10), "{:?}", since.elapsed());
    assert_eq!(rank_pids(&sandbox), before, "no rank ended");
    coordinator.expect(0);
    for agent in agents {
        agent.expect(0);
    }
    assert_all_steps(&sandbox);
    assert_eq!(sandbox.events_of("generation_started").len(), 1);
    assert_eq!(sandbox.events_of("generation_adopted").len(), 1);
    sandbox.assert_nothing_left();
}

#[test]
fn a_new_coordinator_starts_again_where_ranks_are_missing() {
    let sandbox = sandbox().env("FAKE_STEP_MS", 150);
    let killed = coordinator(&sandbox);
    let [first, second] = ["a", "b"].map(|name| agent(&sandbox, name));
    sandbox.wait_for_step(1);
    let spare = agent(&sandbox, "spare");
    sandbox.wait_for_step(7);
    killed.signal(Signal::KILL);
    second.signal(Signal::KILL);
    drop((killed, second));
    let (_, stderr) = new_coordinator(&sandbox).expect(0);
    assert!(stderr.contains("not all ranks of the last generation were found"), "{stderr}");
    first.expect(0);
    spare.expect(0);
    assert_all_steps(&sandbox);
    let generations: Vec<u64> = sandbox
        .events_of("generation_started")
        .iter()
        .map(|event| event["generation"].as_u64().unwrap())
        .collect();
    assert_eq!(generations, [1, 2], "it never goes back");
    sandbox.assert_nothing_left();
}

/// An agent that died with its coordinator, as on the head node that is started anew, has no ranks
/// left: nothing is to be waited for once it is back.
#[test]
fn a_new_coordinator_does_not_wait_for_ranks_that_are_gone_where_all_nodes_are_back() {
    let sandbox = sandbox().env("FAKE_STEP_MS", 150);
    let killed = coordinator(&sandbox);
    let [first, second] = ["a", "b"].map(|name| agent(&sandbox, name));
    sandbox.wait_for_step(7);
    killed.signal(Signal::KILL);
    second.signal(Signal::KILL);
    drop((killed, second));
    let since = Instant::now();
    let coordinator = new_coordinator(&sandbox);
    let second = agent(&sandbox, "b");
    sandbox.wait_for(|status| status["generation"] == 2);
    assert!(since.elapsed() < Duration::from_secs(7), "{:?}", since.elapsed());
    let (_, stderr) = coordinator.expect(0);
    assert!(stderr.contains("are back, without all of its ranks"), "{stderr}");
    for agent in [first, second] {
        agent.expect(0);
    }
    assert_all_steps(&sandbox);
    sandbox.assert_nothing_left();
}

#[test]
fn a_signal_to_one_node_stops_the_run() {
    let sandbox = sandbox().env("FAKE_STEP_MS", 50);
    let coordinator = coordinator(&sandbox);
    let agents = ["a", "b"].map(|name| agent(&sandbox, name));
    sandbox.wait_for_step(3);
    agents[1].signal(Signal::TERM);
    let (_, stderr) = coordinator.expect(75);
    assert!(stderr.contains("SIGTERM to node b"), "{stderr}");
    for agent in agents {
        agent.expect(75);
    }
    sandbox.assert_nothing_left();
}

#[test]
fn strangers_are_not_let_in() {
    let sandbox = sandbox().env("FAKE_STEP_MS", 50);
    let coordinator = coordinator(&sandbox);
    sandbox.wait_for(|status| status["state"] == "starting");
    let run = sandbox.run_dir();
    let address: Value =
        serde_json::from_slice(&std::fs::read(run.coordinator()).unwrap()).unwrap();
    let address = format!("{}:{}", address["host"].as_str().unwrap(), address["port"]);
    // Without TLS; with a frame of 4 GB; with nothing to say.
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 64], &[]] {
        let mut stream = TcpStream::connect(&address).unwrap();
        stream.write_all(bytes).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.len() < 64, "{answer:?}");
    }
    for file in [run.token(), run.certificate()] {
        let mode = std::os::unix::fs::PermissionsExt::mode(&file.metadata().unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600, "{}", file.display());
    }
    let token = std::fs::read(run.token()).unwrap();
    std::fs::write(run.token(), "0".repeat(token.len())).unwrap();
    let (_, stderr) = agent(&sandbox, "stranger").expect(64);
    assert!(stderr.contains("the token is not that of this run"), "{stderr}");
    std::fs::write(run.token(), token).unwrap();
    let agents = ["a", "b"].map(|name| agent(&sandbox, name));
    coordinator.expect(0);
    for agent in agents {
        agent.expect(0);
    }
    assert_all_steps(&sandbox);
    sandbox.assert_nothing_left();
}
