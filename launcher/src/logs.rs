//! `phalanx logs`: what the ranks of the newest generation wrote, in the order of time.

use crate::error::UserError;
use crate::print::err;
use crate::runs::{self, holder, name_of, newest_logs};
use crate::supervisor::relay::text_of;
use rank_protocol::{RunDir, exit_code};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::time::Duration;

/// Most bytes of one file that are taken at once.
const MAX_CHUNK_BYTES: u64 = 4 << 20;
/// Time between two looks when following.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Arguments of `phalanx logs`.
#[derive(Clone, Debug, clap::Args)]
pub struct LogsArgs {
    /// The run's directory or name.
    pub run: String,
    /// Go on while the run does.
    #[arg(short, long)]
    pub follow: bool,
    /// Only this rank.
    #[arg(long)]
    pub rank: Option<usize>,
    /// This generation instead of the newest.
    #[arg(long)]
    pub generation: Option<u64>,
    /// Print the lines as they are in the files.
    #[arg(long)]
    pub json: bool,
}

/// Prints the logs; returns the exit code.
pub fn run(args: LogsArgs) -> Result<i32, UserError> {
    let run = runs::find(&args.run)?;
    let mut offsets = BTreeMap::new();
    loop {
        let is_running = args.follow && holder(&run).is_some();
        let generation = args.generation.or_else(|| newest_logs(&run));
        let files = generation.map(|g| rank_files(&run, g, args.rank)).unwrap_or_default();
        if files.is_empty() && !is_running {
            let which = args.rank.map(|rank| format!(" of rank {rank}")).unwrap_or_default();
            return Err(UserError::usage(format!("run {} has no logs{which}", args.run)));
        }
        let is_read = print_news(&files, &mut offsets, args.json);
        if !is_read || !is_running {
            if is_read && offsets.values().all(|offset| *offset == 0) {
                let yet = if holder(&run).is_some() { " yet" } else { "" };
                let name = name_of(&run);
                err!("the ranks of {name} wrote nothing{yet}");
            }
            return Ok(exit_code::DONE);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

fn rank_files(run: &RunDir, generation: u64, only: Option<usize>) -> Vec<(usize, PathBuf)> {
    let folder = run.root().join(format!("logs/gen-{generation:04}"));
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files: Vec<(usize, PathBuf)> = entries
        .filter_map(|entry| {
            let name = entry.file_name();
            let rank = name.to_str()?.strip_prefix("rank-")?.strip_suffix(".log")?.parse().ok()?;
            Some((rank, entry.path()))
        })
        .filter(|(rank, _)| only.is_none_or(|only| only == *rank))
        .collect();
    files.sort();
    files
}

/// Prints what is new in the files, merged by time. False where nobody reads any more.
fn print_news(
    files: &[(usize, PathBuf)],
    offsets: &mut BTreeMap<PathBuf, u64>,
    is_json: bool,
) -> bool {
    loop {
        let mut news: Vec<(String, usize, String)> = Vec::new();
        for (rank, path) in files {
            let offset = offsets.entry(path.clone()).or_default();
            for line in whole_lines(path, offset) {
                let object: Map<String, Value> = serde_json::from_str(&line).unwrap_or_default();
                let time = object.get("timestamp").and_then(Value::as_str).unwrap_or_default();
                let shown = if is_json { line.clone() } else { human(*rank, time, &object, &line) };
                news.push((time.to_owned(), *rank, shown));
            }
        }
        if news.is_empty() {
            return true;
        }
        // Stable: lines of one rank with one time stay in order.
        news.sort_by(|a, b| (&a.0, a.1).cmp(&(&b.0, b.1)));
        let mut out = std::io::stdout().lock();
        for (_, _, line) in news {
            if writeln!(out, "{line}").is_err() {
                return false;
            }
        }
    }
}

fn human(rank: usize, time: &str, object: &Map<String, Value>, line: &str) -> String {
    let level = object.get("level").and_then(Value::as_str).unwrap_or("INFO");
    let text = if object.is_empty() { line.to_owned() } else { text_of(object) };
    format!("{time} rank {rank} {level:>5} {text}")
}

/// The whole lines after `offset`, which moves behind them.
fn whole_lines(path: &PathBuf, offset: &mut u64) -> Vec<String> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|mut file| {
        file.seek(SeekFrom::Start(*offset))?;
        file.take(MAX_CHUNK_BYTES).read_to_end(&mut bytes)
    });
    let end = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |index| index + 1);
    if read.is_err() {
        return Vec::new();
    }
    *offset += end as u64;
    String::from_utf8_lossy(&bytes[..end]).lines().map(str::to_owned).collect()
}
