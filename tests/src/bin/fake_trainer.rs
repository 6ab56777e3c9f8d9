//! A trainer that counts instead of training: it speaks the whole protocol, writes metrics and real
//! (tiny) checkpoints, and fails where `$FAKE_FAULTS` says.
//!
//! `$FAKE_FAULTS` is a list, separated by `;`, of `KIND:RANK:STEP:GENERATION`, where STEP may be
//! `g` (the number of the generation, so that no two failures are at one step) and GENERATION `*`.
//! `$FAKE_STEP_MS` is the time of a step; with `$FAKE_SKIPS` each is skipped as not finite. Told to
//! let go of a generation, it does, and goes on in the next; with `$FAKE_HOLDS_ON` it does not.

use checkpoint_format::{Dtype, Piece, Save, TensorBox, TrainState};
use rank_protocol::jsonl::Appender;
use rank_protocol::{
    Event, FailureClass, FailureReport, Phase, RankClient, RunDir, StepReport, exit_code,
};
use rustix::process::{Signal, getpid, kill_process};
use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() {
    let code = match train() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("fake trainer: {error}");
            exit_code::FAILED
        }
    };
    std::process::exit(code);
}

struct Fake {
    client: RankClient,
    metrics: Option<Appender>,
    run: RunDir,
    step_time: Duration,
    is_waiting: Arc<AtomicBool>,
}

fn train() -> Result<i32> {
    let mut client = RankClient::from_env()?;
    loop {
        let error = match generation(client.clone()) {
            Ok(code) => return Ok(code),
            Err(error) => error,
        };
        if client.alive().is_ok() {
            return Err(error);
        }
        if std::env::var_os("FAKE_HOLDS_ON").is_some() {
            std::thread::sleep(Duration::from_secs(60));
        }
        client = client.let_go()?;
    }
}

fn generation(client: RankClient) -> Result<i32> {
    let assignment = client.assignment().clone();
    let run = RunDir::new(&assignment.run_dir);
    let config = run_config::RunConfig::load(&run.config(), &[])?.config;
    let millis = std::env::var("FAKE_STEP_MS").ok().and_then(|ms| ms.parse().ok()).unwrap_or(5);
    let metrics = match assignment.rank {
        0 => Some(Appender::open(&run.metrics())?),
        _ => None,
    };
    let step_time = Duration::from_millis(millis);
    let is_waiting = Arc::new(AtomicBool::new(false));
    let waits = is_waiting.clone();
    client.on_where(move |_| waits.load(Ordering::Relaxed).then(|| "a meeting".to_owned()));
    let mut fake = Fake { client, metrics, run, step_time, is_waiting };
    let first = assignment.resume_step.unwrap_or(0) + 1;
    fake.client.phase(Phase::Train)?;
    for step in first..=config.training.steps {
        if let Some(code) = fake.fault(step)? {
            return Ok(code);
        }
        let is_stopping = fake.agree_to_stop(step)?;
        if is_stopping {
            fake.save(step - 1)?;
            return Ok(exit_code::PREEMPTED);
        }
        fake.step(step)?;
        let every = config.checkpoint.every_steps.unwrap_or(0);
        let is_last = step == config.training.steps;
        let stops = fake.client.assignment().stop_after == Some(step) && !is_last;
        if is_last || stops || (every > 0 && step % every == 0) {
            fake.save(step)?;
        }
        if stops {
            return Ok(exit_code::PREEMPTED);
        }
    }
    fake.client.finished(config.training.steps)?;
    Ok(exit_code::DONE)
}

impl Fake {
    /// Ranks meet at each step, and rank 0 decides for all, through the store. This stands for the
    /// collectives too, because the others wait in it when a rank is gone.
    fn agree_to_stop(&self, step: u64) -> Result<bool> {
        self.is_waiting.store(true, Ordering::Relaxed);
        let stop = self.meet(step);
        self.is_waiting.store(false, Ordering::Relaxed);
        stop
    }

    fn meet(&self, step: u64) -> Result<bool> {
        let assignment = self.client.assignment();
        let here = |rank: usize| format!("here/{step}/{rank}");
        self.client.store().set(&here(assignment.rank), b"")?;
        let all: Vec<String> = (0..assignment.world_size).map(here).collect();
        self.client.store().wait(&all, Duration::from_secs(60))?;
        let key = format!("step/{step}");
        if assignment.rank == 0 {
            let word: &[u8] = if self.client.stop_requested() { b"stop" } else { b"go" };
            self.client.store().set(&key, word)?;
            return Ok(word == b"stop");
        }
        Ok(self.client.store().get(&key, Duration::from_secs(60))? == b"stop")
    }

    fn step(&mut self, step: u64) -> Result<()> {
        std::thread::sleep(self.step_time);
        let skipped = std::env::var_os("FAKE_SKIPS").is_some();
        let report = StepReport {
            step,
            loss: if skipped { f64::NAN } else { 10.0 / step as f64 },
            tokens: step * 100,
            tokens_per_second: 100.0 / self.step_time.as_secs_f64(),
            step_time_s: self.step_time.as_secs_f64(),
            generation: self.client.assignment().generation,
            skipped,
            ..StepReport::default()
        };
        if let Some(metrics) = &mut self.metrics {
            metrics.append(&report)?;
        }
        Ok(self.client.report_step(report)?)
    }

    fn save(&self, step: u64) -> Result<()> {
        let assignment = self.client.assignment();
        if assignment.rank != 0 || self.run.checkpoint(step).exists() {
            return Ok(());
        }
        let data = step.to_le_bytes();
        let save = Save::new(&self.run.checkpoints(), step, assignment.generation);
        save.begin(4096)?;
        let piece = Piece {
            name: "step".into(),
            dtype: Dtype::I64,
            shape: vec![1],
            region: TensorBox { offsets: vec![0], lengths: vec![1] },
            data: &data,
        };
        save.write_rank(0, &[piece])?;
        let state =
            TrainState { generation: assignment.generation, world_size: 1, ..TrainState::at(step) };
        save.commit(1, &state)?;
        Ok(self.client.checkpoint_committed(step)?)
    }

    /// Brings about the fault that is due here; `Some`: exit with this code.
    fn fault(&self, step: u64) -> Result<Option<i32>> {
        let (rank, generation) =
            (self.client.assignment().rank, self.client.assignment().generation);
        let faults = std::env::var("FAKE_FAULTS").unwrap_or_default();
        let is_due = |fault: &&str| {
            let parts: Vec<&str> = fault.split(':').collect();
            let [_, at_rank, at_step, at_generation] = parts[..] else { return false };
            let at_step = if at_step == "g" { Some(generation) } else { at_step.parse().ok() };
            at_rank.parse() == Ok(rank)
                && at_step == Some(step)
                && (at_generation == "*" || at_generation.parse() == Ok(generation))
        };
        let Some(fault) = faults.split(';').find(is_due) else { return Ok(None) };
        let fields = [("fault".to_owned(), fault.into())].into_iter().collect();
        self.client.event(Event { kind: "fault_injected".into(), fields })?;
        match fault.split(':').next() {
            Some("kill") => kill_process(getpid(), Signal::KILL)?,
            Some("abort") => kill_process(getpid(), Signal::ABORT)?,
            Some("exit64") => return Ok(Some(exit_code::CONFIG)),
            Some("exit0") => return Ok(Some(exit_code::DONE)),
            Some("report") => {
                self.client.failure(FailureReport {
                    class: FailureClass::Process,
                    phase: Phase::Train,
                    step: Some(step),
                    collective: Some("all_reduce #3 of data".into()),
                    lines: vec![format!("CUDA error at 0x{:x}", getpid().as_raw_nonzero())],
                    roll_back: None,
                })?;
                return Ok(Some(exit_code::FAILED));
            }
            Some("hang") => std::thread::sleep(Duration::from_secs(60)),
            other => return Err(format!("no fault {other:?}").into()),
        }
        Ok(None)
    }
}
