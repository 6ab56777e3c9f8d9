//! A communicator over any backend: one thread carries out its operations in the order of issue.

use std::collections::HashSet;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use torch_shim::cuda::Event;
use torch_shim::gloo::Store;
use torch_shim::profiler::{self, Span};
use torch_shim::tch::{Device, Kind, Tensor};

use crate::agreement::{Agreement, Check, MessageAgreement, Voice};
use crate::backend::{Backend, Operation, OverMessages, TAG_LIMIT, bytes};
use crate::error::{CommError, Members, Result, Site};
use crate::transport::Transport;
use crate::work::{Completion, Finisher, Work};
use crate::{Communicator, ReduceOp};

/// An operation takes long from here on: the ranks compare where they are.
const LONG: Duration = Duration::from_secs(1);

/// What a group is made with.
#[derive(Clone, Debug)]
pub struct GroupOptions {
    /// Its name, unique in the run (`data`, `tensor-3`).
    pub name: String,
    /// The run's generation: nothing of an older one is ever read.
    pub generation: u64,
    /// The numbers in the run of its members, for messages to people; empty where they are 0, 1, …
    pub ranks: Vec<usize>,
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
        let (name, ranks) = (name.into(), Vec::new());
        GroupOptions { name, generation, ranks, timeout, check: Check::default() }
    }

    /// The same group, of these ranks of the run.
    #[must_use]
    pub fn of(self, ranks: &[usize]) -> Self {
        GroupOptions { ranks: ranks.to_vec(), ..self }
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
    messages: MessageAgreement,
    threads: Vec<JoinHandle<()>>,
    /// Dropped, it ends the watch.
    watching: Option<Sender<()>>,
}

struct Shared {
    backend: Box<dyn Backend>,
    members: Arc<Members>,
    rank: usize,
    size: usize,
    cause: Mutex<Option<CommError>>,
    running: Mutex<Option<Running>>,
}

/// The operation that the group's thread is at.
#[derive(Clone)]
struct Running {
    what: String,
    since: Instant,
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
            members: Arc::new(Members {
                group: options.name.clone(),
                ranks: options.ranks.clone(),
            }),
            rank,
            size,
            cause: Mutex::new(None),
            running: Mutex::new(None),
        });
        let voice = Voice { store, members: shared.members.clone(), rank, size };
        let agreement = Agreement {
            voice: voice.clone(),
            check: options.check,
            timeout: options.timeout,
            seen: HashSet::new(),
        };
        let agreement_is_on = agreement.is_on();
        let messages = MessageAgreement::new(voice.clone(), options.check);
        let (sender, receiver) = channel();
        let own = shared.clone();
        let worker = move || work(&own, agreement, &receiver);
        let mut group = Group {
            threads: vec![thread(format!("comm-{}", options.name), worker)?],
            shared,
            queue: Mutex::new(Some(sender)),
            messages,
            watching: None,
        };
        if agreement_is_on {
            let (watching, ended) = channel();
            let own = group.shared.clone();
            let name = format!("watch-{}", options.name);
            group.threads.push(thread(name, move || watch(&own, &voice, &ended))?);
            group.watching = Some(watching);
        }
        Ok(group)
    }

    /// The operation that is under way, and for how long; for people who ask what a rank waits for.
    pub fn waits_in(&self) -> Option<String> {
        let shared = &self.shared;
        let on_stream = || shared.backend.oldest().map(|(what, since)| Running { what, since });
        let running = lock(&shared.running).clone().or_else(on_stream)?;
        let seconds = running.since.elapsed().as_secs_f64();
        Some(format!("{} of group {} for {seconds:.1} s", running.what, shared.members.group))
    }

    fn enqueue(&self, operation: Operation) -> Result<Work> {
        self.shared.alive()?;
        let completion = Arc::new(Completion::default());
        let after = self.shared.backend.issued()?;
        let job = Job { operation, after, finisher: Finisher(completion.clone()) };
        let queue = lock(&self.queue);
        let sent = queue.as_ref().is_some_and(|queue| queue.send(job).is_ok());
        if sent { Ok(Work::queued(completion)) } else { Err(self.shared.dead()) }
    }

    fn agree(&self, peer: usize, tag: u32, is_sent: bool, tensor: &Tensor) -> Result<()> {
        let compared = self.messages.compare(peer, tag, is_sent, tensor);
        compared.map_err(|error| self.shared.fail(&error))
    }

    fn peer(&self, peer: usize, tag: u32) -> Result<()> {
        if peer >= self.shared.size || peer == self.shared.rank || tag >= TAG_LIMIT {
            return Err(CommError::Invalid(format!(
                "group {}: rank {} cannot exchange a message with rank {peer} of \
                 {} with tag {tag} (limit {TAG_LIMIT})",
                self.shared.members.group, self.shared.rank, self.shared.size
            )));
        }
        Ok(())
    }
}

fn thread(name: String, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let thread = std::thread::Builder::new().name(name.clone()).spawn(body);
    thread.map_err(|error| CommError::Backend(format!("no thread {name}: {error}")))
}

/// The communication thread.
fn work(shared: &Shared, mut agreement: Agreement, jobs: &Receiver<Job>) {
    let mut sequence = 0;
    while let Some(job) = next(shared, jobs) {
        let operation = job.operation.describe();
        let what = format!("operation {sequence} ({operation})");
        let site = Site { members: shared.members.clone(), operation: what.clone() };
        let since = Instant::now();
        let span = shared.span(&operation, job.operation.bytes());
        *lock(&shared.running) = Some(Running { what: what.clone(), since });
        let result = shared.alive().and_then(|()| {
            let alive = |peer| shared.alive().and_then(|()| shared.backend.reachable(peer));
            agreement.compare(sequence, &operation, &alive)?;
            // The tensors go before the waiter wakes, so that their memory is its own again.
            shared.backend.run(job.operation, &what, job.after)
        });
        *lock(&shared.running) = None;
        span.into_iter().for_each(ended);
        let result = result.map_err(|error| {
            // A peer may be gone because it found that this rank does something else.
            let disagree = matches!(error, CommError::Peer { .. }) && agreement.is_on();
            let compared = if disagree { agreement.voice.stalls(&what) } else { Ok(()) };
            match compared {
                Err(mismatch @ CommError::Mismatch { .. }) => shared.fail(&mismatch),
                _ => shared.fail(&site.locate(error)),
            }
        });
        job.finisher.finish(result);
        sequence += 1;
    }
}

/// Looks after an operation that takes long: do the other ranks wait in another one?
fn watch(shared: &Shared, voice: &Voice, ended: &Receiver<()>) {
    let (mut at, mut next) = (None, LONG);
    while ended.recv_timeout(LONG / 2) == Err(RecvTimeoutError::Timeout) {
        let running = lock(&shared.running).clone();
        let on_stream = || shared.backend.oldest().map(|(what, since)| Running { what, since });
        let Some(running) = running.or_else(on_stream) else { continue };
        if at.as_ref() != Some(&running.what) {
            (at, next) = (Some(running.what.clone()), LONG);
        }
        if running.since.elapsed() < next {
            continue;
        }
        // Less and less often, for the sake of the store.
        next *= 2;
        match voice.stalls(&running.what) {
            Ok(()) => {}
            Err(error @ CommError::Mismatch { .. }) => drop(shared.fail(&error)),
            Err(error) => tracing::debug!("{}: {error}", shared.members.group),
        }
    }
}

/// The next job; none when the group goes. Looks after what is under way while there is none.
fn next(shared: &Shared, jobs: &Receiver<Job>) -> Option<Job> {
    let Some(interval) = shared.backend.watch_interval() else { return jobs.recv().ok() };
    loop {
        if shared.alive().is_ok()
            && let Err(error) = shared.backend.watch()
        {
            drop(shared.fail(&error));
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
        match lock(&self.cause).as_ref() {
            None => Ok(()),
            Some(cause) => {
                let (group, cause) = (self.members.group.clone(), cause.to_string());
                Err(CommError::Dead { group, cause })
            }
        }
    }

    fn dead(&self) -> CommError {
        let cause = "its communication thread is gone".to_string();
        let group = self.members.group.clone();
        self.alive().err().unwrap_or(CommError::Dead { group, cause })
    }

    /// Notes the first cause, and closes the connections so that every peer learns of it at once.
    /// Returns the error that says more: that the ranks disagree ends an operation by an abort.
    fn fail(&self, error: &CommError) -> CommError {
        let first = lock(&self.cause).get_or_insert_with(|| error.clone()).clone();
        self.backend.abort(&error.to_string());
        if matches!(first, CommError::Mismatch { .. }) { first } else { error.clone() }
    }

    /// An operation that begins now, for a timeline; on a GPU the stream knows better when.
    fn span(&self, operation: &str, bytes: u64) -> Option<Span> {
        let start_ns = profiler::now().filter(|_| self.backend.device() == Device::Cpu)?;
        let name = operation.split(' ').next().unwrap_or_default().to_owned();
        let group = self.members.group.clone();
        let details = vec![
            ("group", group.clone()),
            ("ranks", self.size.to_string()),
            ("operation", operation.to_owned()),
        ];
        let lane = format!("group {group}");
        Some(Span { name, lane, start_ns, bytes, details, ..Span::default() })
    }

    /// Starts a single message, whose failure says where it was.
    fn message(
        &self,
        is_sent: bool,
        peer: usize,
        tensor: &Tensor,
        start: impl FnOnce() -> Result<Work>,
    ) -> Result<Work> {
        let (verb, way) = if is_sent { ("send", "to") } else { ("receive", "from") };
        let operation = format!(
            "{verb} {:?} {:?} {way} rank {}",
            tensor.kind(),
            tensor.size(),
            self.members.in_run(peer)
        );
        let mut span = self.span(&operation, bytes(tensor));
        if let Some(span) = &mut span {
            // Several are under way at once.
            span.lane = format!("{} {verb} {way} rank {}", span.lane, self.members.in_run(peer));
        }
        let site = Site { members: self.members.clone(), operation };
        match start() {
            Ok(work) => Ok(work.at(site).timed(span)),
            Err(error) => Err(site.locate(error)),
        }
    }
}

/// It ends now.
pub(crate) fn ended(span: Span) {
    if let Some(end_ns) = profiler::now() {
        profiler::record(Span { end_ns, ..span });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.agree(peer, tag, true, tensor)?;
        self.shared.message(true, peer, tensor, || self.shared.backend.send(tensor, peer, tag))
    }

    fn recv(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Work> {
        check(self.device(), &[tensor])?;
        self.peer(peer, tag)?;
        self.shared.alive()?;
        if tensor.numel() == 0 {
            return Ok(Work::done());
        }
        self.agree(peer, tag, false, tensor)?;
        self.shared.message(false, peer, tensor, || self.shared.backend.recv(tensor, peer, tag))
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
        drop(self.shared.fail(&CommError::Backend("aborted on request".to_string())));
    }

    fn bytes_sent(&self) -> u64 {
        self.shared.backend.bytes_sent()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        lock(&self.queue).take();
        self.watching.take();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
