//! The arguments of `phalanx run`, `resume` and `coordinator`.

use std::net::SocketAddr;
use std::path::PathBuf;

/// What `run` and `resume` share.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Options {
    /// Override a key of the config; the value is YAML. Repeatable.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Print each step's report as a JSON line on standard output, and nothing else there.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `phalanx run`.
#[derive(Clone, Debug, clap::Args)]
pub struct RunArgs {
    /// The run config, a YAML file.
    pub config: PathBuf,
    /// On several nodes.
    #[command(flatten)]
    pub node: NodeArgs,
    /// Shared options.
    #[command(flatten)]
    pub options: Options,
}

/// How the coordinator of a run on several nodes is reached.
#[derive(Clone, Debug, clap::Args)]
pub struct ListenArgs {
    /// On several nodes: where the coordinator listens for agents; port 0: any that is free.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:0")]
    pub listen: SocketAddr,
    /// On several nodes: host name or address at which agents reach the coordinator's machine; by
    /// default its name, or the address that it listens on.
    #[arg(long)]
    pub host: Option<String>,
}

/// What this machine is in a run on several nodes.
#[derive(Clone, Debug, clap::Args)]
pub struct NodeArgs {
    /// On several nodes: this one's name; Slurm's or the host's, where it is not given.
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
    /// Where to listen.
    #[command(flatten)]
    pub listen: ListenArgs,
}

/// Arguments of `phalanx resume`.
#[derive(Clone, Debug, clap::Args)]
pub struct ResumeArgs {
    /// The run's directory or name.
    pub run: String,
    /// Continue from this step's checkpoint instead of the newest.
    #[arg(long)]
    pub step: Option<u64>,
    /// Begin again from the initial weights, where the run has no good checkpoint.
    #[arg(long, conflicts_with = "step")]
    pub from_start: bool,
    /// Continue nothing: do so many steps again, from an earlier checkpoint, and compare them with
    /// what they were, bit by bit.
    #[arg(long, value_name = "STEPS", conflicts_with = "from_start",
          value_parser = clap::value_parser!(u64).range(1..))]
    pub verify: Option<u64>,
    /// On several nodes.
    #[command(flatten)]
    pub node: NodeArgs,
    /// Shared options.
    #[command(flatten)]
    pub options: Options,
}

/// Arguments of `phalanx coordinator`.
#[derive(Clone, Debug, clap::Args)]
pub struct CoordinatorArgs {
    /// The run config of a new run, a YAML file; or the directory or name of a run to go on with.
    pub run: String,
    /// Where to listen.
    #[command(flatten)]
    pub listen: ListenArgs,
    /// Continue from this step's checkpoint instead of the newest.
    #[arg(long)]
    pub step: Option<u64>,
    /// Begin again from the initial weights, where the run has no good checkpoint.
    #[arg(long, conflicts_with = "step")]
    pub from_start: bool,
    /// Shared options.
    #[command(flatten)]
    pub options: Options,
}
