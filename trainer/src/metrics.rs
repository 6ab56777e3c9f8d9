//! What rank 0 writes for people: `metrics.jsonl` and TensorBoard events.

use crate::error::{Result, TrainError};
use crate::tensorboard::TensorboardWriter;
use rank_protocol::jsonl::Appender;
use rank_protocol::message::StepReport;
use rank_protocol::run_dir::RunDir;

/// The writers.
pub struct Metrics {
    lines: Appender,
    tensorboard: Option<TensorboardWriter>,
    path: String,
}

impl Metrics {
    /// Opens both; a torn last line is cut. Readers of TensorBoard drop what an earlier, lost
    /// generation wrote from `first_step` on.
    ///
    /// # Errors
    /// Where a file cannot be written.
    pub fn open(run_dir: &RunDir, tensorboard: bool, first_step: u64) -> Result<Self> {
        let path = run_dir.tensorboard().display().to_string();
        let io = |source| TrainError::Io { path: path.clone(), source };
        let tensorboard = match tensorboard {
            true => {
                let mut writer = TensorboardWriter::create(&run_dir.tensorboard()).map_err(io)?;
                writer.session_start(first_step).map_err(io)?;
                Some(writer)
            }
            false => None,
        };
        Ok(Self { lines: Appender::open(&run_dir.metrics())?, tensorboard, path })
    }

    /// Writes one step.
    ///
    /// # Errors
    /// Where a file cannot be written.
    pub fn write(&mut self, report: &StepReport) -> Result<()> {
        self.lines.append(report)?;
        let Some(writer) = &mut self.tensorboard else { return Ok(()) };
        let scalars = [
            ("train/loss", Some(report.loss)),
            ("train/grad_norm", Some(report.grad_norm)),
            ("train/learning_rate", Some(report.learning_rate)),
            ("train/tokens", Some(report.tokens as f64)),
            ("speed/tokens_per_second", Some(report.tokens_per_second)),
            ("speed/step_time_s", Some(report.step_time_s)),
            ("speed/data_wait_s", Some(report.data_wait_s)),
            ("validation/loss", report.validation_loss),
        ];
        let mut written = Ok(());
        for (tag, value) in scalars {
            if let Some(value) = value {
                written = written.and_then(|()| writer.scalar(tag, report.step, value));
            }
        }
        let written = written.and_then(|()| writer.flush());
        written.map_err(|source| TrainError::Io { path: self.path.clone(), source })
    }
}
