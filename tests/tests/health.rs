//! Machines that are not well get no ranks: each fault is planted in a real agent or launcher.

use end_to_end::sandbox::{Running, Sandbox};
use serde_json::{Value, json};

const FAULTS: &str = "PHALANX_HEALTH_FAULTS";

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_phalanx-under-test"), env!("CARGO_BIN_EXE_fake-trainer"))
}

/// Two nodes of two ranks.
fn coordinator(sandbox: &Sandbox, sets: &[&str]) -> Running {
    let args = ["coordinator", "config.yaml", "--listen", "127.0.0.1:0"];
    sandbox.start(&[&args[..], &["--set", "cluster.nodes=2"], sets].concat())
}

fn agent(sandbox: &Sandbox, name: &str, fault: &str) -> Running {
    let planted = format!("{FAULTS}={fault}");
    sandbox.start_by(&["env", &planted], &["agent", "test", "--name", name])
}

fn text<'a>(event: &'a Value, field: &str) -> &'a str {
    event[field].as_str().unwrap_or_default()
}

#[test]
fn a_node_that_is_not_well_gets_no_place() {
    let sandbox = sandbox();
    let coordinator = coordinator(&sandbox, &[]);
    let faults = [
        ("compute", "a product of whole numbers has wrong bits"),
        ("memory", "has wrong bits: 0x0000010000000000"),
        ("disk", "what was written differs from byte 131072 on"),
        ("link", "what came back differs from what was sent"),
    ];
    for (at, (fault, expected)) in faults.into_iter().enumerate() {
        let name = format!("with-{fault}");
        let (_, stderr) = agent(&sandbox, &name, fault).expect(76);
        assert!(stderr.contains(expected), "{stderr}");
        let told = sandbox.events_of("node_unhealthy");
        assert_eq!((told.len(), text(&told[at], "node")), (at + 1, &*name));
        let reason = text(&told[at], "reason");
        assert!(reason.starts_with(&format!("{fault}: ")) && reason.contains(expected), "{reason}");
    }
    let status = sandbox.wait_for(|s| s["unhealthy"].as_array().is_some_and(|u| u.len() == 4));
    assert!(status["unhealthy"][2].as_str().unwrap().starts_with("with-disk: disk: "), "{status}");
    let shown = sandbox.expect(0, &["status", "test"]).0;
    assert!(shown.contains("unhealthy   node with-compute: compute: "), "{shown}");
    let agents = ["a", "b"].map(|name| agent(&sandbox, name, ""));
    coordinator.expect(0);
    agents.into_iter().for_each(|agent| drop(agent.expect(0)));
    sandbox.assert_nothing_left();
}

#[test]
fn a_node_that_was_not_well_twice_is_quarantined() {
    let sandbox = sandbox();
    let coordinator = coordinator(&sandbox, &[]);
    for _ in 0..2 {
        agent(&sandbox, "b", "disk").expect(76);
    }
    let (_, stderr) = agent(&sandbox, "b", "").expect(76);
    assert!(stderr.contains("node b is quarantined"), "{stderr}");
    let told = sandbox.events_of("node_unhealthy");
    let is_quarantined: Vec<&Value> = told.iter().map(|event| &event["is_quarantined"]).collect();
    assert_eq!(json!(is_quarantined), json!([false, true]));
    let agents = ["a", "c"].map(|name| agent(&sandbox, name, ""));
    coordinator.expect(0);
    agents.into_iter().for_each(|agent| drop(agent.expect(0)));
    sandbox.assert_nothing_left();
}

#[test]
fn a_node_on_which_ranks_fail_twice_gives_its_place_to_a_spare() {
    check_fails_twice("kill:2:7:1;kill:2:12:2", &[], "quarantined: rank 2");
}

#[test]
fn a_node_on_which_ranks_hang_twice_gives_its_place_to_a_spare() {
    let limit = ["--set", "restart.hang_timeout_s=1"];
    check_fails_twice(
        "hang:2:7:1;hang:2:12:2",
        &limit,
        "quarantined: rank 2 failed at step 12 (hang)",
    );
}

/// Rank 2 is on the second node, whichever that is, in both generations.
fn check_fails_twice(faults: &str, sets: &[&str], expected: &str) {
    let sandbox = sandbox().env("FAKE_FAULTS", faults).env("FAKE_STEP_MS", 50);
    let coordinator = coordinator(&sandbox, sets);
    let [first, second] = ["a", "b"].map(|name| agent(&sandbox, name, ""));
    sandbox.wait_for_step(2);
    let spare = agent(&sandbox, "spare", "");
    coordinator.expect(0);
    first.expect(0);
    spare.expect(0);
    let (_, stderr) = second.expect(76);
    assert!(stderr.contains(expected), "{stderr}");
    assert_eq!(sandbox.events_of("fault_injected").len(), 2, "both faults came about");
    let placed = sandbox.events_of("nodes_placed");
    let nodes: Vec<&Value> = placed.iter().map(|event| &event["nodes"]).collect();
    assert_eq!(json!(nodes), json!([["a", "b"], ["a", "b"], ["a", "spare"]]));
    let told = &sandbox.events_of("node_unhealthy")[..];
    assert!(told.len() == 1 && told[0]["node"] == "b", "{told:?}");
    sandbox.assert_nothing_left();
}

#[test]
fn a_launcher_looks_at_its_own_machine() {
    for fault in ["compute", "memory", "disk"] {
        let sandbox = sandbox().env(FAULTS, fault);
        let (_, stderr) = sandbox.expect(76, &["run", "config.yaml"]);
        assert!(stderr.contains(&format!("this machine is not well: {fault}: ")), "{stderr}");
        assert!(!sandbox.run_dir().root().exists(), "no run was made");
        let off = ["run", "config.yaml", "--set", "restart.health_check=false"];
        sandbox.expect(0, &off);
    }
}
