//! What a collective inside the graph failed with.
//!
//! An error of an autograd function comes out of libtorch as text. The collective's own error,
//! which names the peer, is kept here on the way, and takes the text's place.

use std::sync::{Arc, Mutex, PoisonError};

use collectives::CommError;
use torch_shim::ShimError;

/// The first failure of a rank's collectives; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Failure(Arc<Mutex<Option<CommError>>>);

impl Failure {
    /// Keeps an error, and makes what libtorch carries.
    pub(crate) fn keep(&self, error: CommError) -> ShimError {
        let text = error.to_string();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        ShimError::Closure(text)
    }

    /// The failure, where there was one.
    pub fn take(&self) -> Option<CommError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
