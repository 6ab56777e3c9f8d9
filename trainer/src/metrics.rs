//! What rank 0 writes for people: `metrics.jsonl` and TensorBoard events.
//!
//! A disk that takes nothing stops no training: what it did not take is kept, and written before
//! the next step that it takes.

use crate::error::{Result, TrainError};
use crate::tensorboard::TensorboardWriter;
use rank_protocol::jsonl::Appender;
use rank_protocol::message::StepReport;
use rank_protocol::run_dir::RunDir;
use std::collections::VecDeque;
use std::path::Path;

/// Steps that may wait for a disk; then training ends, and goes on from the last checkpoint.
const MAX_WAITING: usize = 1 << 16;

/// The writers.
pub struct Metrics {
    run_dir: RunDir,
    lines: Sink<Appender>,
    tensorboard: Option<Sink<TensorboardWriter>>,
    is_failing: bool,
}

/// How writing went.
#[derive(Debug)]
pub enum Written {
    /// All that there was.
    All,
    /// All, after some steps that were not written at first.
    AllAgain,
    /// Not all, for this reason; the first time of several.
    NotAll(TrainError),
    /// Not all, as the last time.
    StillNotAll,
}

/// A file, and what it has not taken yet.
struct Sink<W> {
    writer: Option<W>,
    waiting: VecDeque<StepReport>,
}

impl<W> Sink<W> {
    fn new(writer: W) -> Self {
        Self { writer: Some(writer), waiting: VecDeque::new() }
    }

    /// Writes what waits; a writer that failed is opened anew the next time, from the first step
    /// that it did not take.
    fn write(
        &mut self,
        open: impl FnOnce(u64) -> Result<W>,
        append: impl Fn(&mut W, &StepReport) -> Result<()>,
    ) -> Result<()> {
        let Some(first) = self.waiting.front() else { return Ok(()) };
        let mut writer = match self.writer.take() {
            Some(writer) => writer,
            None => open(first.step)?,
        };
        while let Some(report) = self.waiting.front() {
            append(&mut writer, report)?;
            self.waiting.pop_front();
        }
        self.writer = Some(writer);
        Ok(())
    }
}

impl Metrics {
    /// Opens both; a torn last line is cut. Readers of TensorBoard drop what an earlier, lost
    /// generation wrote from `first_step` on.
    ///
    /// # Errors
    /// Where a file cannot be written.
    pub fn open(run_dir: &RunDir, tensorboard: bool, first_step: u64) -> Result<Self> {
        let lines = Sink::new(Appender::open(&run_dir.metrics())?);
        let tensorboard = match tensorboard {
            true => Some(Sink::new(open_tensorboard(&run_dir.tensorboard(), first_step)?)),
            false => None,
        };
        Ok(Self { run_dir: run_dir.clone(), lines, tensorboard, is_failing: false })
    }

    /// Writes one step, and those before it that were not written.
    ///
    /// # Errors
    /// Where so many steps wait that no more are kept.
    pub fn write(&mut self, report: &StepReport) -> Result<Written> {
        self.lines.waiting.push_back(report.clone());
        if let Some(tensorboard) = &mut self.tensorboard {
            tensorboard.waiting.push_back(report.clone());
        }
        self.write_waiting()
    }

    /// Tries once more to write what was not written.
    ///
    /// # Errors
    /// Where so many steps wait that no more are kept.
    pub fn write_waiting(&mut self) -> Result<Written> {
        let (lines, folder) = (self.run_dir.metrics(), self.run_dir.tensorboard());
        let written = self
            .lines
            .write(|_| Ok(Appender::open(&lines)?), |lines, report| Ok(lines.append(report)?));
        let shown = self.tensorboard.as_mut().map_or(Ok(()), |tensorboard| {
            let scalars = |writer: &mut TensorboardWriter, report: &StepReport| {
                write_scalars(writer, report).map_err(|source| io_error(&folder, source))
            };
            tensorboard.write(|step| open_tensorboard(&folder, step), scalars)
        });
        let had_failed = self.is_failing;
        let result = written.and(shown);
        self.is_failing = result.is_err();
        match result {
            Ok(()) if had_failed => Ok(Written::AllAgain),
            Ok(()) => Ok(Written::All),
            Err(error) if self.num_waiting() > MAX_WAITING => Err(error),
            Err(_) if had_failed => Ok(Written::StillNotAll),
            Err(error) => Ok(Written::NotAll(error)),
        }
    }

    /// Steps that are not in all files yet.
    pub fn num_waiting(&self) -> usize {
        let shown = self.tensorboard.as_ref().map_or(0, |tensorboard| tensorboard.waiting.len());
        self.lines.waiting.len().max(shown)
    }
}

fn io_error(path: &Path, source: std::io::Error) -> TrainError {
    TrainError::Io { path: path.display().to_string(), source }
}

fn open_tensorboard(folder: &Path, first_step: u64) -> Result<TensorboardWriter> {
    let io = |source| io_error(folder, source);
    let mut writer = TensorboardWriter::create(folder).map_err(io)?;
    writer.session_start(first_step).map_err(io)?;
    Ok(writer)
}

fn write_scalars(writer: &mut TensorboardWriter, report: &StepReport) -> std::io::Result<()> {
    let scalars = [
        ("train/loss", Some(report.loss)),
        ("train/grad_norm", Some(report.grad_norm)),
        ("train/learning_rate", Some(report.learning_rate)),
        ("train/tokens", Some(report.tokens as f64)),
        ("speed/tokens_per_second", Some(report.tokens_per_second)),
        ("speed/step_time_s", Some(report.step_time_s)),
        ("speed/data_wait_s", Some(report.data_wait_s)),
        ("validation/loss", report.validation_loss),
        ("gpu/tflops_full", report.tflops_full),
        ("gpu/tflops_half", report.tflops_half),
        ("gpu/mfu_full", report.mfu_full.filter(|share| share.is_finite())),
        ("gpu/mfu_half", report.mfu_half.filter(|share| share.is_finite())),
        ("gpu/memory_gib", report.memory_gib),
    ];
    for (tag, value) in scalars {
        if let Some(value) = value {
            writer.scalar(tag, report.step, value)?;
        }
    }
    writer.flush()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rank_protocol::jsonl::read_metrics;
    use std::os::unix::fs::symlink;

    fn report(step: u64) -> StepReport {
        StepReport { step, ..StepReport::default() }
    }

    #[test]
    fn what_a_full_disk_does_not_take_is_written_once_it_does() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(folder.path());
        let path = run_dir.metrics();
        symlink("/dev/full", &path).unwrap();
        let mut metrics = Metrics::open(&run_dir, false, 1).unwrap();
        let first = metrics.write(&report(1)).unwrap();
        assert!(matches!(&first, Written::NotAll(error) if error.to_string().contains("space")));
        assert!(matches!(metrics.write(&report(2)).unwrap(), Written::StillNotAll));
        assert_eq!(metrics.num_waiting(), 2);
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(metrics.write(&report(3)).unwrap(), Written::AllAgain));
        assert!(matches!(metrics.write(&report(4)).unwrap(), Written::All));
        let steps: Vec<u64> =
            read_metrics(&path).unwrap().iter().map(|report| report.step).collect();
        assert_eq!(steps, [1, 2, 3, 4]);
    }

    #[test]
    fn a_disk_that_never_takes_anything_ends_the_training_at_last() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(folder.path());
        symlink("/dev/full", run_dir.metrics()).unwrap();
        let mut metrics = Metrics::open(&run_dir, false, 1).unwrap();
        metrics.lines.waiting = (1..=MAX_WAITING as u64).map(report).collect();
        assert!(metrics.write(&report(0)).is_err());
    }
}
