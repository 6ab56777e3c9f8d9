//! The agent of the first node, a child of its coordinator.
//!
//! A process of its own, so that the ranks' end is nobody's but the agent's to see; it dies with
//! the coordinator, as the whole node would.

use super::agent::AgentArgs;
use crate::supervisor::unix::spawn_companion;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// Longest time that the agent may take to end its ranks and itself once the run is over.
const PATIENCE: Duration = Duration::from_secs(10);
/// Time between two looks at it.
const POLL: Duration = Duration::from_millis(10);

/// A running agent; killed when dropped.
pub struct Companion {
    child: Child,
}

impl Companion {
    /// Starts it. Call it from a thread that lives as long as this process.
    ///
    /// # Errors
    /// Where this program cannot be started once more.
    pub fn start(args: &AgentArgs) -> std::io::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["agent", &args.run]);
        let index = args.index.map(|index| index.to_string());
        for (option, value) in [("--name", &args.name), ("--index", &index)] {
            if let Some(value) = value {
                command.args([option, value]);
            }
        }
        Ok(Self { child: spawn_companion(command)? })
    }

    /// Waits until it has ended; the coordinator has told it that the run is over.
    pub fn end(mut self) {
        let deadline = Instant::now() + PATIENCE;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for Companion {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
