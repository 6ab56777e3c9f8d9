//! The run config: one YAML file, shared by the launcher, the ranks and the tools.
//!
//! Two types. *Raw* is what the YAML says; [`RunConfig`] is *resolved*: every default filled in,
//! every path absolute, every limit checked, so that whoever holds one need not check it again.
//! It is passed on whole, never field by field.

pub mod batch_plan;
mod emit;
mod load;
pub mod problem;
pub mod reference;
pub mod resolved;

pub use load::Loaded;
pub use problem::{ConfigErrors, Note, NoteLevel, Place, Problem, ProblemKind};
pub use resolved::*;
