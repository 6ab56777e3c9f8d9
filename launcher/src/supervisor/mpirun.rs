//! Ranks that `mpirun` starts: one child, whose own children connect to a socket by name. A rank
//! that dies takes the whole job down; how it ended, only `mpirun` knows.

use super::cause::Exit;
use super::rank::{DRAIN, Input, NUM_QUEUED, News, RankHandle, read, write};
use super::relay::{RankLog, lines, relay_one};
use super::unix::{Group, Process, Stranger, spawn_in_group};
use rank_protocol::frame;
use rank_protocol::{FailureClass, FailureReport, FromRank, Phase, ToRank, env, exit_code};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::ErrorKind;
use std::os::linux::net::SocketAddrExt;
use std::path::Path;
use std::process::{ChildStderr, ChildStdout, Command, Stdio};
use std::rc::Rc;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, spawn_local};

/// The program that starts the processes of an MPI job.
pub const MPIRUN: &str = "mpirun";
/// After a rank's end, the time in which `mpirun` should have ended too, before the rank's end is
/// told of.
const JOB_END: Duration = Duration::from_secs(3);
/// Lines of `mpirun` that are kept for a cause.
const NUM_LAST_LINES: usize = 20;
/// What `mpirun` sends to the ranks that are left.
const SIGTERM: i32 = 15;
/// The largest first message of a connection.
const MAX_FIRST_BYTES: usize = 4096;

/// One generation's `mpirun`, and its ranks as far as they have connected.
pub struct Job {
    generation: u64,
    mpirun: Group,
    has_been_told: Cell<bool>,
    has_ended: watch::Sender<Option<Exit>>,
    members: Vec<Member>,
    /// Ranks that ended without a word, in that order.
    fallen: RefCell<Vec<usize>>,
    /// What `mpirun` wrote last.
    last_lines: RefCell<VecDeque<String>>,
    inputs: mpsc::Sender<Input>,
}

/// What is known of one rank.
struct Member {
    process: RefCell<Option<(u32, Rc<Stranger>)>>,
    messages: RefCell<Option<mpsc::Receiver<ToRank>>>,
    log: Rc<RefCell<RankLog>>,
    outputs: RefCell<Vec<JoinHandle<()>>>,
    exit: Cell<Option<i32>>,
    has_reported: Cell<bool>,
    phase: Cell<Phase>,
}

/// The command that starts `world_size` processes of `trainer` on this machine.
pub fn command(trainer: &Path, world_size: usize) -> Command {
    let mut command = Command::new(MPIRUN);
    command.args(["--host", &format!("localhost:{world_size}")]);
    command.args(["-np", &world_size.to_string()]);
    // The number of threads is set, their places are not; after a death nobody is waited for.
    command.args(["--bind-to", "none", "--mca", "odls_base_sigkill_timeout", "0"]);
    if rustix::process::geteuid().is_root() {
        command.arg("--allow-run-as-root");
    }
    command.arg(trainer).arg("rank");
    command
}

/// Starts the job and its tasks, on the current thread's `LocalSet`; one log a rank.
pub fn start(
    mut command: Command,
    generation: u64,
    logs: Vec<RankLog>,
    inputs: mpsc::Sender<Input>,
) -> std::io::Result<Vec<RankHandle>> {
    let (listener, name) = listen(generation)?;
    command.env(env::CONTROL, format!("{}{name}", env::CONTROL_NAMED)).stdin(Stdio::null());
    let (process, stdout, stderr) = spawn_in_group(command)?;
    let (members, outboxes): (Vec<_>, Vec<_>) = logs.into_iter().map(Member::new).unzip();
    let job = Rc::new(Job {
        generation,
        mpirun: process.group(),
        has_been_told: Cell::new(false),
        has_ended: watch::Sender::new(None),
        members,
        fallen: RefCell::default(),
        last_lines: RefCell::default(),
        inputs,
    });
    let accepting = spawn_local(accept(Rc::clone(&job), listener));
    let own = Rc::clone(&job);
    spawn_local(async move {
        own.follow(process, stdout, stderr).await;
        // Nobody else comes.
        accepting.abort();
    });
    let handle = |(rank, outbox)| RankHandle::Mpi { job: Rc::clone(&job), rank, outbox };
    Ok(outboxes.into_iter().enumerate().map(handle).collect())
}

/// Listens under a name that leaves no file behind. Who may connect is checked at each connection.
fn listen(generation: u64) -> std::io::Result<(UnixListener, String)> {
    let name = format!("phalanx-{}-{generation}", std::process::id());
    let address = std::os::unix::net::SocketAddr::from_abstract_name(&name)?;
    let listener = std::os::unix::net::UnixListener::bind_addr(&address)?;
    listener.set_nonblocking(true)?;
    Ok((UnixListener::from_std(listener)?, name))
}

impl Member {
    fn new(log: RankLog) -> (Self, mpsc::Sender<ToRank>) {
        let (outbox, messages) = mpsc::channel(NUM_QUEUED);
        let member = Self {
            process: RefCell::default(),
            messages: RefCell::new(Some(messages)),
            log: Rc::new(RefCell::new(log)),
            outputs: RefCell::default(),
            exit: Cell::new(None),
            has_reported: Cell::new(false),
            phase: Cell::new(Phase::Init),
        };
        (member, outbox)
    }
}

impl Job {
    /// A rank's process id; 0 before it has connected.
    pub fn pid(&self, rank: usize) -> u32 {
        let member = self.members.get(rank);
        member.and_then(|member| member.process.borrow().as_ref().map(|p| p.0)).unwrap_or(0)
    }

    /// Asks `mpirun`, once, to end the job: it takes a second time for impatience.
    pub fn terminate(&self) {
        if !self.has_been_told.replace(true) {
            self.mpirun.terminate();
        }
    }

    /// Kills every rank that is known, and `mpirun`. A rank that connects later finds nobody.
    pub fn kill(&self) {
        for member in &self.members {
            if let Some((_, process)) = member.process.borrow().as_ref() {
                process.kill();
            }
        }
        self.mpirun.kill();
    }

    async fn tell(&self, rank: usize, news: News) {
        let _ = self.inputs.send(Input { generation: self.generation, rank, news }).await;
    }

    /// Listens to `mpirun` itself until it ends, and speaks for the ranks that never could.
    async fn follow(
        &self,
        process: Process,
        stdout: Option<ChildStdout>,
        stderr: Option<ChildStderr>,
    ) {
        let stdout = stdout.and_then(|pipe| tokio::process::ChildStdout::from_std(pipe).ok());
        let stderr = stderr.and_then(|pipe| tokio::process::ChildStderr::from_std(pipe).ok());
        let said = async {
            if let (Some(stdout), Some(stderr)) = (stdout, stderr) {
                let take = |line: &str| self.take(line);
                tokio::join!(lines(stdout, take), lines(stderr, take));
            }
        };
        let exit = super::rank::until_the_end(process, said).await;
        tracing::debug!("mpirun {}", exit.describe());
        self.has_ended.send_replace(Some(exit));
        let is_known = |member: &Member| member.process.borrow().is_some();
        let is_one_known = self.members.iter().any(is_known);
        for (rank, _) in self.members.iter().enumerate().filter(|(_, member)| !is_known(member)) {
            if is_one_known {
                self.fallen.borrow_mut().push(rank);
                self.bury(rank).await;
                continue;
            }
            // Not one rank came to say a word: another attempt would come to no more.
            let code = exit.code.filter(|code| *code == super::cause::LOADER_FAILED);
            let exit = Exit { code: code.or(Some(exit_code::CONFIG)), signal: None };
            self.tell(rank, News::Exited { exit, last_lines: self.last_lines() }).await;
        }
    }

    fn take(&self, line: &str) {
        // It draws lines around what it says.
        if line.chars().all(|c| c == '-') {
            return;
        }
        tracing::debug!("mpirun: {line}");
        let mut last_lines = self.last_lines.borrow_mut();
        if last_lines.len() == NUM_LAST_LINES {
            last_lines.pop_front();
        }
        last_lines.push_back(line.to_owned());
    }

    fn last_lines(&self) -> Vec<String> {
        self.last_lines.borrow().iter().cloned().collect()
    }

    /// Listens to a rank until it is gone.
    async fn hear(&self, rank: usize, socket: UnixStream, hello: FromRank) {
        let Some(member) = self.members.get(rank) else { return };
        let Some(messages) = member.messages.borrow_mut().take() else {
            return tracing::error!("a second process says that it is rank {rank}");
        };
        let pid = socket.peer_cred().ok().and_then(|peer| peer.pid()).unwrap_or(0);
        let process = match Stranger::open(pid) {
            Ok(process) => Rc::new(process),
            // It was gone before it was heard.
            Err(error) => return tracing::debug!("rank {rank}, process {pid}: {error}"),
        };
        let known = (u32::try_from(pid).unwrap_or(0), Rc::clone(&process));
        *member.process.borrow_mut() = Some(known);
        let (reader, writer) = socket.into_split();
        spawn_local(write(writer, messages));
        self.tell(rank, News::Message(hello)).await;
        read(reader, &|news| self.pass_on(rank, news)).await;
        process.ended().await;
        let outputs = member.outputs.take();
        let drained = async {
            for output in outputs {
                let _ = output.await;
            }
        };
        let _ = tokio::time::timeout(DRAIN, drained).await;
        if member.exit.get().is_none() {
            self.fallen.borrow_mut().push(rank);
        }
        self.bury(rank).await;
    }

    /// Notes what the end of a rank is judged by.
    fn pass_on(
        &self,
        rank: usize,
        news: News,
    ) -> impl Future<Output = Result<(), mpsc::error::SendError<Input>>> + use<> {
        if let (News::Message(message), Some(member)) = (&news, self.members.get(rank)) {
            match message {
                FromRank::Exiting { code } => member.exit.set(Some(*code)),
                FromRank::Phase(phase) => member.phase.set(*phase),
                FromRank::Failure(_) => member.has_reported.set(true),
                _ => {}
            }
        }
        let (inputs, generation) = (self.inputs.clone(), self.generation);
        async move { inputs.send(Input { generation, rank, news }).await }
    }

    /// Tells of a rank's end. One that ended without a word either brought the job down or was
    /// ended with it.
    async fn bury(&self, rank: usize) {
        let Some(member) = self.members.get(rank) else { return };
        let mut ended = self.has_ended.subscribe();
        let ended = tokio::time::timeout(JOB_END, ended.wait_for(Option::is_some)).await;
        let exit = ended.ok().and_then(|exit| exit.ok().and_then(|exit| *exit));
        if let Some(code) = member.exit.get() {
            let last_lines = member.log.borrow().last_lines();
            let exit = Exit { code: Some(code), signal: None };
            return self.tell(rank, News::Exited { exit, last_lines }).await;
        }
        let is_known = |rank: &usize| *rank < self.members.len();
        let named = self.last_lines.borrow().iter().find_map(|line| named_rank(line));
        let first = self.fallen.borrow().first().copied();
        let culprit = named.filter(is_known).or(first).unwrap_or(rank);
        if rank != culprit {
            if !member.has_reported.get() {
                let line = format!("ended by mpirun, because rank {culprit} had ended");
                let report = FailureReport {
                    class: FailureClass::Transient,
                    phase: member.phase.get(),
                    step: None,
                    collective: None,
                    lines: vec![line],
                    roll_back: None,
                };
                self.tell(rank, News::Message(FromRank::Failure(Box::new(report)))).await;
            }
            let exit = Exit { code: None, signal: Some(SIGTERM) };
            return self.tell(rank, News::Exited { exit, last_lines: Vec::new() }).await;
        }
        let mut last_lines = member.log.borrow().last_lines();
        last_lines.extend(self.last_lines());
        let exit = exit.map(of_first_rank).unwrap_or_default();
        self.tell(rank, News::Exited { exit, last_lines }).await;
    }
}

/// How the rank ended that brought the job down, of how `mpirun` did.
fn of_first_rank(mpirun: Exit) -> Exit {
    match mpirun.code {
        Some(code) if code > 128 => Exit { code: None, signal: Some(code - 128) },
        _ => mpirun,
    }
}

/// The rank of which `mpirun` says in this line that it was the first to end.
fn named_rank(line: &str) -> Option<usize> {
    let digits = |text: &str| {
        let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        text[..end].parse().ok()
    };
    if let Some((_, rest)) = line.split_once("noticed that process rank ") {
        return digits(rest);
    }
    // As in `Process name: [[45067,1],2]`.
    let (_, rest) = line.split_once("Process name: [[")?;
    digits(rest.split_once("],")?.1)
}

/// Takes connections from processes of the same user, and asks each what it is.
async fn accept(job: Rc<Job>, listener: UnixListener) {
    let own = rustix::process::geteuid().as_raw();
    loop {
        let socket = match listener.accept().await {
            Ok((socket, _)) => socket,
            Err(error) => {
                tracing::warn!("a rank cannot connect: {error}");
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        match socket.peer_cred() {
            Ok(peer) if peer.uid() == own => {}
            other => {
                tracing::warn!("a connection by a stranger was refused: {other:?}");
                continue;
            }
        }
        spawn_local(meet(Rc::clone(&job), socket));
    }
}

/// Hears what a connection is for, and uses it so.
async fn meet(job: Rc<Job>, mut socket: UnixStream) {
    match tokio::time::timeout(DRAIN, first_message(&mut socket)).await {
        Ok(Ok(FromRank::Output { rank, is_error })) => {
            let Some(member) = job.members.get(rank) else { return };
            let log = Rc::clone(&member.log);
            let stream = if is_error { "stderr" } else { "stdout" };
            let task = spawn_local(async move { relay_one(&log, socket, stream).await });
            member.outputs.borrow_mut().push(task);
        }
        Ok(Ok(FromRank::Hello { pid, build, rank: Some(rank) })) => {
            let hello = FromRank::Hello { pid, build, rank: Some(rank) };
            job.hear(rank, socket, hello).await;
        }
        other => tracing::warn!("a connection did not say what it is: {other:?}"),
    }
}

/// The first message, and not a byte of what follows it.
async fn first_message(socket: &mut UnixStream) -> std::io::Result<FromRank> {
    let length = socket.read_u32().await? as usize;
    if length > MAX_FIRST_BYTES {
        return Err(ErrorKind::InvalidData.into());
    }
    let mut body = vec![0; length];
    socket.read_exact(&mut body).await?;
    frame::decode(&body).map_err(|error| std::io::Error::new(ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mpirun_names_the_first_rank_that_ended() {
        let killed = "mpirun noticed that process rank 3 with PID 0 on node x exited on signal 9.";
        assert_eq!(named_rank(killed), Some(3));
        assert_eq!(named_rank("  Process name: [[45067,1],12]"), Some(12));
        assert_eq!(named_rank("  Exit code:    1"), None);
    }

    #[test]
    fn the_signal_is_that_of_the_rank() {
        let exit = |code| of_first_rank(Exit { code: Some(code), signal: None });
        assert_eq!(exit(137), Exit { code: None, signal: Some(9) });
        assert_eq!(exit(1), Exit { code: Some(1), signal: None });
    }
}
