//! Processes: a rank is spawned in a process group of its own, dies with this process, and its end
//! is seen at once through a pidfd.
#![expect(unsafe_code, reason = "std offers no safe way to run code between fork and exec")]

use super::cause::Exit;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process_group, pidfd_open,
    pidfd_send_signal, set_parent_process_death_signal, waitid,
};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};
use tokio::io::unix::AsyncFd;

/// A running rank.
pub struct Process {
    child: Child,
    group: Pid,
    pidfd: AsyncFd<OwnedFd>,
}

/// A rank just spawned, with this side's ends of its pipes.
pub struct Spawned {
    /// The process.
    pub process: Process,
    /// The agent's end of the control socket; non-blocking.
    pub control: UnixStream,
    /// Its standard output.
    pub stdout: Option<ChildStdout>,
    /// Its standard error.
    pub stderr: Option<ChildStderr>,
}

/// Spawns `command` with a control socket as its standard input and both outputs piped.
///
/// Call it from a thread that lives as long as the launcher: the kernel kills the process when the
/// thread that spawned it ends.
pub fn spawn(mut command: Command) -> std::io::Result<Spawned> {
    let (control, theirs) = UnixStream::pair()?;
    control.set_nonblocking(true)?;
    command.stdin(Stdio::from(OwnedFd::from(theirs)));
    let (process, stdout, stderr) = spawn_in_group(command)?;
    Ok(Spawned { process, control, stdout, stderr })
}

/// Spawns `command` in a process group of its own, with both outputs piped; else as [`spawn`].
pub fn spawn_in_group(
    mut command: Command,
) -> std::io::Result<(Process, Option<ChildStdout>, Option<ChildStderr>)> {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = spawn_bound(command)?;
    let stdout = child.stdout.take();
    let stderr = child.stderr.take();
    let group = Pid::from_child(&child);
    let pidfd = pidfd_open(group, PidfdFlags::NONBLOCK).map_err(std::io::Error::from);
    match pidfd.and_then(register) {
        Ok(pidfd) => Ok((Process { child, group, pidfd }, stdout, stderr)),
        Err(error) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(error)
        }
    }
}

/// Spawns another part of the launcher, which writes where this one does; else as [`spawn`].
pub fn spawn_companion(mut command: Command) -> std::io::Result<Child> {
    command.stdin(Stdio::null());
    spawn_bound(command)
}

/// Spawns `command` in a process group of its own; it dies with this process.
fn spawn_bound(mut command: Command) -> std::io::Result<Child> {
    command.process_group(0);
    let launcher = rustix::process::getpid();
    let die_with_the_launcher = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The launcher may have died before the line above took effect.
        if rustix::process::getppid() != Some(launcher) {
            return Err(std::io::ErrorKind::BrokenPipe.into());
        }
        Ok(())
    };
    // SAFETY: the closure runs in the forked child and makes two system calls through rustix, which
    // issues them directly; it allocates nothing and takes no lock.
    unsafe { command.pre_exec(die_with_the_launcher) }.spawn()
}

fn register(pidfd: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` always gives the one descriptor that it owns, open until it is dropped,
    // and the `AsyncFd` lends it out only by shared reference.
    unsafe { AsyncFd::register(pidfd) }.map_err(std::io::Error::from)
}

/// A process that is no child of this one; it cannot be mistaken for a later one of its id.
pub struct Stranger {
    pidfd: AsyncFd<OwnedFd>,
}

impl Stranger {
    /// The process that is at the other end of a socket, by its id.
    pub fn open(pid: i32) -> std::io::Result<Self> {
        let pid = Pid::from_raw(pid).ok_or(std::io::ErrorKind::NotFound)?;
        let pidfd = pidfd_open(pid, PidfdFlags::NONBLOCK)?;
        Ok(Self { pidfd: register(pidfd)? })
    }

    /// Waits for its end; how it ended is its parent's to know.
    pub async fn ended(&self) {
        let _ = self.pidfd.readable().await;
    }

    /// SIGKILL; also where it is stopped.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL);
    }
}

impl Process {
    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A handle that can signal the group while another task waits for the process.
    pub fn group(&self) -> Group {
        Group { leader: self.group }
    }

    /// Waits for the end; kills what the process left in its group; then reaps it.
    pub async fn wait(mut self) -> Exit {
        loop {
            let Ok(mut guard) = self.pidfd.readable().await else { break };
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
            match waitid(WaitId::PidFd(self.pidfd.get_ref().as_fd()), options) {
                Ok(Some(_)) => break,
                Ok(None) => guard.clear_ready(),
                Err(_) => break,
            }
        }
        // The leader is not reaped yet, so its id and the group's cannot be anyone else's.
        let _ = kill_process_group(self.group, Signal::KILL);
        match self.child.wait() {
            Ok(status) => Exit {
                code: status.code(),
                signal: std::os::unix::process::ExitStatusExt::signal(&status),
            },
            Err(_) => Exit::default(),
        }
    }
}

/// A rank's process group. Use it only while the rank has not been reaped.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    leader: Pid,
}

impl Group {
    /// Asks every process of the group to end.
    pub fn terminate(self) {
        let _ = kill_process_group(self.leader, Signal::TERM);
    }

    /// Ends every process of the group; also one that is stopped.
    pub fn kill(self) {
        let _ = kill_process_group(self.leader, Signal::KILL);
    }
}
