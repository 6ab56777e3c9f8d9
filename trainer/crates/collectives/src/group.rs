//! A communicator over any backend: one thread carries out its operations in the order of issue.

use std::collections::HashSet;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use torch_shim::cuda::Event;
use torch_shim::gloo::Store;
use torch_shim::tch::{Device, Kind, Tensor};

use crate::agreement::{Agreement, Check};
use crate::backend::{Backend, Operation, OverMessages, TAG_LIMIT};
use crate::error::{CommError, Result};
use crate::transport::Transport;
use crate::work::{Completion, Finisher, Work};
use crate::{Communicator, ReduceOp};

/// What a group is made with.
#[derive(Clone, Debug)]
pub struct GroupOptions {
    /// Its name, unique in the run (`data`, `tensor-3`).
    pub name: String,
    /// The run's generation: nothing of an older one is ever read.
    pub generation: u64,
    /// The longest wait for one message.
    pub timeout: Duration,
    /// Which operations the ranks compare before they start.
    pub check: Check,
}

impl GroupOptions {
    /// A group of that name and generation, with a time-out of 60 s and operations compared on
    /// first use.
    pub fn new(name: impl Into<String>, generation: u64) -> Self {
        let timeout = Duration::from_secs(60);
        GroupOptions { name: name.into(), generation, timeout, check: Check::default() }
    }

    /// The prefix of all the group's keys in the store.
    pub(crate) fn prefix(&self) -> String {
        format!("generation-{}/{}", self.generation, self.name)
    }
}

/// A communicator over some backend.
pub struct Group {
    shared: Arc<Shared>,
    queue: Mutex<Option<Sender<Job>>>,
    worker: Option<JoinHandle<()>>,
}

struct Shared {
    backend: Box<dyn Backend>,
    name: String,
    rank: usize,
    size: usize,
    cause: Mutex<Option<String>>,
}

struct Job {
    operation: Operation,
    after: Option<Event>,
    finisher: Finisher,
}

impl Group {
    /// A group whose collectives are algorithms over a transport's messages.
    pub(crate) fn new(
        transport: Box<dyn Transport>,
        store: Store,
        rank: usize,
        size: usize,
        options: &GroupOptions,
    ) -> Result<Group> {
        let backend = Box::new(OverMessages::new(transport, rank, size));
        Group::over(backend, store, (rank, size), options)
    }

    /// A group over any backend.
    pub(crate) fn over(
        backend: Box<dyn Backend>,
        store: Store,
        (rank, size): (usize, usize),
        options: &GroupOptions,
    ) -> Result<Group> {
        let shared = Arc::new(Shared {
            backend,
            name: options.name.clone(),
            rank,
            size,
            cause: Mutex::new(None),
        });
        let agreement = Agreement {
            store,
            check: options.check,
            group: options.name.clone(),
            rank,
            size,
            timeout: options.timeout,
            seen: HashSet::new(),
        };
        let (sender, receiver) = channel();
        let own = shared.clone();
        let worker = std::thread::Builder::new()
            .name(format!("comm-{}", options.name))
            .spawn(move || work(&own, agreement, &receiver))
            .map_err(|error| {
                CommError::Backend(format!("no thread for group {}: {error}", options.name))
            })?;
        Ok(Group { shared, queue: Mutex::new(Some(sender)), worker: Some(worker) })
    }

    fn enqueue(&self, operation: Operation) -> Result<Work> {
        self.shared.alive()?;
        let completion = Arc::new(Completion::default());
        let after = self.shared.backend.issued()?;
        let job = Job { operation, after, finisher: Finisher(completion.clone()) };
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = queue.as_ref().is_some_and(|queue| queue.send(job).is_ok());
        if sent { Ok(Work::queued(completion)) } else { Err(self.shared.dead()) }
    }

    fn peer(&self, peer: usize, tag: u32) -> Result<()> {
        if peer >= self.shared.size || peer == self.shared.rank || tag >= TAG_LIMIT {
            return Err(CommError::Invalid(format!(
                "group {}: rank {} cannot exchange a message with rank {peer} of \
                 {} with tag {tag} (limit {TAG_LIMIT})",
                self.shared.name, self.shared.rank, self.shared.size
            )));
        }
        Ok(())
    }
}

/// The communication thread.
fn work(shared: &Shared, mut agreement: Agreement, jobs: &Receiver<Job>) {
    let mut sequence = 0;
    while let Some(job) = next(shared, jobs) {
        let operation = job.operation.describe();
        let result = shared.alive().and_then(|()| {
            let alive = |peer| shared.alive().and_then(|()| shared.backend.reachable(peer));
            agreement
                .compare(sequence, &operation, &alive)
                .map_err(|error| shared.locate(error, sequence, &operation))?;
            // The tensors go before the waiter wakes, so that their memory is its own again.
            let done = shared.backend.run(job.operation, sequence, job.after);
            done.map_err(|error| shared.locate(error, sequence, &operation))
        });
        if let Err(error) = &result {
            shared.fail(error);
        }
        job.finisher.finish(result);
        sequence += 1;
    }
}

/// The next job; none when the group goes. Looks after what is under way while there is none.
fn next(shared: &Shared, jobs: &Receiver<Job>) -> Option<Job> {
    let Some(interval) = shared.backend.watch_interval() else { return jobs.recv().ok() };
    loop {
        if shared.alive().is_ok()
            && let Err(error) = shared.backend.watch()
        {
            shared.fail(&error);
        }
        match jobs.recv_timeout(interval) {
            Ok(job) => return Some(job),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return None,
        }
    }
}

impl Shared {
    fn alive(&self) -> Result<()> {
        match self.cause.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            None => Ok(()),
            Some(cause) => Err(CommError::Dead { group: self.name.clone(), cause: cause.clone() }),
        }
    }

    fn dead(&self) -> CommError {
        let cause = "its communication thread is gone".to_string();
        self.alive().err().unwrap_or(CommError::Dead { group: self.name.clone(), cause })
    }

    /// Notes the first cause, and closes the connections so that every peer learns of it at once.
    fn fail(&self, error: &CommError) {
        let mut cause = self.cause.lock().unwrap_or_else(PoisonError::into_inner);
        if cause.is_none() {
            *cause = Some(error.to_string());
        }
        drop(cause);
        self.backend.abort(&error.to_string());
    }

    /// Says which operation it was that lost a peer.
    fn locate(&self, error: CommError, sequence: u64, operation: &str) -> CommError {
        match error {
            CommError::Peer { peer, detail, .. } => {
                let (group, operation) = (self.name.clone(), operation.to_string());
                CommError::Peer { group, sequence, operation, peer, detail }
            }
            other => other,
        }
    }
}

fn check(device: Device, tensors: &[&Tensor]) -> Result<()> {
    for tensor in tensors {
        let known =
            matches!(tensor.kind(), Kind::Float | Kind::Double | Kind::BFloat16 | Kind::Int64);
        if !known || !tensor.is_contiguous() || tensor.device() != device {
            return Err(CommError::Invalid(format!(
                "collectives want contiguous tensors of f32, f64, bf16 or i64 on {device:?}, not \
                 {:?} {:?} on {:?} (contiguous: {})",
                tensor.kind(),
                tensor.size(),
                tensor.device(),
                tensor.is_contiguous()
            )));
        }
        if tensor.kind() != tensors[0].kind() {
            let text =
                format!("input and output are {:?} and {:?}", tensors[0].kind(), tensor.kind());
            return Err(CommError::Invalid(text));
        }
    }
    Ok(())
}

fn check_op(tensor: &Tensor, op: ReduceOp) -> Result<()> {
    if op == ReduceOp::Avg && tensor.kind() == Kind::Int64 {
        return Err(CommError::Invalid(
            "integers have no average: sum them, and divide as you need".to_string(),
        ));
    }
    Ok(())
}

fn check_ratio(large: &Tensor, small: &Tensor, ratio: usize) -> Result<()> {
    if large.numel() != small.numel() * ratio {
        let (large, small) = (large.numel(), small.numel());
        return Err(CommError::Invalid(format!("{large} elements are not {ratio} times {small}")));
    }
    Ok(())
}

impl Communicator for Group {
    fn rank(&self) -> usize {
        self.shared.rank
    }

    fn size(&self) -> usize {
        self.shared.size
    }

    fn device(&self) -> Device {
        self.shared.backend.device()
    }

    fn alive(&self) -> Result<()> {
        self.shared.alive()
    }

    fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work> {
        check(self.device(), &[tensor])?;
        check_op(tensor, op)?;
        self.enqueue(Operation::AllReduce(tensor.shallow_clone(), op))
    }

    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work> {
        check(self.device(), &[output, input])?;
        check_ratio(output, input, self.size())?;
        self.enqueue(Operation::AllGather(output.shallow_clone(), input.shallow_clone()))
    }

    fn reduce_scatter(&self, output: &Tensor, input: &Tensor, op: ReduceOp) -> Result<Work> {
        check(self.device(), &[output, input])?;
        check_op(input, op)?;
        check_ratio(input, output, self.size())?;
        self.enqueue(Operation::ReduceScatter(output.shallow_clone(), input.shallow_clone(), op))
    }

    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work> {
        check(self.device(), &[tensor])?;
        if root >= self.size() {
            return Err(CommError::Invalid(format!(
                "no root {root} in a group of {}",
                self.size()
            )));
        }
        self.enqueue(Operation::Broadcast(tensor.shallow_clone(), root))
    }

    fn send(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Work> {
        check(self.device(), &[tensor])?;
        self.peer(peer, tag)?;
        self.shared.alive()?;
        if tensor.numel() == 0 {
            return Ok(Work::done());
        }
        self.shared.backend.send(tensor, peer, tag)
    }

    fn recv(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Work> {
        check(self.device(), &[tensor])?;
        self.peer(peer, tag)?;
        self.shared.alive()?;
        if tensor.numel() == 0 {
            return Ok(Work::done());
        }
        self.shared.backend.recv(tensor, peer, tag)
    }

    fn all_to_all(&self, output: &Tensor, input: &Tensor) -> Result<Work> {
        check(self.device(), &[output, input])?;
        check_ratio(output, input, 1)?;
        if !input.numel().is_multiple_of(self.size()) {
            let text = format!("{} elements do not divide by {} ranks", input.numel(), self.size());
            return Err(CommError::Invalid(text));
        }
        self.enqueue(Operation::AllToAll(output.shallow_clone(), input.shallow_clone()))
    }

    fn barrier(&self) -> Result<Work> {
        self.enqueue(Operation::Barrier)
    }

    fn abort(&self) {
        self.shared.fail(&CommError::Backend("aborted on request".to_string()));
    }

    fn bytes_sent(&self) -> u64 {
        self.shared.backend.bytes_sent()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}
