//! `phalanx cancel`: asks a run's launcher to stop, and waits until it has.

use crate::error::UserError;
use crate::print::out;
use crate::runs::{self, holder, name_of};
use crate::supervisor::policy::Policy;
use rank_protocol::{RunDir, exit_code};
use run_config::RunConfig;
use rustix::process::{Pid, Signal, kill_process};
use std::time::{Duration, Instant};

/// Longest wait beyond that of the launcher itself, which ends ranks that do not save in time.
const SLACK: Duration = Duration::from_secs(60);

/// Arguments of `phalanx cancel`.
#[derive(Clone, Debug, clap::Args)]
pub struct CancelArgs {
    /// The run's directory or name.
    pub run: String,
    /// Stop at once: neither finish the step nor save.
    #[arg(long)]
    pub now: bool,
}

/// Stops the run; returns the exit code.
pub fn run(args: CancelArgs) -> Result<i32, UserError> {
    let run = runs::find(&args.run)?;
    let name = name_of(&run);
    let Some(pid) = holder(&run) else {
        out!("run {name} is not running");
        return Ok(exit_code::DONE);
    };
    let signal = if args.now { Signal::QUIT } else { Signal::TERM };
    let process = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let process = process.ok_or_else(|| UserError::failed(format!("{pid} is no process id")))?;
    kill_process(process, signal)
        .map_err(|error| UserError::failed(format!("cannot signal process {pid}: {error}")))?;
    if !args.now {
        out!("run {name}: finishing the step and saving");
    }
    wait(&run)?;
    let status = crate::status::read(&run)?;
    out!("run {name}: {}", status.reason.unwrap_or(status.state));
    Ok(exit_code::DONE)
}

/// Longest wait for the step to be finished and saved.
fn patience(run: &RunDir) -> Duration {
    let policy = Policy::new(1, 1);
    // A run whose config cannot be read is waited for as one with the usual limits.
    let policy = match RunConfig::load(&run.config(), &[]) {
        Ok(loaded) => policy.outlasting(Duration::from_secs(loaded.config.cluster.timeout_s)),
        Err(_) => policy,
    };
    policy.stop + SLACK
}

fn wait(run: &RunDir) -> Result<(), UserError> {
    let patience = patience(run);
    let deadline = Instant::now() + patience;
    while let Some(pid) = holder(run) {
        if Instant::now() >= deadline {
            let seconds = patience.as_secs();
            let error = UserError::failed(format!("process {pid} goes on after {seconds} s"));
            return Err(error.hint("cancel it with --now"));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
