//! A disk that fills up: a real, small one, where this user may mount a tmpfs; else the tests say
//! that they were skipped.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use end_to_end::sandbox::{PATIENCE, Sandbox};
use rank_protocol::RunDir;
use rank_protocol::jsonl::read_metrics;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A mount namespace of its own in which `runs/` of a sandbox is a small disk; gone when dropped.
struct SmallDisk {
    holder: Child,
    mount: PathBuf,
    folder: String,
}

impl SmallDisk {
    /// `None`, with the reason printed, where this user may not mount.
    fn mount(sandbox: &Sandbox, size: &str) -> Option<Self> {
        let mount = sandbox.path().join("runs");
        std::fs::create_dir(&mount).unwrap();
        let script =
            format!("mount -t tmpfs -o size={size} tmpfs \"$0\" && echo ready && exec cat");
        let mut holder = Command::new("unshare")
            .args(["--map-root-user", "--mount", "sh", "-c", &script])
            .arg(&mount)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .inspect_err(|error| println!("skipped: cannot start unshare: {error}"))
            .ok()?;
        let mut line = String::new();
        BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let folder = sandbox.path().display().to_string();
        let disk = Self { holder, mount, folder };
        if line != "ready\n" {
            println!("skipped: this user may not mount a tmpfs in a namespace of its own");
            return None;
        }
        Some(disk)
    }

    /// The words that bring a command into the namespace.
    fn enter(&self) -> [String; 6] {
        let pid = self.holder.id().to_string();
        ["nsenter", "--target", &pid, "--user", "--mount", "--preserve-credentials"]
            .map(str::to_owned)
    }

    /// Runs `phalanx` in the namespace; it must end with this code.
    fn expect(&self, sandbox: &Sandbox, code: i32, args: &[&str]) -> (String, String) {
        let words = self.enter();
        let place = format!("--wdns={}", self.folder);
        let words: Vec<&str> = words.iter().map(String::as_str).chain([&*place]).collect();
        sandbox.start_by(&words, args).expect(code)
    }

    fn grow(&self, size: &str) {
        let [program, args @ ..] = self.enter();
        let options = format!("remount,size={size}");
        let mounted = Command::new(program)
            .args(args)
            .args(["mount", "-o", &options])
            .arg(&self.mount)
            .status();
        assert!(mounted.unwrap().success());
    }

    /// The run `test` on the disk, as seen from here.
    fn run_dir(&self) -> RunDir {
        let root = format!("/proc/{}/root", self.holder.id());
        RunDir::new(Path::new(&root).join(self.mount.strip_prefix("/").unwrap()).join("test"))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// The disk is one that a look at the machine's health would refuse from the start.
const RUN: [&str; 6] = [
    "run",
    "config.yaml",
    "--set",
    "metrics.tensorboard=false",
    "--set",
    "restart.health_check=false",
];

#[test]
fn a_checkpoint_that_finds_no_space_costs_no_older_one() {
    let sandbox = Sandbox::real(env!("CARGO_BIN_EXE_phalanx-under-test"));
    // A checkpoint has 0.6 MB: three fit.
    let Some(disk) = SmallDisk::mount(&sandbox, "2m") else { return };
    let (_, stderr) = disk.expect(&sandbox, 93, &RUN);
    for expected in ["no space for a checkpoint in", "runs/test/checkpoints", "bytes and", "free"] {
        assert!(stderr.contains(expected), "{stderr} lacks {expected:?}");
    }
    assert!(stderr.contains("failed at step 20 (storage)"), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    let (list, _) = disk.expect(&sandbox, 0, &["checkpoint", "verify", "test"]);
    assert!(list.lines().count() == 3 && !list.contains("DAMAGED"), "{list}");
    disk.grow("30m");
    let (_, stderr) = disk.expect(&sandbox, 0, &["resume", "test"]);
    assert!(stderr.contains("continues from step 15"), "{stderr}");
    disk.expect(&sandbox, 0, &[&RUN[..], &["--set", "name=straight"]].concat());
    disk.expect(&sandbox, 0, &["checkpoint", "diff", "straight", "test"]);
}

#[test]
fn training_goes_on_while_there_is_no_space_for_a_checkpoint() {
    let sandbox = Sandbox::real(env!("CARGO_BIN_EXE_phalanx-under-test"));
    let Some(disk) = SmallDisk::mount(&sandbox, "2m") else { return };
    let (words, place) = (disk.enter(), format!("--wdns={}", disk.folder));
    let words: Vec<&str> = words.iter().map(String::as_str).chain([&*place]).collect();
    let sets = ["--set", "training.steps=400", "--set", "checkpoint.every_steps=20"];
    let running = sandbox.start_by(&words, &[&RUN[..], &sets].concat());
    let of_kind = |kind: &str| {
        let events: Vec<serde_json::Value> =
            rank_protocol::jsonl::read(&disk.run_dir().events()).unwrap_or_default();
        events.into_iter().filter(|event| event["kind"] == kind).collect::<Vec<_>>()
    };
    let deadline = Instant::now() + PATIENCE;
    while of_kind("checkpoint_failed").is_empty() {
        assert!(Instant::now() < deadline, "the disk must fill up");
        std::thread::sleep(Duration::from_millis(5));
    }
    disk.grow("30m");
    running.expect(0);
    let failed = &of_kind("checkpoint_failed")[0];
    assert!(failed["reason"].as_str().unwrap().contains("no space for a checkpoint"), "{failed}");
    assert_eq!(of_kind("generation_started").len(), 1, "no rank was started again");
    assert!(of_kind("checkpoint_committed").last().unwrap()["step"] == 400);
    let (list, _) = disk.expect(&sandbox, 0, &["checkpoint", "verify", "test"]);
    assert!(!list.contains("DAMAGED"), "{list}");
}

#[test]
fn a_disk_that_is_full_to_the_last_byte_ends_a_run_with_a_reason() {
    let sandbox = Sandbox::real(env!("CARGO_BIN_EXE_phalanx-under-test"));
    let Some(disk) = SmallDisk::mount(&sandbox, "3m") else { return };
    disk.expect(&sandbox, 0, &[&RUN[..], &["--set", "checkpoint.every_steps=20"]].concat());
    let filler = disk.run_dir().root().with_file_name("filler");
    assert!(std::fs::write(&filler, vec![0; 4 << 20]).is_err(), "the disk must be full");
    let more = ["resume", "test", "--set", "training.steps=40"];
    let (_, stderr) = disk.expect(&sandbox, 1, &more);
    assert!(stderr.contains("No space left on device"), "{stderr}");
    assert!(stderr.contains("runs/test/") && !stderr.contains("panicked"), "{stderr}");
    std::fs::remove_file(filler).unwrap();
    disk.expect(&sandbox, 0, &more);
    let metrics = read_metrics(&disk.run_dir().metrics()).unwrap();
    assert_eq!(metrics.len(), 40, "no torn line is left in the middle");
    disk.expect(&sandbox, 0, &["status", "test"]);
    disk.expect(&sandbox, 0, &["why", "test"]);
}
