//! What a backend supplies: messages between two ranks.

use torch_shim::tch::Tensor;

use crate::error::Result;

/// A message on its way.
pub(crate) trait Pending: Send {
    /// Waits, at most for the transport's time-out.
    fn wait(self: Box<Self>) -> Result<()>;

    /// Whether a wait would return at once; may say no until waited for.
    fn is_done(&self) -> bool;
}

/// Messages between the ranks of one group. Those between two ranks with one tag keep their order.
/// Errors name the peer and the transport's own words, and leave the rest of a
/// [`crate::CommError::Peer`] to the caller.
pub(crate) trait Transport: Send + Sync {
    /// Starts to send a contiguous tensor of at least one element.
    fn send(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Box<dyn Pending>>;

    /// Starts to receive into a contiguous tensor of at least one element.
    fn recv(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Box<dyn Pending>>;

    /// An error where the transport knows, without a message, that a peer is gone.
    fn reachable(&self, _peer: usize) -> Result<()> {
        Ok(())
    }

    /// Ends all messages, here and at the peers, with an error.
    fn abort(&self, cause: &str);
}
