//! The arguments of `phalanx run`, `resume` and `coordinator`.

use crate::error::UserError;
use rank_protocol::Steps;
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
    /// Write a timeline of these steps, both included: a file for each rank in the run's folder
    /// `profiles/`, which chrome://tracing and Perfetto show.
    #[arg(long, value_name = "steps=FIRST..LAST", value_parser = profiled_steps)]
    pub profile: Option<Steps>,
}

/// The most steps of one timeline, whose events are in memory until it is written.
const MAX_PROFILED: u64 = 1000;

fn profiled_steps(text: &str) -> Result<Steps, String> {
    let steps = text.strip_prefix("steps=").and_then(|range| {
        let (first, last) = range.split_once("..").unwrap_or((range, range));
        Some(Steps { first: first.parse().ok()?, last: last.parse().ok()? })
    });
    match steps {
        None => Err("expected steps=FIRST..LAST, as steps=10..12".to_owned()),
        Some(Steps { first: 0, .. }) => Err("steps are counted from 1".to_owned()),
        Some(Steps { first, last }) if last < first => Err(format!("{last} comes before {first}")),
        Some(Steps { first, last }) if last - first >= MAX_PROFILED => {
            Err(format!("{} steps, the limit is {MAX_PROFILED}", last - first + 1))
        }
        Some(steps) => Ok(steps),
    }
}

/// Refuses a timeline of steps that a run does not have.
///
/// # Errors
/// Which they are.
pub fn check_profile(profile: Option<Steps>, steps: u64) -> Result<(), UserError> {
    match profile.filter(|profile| profile.last > steps) {
        None => Ok(()),
        Some(Steps { first, last }) => {
            let message = format!("--profile steps={first}..{last}: the run has {steps} steps");
            Err(UserError::usage(message).hint("name steps from 1 to the last"))
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_to_profile_are_read() {
        let steps = |first, last| Ok(Steps { first, last });
        assert_eq!(profiled_steps("steps=10..12"), steps(10, 12));
        assert_eq!(profiled_steps("steps=3"), steps(3, 3));
        let refused = |text: &str, part: &str| {
            let error = profiled_steps(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        };
        for text in ["10..12", "steps=", "steps=a..b", "steps=1..", "steps=-1..2", "steps=1..=2"] {
            refused(text, "steps=10..12");
        }
        refused("steps=0..2", "from 1");
        refused("steps=5..4", "4 comes before 5");
        refused("steps=1..1001", "1001 steps, the limit is 1000");
    }

    #[test]
    fn steps_that_a_run_does_not_have_are_refused() {
        let profile = Some(Steps { first: 10, last: 12 });
        assert!(check_profile(profile, 12).is_ok() && check_profile(None, 1).is_ok());
        let error = check_profile(profile, 11).unwrap_err().to_string();
        assert!(error.contains("steps=10..12: the run has 11 steps"), "{error}");
    }
}
