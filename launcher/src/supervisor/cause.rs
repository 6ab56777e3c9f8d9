//! Why a rank failed, which failure of several came first, and when two are the same.

pub use rank_protocol::exit::{Exit, signal_name};
use rank_protocol::{FailureClass, FailureReport, Phase, RollBack, env, exit_code, libtorch};
use serde::{Deserialize, Serialize};

/// With this the dynamic linker ends a process whose libraries are absent or do not fit.
pub const LOADER_FAILED: i32 = 127;

/// One rank's failure: the content of its error file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cause {
    /// Rank.
    pub rank: usize,
    /// Class.
    pub class: FailureClass,
    /// What the rank was doing.
    pub phase: Phase,
    /// Step it was at.
    pub step: Option<u64>,
    /// Collective it was in.
    pub collective: Option<String>,
    /// Name of the signal that ended it.
    pub signal: Option<String>,
    /// How it ended.
    pub exit: Exit,
    /// What happened, first line first.
    pub lines: Vec<String>,
    /// Whether the rank itself said so; else it is inferred from how it ended.
    pub is_reported: bool,
    /// Set where the run shall go on from the newest checkpoint without some samples.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub roll_back: Option<RollBack>,
    /// Whether nothing singles this rank out: it is named because one must be.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_guess: bool,
}

/// Two failures with an equal signature are the same failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    class: FailureClass,
    phase: Phase,
    step: Option<u64>,
    exit: Exit,
    line: String,
}

impl Cause {
    /// From how a rank ended, what it said before, and where it was.
    pub fn new(
        rank: usize,
        exit: Exit,
        report: Option<FailureReport>,
        phase: Phase,
        last_step: Option<u64>,
        last_lines: Vec<String>,
    ) -> Self {
        let signal = exit.signal.map(signal_name);
        // A rank that did step n was at n + 1.
        let at = last_step.map(|step| step + 1);
        match report {
            Some(report) => Self {
                rank,
                class: report.class,
                phase: report.phase,
                step: report.step.or(at),
                collective: report.collective,
                signal,
                exit,
                lines: report.lines,
                is_reported: true,
                roll_back: report.roll_back,
                is_guess: false,
            },
            None => Self {
                rank,
                class: class_of(exit),
                phase,
                step: at,
                collective: None,
                signal,
                exit,
                lines: inferred_lines(exit, last_lines),
                is_reported: false,
                roll_back: None,
                is_guess: false,
            },
        }
    }

    /// A rank that did not do in time what it had to.
    pub fn hang(rank: usize, phase: Phase, last_step: Option<u64>, line: String) -> Self {
        Self {
            rank,
            class: FailureClass::Hang,
            phase,
            step: last_step.map(|step| step + 1),
            collective: None,
            signal: None,
            exit: Exit::default(),
            lines: vec![line],
            is_reported: false,
            roll_back: None,
            is_guess: false,
        }
    }

    /// Whether it speaks against the node that the rank ran on: should it happen there once more,
    /// another node had better have its place. A rank that hangs may do so of its device.
    pub fn is_of_its_node(&self) -> bool {
        use FailureClass::{Hang, Node, Process};
        matches!(self.class, Process | Node | Hang) && !self.is_guess
    }

    /// The one of several failures of a moment that brought the others about: the earliest that is
    /// no lost link, because a rank whose peer died reports a lost link, often before the peer's
    /// own end is seen.
    pub fn first(causes: &[Cause]) -> Option<&Cause> {
        causes.iter().find(|cause| !cause.is_consequence()).or(causes.first())
    }

    /// Whether something else must have failed for this to happen: a link that was lost.
    pub fn is_consequence(&self) -> bool {
        self.class == FailureClass::Transient
    }

    /// One line that says who failed and how.
    pub fn summary(&self) -> String {
        let at = match self.step {
            Some(step) => format!("at step {step}"),
            None => format!("in {}", self.phase.name()),
        };
        let line = self.lines.first().map(|line| format!(": {line}")).unwrap_or_default();
        format!("rank {} failed {at} ({}){line}", self.rank, self.class.name())
    }

    /// What makes it the same failure as another, whichever rank it hit.
    pub fn signature(&self) -> Signature {
        let line = self.lines.first().map(String::as_str).unwrap_or_default();
        Signature {
            class: self.class,
            phase: self.phase,
            step: self.step,
            exit: self.exit,
            line: without_numbers(line),
        }
    }
}

/// Numbers differ from one occurrence to the next: addresses, ports, times.
fn without_numbers(line: &str) -> String {
    let mut out = String::new();
    for word in line.split_whitespace() {
        let has_digit = word.chars().any(|c| c.is_ascii_digit());
        out.push_str(if has_digit { "#" } else { word });
        out.push(' ');
    }
    out
}

fn class_of(exit: Exit) -> FailureClass {
    match exit.code {
        Some(exit_code::CONFIG | LOADER_FAILED) => FailureClass::Config,
        Some(exit_code::NODE_UNHEALTHY) => FailureClass::Node,
        _ => FailureClass::Process,
    }
}

fn inferred_lines(exit: Exit, last_lines: Vec<String>) -> Vec<String> {
    let what = match (exit.code, exit.signal) {
        (Some(exit_code::DONE), _) => "exited with 0 before the last step was done".to_owned(),
        (Some(LOADER_FAILED), _) => {
            let why = last_lines.last().map_or("no reason given", String::as_str);
            format!(
                "the trainer could not be loaded: {why}; hint: it needs libtorch {}: look at {} \
                 and {}, or run ops/setup and build again",
                libtorch::RELEASE,
                env::LIBTORCH,
                env::LIBRARY_PATH
            )
        }
        (_, Some(9)) => "killed by SIGKILL (by hand, or for want of memory)".to_owned(),
        _ => exit.describe(),
    };
    std::iter::once(what).chain(last_lines).collect()
}
