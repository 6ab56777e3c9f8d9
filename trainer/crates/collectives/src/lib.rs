//! Collective operations between the ranks of a group.
//!
//! [`Communicator`] is the interface; [`nccl`] (GPUs), [`gloo`] (processes, CPU), `mpi` (processes
//! that `mpirun` started; feature `mpi`) and [`local`] (threads of one process, for tests) are its
//! backends. All but NCCL carry messages only: the algorithms in `ring` run on top of each, with a
//! fixed order of summation, so that a result depends on the group's size and nothing else.
//! [`conformance`] is the one suite that every backend passes.

mod agreement;
mod backend;
mod circle;
pub mod conformance;
mod error;
pub mod gloo;
mod group;
pub mod local;
#[cfg(feature = "mpi")]
pub mod mpi;
pub mod nccl;
mod ring;
mod transport;
mod whereabouts;
mod work;

use torch_shim::tch::{Device, Tensor};

pub use agreement::Check;
pub use error::{CommError, Result};
pub use group::{Group, GroupOptions};
pub use whereabouts::Whereabouts;
pub use work::{Work, waited};

/// How the tensors of the ranks become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReduceOp {
    /// The sum over ranks.
    Sum,
    /// The sum divided by the number of ranks; not for integers.
    Avg,
    /// The smallest; a NaN wins.
    Min,
    /// The largest; a NaN wins.
    Max,
}

/// One rank's end of a group of ranks.
///
/// Every rank issues the same collectives in the same order; each returns at once, and runs in the
/// order of issue. Until its [`Work`] is waited for, inputs must not be written and outputs not
/// read. Tensors are contiguous, on the group's device, of f32, f64, bf16 or i64. After a failure
/// every later operation fails too: the group is dead, and a new generation takes its place.
pub trait Communicator: Send + Sync {
    /// This rank's number in the group.
    fn rank(&self) -> usize;

    /// The number of ranks in the group.
    fn size(&self) -> usize;

    /// The device of the tensors that it takes.
    fn device(&self) -> Device;

    /// Whether nothing has failed so far. On a GPU a failure shows here only: to be asked once the
    /// host has read what a step came to, before it is believed.
    ///
    /// # Errors
    /// The first cause, when the group is dead.
    fn alive(&self) -> Result<()>;

    /// Reduces `tensor` over the ranks, in place, to the same bits on every rank.
    ///
    /// # Errors
    /// When the tensor or operation is not supported, or the group is dead.
    fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work>;

    /// Puts the ranks' `input`s side by side into `output`, in the order of ranks.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`], and when `output` does not hold `size` inputs.
    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work>;

    /// Reduces `input` over the ranks; rank r keeps the r-th of `size` equal pieces in `output`.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`], and when `input` does not hold `size` outputs.
    fn reduce_scatter(&self, output: &Tensor, input: &Tensor, op: ReduceOp) -> Result<Work>;

    /// Copies the root's `tensor` to all ranks.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`], and when there is no such root.
    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work>;

    /// Sends `tensor` to one rank, which receives it with the same tag (below 65,536). Messages
    /// between two ranks with one tag keep their order.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`], and when there is no such peer.
    fn send(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Work>;

    /// Receives what `peer` sends with this tag.
    ///
    /// # Errors
    /// As [`Communicator::send`].
    fn recv(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Work>;

    /// Sends the p-th of `size` equal pieces of `input` to rank p, and puts what comes from rank p
    /// into the p-th of `output`.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`], and when the pieces are not equal.
    fn all_to_all(&self, output: &Tensor, input: &Tensor) -> Result<Work>;

    /// Is done when every rank has come to it.
    ///
    /// # Errors
    /// When the group is dead.
    fn barrier(&self) -> Result<Work>;

    /// Ends every operation under way, here and (through the closing connections) at the peers,
    /// with an error.
    fn abort(&self);

    /// Bytes of tensors that this rank has sent so far.
    fn bytes_sent(&self) -> u64;
}
