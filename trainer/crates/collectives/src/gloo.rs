//! The backend between processes on CPUs: Gloo's connections, as libtorch has them.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use torch_shim::ShimError;
use torch_shim::gloo::{Gloo, Message, Store};
use torch_shim::tch::Tensor;

use crate::error::{CommError, Result};
use crate::group::{Group, GroupOptions};
use crate::transport::{Pending, Transport};

/// Connects this rank to the others of a group, through a store that all share. `hostname` is this
/// rank's own address, as the others reach it.
///
/// # Errors
/// When the others do not come within the options' time-out, or the address cannot be bound.
pub fn connect(
    store: &Store,
    rank: usize,
    size: usize,
    hostname: &str,
    options: &GroupOptions,
) -> Result<Group> {
    let store = store.with_prefix(&options.prefix());
    let gloo =
        Gloo::connect(store.clone(), rank, size, options.timeout, hostname).map_err(|error| {
            CommError::Backend(format!(
                "group {}: rank {rank} of {size} cannot connect: {error}",
                options.name
            ))
        })?;
    let transport = GlooTransport {
        gloo: Mutex::new(Some(Arc::new(gloo))),
        under_way: Mutex::default(),
        timeout: options.timeout,
    };
    Group::new(Box::new(transport), store, rank, size, options)
}

struct GlooTransport {
    /// Taken away by an abort, which closes the connections.
    gloo: Mutex<Option<Arc<Gloo>>>,
    under_way: Mutex<Vec<Weak<Message>>>,
    timeout: Duration,
}

impl GlooTransport {
    fn start(
        &self,
        peer: usize,
        is_sent: bool,
        start: impl FnOnce(&Gloo) -> torch_shim::Result<Message>,
    ) -> Result<Box<dyn Pending>> {
        let gloo = self.gloo.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let gloo =
            gloo.ok_or_else(|| CommError::lost(peer, "the connections are closed".to_string()))?;
        let message = Arc::new(start(&gloo).map_err(|error| lost_by(peer, &error))?);
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        under_way.retain(|message| message.strong_count() > 0);
        under_way.push(Arc::downgrade(&message));
        Ok(Box::new(OnItsWay { message, _gloo: gloo, peer, is_sent, timeout: self.timeout }))
    }
}

fn lost_by(peer: usize, error: &ShimError) -> CommError {
    CommError::lost(peer, error.to_string())
}

impl Transport for GlooTransport {
    fn send(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Box<dyn Pending>> {
        self.start(peer, true, |gloo| gloo.send(tensor, peer, tag))
    }

    fn recv(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Box<dyn Pending>> {
        self.start(peer, false, |gloo| gloo.recv(tensor, peer, tag))
    }

    fn tells_when_sent(&self) -> bool {
        false
    }

    fn waits_for_taker(&self) -> bool {
        // A sender announces a message, and its bytes go once the receiver has answered.
        true
    }

    fn abort(&self, _cause: &str) {
        let gloo = self.gloo.lock().unwrap_or_else(PoisonError::into_inner).take();
        let under_way =
            std::mem::take(&mut *self.under_way.lock().unwrap_or_else(PoisonError::into_inner));
        for message in under_way.iter().filter_map(Weak::upgrade) {
            // It may be through already; then there is nothing to end.
            let _ = message.abort();
        }
        drop(gloo);
    }
}

struct OnItsWay {
    // Fields drop in this order: a message must go before its connections.
    message: Arc<Message>,
    _gloo: Arc<Gloo>,
    peer: usize,
    is_sent: bool,
    timeout: Duration,
}

impl Pending for OnItsWay {
    fn wait(self: Box<Self>) -> Result<()> {
        let since = Instant::now();
        self.message.wait(self.timeout).map_err(|error| match since.elapsed() < self.timeout {
            true => lost_by(self.peer, &error),
            false => CommError::late(self.peer, self.is_sent, self.timeout),
        })
    }

    fn is_done(&self) -> bool {
        false
    }
}
