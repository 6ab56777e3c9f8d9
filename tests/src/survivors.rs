//! What becomes of the ranks that live on where one of them dies, or stands still.

use crate::sandbox::{PATIENCE, Sandbox};
use serde_json::Value;
use std::path::Path;
use std::time::{Duration, Instant};

/// The ranks of a generation, but for one that is lost.
pub struct Survivors<'a> {
    sandbox: &'a Sandbox,
    generation: u64,
    lost: usize,
    /// Rank and process.
    processes: Vec<(usize, u32)>,
}

/// What one of them said before it ended or let go.
#[derive(Debug)]
pub struct LastWords {
    /// The rank.
    pub rank: usize,
    /// Its own error, or what its agent told it; one line.
    pub text: String,
    /// Whether it is its own error.
    pub is_own: bool,
    /// How long after the loss its process had ended, or held nothing of the generation any more.
    pub after: Duration,
}

impl<'a> Survivors<'a> {
    /// All ranks of a status but `lost`.
    ///
    /// # Panics
    /// Where the status lacks one's process.
    pub fn of(sandbox: &'a Sandbox, status: &Value, lost: usize) -> Self {
        let ranks = status["ranks"].as_array().map(Vec::as_slice).unwrap_or_default();
        let pid = |rank: &Value| rank["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
        let process = |(rank, fields)| match pid(fields) {
            Some(pid) => (rank, pid),
            None => panic!("rank {rank} has no process: {fields}"),
        };
        let others = ranks.iter().enumerate().filter(|(rank, _)| *rank != lost);
        let processes: Vec<(usize, u32)> = others.map(process).collect();
        assert!(!processes.is_empty(), "{status}");
        let generation = status["generation"].as_u64().unwrap_or(0);
        Self { sandbox, generation, lost, processes }
    }

    /// Each has ended or let go of its generation `within` a time after the rank was lost, with an
    /// error of its own or told by its agent, that names the lost rank or another one which was
    /// lost by it; returns what they said.
    ///
    /// # Panics
    /// Where one takes longer, or says nothing of the kind.
    pub fn assert_told(&self, lost_at: Instant, within: Duration) -> Vec<LastWords> {
        let mut ended: Vec<Option<Duration>> = vec![None; self.processes.len()];
        while ended.contains(&None) && lost_at.elapsed() < within + PATIENCE {
            for (end, (rank, pid)) in ended.iter_mut().zip(&self.processes) {
                if end.is_none() && (self.has_let_go(*rank) || is_over(*pid)) {
                    *end = Some(lost_at.elapsed());
                }
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let ended = ended.into_iter().map(|end| end.unwrap_or(Duration::MAX));
        let words: Vec<LastWords> = self
            .processes
            .iter()
            .zip(ended)
            .map(|((rank, _), after)| self.of_rank(*rank, after))
            .collect();
        for LastWords { rank, text, is_own, after } in &words {
            let by = if *is_own { "itself" } else { "told" };
            eprintln!("rank {rank}, {} ms after, {by}: {text}", after.as_millis());
        }
        for LastWords { rank, text, is_own, after } in &words {
            assert!(*after <= within, "rank {rank} had ended only after {after:?}, not {within:?}");
            let lost = match is_own {
                true => "lost rank ".to_owned(),
                false => format!("rank {}", self.lost),
            };
            assert!(text.contains(&lost), "rank {rank} says nothing of the loss: {text}");
        }
        words
    }

    fn has_let_go(&self, rank: usize) -> bool {
        let log = self.sandbox.run_dir().log(self.generation, rank);
        line_of(&log, &format!("rank {rank} has let go of the generation")).is_some()
    }

    /// Its own error goes before what it was told.
    fn of_rank(&self, rank: usize, after: Duration) -> LastWords {
        let run_dir = self.sandbox.run_dir();
        let error_file = run_dir.error(self.generation, rank);
        let log = run_dir.log(self.generation, rank);
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let told = line_of(&log, &format!("rank {rank} ends: "));
            let told = told.or(line_of(&log, &format!("rank {rank} is to let go: ")));
            let own = reported(&error_file).or(line_of(&log, &format!("rank {rank} fails: ")));
            let is_own = own.is_some();
            if let Some(text) = own.or(told) {
                return LastWords { rank, text, is_own, after };
            }
            assert!(Instant::now() < deadline, "rank {rank} left no word in {}", log.display());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Whether the process is gone, or nothing but its exit code is left of it.
fn is_over(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The state follows the command's name, which stands in brackets.
    let state = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next());
    matches!(state, None | Some("Z" | "X"))
}

/// The first line of an error file.
fn reported(error_file: &Path) -> Option<String> {
    let error: Value = serde_json::from_slice(&std::fs::read(error_file).ok()?).ok()?;
    error["lines"][0].as_str().map(str::to_owned)
}

/// What follows `mark` in a log's message.
fn line_of(log: &Path, mark: &str) -> Option<String> {
    let log = std::fs::read_to_string(log).ok()?;
    let (_, rest) = log.split_once(mark)?;
    rest.split("\"}").next().map(str::to_owned)
}
