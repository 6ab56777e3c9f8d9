//! The backend between GPUs: NCCL, on streams of its own.
//!
//! An operation is put on the group's stream behind an event on its issuer's current stream, and
//! whoever waits for it lets its own current stream wait for an event behind it: the host waits for
//! neither. It learns of a failure from NCCL's own report, or from an operation that has not ended
//! a time-out after it could begin; then the group is dead, and its work leaves the streams.
//!
//! NCCL has no tags: what two ranks send each other is matched by order. So the messages from one
//! rank to another with one tag have a communicator and a stream to themselves, made at the first.
//!
//! A death of another process NCCL may never notice: whoever learns of it must abort the group.
//! Bytes sent are those of a ring, which NCCL's algorithms need not be; in minima and maxima a NaN
//! may lose.

mod channel;
mod lane;
mod native;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nccl_rs::Nccl;
use torch_shim::cuda::Event;
use torch_shim::gloo::Store;
use torch_shim::tch::{Device, Kind, Tensor};

use crate::ReduceOp;
use crate::backend::{Backend, Operation, bytes};
use crate::error::Result;
use crate::group::{Group, GroupOptions};
use crate::nccl::channel::Channel;
use crate::nccl::lane::{Lane, Place};
use crate::nccl::native::buffer;
use crate::work::{Behind, Work};

/// How often the work under way is looked after.
const WATCH: Duration = Duration::from_millis(50);

/// Connects this rank, on GPU `device`, to the others of a group, through a store that all share.
///
/// # Errors
/// When the others do not come within the options' time-out, or NCCL or the GPU refuses.
pub fn connect(
    nccl: &Nccl,
    device: usize,
    store: &Store,
    (rank, size): (usize, usize),
    options: &GroupOptions,
) -> Result<Group> {
    let store = store.with_prefix(&options.prefix());
    let place = Arc::new(Place::new(nccl.clone(), store.clone(), device, options));
    let lane = Lane::connect(&place, &options.name, (rank, size))?;
    let token = Tensor::f_zeros([1], (Kind::Int64, Device::Cuda(device)))?;
    let backend = NcclBackend {
        place,
        lane,
        token: Mutex::new(token),
        channels: Mutex::default(),
        rank,
        size,
        bytes: AtomicU64::new(0),
    };
    Group::over(Box::new(backend), store, (rank, size), options)
}

struct NcclBackend {
    place: Arc<Place>,
    lane: Lane,
    /// What a barrier reduces.
    token: Mutex<Tensor>,
    channels: Mutex<HashMap<Route, Channel>>,
    rank: usize,
    size: usize,
    bytes: AtomicU64,
}

/// Sender, receiver, tag.
type Route = (usize, usize, u32);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl NcclBackend {
    fn count(&self, operation: &Operation) {
        let others = self.size as u64 - 1;
        let sent = match operation {
            Operation::AllReduce(tensor, _) => 2 * bytes(tensor) * others / self.size as u64,
            Operation::AllGather(_, input) => bytes(input) * others,
            Operation::ReduceScatter(output, _, _) => bytes(output) * others,
            Operation::Broadcast(tensor, root) if *root == self.rank => bytes(tensor),
            Operation::AllToAll(_, input) => bytes(input) * others / self.size as u64,
            Operation::Broadcast(..) | Operation::Barrier => 0,
        };
        self.bytes.fetch_add(sent, Ordering::Relaxed);
    }

    fn message(&self, route: Route, tensor: &Tensor) -> Result<Work> {
        let after = self.place.now()?;
        let mut channels = lock(&self.channels);
        let channel = match channels.entry(route) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(Channel::open(&self.place, route, self.rank)?)
            }
        };
        channel.put(tensor.shallow_clone(), after)
    }
}

impl Backend for NcclBackend {
    fn device(&self) -> Device {
        Device::Cuda(self.place.device)
    }

    fn issued(&self) -> Result<Option<Event>> {
        self.place.now().map(Some)
    }

    fn run(
        &self,
        operation: Operation,
        what: &str,
        after: Option<Event>,
    ) -> Result<Option<Behind>> {
        let Some(after) = after else { return Ok(None) };
        self.count(&operation);
        let put = |after: Event, tensors: Vec<Tensor>, call: &lane::Call<'_>| {
            if tensors.iter().all(|tensor| tensor.numel() == 0) {
                return Ok(None);
            }
            self.lane.put(what, after, tensors, call).map(Some)
        };
        let reduce = |op: ReduceOp| match op {
            ReduceOp::Sum => nccl_rs::ReduceOp::Sum,
            ReduceOp::Avg => nccl_rs::ReduceOp::Avg,
            ReduceOp::Min => nccl_rs::ReduceOp::Min,
            ReduceOp::Max => nccl_rs::ReduceOp::Max,
        };
        match operation {
            Operation::AllReduce(tensor, op) => {
                let whole = buffer(&tensor)?;
                put(after, vec![tensor], &|nccl, stream| nccl.all_reduce(whole, reduce(op), stream))
            }
            Operation::AllGather(output, input) => {
                let (to, from) = (buffer(&output)?, buffer(&input)?);
                put(after, vec![output, input], &|nccl, stream| nccl.all_gather(to, from, stream))
            }
            Operation::ReduceScatter(output, input, op) => {
                let (to, from) = (buffer(&output)?, buffer(&input)?);
                put(after, vec![output, input], &|nccl, stream| {
                    nccl.reduce_scatter(to, from, reduce(op), stream)
                })
            }
            Operation::Broadcast(tensor, root) => {
                let whole = buffer(&tensor)?;
                put(after, vec![tensor], &|nccl, stream| nccl.broadcast(whole, root, stream))
            }
            Operation::AllToAll(output, input) => {
                let (to, from) = (buffer(&output)?, buffer(&input)?);
                put(after, vec![output, input], &|nccl, stream| nccl.all_to_all(to, from, stream))
            }
            Operation::Barrier => {
                let token = lock(&self.token).shallow_clone();
                let whole = buffer(&token)?;
                let behind = self.lane.put(what, after, vec![token], &|nccl, stream| {
                    nccl.all_reduce(whole, nccl_rs::ReduceOp::Sum, stream)
                })?;
                // The one operation that the host waits for.
                self.lane.wait(what, &behind.event)?;
                Ok(Some(behind))
            }
        }
    }

    fn send(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Work> {
        self.bytes.fetch_add(bytes(tensor), Ordering::Relaxed);
        self.message((self.rank, peer, tag), tensor)
    }

    fn recv(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Work> {
        self.message((peer, self.rank, tag), tensor)
    }

    fn watch_interval(&self) -> Option<Duration> {
        Some(WATCH)
    }

    fn watch(&self) -> Result<()> {
        self.lane.watch()?;
        self.place.failure()
    }

    fn oldest(&self) -> Option<(String, Instant)> {
        self.lane.oldest()
    }

    fn abort(&self, cause: &str) {
        self.place.abort(cause);
    }

    fn bytes_sent(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}
