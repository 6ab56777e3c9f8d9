//! How far a long command is: a bar on a terminal, a line now and then elsewhere.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Pause between plain lines.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Progress over a number of bytes, written to standard error.
pub struct Progress {
    bar: Option<ProgressBar>,
    verb: &'static str,
    total: u64,
    started: Instant,
    state: Mutex<State>,
}

struct State {
    done: u64,
    documents: u64,
    tokens: u64,
    last_line: Instant,
}

impl Progress {
    /// Shows `verb` and how many of `total` bytes are done; a bar where standard error is a
    /// terminal.
    pub fn new(verb: &'static str, total: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar =
                ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(8));
            let template = "{prefix} [{bar:30}] {bytes}/{total_bytes} {msg} {eta} left";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_prefix(verb);
            bar
        });
        Progress::with(bar, verb, total)
    }

    /// Shows nothing.
    pub fn silent() -> Self {
        Progress::with(Some(ProgressBar::hidden()), "", 0)
    }

    fn with(bar: Option<ProgressBar>, verb: &'static str, total: u64) -> Self {
        let started = Instant::now();
        let state = State { done: 0, documents: 0, tokens: 0, last_line: started };
        Progress { bar, verb, total, started, state: Mutex::new(state) }
    }

    /// Adds bytes, documents and tokens that are done.
    pub fn add(&self, bytes: u64, documents: u64, tokens: u64) {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        state.done += bytes;
        state.documents += documents;
        state.tokens += tokens;
        let text = format!("{} documents, {} tokens", state.documents, state.tokens);
        if let Some(bar) = &self.bar {
            bar.set_position(state.done.min(self.total));
            bar.set_message(text);
        } else if state.last_line.elapsed() >= LINE_EVERY {
            state.last_line = Instant::now();
            let elapsed_s = self.started.elapsed().as_secs_f64();
            let mib = 1024.0 * 1024.0;
            // Unlike `eprintln!` this goes on where nobody listens any more.
            let _ = writeln!(
                std::io::stderr(),
                "{}: {:.1} of {:.1} MiB, {text}, {:.1} MiB/s",
                self.verb,
                state.done as f64 / mib,
                self.total as f64 / mib,
                state.done as f64 / mib / elapsed_s
            );
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
