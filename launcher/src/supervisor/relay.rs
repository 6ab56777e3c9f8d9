//! Passes on what a rank writes: JSON lines into its log file, and under a rank span to the screen.
//!
//! A rank writes JSON tracing lines to its standard error; whatever else it or a library writes
//! (an abort message, say) becomes the message of a line.

use rank_protocol::{RunDir, client};
use serde_json::{Map, Value, json};
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::Write;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};

/// Longest line that is kept whole; a longer one is broken.
const MAX_LINE_BYTES: u64 = 64 << 10;
/// Lines kept for a cause that the rank itself does not report.
const NUM_LAST_LINES: usize = 20;

/// The log of one rank's process: a file for each generation that it goes on in.
#[derive(Debug)]
pub struct RankLog {
    run: RunDir,
    file: Option<File>,
    rank: usize,
    span: tracing::Span,
    last_lines: VecDeque<String>,
}

impl RankLog {
    /// Opens the file of a generation; without it (no space left, say) lines still reach the
    /// screen.
    pub fn open(run: &RunDir, generation: u64, rank: usize) -> Self {
        let span = tracing::info_span!("rank", rank);
        let file = open_file(run, generation, rank);
        Self { run: run.clone(), file, rank, span, last_lines: VecDeque::new() }
    }

    /// Of a process that has no place yet: lines reach the screen alone.
    pub fn of_nobody(run: &RunDir) -> Self {
        let span = tracing::debug_span!("spare");
        Self { run: run.clone(), file: None, rank: usize::MAX, span, last_lines: VecDeque::new() }
    }

    /// The lines from here on are of another generation.
    fn enter(&mut self, generation: u64, rank: usize) {
        *self = Self::open(&self.run, generation, rank);
    }

    /// What the rank wrote last that may say why it failed.
    pub fn last_lines(&self) -> Vec<String> {
        self.last_lines.iter().cloned().collect()
    }

    fn take(&mut self, line: &str, stream: &str) {
        let (mut object, is_structured) = match serde_json::from_str(line) {
            Ok(Value::Object(object)) => (object, true),
            _ => (plain(line, stream), false),
        };
        if let Some((generation, rank)) = entered(&object) {
            self.enter(generation, rank);
        }
        object.insert("rank".into(), self.rank.into());
        let level = object.get("level").and_then(Value::as_str).unwrap_or("INFO").to_owned();
        let text = text_of(&object);
        if !is_structured || level == "ERROR" {
            if self.last_lines.len() == NUM_LAST_LINES {
                self.last_lines.pop_front();
            }
            self.last_lines.push_back(text.clone());
        }
        self.show(&level, &text);
        let Some(file) = &mut self.file else { return };
        let written =
            serde_json::to_vec(&object).map_err(std::io::Error::from).and_then(|mut l| {
                l.push(b'\n');
                file.write_all(&l)
            });
        if let Err(error) = written {
            tracing::warn!("the log of rank {} ends here: {error}", self.rank);
            self.file = None;
        }
    }

    /// Rank 0 speaks for all, unless something is wrong.
    fn show(&self, level: &str, text: &str) {
        let _entered = self.span.enter();
        match level {
            "ERROR" => tracing::error!("{text}"),
            "WARN" => tracing::warn!("{text}"),
            "INFO" if self.rank == 0 => tracing::info!("{text}"),
            _ => tracing::debug!("{text}"),
        }
    }
}

fn open_file(run: &RunDir, generation: u64, rank: usize) -> Option<File> {
    let path = run.log(generation, rank);
    let made = path.parent().map_or(Ok(()), std::fs::create_dir_all);
    let file = made.and_then(|()| OpenOptions::new().create(true).append(true).open(&path));
    file.inspect_err(|error| tracing::warn!("cannot write {}: {error}", path.display())).ok()
}

/// The generation that a rank enters with this line, and which rank it is.
fn entered(object: &Map<String, Value>) -> Option<(u64, usize)> {
    let is_own = object.get("target").and_then(Value::as_str) == Some(client::LOG_TARGET);
    let fields = object.get("fields").filter(|_| is_own)?;
    let rank = fields.get(client::ENTERED_AS)?.as_u64()?;
    Some((fields.get(client::ENTERED)?.as_u64()?, usize::try_from(rank).ok()?))
}

fn plain(line: &str, stream: &str) -> Map<String, Value> {
    let line = json!({
        "timestamp": crate::time::now(),
        "level": "INFO",
        "stream": stream,
        "fields": { "message": line },
    });
    match line {
        Value::Object(object) => object,
        _ => Map::new(),
    }
}

/// Message and fields of a tracing line, for people.
pub fn text_of(object: &Map<String, Value>) -> String {
    let mut text = String::new();
    let Some(Value::Object(fields)) = object.get("fields") else { return text };
    if let Some(message) = fields.get("message").and_then(Value::as_str) {
        text.push_str(message);
    }
    for (key, value) in fields.iter().filter(|(key, _)| *key != "message") {
        let shown = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        text.push_str(&format!("{}{key}={shown}", if text.is_empty() { "" } else { " " }));
    }
    text
}

/// Reads lines until the stream ends. `take` gets each, without its end.
pub async fn lines(stream: impl AsyncRead + Unpin, mut take: impl FnMut(&str)) {
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut reader).take(MAX_LINE_BYTES).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => take(String::from_utf8_lossy(&line).trim_end()),
        }
    }
}

/// Passes on one output of a rank until it ends.
pub async fn relay_one(
    log: &std::cell::RefCell<RankLog>,
    output: impl AsyncRead + Unpin,
    stream: &str,
) {
    let take = |line: &str| {
        if !line.is_empty() {
            log.borrow_mut().take(line, stream);
        }
    };
    lines(output, take).await;
}

/// Passes on both outputs of a rank until both end.
pub async fn relay(
    log: &std::cell::RefCell<RankLog>,
    stdout: impl AsyncRead + Unpin,
    stderr: impl AsyncRead + Unpin,
) {
    tokio::join!(relay_one(log, stdout, "stdout"), relay_one(log, stderr, "stderr"));
}
