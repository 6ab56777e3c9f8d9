//! What a user did that cannot be done, said once, with a hint and the exit code that follows.

use rank_protocol::exit_code;
use rank_protocol::jsonl::JsonlError;
use std::fmt;

/// An error for the user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserError {
    /// Exit code.
    pub code: i32,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

impl UserError {
    /// Usage or config: 64.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { code: exit_code::CONFIG, message: message.into(), hint: None }
    }

    /// Something failed or is damaged: 1.
    pub fn failed(message: impl Into<String>) -> Self {
        Self { code: exit_code::FAILED, message: message.into(), hint: None }
    }

    /// With what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for UserError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.message)?;
        if let Some(hint) = &self.hint {
            write!(f, "\n  hint: {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for UserError {}

impl From<run_config::ConfigErrors> for UserError {
    fn from(errors: run_config::ConfigErrors) -> Self {
        Self::usage(errors.to_string())
    }
}

impl From<JsonlError> for UserError {
    fn from(error: JsonlError) -> Self {
        let told = Self::failed(error.to_string());
        match error {
            JsonlError::Line { path, line, .. } if line > 0 => told.hint(format!(
                "the line is damaged; the others count without it: sed -i {line}d {}",
                path.display()
            )),
            _ => told,
        }
    }
}
