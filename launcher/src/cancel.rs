//! `phalanx cancel`: asks a run's launcher to stop, and waits until it has.

use crate::error::UserError;
use crate::print::out;
use crate::runs::{self, holder, name_of};
use rank_protocol::{RunDir, exit_code};
use rustix::process::{Pid, Signal, kill_process};
use std::time::{Duration, Instant};

/// Longest wait for the step to be finished and saved.
const PATIENCE: Duration = Duration::from_secs(660);

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

fn wait(run: &RunDir) -> Result<(), UserError> {
    let deadline = Instant::now() + PATIENCE;
    while let Some(pid) = holder(run) {
        if Instant::now() >= deadline {
            let seconds = PATIENCE.as_secs();
            let error = UserError::failed(format!("process {pid} goes on after {seconds} s"));
            return Err(error.hint("cancel it with --now"));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
