//! What a person watches while a run goes on: a progress bar on a terminal, plain lines otherwise,
//! and with `--json` the step reports alone on standard output.

use crate::print::err;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rank_protocol::{StepReport, env};
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Time between two plain lines.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Where steps are shown.
pub struct View {
    bar: ProgressBar,
    is_json: bool,
    is_terminal: bool,
    shown: Option<Instant>,
}

impl View {
    /// For standard error as it is; log lines of this process go there too, above the bar.
    pub fn start(is_json: bool) -> Self {
        let is_terminal = std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        let filter = EnvFilter::try_from_env(env::LOG).unwrap_or_else(|_| EnvFilter::new("info"));
        // A test that starts two in one process keeps the first subscriber.
        let _ = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_target(false)
            .with_ansi(is_terminal)
            .with_writer(AboveTheBar(bar.clone()))
            .try_init();
        Self { bar, is_json, is_terminal, shown: None }
    }

    /// The first generation starts, of `steps` steps in all.
    pub fn begin(&mut self, steps: u64) {
        if !self.is_terminal {
            return;
        }
        self.bar.set_draw_target(ProgressDrawTarget::stderr_with_hz(8));
        self.bar.set_length(steps);
        let template = "{wide_bar:.cyan/blue} step {pos}/{len} {msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style);
        }
        self.bar.set_message("starting");
    }

    /// A step was done.
    pub fn step(&mut self, report: &StepReport, steps: u64, eta_s: Option<f64>) {
        if self.is_json
            && let Ok(mut line) = serde_json::to_string(report)
        {
            line.push('\n');
            // A reader that went away does not end the run.
            let _ = std::io::stdout().write_all(line.as_bytes());
        }
        let text = describe(report, eta_s);
        if self.is_terminal {
            self.bar.set_position(report.step);
            self.bar.set_message(text);
            return;
        }
        let is_due = self.shown.is_none_or(|shown| shown.elapsed() >= LINE_EVERY);
        let is_notable = report.validation_loss.is_some() || report.skipped;
        if is_due || is_notable || report.step == steps {
            self.shown = Some(Instant::now());
            err!("step {}/{steps} {text}", report.step);
        }
    }

    /// Takes the bar away.
    pub fn end(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Loss, speed and time left in words.
fn describe(report: &StepReport, eta_s: Option<f64>) -> String {
    let mut text = format!("loss {:.4}", report.loss);
    if let Some(loss) = report.validation_loss {
        text.push_str(&format!(" validation {loss:.4}"));
    }
    if report.skipped {
        let is_finite = report.loss.is_finite() && report.grad_norm.is_finite();
        text.push_str(if is_finite { " (skipped: spike)" } else { " (skipped: not finite)" });
    }
    text.push_str(&format!(" {} tokens/s", thousands(report.tokens_per_second)));
    if let Some(eta) = eta_s.and_then(|eta| Duration::try_from_secs_f64(eta).ok()) {
        text.push_str(&format!(" {} left", crate::time::short(eta)));
    }
    text
}

/// A number with its thousands apart.
pub fn thousands(number: f64) -> String {
    if !number.is_finite() {
        return "?".to_owned();
    }
    let digits = format!("{:.0}", number.abs());
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Writes log lines so that the bar stays below them and whole.
#[derive(Clone)]
struct AboveTheBar(ProgressBar);

impl<'a> MakeWriter<'a> for AboveTheBar {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl Write for AboveTheBar {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        // An error would be printed on standard error, with a panic where that is gone.
        let _ = self.0.suspend(|| std::io::stderr().write_all(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        let _ = std::io::stderr().flush();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_apart() {
        let shown = [0.0, 999.4, 1000.0, 1_234_567.8, f64::NAN].map(thousands);
        assert_eq!(shown, ["0", "999", "1,000", "1,234,568", "?"]);
    }

    #[test]
    fn a_step_in_words() {
        let report = StepReport { loss: 2.5, tokens_per_second: 12_345.0, ..Default::default() };
        assert_eq!(describe(&report, Some(75.0)), "loss 2.5000 12,345 tokens/s 1:15 left");
    }
}
