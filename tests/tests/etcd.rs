//! A run whose state is in etcd: its coordinator dies with its node, or is cut off, or etcd is.
//! Nodes are played by processes on this machine, those of coordinators by loopback addresses.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use end_to_end::etcd::Etcd;
use end_to_end::sandbox::{Running, Sandbox, signal};
use launcher::cluster::store::etcd::EtcdStore;
use launcher::cluster::store::http::Http;
use launcher::cluster::store::{Acquired, Holder, Record, StateStore, TTL};
use launcher::runs::History;
use rank_protocol::jsonl::read_metrics;
use run_config::{EtcdAddress, RestartStore};
use rustix::process::Signal;
use serde_json::json;
use std::time::{Duration, Instant};

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_phalanx-under-test"), env!("CARGO_BIN_EXE_fake-trainer"))
}

/// Two nodes of two ranks, coordinated from the node at this address.
fn coordinator(sandbox: &Sandbox, etcd: &Etcd, run: &str, address: &str) -> Running {
    let (listen, store) = (format!("{address}:0"), format!("restart.store={}", etcd.url()));
    let mut args = vec!["coordinator", run, "--listen", &listen];
    if run == "config.yaml" {
        args.extend(["--set", "cluster.nodes=2", "--set", &store]);
    }
    sandbox.start(&args)
}

fn agents(sandbox: &Sandbox) -> [Running; 2] {
    ["a", "b"].map(|name| sandbox.start(&["agent", "test", "--name", name]))
}

fn rank_pids(sandbox: &Sandbox) -> Vec<u32> {
    let is_rank = |(_, command): &&(u32, String)| command.contains("fake-trainer");
    sandbox.processes().iter().filter(is_rank).map(|(pid, _)| *pid).collect()
}

fn steps(sandbox: &Sandbox) -> Vec<u64> {
    let metrics = read_metrics(&sandbox.run_dir().metrics()).unwrap();
    metrics.iter().map(|report| report.step).collect()
}

fn assert_all_steps(sandbox: &Sandbox) {
    assert_eq!(steps(sandbox), (1..=20).collect::<Vec<u64>>());
    sandbox.assert_nothing_left();
}

fn generations(sandbox: &Sandbox) -> Vec<u64> {
    let started = sandbox.events_of("generation_started");
    started.iter().map(|event| event["generation"].as_u64().unwrap()).collect()
}

fn expect_all(coordinator: Running, agents: [Running; 2]) {
    coordinator.expect(0);
    agents.into_iter().for_each(|agent| drop(agent.expect(0)));
}

/// The coordinator dies, and the same command (or one with the run's name: `run`) on another node
/// takes over.
fn check_take_over(run: &str, is_history_kept: bool) {
    let (etcd, sandbox) = (Etcd::start(), sandbox().env("FAKE_STEP_MS", 150));
    let killed = coordinator(&sandbox, &etcd, "config.yaml", "127.0.0.1");
    let agents = agents(&sandbox);
    sandbox.wait_for_step(2);
    let before = rank_pids(&sandbox);
    assert_eq!(before.len(), 4);
    killed.signal(Signal::KILL);
    drop(killed);
    if !is_history_kept {
        // What counts is in etcd.
        let events = sandbox.run_dir().events();
        std::fs::rename(&events, events.with_extension("away")).unwrap();
    }
    let since = Instant::now();
    let stopped_at = *steps(&sandbox).last().unwrap();
    let coordinator = coordinator(&sandbox, &etcd, run, "127.0.0.2");
    sandbox.wait_for_metrics(stopped_at + 2, 1);
    assert!(since.elapsed() < Duration::from_secs(10), "{:?}", since.elapsed());
    assert_eq!(rank_pids(&sandbox), before, "no rank ended");
    expect_all(coordinator, agents);
    assert_all_steps(&sandbox);
    assert_eq!(sandbox.events_of("generation_adopted").len(), 1);
    assert_eq!(generations(&sandbox), if is_history_kept { vec![1] } else { vec![] });
    assert!(read_metrics(&sandbox.run_dir().metrics()).unwrap().iter().all(|r| r.generation == 1));
}

#[test]
fn the_same_command_on_another_node_takes_over() {
    check_take_over("config.yaml", true);
}

#[test]
fn another_node_takes_over_with_nothing_but_what_etcd_knows() {
    check_take_over("test", false);
}

#[test]
fn etcd_may_die_and_come_back_under_a_running_job() {
    let (mut etcd, sandbox) = (Etcd::start(), sandbox().env("FAKE_STEP_MS", 400));
    let coordinator = coordinator(&sandbox, &etcd, "config.yaml", "127.0.0.1");
    let agents = agents(&sandbox);
    let step = sandbox.wait_for_step(2)["step"].as_u64().unwrap();
    let before = rank_pids(&sandbox);
    etcd.kill();
    sandbox.wait_for(|status| status["store_alarm"].is_string());
    let told = sandbox.expect(0, &["status", "test"]).0;
    assert!(told.contains("ALARM       the store does not answer"), "{told}");
    let during = sandbox.wait_for_step(step + 4);
    assert!(during["store_alarm"].is_string(), "{during}");
    etcd.restart();
    sandbox.wait_for(|status| status["store_alarm"].is_null());
    assert_eq!(rank_pids(&sandbox), before, "no rank ended");
    expect_all(coordinator, agents);
    assert_all_steps(&sandbox);
    assert_eq!(generations(&sandbox), [1]);
    for kind in ["store_away", "store_back"] {
        assert_eq!(sandbox.events_of(kind).len(), 1, "{kind}");
    }
}

#[test]
fn no_generation_begins_while_etcd_is_away() {
    let (mut etcd, sandbox) = (Etcd::start(), sandbox().env("FAKE_STEP_MS", 150));
    let coordinator = coordinator(&sandbox, &etcd, "config.yaml", "127.0.0.1");
    let agents = agents(&sandbox);
    sandbox.wait_for_step(6);
    etcd.kill();
    sandbox.wait_for(|status| status["store_alarm"].is_string());
    signal(rank_pids(&sandbox)[0], Signal::KILL);
    sandbox.wait_for(|status| {
        let ranks = status["ranks"].as_array();
        ranks.is_some_and(|ranks| ranks.iter().any(|rank| rank["state"] == "failed"))
    });
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(generations(&sandbox), [1]);
    assert_eq!(sandbox.events_of("first_cause").len(), 1, "the failure was seen");
    etcd.restart();
    expect_all(coordinator, agents);
    assert_eq!(generations(&sandbox), [1, 2]);
    assert_eq!(steps(&sandbox).last(), Some(&20));
    sandbox.assert_nothing_left();
}

#[test]
fn of_two_coordinators_at_once_one_is_refused() {
    let (etcd, sandbox) = (Etcd::start(), sandbox().env("FAKE_STEP_MS", 800));
    let first = coordinator(&sandbox, &etcd, "config.yaml", "127.0.0.1");
    let agents = agents(&sandbox);
    sandbox.wait_for_step(1);
    let (_, stderr) = coordinator(&sandbox, &etcd, "test", "127.0.0.2").expect(64);
    let (host, pid) = (launcher::cluster::nodes::host_name(), first.pid());
    let holder = format!("run test is held by the coordinator on {host} (process {pid}");
    assert!(stderr.contains(&holder), "{stderr}");
    expect_all(first, agents);
    assert_all_steps(&sandbox);
}

#[test]
fn a_coordinator_that_was_not_running_for_long_gives_way_to_its_successor() {
    let (etcd, sandbox) = (Etcd::start(), sandbox().env("FAKE_STEP_MS", 400));
    let stale = coordinator(&sandbox, &etcd, "config.yaml", "127.0.0.1");
    let agents = agents(&sandbox);
    sandbox.wait_for_step(2);
    let before = rank_pids(&sandbox);
    stale.signal(Signal::STOP);
    let successor = coordinator(&sandbox, &etcd, "test", "127.0.0.2");
    let deadline = Instant::now() + Duration::from_secs(20);
    while sandbox.events_of("generation_adopted").is_empty() {
        assert!(Instant::now() < deadline, "the successor did not take over");
        std::thread::sleep(Duration::from_millis(50));
    }
    let num_events = sandbox.events().len();
    signal(stale.pid(), Signal::CONT);
    let successor_pid = successor.pid();
    let (_, stderr) = stale.expect(1);
    assert!(stderr.contains("this coordinator is none any more"), "{stderr}");
    assert!(stderr.contains(&format!("(process {successor_pid}")), "{stderr}");
    let said = &sandbox.events()[num_events..];
    assert!(said.iter().all(|event| event["kind"] != "run_failed"), "{said:?}");
    assert_eq!(rank_pids(&sandbox), before, "no rank ended");
    expect_all(successor, agents);
    assert_all_steps(&sandbox);
    assert_eq!(generations(&sandbox), [1]);
}

#[test]
fn a_coordinator_that_nobody_replaced_takes_its_lease_again() {
    let (etcd, sandbox) = (Etcd::start(), sandbox().env("FAKE_STEP_MS", 150));
    let coordinator = coordinator(&sandbox, &etcd, "config.yaml", "127.0.0.1");
    let agents = agents(&sandbox);
    sandbox.wait_for_step(2);
    coordinator.signal(Signal::STOP);
    std::thread::sleep(TTL + Duration::from_secs(2));
    signal(coordinator.pid(), Signal::CONT);
    let output = coordinator.expect(0);
    assert!(output.1.contains("the lease had ended and was taken again"), "{}", output.1);
    agents.into_iter().for_each(|agent| drop(agent.expect(0)));
    assert_all_steps(&sandbox);
    assert_eq!(generations(&sandbox), [1]);
}

#[test]
fn a_folder_that_is_not_shared_is_refused() {
    let (etcd, here) = (Etcd::start(), sandbox());
    let first = coordinator(&here, &etcd, "config.yaml", "127.0.0.1");
    expect_all(first, agents(&here));
    let there = sandbox();
    let (_, stderr) = coordinator(&there, &etcd, "config.yaml", "127.0.0.2").expect(64);
    assert!(stderr.contains("run test was begun on"), "{stderr}");
    assert!(stderr.contains("which this machine does not see"), "{stderr}");
    assert!(stderr.contains("etcdctl del --prefix tests/phalanx/test/"), "{stderr}");
    // A copy of the folder is another folder.
    let copy = there.run_dir();
    std::fs::create_dir_all(copy.root()).unwrap();
    std::fs::copy(here.run_dir().config(), copy.config()).unwrap();
    let (_, stderr) = coordinator(&there, &etcd, "test", "127.0.0.2").expect(64);
    assert!(stderr.contains("does not say that it is the folder of test-"), "{stderr}");
    // The first machine's own is as it was.
    let (_, stderr) = coordinator(&here, &etcd, "test", "127.0.0.1").expect(0);
    assert!(stderr.contains("run test has finished"), "{stderr}");
}

#[test]
fn what_needs_no_store_or_has_none_is_refused() {
    let sandbox = sandbox();
    let store = "restart.store=etcd://127.0.0.1:1/p";
    let (_, stderr) = sandbox.expect(64, &["run", "config.yaml", "--set", store]);
    assert!(stderr.contains("is for `phalanx coordinator`"), "{stderr}");
    let args = ["coordinator", "config.yaml", "--listen", "127.0.0.1:0", "--set", store];
    let since = Instant::now();
    let (_, stderr) = sandbox.expect(1, &args);
    assert!(stderr.contains("the store did not answer for 10 s"), "{stderr}");
    assert!(since.elapsed() < Duration::from_secs(20));
    let secret = "restart.store=etcd://me:hunter2@127.0.0.1:1/p";
    let (_, stderr) = sandbox.expect(64, &["check", "config.yaml", "--set", secret]);
    assert!(stderr.contains("PHALANX_ETCD_PASSWORD_FILE"), "{stderr}");
}

#[test]
fn etcd_may_ask_for_a_name_and_password() {
    let etcd = Etcd::start();
    let mut http = Http::new(&address(&etcd)).unwrap();
    // `tests/phalanx/` and all that begins so.
    let keys = json!({
        "permType": "READWRITE", "key": "dGVzdHMvcGhhbGFueC8=", "range_end": "dGVzdHMvcGhhbGFueDA=",
    });
    for (path, body) in [
        ("user/add", json!({ "name": "root", "password": "r00t" })),
        ("role/add", json!({ "name": "root" })),
        ("user/grant", json!({ "user": "root", "role": "root" })),
        ("user/add", json!({ "name": "phalanx", "password": "hunter2" })),
        ("role/add", json!({ "name": "runs" })),
        ("role/grant", json!({ "name": "runs", "perm": keys })),
        ("user/grant", json!({ "user": "phalanx", "role": "runs" })),
        ("enable", json!({})),
    ] {
        http.post(&format!("/v3/auth/{path}"), &body).unwrap();
    }
    let sandbox = sandbox().env("FAKE_STEP_MS", 100).env("PHALANX_ETCD_USER", "phalanx");
    let file = sandbox.path().join("password");
    std::fs::write(&file, "wrong\n").unwrap();
    let sandbox = sandbox.env("PHALANX_ETCD_PASSWORD_FILE", file.display());
    let (_, stderr) = coordinator(&sandbox, &etcd, "config.yaml", "127.0.0.1").expect(1);
    assert!(stderr.contains("authentication failed"), "{stderr}");
    std::fs::write(&file, "hunter2\n").unwrap();
    let coordinator = coordinator(&sandbox, &etcd, "config.yaml", "127.0.0.1");
    let agents = agents(&sandbox);
    sandbox.wait_for_step(2);
    let ranks = rank_pids(&sandbox);
    assert_eq!(ranks.len(), 4);
    for pid in ranks {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
        let environment = String::from_utf8_lossy(&environment);
        assert!(!environment.contains("PHALANX_ETCD_PASSWORD"), "ranks need no password");
    }
    expect_all(coordinator, agents);
    assert_all_steps(&sandbox);
}

#[test]
fn etcd_is_reached_over_tls_and_known_by_its_authority() {
    let sandbox = sandbox();
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let [certificate, key] = ["etcd.pem", "etcd.key"].map(|name| sandbox.path().join(name));
    std::fs::write(&certificate, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let etcd = Etcd::start_with_tls(certificate.clone(), key);
    let (_, stderr) = coordinator(&sandbox, &etcd, "config.yaml", "127.0.0.1").expect(64);
    assert!(stderr.contains("PHALANX_ETCD_CA is not set"), "{stderr}");
    let other = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let authority = sandbox.path().join("authority.pem");
    std::fs::write(&authority, other.cert.pem()).unwrap();
    let sandbox = sandbox.env("PHALANX_ETCD_CA", authority.display());
    let (_, stderr) = coordinator(&sandbox, &etcd, "config.yaml", "127.0.0.1").expect(1);
    assert!(stderr.contains("the store did not answer"), "{stderr}");
    std::fs::copy(&certificate, &authority).unwrap();
    let coordinator = coordinator(&sandbox, &etcd, "config.yaml", "127.0.0.1");
    let agents = agents(&sandbox);
    expect_all(coordinator, agents);
    assert_all_steps(&sandbox);
}

fn address(etcd: &Etcd) -> EtcdAddress {
    match RestartStore::parse(&etcd.url()).unwrap() {
        RestartStore::Etcd(address) => address,
        RestartStore::File => unreachable!(),
    }
}

fn holder(host: &str) -> Holder {
    let (host, since) = (host.to_owned(), "now".to_owned());
    Holder { host, pid: 1, since, run_id: "r".to_owned(), address: None }
}

fn record(epoch: u64, last_generation: u64) -> Record {
    Record {
        epoch,
        history: History { last_generation, ..History::default() },
        ..Record::default()
    }
}

#[test]
fn a_stale_holders_writes_are_refused() {
    let etcd = Etcd::start();
    let store = || EtcdStore::new(&address(&etcd), "run").unwrap();
    let (mut first, mut second, mut reader) = (store(), store(), store());
    let Acquired::Yes { epoch, record: None } = first.acquire(&holder("a")).unwrap() else {
        panic!("nobody was there");
    };
    assert_eq!(first.write(&record(epoch, 1)), Ok(true));
    assert_eq!(second.acquire(&holder("b")), Ok(Acquired::Held(Box::new(holder("a")))));
    assert_eq!(second.write(&record(epoch, 9)), Ok(false), "it holds nothing");
    let since = Instant::now();
    let found = loop {
        match second.acquire(&holder("b")).unwrap() {
            Acquired::Yes { epoch, record } => break (epoch, record.unwrap()),
            Acquired::Held(_) => std::thread::sleep(Duration::from_millis(100)),
        }
        assert!(since.elapsed() < TTL + Duration::from_secs(3), "the lease does not end");
    };
    assert!(since.elapsed() >= TTL - Duration::from_secs(1), "{:?}", since.elapsed());
    assert!(found.0 > epoch);
    assert_eq!(*found.1, record(epoch, 1));
    assert_eq!(second.write(&record(found.0, 2)), Ok(true));
    assert_eq!(first.renew(), Ok(false));
    assert_eq!(first.write(&record(epoch, 1)), Ok(false));
    assert_eq!(first.announce(&holder("a")), Ok(false));
    assert_eq!(reader.holder(), Ok(Some((found.0, holder("b")))));
    second.release();
    assert_eq!(reader.holder(), Ok(None));
    let Acquired::Yes { record: Some(last), .. } = first.acquire(&holder("a")).unwrap() else {
        panic!("it was given up");
    };
    assert_eq!(last.history.last_generation, 2);
}
