//! Checks of form: what the repository promises about itself and no compiler checks.

mod dependencies;
mod exceptions;
mod faults;
mod rules;
mod source;

use std::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;

use self::source::Source;

/// Something that is not as promised.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Violation {
    pub path: String,
    /// From 1; 0 when the whole file is meant.
    pub line: usize,
    pub message: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.path, self.message),
            line => write!(f, "{}:{line}: {}", self.path, self.message),
        }
    }
}

pub fn run(root: &Path) -> Result<String, String> {
    let mut violations = dependencies::check(root)?;
    let files = tracked_files(root)?;
    let mut sources = Vec::new();
    for path in &files {
        let Ok(text) = fs::read_to_string(root.join(path)) else { continue }; // binary, or deleted
        rules::check_text(path, &text, &mut violations);
        if path.ends_with(".rs") {
            let source = Source::new(path, &text);
            rules::check_rust(&source, &mut violations);
            sources.push(source);
        }
    }
    exceptions::check_used(&sources, &mut violations);
    faults::check(|path| fs::read_to_string(root.join(path)).ok(), &mut violations);
    if violations.is_empty() {
        return Ok(format!("tidy: {} files are as they should be", files.len()));
    }
    violations.sort();
    let lines: Vec<String> = violations.iter().map(ToString::to_string).collect();
    Err(format!("{}\ntidy: {} problems", lines.join("\n"), lines.len()))
}

/// The files that git tracks, and new ones that it does not ignore.
fn tracked_files(root: &Path) -> Result<Vec<String>, String> {
    let arguments = ["ls-files", "--cached", "--others", "--exclude-standard"];
    let listing = output_of(Command::new("git").args(arguments).current_dir(root))?;
    let mut files: Vec<String> = listing.lines().map(str::to_owned).collect();
    files.sort();
    files.dedup();
    Ok(files)
}

fn output_of(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("tidy: {command:?}: {error}"))?;
    if !output.status.success() {
        return Err(format!("tidy: {command:?}: {}", String::from_utf8_lossy(&output.stderr)));
    }
    String::from_utf8(output.stdout).map_err(|error| format!("tidy: {command:?}: {error}"))
}
