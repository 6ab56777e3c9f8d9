//! What the forward pass of an autograd function leaves for its backward pass.

use std::sync::{Arc, Mutex, PoisonError};

use torch_shim::{Result as ShimResult, ShimError};

/// A value that is put once and taken once; clones share it.
pub(crate) struct Slot<T>(Arc<Mutex<Option<T>>>);

impl<T> Slot<T> {
    pub(crate) fn new() -> Self {
        Slot(Arc::new(Mutex::new(None)))
    }

    pub(crate) fn share(&self) -> Self {
        Slot(self.0.clone())
    }

    pub(crate) fn put(&self, value: T) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
    }

    /// Takes the value: its memory is free as soon as the backward pass is done with it.
    pub(crate) fn take(&self) -> ShimResult<T> {
        let value = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        value.ok_or_else(|| ShimError::Closure("a second backward pass through a graph".into()))
    }
}
