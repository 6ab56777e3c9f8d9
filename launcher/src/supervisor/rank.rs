//! The tasks of one rank: what it says, what it is told, what it logs, and its end.

use super::cause::Exit;
use super::mpirun::Job;
use super::relay::{RankLog, relay};
use super::unix::{Group, Process, Spawned, spawn};
use crate::cluster::remote::RemoteRank;
use rank_protocol::frame::{self, Decoder};
use rank_protocol::{Assignment, FromRank, ToRank, env};
use std::cell::{Cell, RefCell};
use std::ffi::OsStr;
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, watch};

/// Messages that wait for a rank to read them; a rank that leaves more unread is killed.
pub const NUM_QUEUED: usize = 1024;
/// After a rank's end, the time in which its last messages and lines must have been read.
pub const DRAIN: Duration = Duration::from_secs(2);

/// What the tasks of ranks tell the supervisor.
#[derive(Debug)]
pub struct Input {
    /// Generation of the rank; an older one than the current is dropped.
    pub generation: u64,
    /// Rank.
    pub rank: usize,
    /// What happened.
    pub news: News,
}

/// What happened to a rank.
#[derive(Debug)]
pub enum News {
    /// It said something.
    Message(FromRank),
    /// It said something that is no message.
    Garbled(String),
    /// Its process ended, and everything it said before has been passed on.
    Exited {
        /// How.
        exit: Exit,
        /// What it wrote last.
        last_lines: Vec<String>,
    },
}

/// A running rank, for the supervisor.
pub enum RankHandle {
    /// A child, and what it started.
    Own {
        /// Process id.
        pid: u32,
        /// Its process group.
        group: Group,
        /// What it is told.
        outbox: mpsc::Sender<ToRank>,
        /// The newest generation that it was assigned to, and as which rank.
        assigned: watch::Sender<(u64, usize)>,
    },
    /// One of the ranks that `mpirun` started, or will.
    Mpi {
        /// The job.
        job: Rc<Job>,
        /// Which of its ranks.
        rank: usize,
        /// What it is told.
        outbox: mpsc::Sender<ToRank>,
    },
    /// One on another node.
    Remote(RemoteRank),
}

impl RankHandle {
    /// Process id; 0 where it is not yet known.
    pub fn pid(&self) -> u32 {
        match self {
            RankHandle::Own { pid, .. } => *pid,
            RankHandle::Mpi { job, rank, .. } => job.pid(*rank),
            RankHandle::Remote(remote) => remote.pid(),
        }
    }

    /// Queues a message; a rank that does not read is killed.
    pub fn tell(&self, message: ToRank) {
        let outbox = match self {
            RankHandle::Own { outbox, .. } | RankHandle::Mpi { outbox, .. } => outbox,
            RankHandle::Remote(remote) => return remote.tell(message),
        };
        if let Err(mpsc::error::TrySendError::Full(_)) = outbox.try_send(message) {
            tracing::error!("process {} reads no messages: killing it", self.pid());
            self.kill();
        }
    }

    /// Gives it its place: the first, or where it has let go of the one before, the next.
    pub fn assign(&self, assignment: Assignment) {
        match self {
            RankHandle::Own { assigned, .. } => {
                assigned.send_replace((assignment.generation, assignment.rank));
            }
            RankHandle::Mpi { .. } => {}
            RankHandle::Remote(remote) => return remote.assign(assignment),
        }
        self.tell(ToRank::Assignment(Box::new(assignment)));
    }

    /// SIGTERM to its process group; under `mpirun`, to that.
    pub fn terminate(&self) {
        match self {
            RankHandle::Own { group, .. } => group.terminate(),
            RankHandle::Mpi { job, .. } => job.terminate(),
            RankHandle::Remote(remote) => remote.terminate(),
        }
    }

    /// SIGKILL to its process group; under `mpirun`, to the whole job.
    pub fn kill(&self) {
        match self {
            RankHandle::Own { group, .. } => group.kill(),
            RankHandle::Mpi { job, .. } => job.kill(),
            RankHandle::Remote(remote) => remote.kill(),
        }
    }
}

/// What every rank finds in its environment: its threads, and where libtorch is.
pub fn set_environment(command: &mut Command, threads: usize, library_path: Option<&OsStr>) {
    for name in env::THREADS {
        command.env(name, threads.to_string());
    }
    for name in env::SECRETS {
        command.env_remove(name);
    }
    if let Some(path) = library_path {
        command.env(env::LIBRARY_PATH, path);
    }
    let (queues, number) = env::CUDA_QUEUES;
    if std::env::var_os(queues).is_none() {
        command.env(queues, number);
    }
}

/// Starts a rank and its tasks, on the current thread's `LocalSet`.
pub fn start(
    command: Command,
    generation: u64,
    rank: usize,
    log: RankLog,
    inputs: mpsc::Sender<Input>,
) -> std::io::Result<RankHandle> {
    let Spawned { process, control, stdout, stderr } = spawn(command)?;
    let (pid, group) = (process.pid(), process.group());
    let (reader, writer) = match UnixStream::from_std(control) {
        Ok(stream) => stream.into_split(),
        Err(error) => {
            group.kill();
            return Err(error);
        }
    };
    let (outbox, messages) = mpsc::channel(NUM_QUEUED);
    tokio::task::spawn_local(write(writer, messages));
    let (assigned, mut newest) = watch::channel((generation, rank));
    tokio::task::spawn_local(async move {
        let stdout = stdout.and_then(|pipe| tokio::process::ChildStdout::from_std(pipe).ok());
        let stderr = stderr.and_then(|pipe| tokio::process::ChildStderr::from_std(pipe).ok());
        let log = RefCell::new(log);
        let spoken = Cell::new((generation, rank));
        let told = |news| {
            let ((generation, rank), news) = of_place(news, &spoken, *newest.borrow());
            inputs.send(Input { generation, rank, news })
        };
        let said = async {
            let logged = async {
                if let (Some(stdout), Some(stderr)) = (stdout, stderr) {
                    relay(&log, stdout, stderr).await;
                }
            };
            tokio::join!(read(reader, &told), logged);
        };
        let exit = until_the_end(process, said).await;
        let last_lines = log.borrow().last_lines();
        // Who assigns it before this was heard hears of it again: it has ended in that place, too.
        loop {
            let (generation, rank) = *newest.borrow_and_update();
            let news = News::Exited { exit, last_lines: last_lines.clone() };
            let _ = inputs.send(Input { generation, rank, news }).await;
            if newest.changed().await.is_err() {
                break;
            }
        }
    });
    Ok(RankHandle::Own { pid, group, outbox, assigned })
}

/// The generation and rank of which a process says something: those of which it has `spoken` last,
/// until it says that it has joined the generation that it was `assigned` to.
fn of_place(
    news: News,
    spoken: &Cell<(u64, usize)>,
    assigned: (u64, usize),
) -> ((u64, usize), News) {
    if let News::Message(FromRank::Joined { generation }) = news {
        if generation != assigned.0 || generation <= spoken.get().0 {
            let meant = assigned.0;
            let error = format!("it joins generation {generation}, and was assigned to {meant}");
            return (assigned, News::Garbled(error));
        }
        spoken.set(assigned);
    }
    (spoken.get(), news)
}

/// Listens until the process has ended and all it said has been passed on.
pub async fn until_the_end(process: Process, said: impl Future<Output = ()>) -> Exit {
    let mut said = std::pin::pin!(said);
    let mut ended = std::pin::pin!(process.wait());
    tokio::select! {
        exit = &mut ended => {
            let _ = tokio::time::timeout(DRAIN, said).await;
            exit
        }
        () = &mut said => ended.await,
    }
}

/// Passes on what a rank says, until it ends or says what is no message.
pub async fn read<F: Future<Output = Result<(), mpsc::error::SendError<Input>>>>(
    mut reader: OwnedReadHalf,
    told: &impl Fn(News) -> F,
) {
    let mut decoder = Decoder::default();
    let mut buffer = vec![0; 16 << 10];
    loop {
        let count = match reader.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(count) => count,
        };
        decoder.push(&buffer[..count]);
        loop {
            let news = match decoder.next_message() {
                Ok(Some(message)) => News::Message(message),
                Ok(None) => break,
                Err(error) => {
                    let _ = told(News::Garbled(error.to_string())).await;
                    return;
                }
            };
            if told(news).await.is_err() {
                return;
            }
        }
    }
}

/// Writes until the supervisor drops its handle, and so keeps the socket open as long: its end is
/// the rank's.
pub async fn write(mut writer: OwnedWriteHalf, mut messages: mpsc::Receiver<ToRank>) {
    while let Some(message) = messages.recv().await {
        let frame = match frame::encode(&message) {
            Ok(frame) => frame,
            Err(error) => {
                tracing::error!("a message to a rank was dropped: {error}");
                continue;
            }
        };
        if writer.write_all(&frame).await.is_err() {
            // The rank is gone; its exit is reported by another task.
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rank_protocol::run_dir::RunDir;

    fn assignment(generation: u64) -> Assignment {
        let text = serde_json::json!({
            "run_id": "r", "generation": generation, "rank": 3, "world_size": 4, "local_rank": 0,
            "local_world_size": 1, "address": "127.0.0.1", "threads": 1, "run_dir": "/",
            "resume_step": null
        });
        serde_json::from_value(text).unwrap()
    }

    /// An end that was told and not heard yet is told again of the place that it was given
    /// meanwhile.
    #[tokio::test(flavor = "current_thread")]
    async fn a_process_that_ended_before_it_was_assigned_has_ended_in_that_place() {
        let local = tokio::task::LocalSet::new();
        let run = RunDir::new(std::env::temp_dir().join("no-such-run"));
        local
            .run_until(async {
                let (inputs, mut heard) = mpsc::channel(8);
                let log = RankLog::of_nobody(&run);
                let handle = start(Command::new("false"), 1, 3, log, inputs).unwrap();
                let first = heard.recv().await.unwrap();
                handle.assign(assignment(2));
                let second = heard.recv().await.unwrap();
                for (input, generation) in [(first, 1), (second, 2)] {
                    assert_eq!((input.generation, input.rank), (generation, 3));
                    let failed = Exit { code: Some(1), signal: None };
                    assert!(matches!(input.news, News::Exited { exit, .. } if exit == failed));
                }
                drop(handle);
                assert!(heard.recv().await.is_none(), "nothing is left of it");
            })
            .await;
    }
}
