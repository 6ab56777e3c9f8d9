//! The run config: one YAML file, shared by the launcher, the ranks and the tools.
//!
//! Two types. *Raw* is what the YAML says; [`RunConfig`] is *resolved*: every default filled in,
//! every path absolute, every limit checked, so that whoever holds one need not check it again.
//! It is passed on whole, never field by field.
//!
//! The way of a text: `yaml` (a tree that knows its places) -> `walk` (typed leaves, by the table
//! in `keys`) -> `layers` (defaults, preset, file, `--set`) -> `resolve` (typed config) -> `rules`
//! and `support` (what several keys must agree on, and what is not there yet).

pub mod batch_plan;
mod emit;
mod keys;
mod layers;
mod load;
pub mod problem;
pub mod reference;
mod resolve;
pub mod resolved;
mod rules;
mod store;
mod support;
mod walk;
mod yaml;

pub use load::Loaded;
pub use problem::{ConfigErrors, Note, NoteLevel, Place, Problem, ProblemKind};
pub use resolved::*;
