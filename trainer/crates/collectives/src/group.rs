//! A communicator over any backend: one thread carries out its operations in the order of issue.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
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
use crate::whereabouts::{Awaited, What, Whereabouts};
use crate::work::{Completion, Finisher, Work};
use crate::{Communicator, ReduceOp};

/// An operation takes long from here on: the ranks compare where they are.
pub(crate) const LONG: Duration = Duration::from_secs(1);

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
    threads: Vec<JoinHandle<()>>,
    /// Dropped, it ends the watch.
    watching: Option<Sender<()>>,
}

/// What a group's threads share.
pub(crate) struct Shared {
    backend: Box<dyn Backend>,
    members: Arc<Members>,
    rank: usize,
    size: usize,
    voice: Voice,
    /// Whether the ranks compare what they do.
    compares: bool,
    messages: MessageAgreement,
    /// Collectives so far.
    issued: AtomicU64,
    whereabouts: OnceLock<Whereabouts>,
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
        let ranks = options.ranks.clone();
        let members = Arc::new(Members { group: options.name.clone(), ranks });
        let voice = Voice { store, members: members.clone(), rank, size };
        let agreement = Agreement {
            voice: voice.clone(),
            check: options.check,
            timeout: options.timeout,
            seen: HashSet::new(),
        };
        let shared = Arc::new(Shared {
            backend,
            members,
            rank,
            size,
            compares: agreement.is_on(),
            messages: MessageAgreement::new(voice.clone(), options.check),
            voice,
            issued: AtomicU64::new(0),
            whereabouts: OnceLock::new(),
            cause: Mutex::new(None),
            running: Mutex::new(None),
        });
        let (sender, receiver) = channel();
        let own = shared.clone();
        let worker = move || work(&own, agreement, &receiver);
        let mut group = Group {
            threads: vec![thread(format!("comm-{}", options.name), worker)?],
            shared,
            queue: Mutex::new(Some(sender)),
            watching: None,
        };
        if group.shared.compares {
            let (watching, ended) = channel();
            let own = group.shared.clone();
            let name = format!("watch-{}", options.name);
            group.threads.push(thread(name, move || watch(&own, &ended))?);
            group.watching = Some(watching);
        }
        Ok(group)
    }

    /// One of the groups that this rank's thread works with: where it waits here for a rank that
    /// waits in another of them for this one, both are told.
    #[must_use]
    pub fn among(self, whereabouts: &Whereabouts) -> Group {
        if self.shared.compares && self.shared.whereabouts.set(whereabouts.clone()).is_ok() {
            whereabouts.enter(Arc::downgrade(&self.shared));
        }
        self
    }

    /// The operation that is under way, and for how long; for people who ask what a rank waits for.
    pub fn waits_in(&self) -> Option<String> {
        let (what, since) = self.shared.under_way()?;
        let seconds = since.elapsed().as_secs_f64();
        Some(format!("{what} of group {} for {seconds:.1} s", self.shared.members.group))
    }

    fn enqueue(&self, operation: Operation) -> Result<Work> {
        self.shared.alive()?;
        let completion = Arc::new(Completion::default());
        let after = self.shared.backend.issued()?;
        let needs = operation.needs();
        let job = Job { operation, after, finisher: Finisher(completion.clone()) };
        let queue = lock(&self.queue);
        // Counted before another rank can see anything of it.
        let index = self.shared.issued.fetch_add(1, Ordering::SeqCst);
        if queue.as_ref().is_none_or(|queue| queue.send(job).is_err()) {
            return Err(self.shared.dead());
        }
        drop(queue);
        let awaited = self.shared.awaited(What::Operation { index, needs });
        Ok(Work::queued(completion).awaited(awaited))
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
            let error = shared.explain(&site, error);
            // A peer may be gone because this rank does something else.
            let disagree = matches!(error, CommError::Peer { .. }) && shared.compares;
            let compared = if disagree { shared.voice.stalls(&what) } else { Ok(()) };
            match compared {
                Err(mismatch @ CommError::Mismatch { .. }) => shared.fail(&mismatch),
                _ => shared.fail(&error),
            }
        });
        job.finisher.finish(result);
        sequence += 1;
    }
}

/// Looks after an operation that takes long: do the other ranks wait in another one?
fn watch(shared: &Shared, ended: &Receiver<()>) {
    let (mut at, mut next) = (None, LONG);
    while ended.recv_timeout(LONG / 2) == Err(RecvTimeoutError::Timeout) {
        if let Err(error @ CommError::Mismatch { .. }) = shared.messages.look_again() {
            drop(shared.fail(&error));
        }
        let Some((what, since)) = shared.under_way() else { continue };
        if at.as_ref() != Some(&what) {
            (at, next) = (Some(what.clone()), LONG);
        }
        if since.elapsed() < next {
            continue;
        }
        // Less and less often, for the sake of the store.
        next *= 2;
        match shared.voice.stalls(&what) {
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
    pub(crate) fn alive(&self) -> Result<()> {
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

    pub(crate) fn members(&self) -> &Arc<Members> {
        &self.members
    }

    /// The operation under way, and since when.
    pub(crate) fn under_way(&self) -> Option<(String, Instant)> {
        let running = lock(&self.running).clone();
        running.map(|running| (running.what, running.since)).or_else(|| self.backend.oldest())
    }

    /// Adds how much was issued here, of collectives and of messages.
    pub(crate) fn count(&self, counts: &mut BTreeMap<String, u64>) {
        counts.insert(self.members.group.clone(), self.issued.load(Ordering::SeqCst));
        self.messages.count(counts);
    }

    /// What a wait for it is told of, where somebody wants to know.
    fn awaited(&self, what: What) -> Option<(Whereabouts, Awaited)> {
        let whereabouts = self.whereabouts.get()?.clone();
        let members = self.members.clone();
        Some((whereabouts, Awaited { members, own: self.rank, size: self.size, what }))
    }

    /// Says where a transport failed. Where it was found here that the ranks do not agree, or by
    /// the peer that was lost, this is the error, and the group's end.
    fn explain(&self, site: &Site, error: CommError) -> CommError {
        let found = lock(&self.cause).clone();
        let verdict = match (found, &error) {
            (Some(found @ CommError::Mismatch { .. }), _) => Some(found),
            (_, CommError::Peer { peer, .. }) if self.compares => self.voice.verdict_of(*peer),
            _ => None,
        };
        if let Some(verdict) = verdict {
            return self.fail(&verdict);
        }
        let located = site.locate(error);
        match (&located, self.whereabouts.get()) {
            (CommError::Peer { peer, is_late: true, .. }, Some(all)) => {
                let because = all.held_up(*peer);
                located.because(&because)
            }
            _ => located,
        }
    }

    /// Notes the first cause, and closes the connections so that every peer learns of it at once.
    /// Returns the error that says more: that the ranks disagree ends an operation by an abort, and
    /// all that this rank does.
    fn fail(&self, error: &CommError) -> CommError {
        let error = self.fail_alone(error);
        if let (CommError::Mismatch { .. }, Some(all)) = (&error, self.whereabouts.get()) {
            all.give_up(&error);
        }
        error
    }

    /// As [`Shared::fail`], of this group alone.
    pub(crate) fn fail_alone(&self, error: &CommError) -> CommError {
        if self.compares && lock(&self.cause).is_none() {
            // Before anybody loses this rank by it.
            self.voice.tell(error);
        }
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
        self: &Arc<Self>,
        is_sent: bool,
        (peer, tag): (usize, u32),
        tensor: &Tensor,
    ) -> Result<Work> {
        let compared = self.messages.compare(peer, tag, is_sent, tensor);
        let index = compared.map_err(|error| self.fail(&error))?;
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
        let started = match is_sent {
            true => self.backend.send(tensor, peer, tag),
            false => self.backend.recv(tensor, peer, tag),
        };
        let work = started.map_err(|error| self.explain(&site, error))?.timed(span);
        let shared = Arc::downgrade(self);
        let work = work.explained(Box::new(move |error| match shared.upgrade() {
            Some(shared) => shared.explain(&site, error),
            None => site.locate(error),
        }));
        if is_sent && !self.backend.waits_for_taker() {
            return Ok(work);
        }
        Ok(work.awaited(self.awaited(What::Message { peer, tag, index, is_sent })))
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
        self.shared.message(true, (peer, tag), tensor)
    }

    fn recv(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Work> {
        check(self.device(), &[tensor])?;
        self.peer(peer, tag)?;
        self.shared.alive()?;
        if tensor.numel() == 0 {
            return Ok(Work::done());
        }
        self.shared.message(false, (peer, tag), tensor)
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
