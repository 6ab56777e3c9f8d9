//! A folder of its own for each test, the processes started in it, and what they left behind.

use crate::text;
use rank_protocol::{RunDir, StepReport, jsonl};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Longest time anything in a test may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A folder with a config, and the binaries that work in it.
pub struct Sandbox {
    folder: tempfile::TempDir,
    phalanx: PathBuf,
    trainer: PathBuf,
    env: Vec<(String, String)>,
}

/// A started `phalanx`; killed when dropped.
pub struct Running {
    child: Option<Child>,
}

impl Sandbox {
    /// With the launcher and the real trainer, which is built beside it.
    ///
    /// # Panics
    /// Where there is none.
    pub fn real(phalanx: &str) -> Self {
        let trainer = Path::new(phalanx).with_file_name("phalanx-trainer");
        let path = trainer.to_string_lossy();
        assert!(
            trainer.is_file(),
            "there is no {path}: build it with `cargo build -p trainer --bins`, or run ops/test, \
             which does"
        );
        Self::new(phalanx, &path)
    }

    /// With the launcher and the trainer to use, a tiny real data set, and a config of two ranks
    /// and 20 steps.
    ///
    /// # Panics
    /// Where the folder or the data cannot be made.
    pub fn new(phalanx: &str, trainer: &str) -> Self {
        let folder = tempfile::tempdir().unwrap_or_else(|error| panic!("{error}"));
        let config = "\
            name: test\n\
            model: {dim: 32, layers: 2, heads: 4, kv_heads: 2, ffn_dim: 64, vocab_size: 512}\n\
            data:\n  tokenizer: tokenizer.json\n  sequence_length: 32\n  \
            validation_fraction: 0.05\n  sources:\n  \
            - {name: text, path: shards/*.parquet}\n\
            precision: {compute: fp32}\n\
            training: {steps: 20, global_batch: 8, micro_batch: 1}\n\
            optimizer: {learning_rate: 3.0e-3}\n\
            checkpoint: {every_steps: 5, keep_last: 100}\n\
            schedule: {warmup_steps: 2}\n\
            validation: {every_steps: 10, steps: 2}\n\
            cluster: {kind: local, ranks_per_node: 2, device: cpu}\n";
        let path = folder.path().join("config.yaml");
        std::fs::write(path, config).unwrap_or_else(|error| panic!("{error}"));
        let sandbox =
            Self { folder, phalanx: phalanx.into(), trainer: trainer.into(), env: Vec::new() };
        sandbox.make_data(&text::documents(300));
        sandbox
    }

    /// Makes `tokenizer.json` and `shards/` of a text, as users do.
    ///
    /// # Panics
    /// Where that fails.
    pub fn make_data(&self, text: &str) {
        let write = std::fs::write(self.path().join("text.txt"), text);
        write.unwrap_or_else(|error| panic!("{error}"));
        let input = ["text.txt", "--split-on", "\\f"];
        let train = ["--vocab-size", "512", "--out", "tokenizer.json"];
        self.expect(0, &[&["data", "train-tokenizer"], &input[..], &train].concat());
        let tokenize = ["--tokenizer", "tokenizer.json", "--out", "shards", "--threads", "1"];
        self.expect(0, &[&["data", "tokenize"], &input[..], &tokenize].concat());
    }

    /// With an environment variable for every process.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl ToString) -> Self {
        self.env.push((name.to_owned(), value.to_string()));
        self
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The directory of the run named `test`.
    pub fn run_dir(&self) -> RunDir {
        self.run_dir_of("test")
    }

    /// The directory of a run.
    pub fn run_dir_of(&self, name: &str) -> RunDir {
        RunDir::new(self.path().join("runs").join(name))
    }

    /// Trains to the end under another name, with these `--set`s.
    pub fn train(&self, name: &str, sets: &[&str]) {
        let name = format!("name={name}");
        let sets = [&name].map(String::as_str).into_iter().chain(sets.iter().copied());
        let sets = sets.flat_map(|set| ["--set", set]);
        let args: Vec<&str> = ["run", "config.yaml"].into_iter().chain(sets).collect();
        self.expect(0, &args);
    }

    /// Starts `phalanx` with these arguments.
    ///
    /// # Panics
    /// Where it cannot be started.
    pub fn start(&self, args: &[&str]) -> Running {
        self.start_by(&[], args)
    }

    /// Starts `phalanx` through another program, as in `nsenter …`.
    ///
    /// # Panics
    /// Where it cannot be started.
    pub fn start_by(&self, before: &[&str], args: &[&str]) -> Running {
        let phalanx = self.phalanx.to_string_lossy();
        let words: Vec<&str> = before.iter().copied().chain([&*phalanx]).collect();
        let child = Command::new(words[0])
            .args(&words[1..])
            .args(args)
            .current_dir(self.path())
            .env("PHALANX_RUNS", self.path().join("runs"))
            .env("PHALANX_TRAINER", &self.trainer)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", self.phalanx.display()));
        Running { child: Some(child) }
    }

    /// Runs `phalanx` to its end.
    pub fn phalanx(&self, args: &[&str]) -> Output {
        self.start(args).wait()
    }

    /// Runs `phalanx` to its end, which must be with this exit code.
    pub fn expect(&self, code: i32, args: &[&str]) -> (String, String) {
        self.start(args).expect(code)
    }

    /// The events of the run so far.
    ///
    /// # Panics
    /// Where a line is no JSON.
    pub fn events(&self) -> Vec<Value> {
        jsonl::read(&self.run_dir().events()).unwrap_or_else(|error| panic!("{error}"))
    }

    /// The events of one kind.
    pub fn events_of(&self, kind: &str) -> Vec<Value> {
        self.events().into_iter().filter(|event| event["kind"] == kind).collect()
    }

    /// Waits until the status of the run is as it should be, and returns it.
    ///
    /// # Panics
    /// Where it does not come to that in time.
    pub fn wait_for(&self, is_right: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        let mut status = Value::Null;
        while Instant::now() < deadline {
            let bytes = std::fs::read(self.run_dir().status()).unwrap_or_default();
            status = serde_json::from_slice(&bytes).unwrap_or_default();
            if is_right(&status) {
                return status;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the status did not come right: {status:#}");
    }

    /// Waits until the run has done `step`, and returns its status.
    pub fn wait_for_step(&self, step: u64) -> Value {
        self.wait_for(|status| status["step"].as_u64() >= Some(step))
    }

    /// Waits until `metrics.jsonl` of the run holds `step`, which comes sooner than in the status.
    ///
    /// # Panics
    /// Where it does not come to that in time.
    pub fn wait_for_metrics(&self, step: u64, generation: u64) {
        let deadline = Instant::now() + PATIENCE;
        let is_there = |report: &StepReport| report.step >= step && report.generation >= generation;
        while Instant::now() < deadline {
            let metrics = jsonl::read_metrics(&self.run_dir().metrics()).unwrap_or_default();
            if metrics.last().is_some_and(is_there) {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        panic!("step {step} of generation {generation} was not done");
    }

    /// Every living process that was started in this sandbox, and its command line.
    pub fn processes(&self) -> Vec<(u32, String)> {
        let mark = self.path().display().to_string();
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        entries
            .filter_map(|entry| {
                let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
                // A zombie has an empty environment and does not count.
                let environment = std::fs::read(entry.path().join("environ")).ok()?;
                let is_ours = String::from_utf8_lossy(&environment).contains(&mark);
                let command = std::fs::read(entry.path().join("cmdline")).ok()?;
                let command = String::from_utf8_lossy(&command).replace('\0', " ");
                is_ours.then_some((pid, command))
            })
            .collect()
    }

    /// Nothing but the run's own files may be left: no process, no temporary file.
    ///
    /// # Panics
    /// Where something is.
    pub fn assert_nothing_left(&self) {
        let processes = self.processes();
        assert!(processes.is_empty(), "left behind: {processes:?}");
        let mut folders = vec![self.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                let is_temporary = name.ends_with(".new") || name.contains("tmp");
                assert!(!is_temporary, "left behind: {}", entry.path().display());
                if entry.path().is_dir() {
                    folders.push(entry.path());
                }
            }
        }
    }
}

impl Running {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// Sends it a signal.
    pub fn signal(&self, which: Signal) {
        signal(self.pid(), which);
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// Where it does not end in time.
    pub fn wait(self) -> Output {
        self.wait_within(PATIENCE)
    }

    /// Waits so long for its end.
    ///
    /// # Panics
    /// Where it does not end in time.
    pub fn wait_within(mut self, patience: Duration) -> Output {
        let Some(child) = self.child.take() else { panic!("already waited for") };
        let pid = child.id();
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || sender.send(child.wait_with_output()));
        match receiver.recv_timeout(patience) {
            Ok(Ok(output)) => output,
            Ok(Err(error)) => panic!("{error}"),
            Err(_) => {
                signal(pid, Signal::KILL);
                panic!("process {pid} did not end within {patience:?}");
            }
        }
    }

    /// Waits for its end, which must be with this exit code; returns both outputs.
    ///
    /// # Panics
    /// Where it ends otherwise.
    pub fn expect(self, code: i32) -> (String, String) {
        self.expect_within(PATIENCE, code)
    }

    /// Waits so long for its end, which must be with this exit code; returns both outputs.
    ///
    /// # Panics
    /// Where it ends otherwise.
    pub fn expect_within(self, patience: Duration, code: i32) -> (String, String) {
        let output = self.wait_within(patience);
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{:?}\n{stdout}\n{stderr}", output.status);
        (stdout, stderr)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Sends a signal to a process.
pub fn signal(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let _ = pid.map(|pid| kill_process(pid, signal));
}
