//! What a backend supplies: messages between two ranks.

use torch_shim::tch::Tensor;

use crate::error::Result;

/// A message on its way.
pub(crate) trait Pending: Send {
    /// Waits, at most for the transport's time-out.
    fn wait(self: Box<Self>) -> Result<()>;

    /// Whether a wait would return at once; may say no until waited for, unless it was sent over
    /// a transport that [`Transport::tells_when_sent`].
    fn is_done(&self) -> bool;
}

/// Messages between the ranks of one group. Those between two ranks with one tag keep their order.
/// Errors are those of [`crate::CommError::lost`], which leaves the rest to the caller.
pub(crate) trait Transport: Send + Sync {
    /// Starts to send a contiguous tensor of at least one element.
    fn send(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Box<dyn Pending>>;

    /// Starts to receive into a contiguous tensor of at least one element.
    fn recv(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Box<dyn Pending>>;

    /// An error where the transport knows, without a message, that a peer is gone.
    fn reachable(&self, _peer: usize) -> Result<()> {
        Ok(())
    }

    /// Whether [`Pending::is_done`] of a message that was sent ever says yes before it is waited
    /// for.
    fn tells_when_sent(&self) -> bool {
        true
    }

    /// Whether a message that was sent is through only once the peer has begun to take it.
    fn waits_for_taker(&self) -> bool {
        false
    }

    /// Ends all messages, here and at the peers, with an error.
    fn abort(&self, cause: &str);
}
