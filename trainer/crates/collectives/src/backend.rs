//! What carries out the operations of a group.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use torch_shim::cuda::Event;
use torch_shim::tch::{Device, Tensor};

use crate::ReduceOp;
use crate::error::{CommError, Result};
use crate::ring::{self, Exchange};
use crate::transport::{Pending, Transport};
use crate::whereabouts::Needs;
use crate::work::{Behind, Completion, Finisher, Work};

/// Tags from here on belong to the collectives.
pub(crate) const TAG_LIMIT: u32 = 1 << 16;

/// A collective operation. Its tensors have passed all checks.
pub(crate) enum Operation {
    AllReduce(Tensor, ReduceOp),
    AllGather(Tensor, Tensor),
    ReduceScatter(Tensor, Tensor, ReduceOp),
    Broadcast(Tensor, usize),
    AllToAll(Tensor, Tensor),
    Barrier,
}

impl Operation {
    /// What all ranks must agree on.
    pub(crate) fn describe(&self) -> String {
        let of = |tensor: &Tensor| format!("{:?} {:?}", tensor.kind(), tensor.size());
        match self {
            Operation::AllReduce(tensor, op) => format!("all_reduce {op:?} {}", of(tensor)),
            Operation::AllGather(_, input) => format!("all_gather {}", of(input)),
            Operation::ReduceScatter(_, input, op) => {
                format!("reduce_scatter {op:?} {}", of(input))
            }
            Operation::Broadcast(tensor, root) => format!("broadcast from {root} {}", of(tensor)),
            Operation::AllToAll(_, input) => format!("all_to_all {}", of(input)),
            Operation::Barrier => "barrier".to_string(),
        }
    }

    /// Who else must have issued it before it can end.
    pub(crate) fn needs(&self) -> Needs {
        match self {
            Operation::AllReduce(tensor, _) | Operation::Broadcast(tensor, _)
                if tensor.numel() == 0 =>
            {
                Needs::Nobody
            }
            Operation::AllGather(_, input)
            | Operation::ReduceScatter(_, input, _)
            | Operation::AllToAll(_, input)
                if input.numel() == 0 =>
            {
                Needs::Nobody
            }
            Operation::Broadcast(_, root) => Needs::Root(*root),
            _ => Needs::All,
        }
    }
}

impl Operation {
    /// Bytes of the larger tensor of the two, or of the only one.
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Operation::AllReduce(tensor, _) | Operation::Broadcast(tensor, _) => bytes(tensor),
            Operation::AllGather(output, input)
            | Operation::ReduceScatter(output, input, _)
            | Operation::AllToAll(output, input) => bytes(output).max(bytes(input)),
            Operation::Barrier => 0,
        }
    }
}

/// What carries out the operations of a group. Errors that name a peer are those of
/// [`crate::CommError::lost`], which leaves the rest to the caller.
pub(crate) trait Backend: Send + Sync {
    /// The device of its tensors.
    fn device(&self) -> Device;

    /// Called where an operation is issued: what it has to come after.
    fn issued(&self) -> Result<Option<Event>> {
        Ok(None)
    }

    /// Carries out an operation, `what` in words, on the group's thread; what is left may be under
    /// way on a stream.
    fn run(&self, operation: Operation, what: &str, after: Option<Event>)
    -> Result<Option<Behind>>;

    /// Starts to send a contiguous tensor of at least one element.
    fn send(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Work>;

    /// Starts to receive into a contiguous tensor of at least one element.
    fn recv(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Work>;

    /// Whether a message that was sent is through only once the peer has begun to take it.
    fn waits_for_taker(&self) -> bool {
        false
    }

    /// An error where it is known, without a message, that a peer is gone.
    fn reachable(&self, _peer: usize) -> Result<()> {
        Ok(())
    }

    /// How often [`Backend::watch`] wants to be called.
    fn watch_interval(&self) -> Option<Duration> {
        None
    }

    /// The failure of something that is under way on a stream, or has been there for too long.
    fn watch(&self) -> Result<()> {
        Ok(())
    }

    /// What has been under way on a stream for longest, in words, and since when.
    fn oldest(&self) -> Option<(String, Instant)> {
        None
    }

    /// Ends all that is under way, with an error.
    fn abort(&self, cause: &str);

    /// Bytes of tensors that this rank has sent so far.
    fn bytes_sent(&self) -> u64;
}

/// Bytes of a tensor's elements.
pub(crate) fn bytes(tensor: &Tensor) -> u64 {
    (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64
}

/// The collectives as algorithms over messages, on the CPU.
pub(crate) struct OverMessages {
    transport: Box<dyn Transport>,
    rank: usize,
    size: usize,
    bytes: AtomicU64,
    sends: Sends,
}

impl OverMessages {
    pub(crate) fn new(transport: Box<dyn Transport>, rank: usize, size: usize) -> OverMessages {
        OverMessages { transport, rank, size, bytes: AtomicU64::new(0), sends: Sends::default() }
    }

    fn count(&self, tensor: &Tensor) {
        self.bytes.fetch_add(bytes(tensor), Ordering::Relaxed);
    }
}

impl Backend for OverMessages {
    fn device(&self) -> Device {
        Device::Cpu
    }

    fn run(
        &self,
        operation: Operation,
        what: &str,
        _after: Option<Event>,
    ) -> Result<Option<Behind>> {
        // Ranks that carry out different operations find no message of each other's: they stall,
        // and learn why, instead of taking what was meant for something else.
        let mut hasher = DefaultHasher::new();
        what.hash(&mut hasher);
        let tag = TAG_LIMIT + (hasher.finish() % u64::from(TAG_LIMIT)) as u32;
        let ranks = &Exchanger { messages: self, tag };
        match &operation {
            Operation::AllReduce(tensor, op) => ring::all_reduce(ranks, tensor, *op),
            Operation::AllGather(output, input) => ring::all_gather(ranks, output, input),
            Operation::ReduceScatter(output, input, op) => {
                ring::reduce_scatter(ranks, output, input, *op)
            }
            Operation::Broadcast(tensor, root) => ring::broadcast(ranks, tensor, *root),
            Operation::AllToAll(output, input) => ring::all_to_all(ranks, output, input),
            Operation::Barrier => ring::barrier(ranks),
        }?;
        Ok(None)
    }

    fn send(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Work> {
        self.count(tensor);
        let message = self.transport.send(tensor, peer, tag)?;
        if self.transport.tells_when_sent() {
            return Ok(Work::message(message));
        }
        self.sends.follow(message)
    }

    fn recv(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Work> {
        Ok(Work::message(self.transport.recv(tensor, peer, tag)?))
    }

    fn waits_for_taker(&self) -> bool {
        self.transport.waits_for_taker()
    }

    fn reachable(&self, peer: usize) -> Result<()> {
        self.transport.reachable(peer)
    }

    fn abort(&self, cause: &str) {
        self.transport.abort(cause);
    }

    fn bytes_sent(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

impl Drop for OverMessages {
    fn drop(&mut self) {
        if self.sends.under_way.load(Ordering::Acquire) > 0 {
            self.transport.abort("the group was dropped while a message was sent");
        }
    }
}

/// Messages that were sent over a transport that does not tell when they are through: a thread
/// waits for them, so that whoever holds their tensors for them can ask.
#[derive(Default)]
struct Sends {
    queue: Mutex<Option<Sender<Sent>>>,
    under_way: Arc<AtomicUsize>,
}

type Sent = (Box<dyn Pending>, Finisher);

impl Sends {
    fn follow(&self, message: Box<dyn Pending>) -> Result<Work> {
        let completion = Arc::new(Completion::default());
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let sender = match queue.take() {
            Some(sender) => sender,
            None => self.start()?,
        };
        self.under_way.fetch_add(1, Ordering::Release);
        // Where the thread is gone, the finisher says so.
        let _ = sender.send((message, Finisher(completion.clone())));
        *queue = Some(sender);
        Ok(Work::queued(completion))
    }

    fn start(&self) -> Result<Sender<Sent>> {
        let (sender, receiver) = channel::<Sent>();
        let under_way = self.under_way.clone();
        let wait = move || {
            for (message, finisher) in receiver {
                finisher.finish(message.wait().map(|()| None));
                under_way.fetch_sub(1, Ordering::Release);
            }
        };
        let thread = std::thread::Builder::new().name("comm-sends".into()).spawn(wait);
        thread.map_err(|error| CommError::Backend(format!("no thread for messages: {error}")))?;
        Ok(sender)
    }
}

struct Exchanger<'a> {
    messages: &'a OverMessages,
    tag: u32,
}

impl Exchange for Exchanger<'_> {
    fn rank(&self) -> usize {
        self.messages.rank
    }

    fn size(&self) -> usize {
        self.messages.size
    }

    fn exchange(&self, outgoing: &[(Tensor, usize)], incoming: &[(Tensor, usize)]) -> Result<()> {
        let transport = &self.messages.transport;
        let mut pending: Vec<Box<dyn Pending>> =
            Vec::with_capacity(outgoing.len() + incoming.len());
        for (tensor, peer) in incoming.iter().filter(|(tensor, _)| tensor.numel() > 0) {
            pending.push(transport.recv(tensor, *peer, self.tag)?);
        }
        for (tensor, peer) in outgoing.iter().filter(|(tensor, _)| tensor.numel() > 0) {
            pending.push(transport.send(tensor, *peer, self.tag)?);
            self.messages.count(tensor);
        }
        pending.into_iter().try_for_each(|message| message.wait())
    }
}
