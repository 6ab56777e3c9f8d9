//! The launcher: everything that `phalanx` does without torch.
//!
//! [`cli`] says what a user can type; [`runs`] finds, makes and locks run directories; [`machine`]
//! resolves what depends on this machine; [`start`] begins and resumes runs, `verify` does steps
//! again; [`health`] looks whether a machine is fit to run ranks;
//! [`supervisor`] runs the ranks, [`cluster`] has agents run them on other machines, [`remote`]
//! keeps checkpoints in an object store, [`memory`] in this machine's memory;
//! [`status`], [`logs`], [`why`] and [`cancel`] work on any run from its files; [`check`],
//! [`data`], [`checkpoint`] and [`simulate`] need no run at all.

#![warn(clippy::print_stdout, clippy::print_stderr)] // they panic; `print` does not

pub mod cancel;
pub mod changes;
pub mod check;
pub mod checkpoint;
pub mod cli;
pub mod cluster;
pub mod data;
pub mod error;
pub mod health;
pub mod init_from;
pub mod logs;
pub mod machine;
pub mod memory;
mod pipeline;
mod plan;
mod print;
pub mod remote;
mod room;
pub mod runs;
pub mod simulate;
pub mod start;
pub mod status;
pub mod supervisor;
pub mod time;
mod verify;
pub mod view;
pub mod why;
