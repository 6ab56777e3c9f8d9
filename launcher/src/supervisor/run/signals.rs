//! The signals that a launcher listens to.

use std::io::Result;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// All of them.
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
    quit: Signal,
    user: Signal,
    hangup: Option<Signal>,
}

impl Signals {
    /// From now on they no longer end the process.
    ///
    /// # Errors
    /// Where the system does not let it listen.
    pub fn listen() -> Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            quit: signal(SignalKind::quit())?,
            user: signal(SignalKind::user_defined2())?,
            // A terminal that goes away stops the run, but for `nohup`.
            hangup: match rank_protocol::signals::ignores_hangup() {
                false => Some(signal(SignalKind::hangup())?),
                true => None,
            },
        })
    }

    /// The name of the next.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
            Some(_) = received(&mut self.hangup) => "SIGHUP",
            _ = self.quit.recv() => "SIGQUIT",
            _ = self.user.recv() => "SIGUSR2",
        }
    }
}

/// The next signal, where it is listened to; never, otherwise.
async fn received(signal: &mut Option<Signal>) -> Option<()> {
    match signal {
        Some(signal) => signal.recv().await,
        None => std::future::pending().await,
    }
}
