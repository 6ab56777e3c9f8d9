//! What a user can type. Each verb is a module with its arguments and a `run`.

use crate::cluster::agent;
use crate::error::UserError;
use crate::print::err;
use crate::{cancel, check, checkpoint, data, logs, machine, memory, simulate, start, status, why};
use clap::{Parser, Subcommand};
use rank_protocol::exit_code;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

/// Trains Llama-3-class language models on many ranks, from one YAML file.
#[derive(Debug, Parser)]
#[command(name = "phalanx", version, about, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Validate a run config; print the resolved plan, memory and FLOP estimate.
    Check(CheckArgs),
    /// Train here.
    Run(start::RunArgs),
    /// Continue a run from its newest good checkpoint.
    Resume(start::ResumeArgs),
    /// Begin or continue a run on several nodes: decide for the agents, one on each.
    Coordinator(start::CoordinatorArgs),
    /// Run this node's ranks for a coordinator.
    Agent(agent::AgentArgs),
    /// Show what a run does; without a name, all runs.
    Status(status::StatusArgs),
    /// Show what the ranks wrote.
    Logs(logs::LogsArgs),
    /// Name the first cause of a run's last failure.
    Why(why::WhyArgs),
    /// Stop a run: finish the step, save.
    Cancel(cancel::CancelArgs),
    /// Simulate what the failures of a cluster would cost a run.
    Simulate(simulate::SimulateArgs),
    /// Train a tokenizer, tokenize text into shards, look at shards.
    #[command(subcommand)]
    Data(data::DataCommand),
    /// List, verify, compare, export and import checkpoints.
    #[command(subcommand)]
    Checkpoint(checkpoint::CheckpointCommand),
    /// Let a trained model write; see `phalanx generate --help`.
    #[command(disable_help_flag = true)]
    Generate(GenerateArgs),
    /// Removes what a launcher that is gone kept in memory; launchers start it.
    #[command(hide = true)]
    MemoryKeeper(memory::KeeperArgs),
}

#[derive(Debug, clap::Args)]
struct CheckArgs {
    /// The run config, a YAML file.
    config: PathBuf,
    /// Override a key of the config; the value is YAML. Repeatable.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Draw the pipeline's schedule in the first step into this SVG file.
    #[arg(long, value_name = "PATH")]
    schedule_svg: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct GenerateArgs {
    /// Passed on to the trainer.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

/// Runs the command line of this process; returns its exit code.
pub fn main() -> i32 {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Asking for help or the version is no mistake.
            let _ = error.print();
            return if error.use_stderr() { exit_code::CONFIG } else { exit_code::DONE };
        }
    };
    let result = match cli.verb {
        Verb::Check(args) => {
            Ok(check::check(&args.config, &args.set, args.json, args.schedule_svg.as_deref()))
        }
        Verb::Data(command) => Ok(data::run(command)),
        Verb::Checkpoint(command) => Ok(checkpoint::run(command)),
        Verb::Run(args) => start::run(args),
        Verb::Resume(args) => start::resume(args),
        Verb::Coordinator(args) => start::coordinator(args),
        Verb::Agent(args) => agent::run(args),
        Verb::Simulate(args) => simulate::run(args),
        Verb::Status(args) => status::run(args),
        Verb::Logs(args) => logs::run(args),
        Verb::Why(args) => why::run(args),
        Verb::Cancel(args) => cancel::run(args),
        Verb::Generate(args) => generate(args),
        Verb::MemoryKeeper(args) => memory::keep(&args),
    };
    result.unwrap_or_else(|error| {
        err!("{error}");
        error.code
    })
}

/// Becomes the trainer.
fn generate(args: GenerateArgs) -> Result<i32, UserError> {
    let trainer = machine::trainer()?;
    let mut command = Command::new(&trainer);
    command.arg("generate").args(args.args);
    if let Some(path) = machine::library_path(run_config::DeviceKind::Auto)? {
        command.env(rank_protocol::env::LIBRARY_PATH, path);
    }
    let error = command.exec();
    Err(UserError::failed(format!("cannot start {}: {error}", trainer.display())))
}
