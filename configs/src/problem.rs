//! What is wrong with a config, and what is worth saying about it: each with its place.

use std::fmt;
use std::path::PathBuf;

/// Where a value was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a file (or, without a path, in a text) at a 1-based line and column.
    File {
        /// The file, where there is one.
        path: Option<PathBuf>,
        /// 1-based line.
        line: usize,
        /// 1-based column, in characters.
        column: usize,
    },
    /// In a `--set key=value`, as typed.
    Set(String),
    /// Nowhere: a default or a preset.
    Default,
    /// The file as a whole.
    WholeFile(Option<PathBuf>),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |path: &Option<PathBuf>| match path {
            Some(path) => path.display().to_string(),
            None => "config".to_owned(),
        };
        match self {
            Self::File { path, line, column } => write!(f, "{}:{line}:{column}", name(path)),
            Self::Set(text) => write!(f, "--set {text}"),
            Self::Default => write!(f, "default"),
            Self::WholeFile(path) => write!(f, "{}", name(path)),
        }
    }
}

/// The class of a problem, for programs; people read the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProblemKind {
    /// The file cannot be read, or is no YAML text.
    Unreadable,
    /// The text is no YAML, or YAML that is not taken here.
    Syntax,
    /// A key that does not exist.
    UnknownKey,
    /// A key given twice.
    DuplicateKey,
    /// A required key that is absent.
    Missing,
    /// A value of another type.
    WrongType,
    /// A value out of its range or not among the choices.
    OutOfRange,
    /// Values that do not go together.
    Conflict,
    /// Valid, and not yet supported in this version.
    Unsupported,
}

/// One problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Class.
    pub kind: ProblemKind,
    /// Where.
    pub place: Place,
    /// Key path, as `training.steps`; empty for the file as a whole.
    pub key: String,
    /// What is wrong, with the value.
    pub message: String,
    /// What would be accepted.
    pub limit: Option<String>,
    /// What to do.
    pub hint: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.place)?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        write!(f, "{}", self.message)?;
        if let Some(limit) = &self.limit {
            write!(f, "\n    limit: {limit}")?;
        }
        if let Some(hint) = &self.hint {
            write!(f, "\n    hint: {hint}")?;
        }
        Ok(())
    }
}

/// Problems written out; a file with more is probably no run config.
const MAX_SHOWN: usize = 100;

/// Everything that is wrong with a config; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors {
    /// In the order of the file.
    pub problems: Vec<Problem>,
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.problems.len() {
            1 => write!(f, "the run config has a problem")?,
            n => write!(f, "the run config has {n} problems")?,
        }
        for problem in self.problems.iter().take(MAX_SHOWN) {
            write!(f, "\n{problem}")?;
        }
        match self.problems.len().saturating_sub(MAX_SHOWN) {
            0 => Ok(()),
            more => write!(f, "\nand {more} more"),
        }
    }
}

impl std::error::Error for ConfigErrors {}

/// How much a note matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoteLevel {
    /// Probably not what is wanted.
    Warning,
    /// Worth knowing.
    Info,
}

/// Something worth saying about a config that is valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// How much it matters.
    pub level: NoteLevel,
    /// Where.
    pub place: Place,
    /// Key path.
    pub key: String,
    /// What.
    pub message: String,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let level = match self.level {
            NoteLevel::Warning => "warning",
            NoteLevel::Info => "note",
        };
        write!(f, "{level}: ")?;
        if self.place != Place::Default {
            write!(f, "{}: ", self.place)?;
        }
        write!(f, "{}: {}", self.key, self.message)
    }
}
