//! A communicator that tells a test of each operation before it is issued.

use collectives::{CommError, Communicator, ReduceOp, Work};
use std::sync::Arc;
use torch_shim::tch::{Device, Tensor};

/// An operation that a rank is about to issue.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// The rank's number in the run.
    pub rank: usize,
    /// The group's name in the run (`shard-0`).
    pub group: &'a str,
    /// The operation's name (`all_reduce`).
    pub operation: &'static str,
}

/// Is told of each call; what it returns takes the operation's place.
pub type Tap = dyn Fn(Call<'_>) -> Option<Work> + Send + Sync;

/// A group with a tap.
pub struct Tapped {
    /// The group.
    pub group: Arc<dyn Communicator>,
    /// Its name in the run.
    pub name: String,
    /// The rank's number in the run.
    pub rank: usize,
    /// The tap.
    pub tap: Arc<Tap>,
}

impl Tapped {
    fn issue(
        &self,
        operation: &'static str,
        issue: impl FnOnce() -> Result<Work, CommError>,
    ) -> Result<Work, CommError> {
        let call = Call { rank: self.rank, group: &self.name, operation };
        (self.tap)(call).map_or_else(issue, Ok)
    }
}

impl Communicator for Tapped {
    fn rank(&self) -> usize {
        self.group.rank()
    }

    fn size(&self) -> usize {
        self.group.size()
    }

    fn device(&self) -> Device {
        self.group.device()
    }

    fn alive(&self) -> Result<(), CommError> {
        self.group.alive()
    }

    fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work, CommError> {
        self.issue("all_reduce", || self.group.all_reduce(tensor, op))
    }

    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work, CommError> {
        self.issue("all_gather", || self.group.all_gather(output, input))
    }

    fn reduce_scatter(
        &self,
        output: &Tensor,
        input: &Tensor,
        op: ReduceOp,
    ) -> Result<Work, CommError> {
        self.issue("reduce_scatter", || self.group.reduce_scatter(output, input, op))
    }

    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work, CommError> {
        self.issue("broadcast", || self.group.broadcast(tensor, root))
    }

    fn send(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Work, CommError> {
        self.issue("send", || self.group.send(tensor, peer, tag))
    }

    fn recv(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Work, CommError> {
        self.issue("recv", || self.group.recv(tensor, peer, tag))
    }

    fn all_to_all(&self, output: &Tensor, input: &Tensor) -> Result<Work, CommError> {
        self.issue("all_to_all", || self.group.all_to_all(output, input))
    }

    fn barrier(&self) -> Result<Work, CommError> {
        self.issue("barrier", || self.group.barrier())
    }

    fn abort(&self) {
        self.group.abort();
    }

    fn bytes_sent(&self) -> u64 {
        self.group.bytes_sent()
    }
}
