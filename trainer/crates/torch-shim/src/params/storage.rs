//! Memory of buffers that comes and goes, and how much of it there is.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};

use tch::Tensor;

use crate::error::Result;
use crate::result::{check, raw};
use crate::sys;

/// Memory that can be given back and taken again while views of it live on. The values are lost.
#[derive(Debug)]
pub struct Memory {
    tensor: Tensor,
    is_there: Arc<AtomicBool>,
    ledger: Arc<Ledger>,
}

impl Memory {
    pub(super) fn new(tensor: Tensor, ledger: &Arc<Ledger>) -> Self {
        ledger.add(bytes(&tensor));
        Self { tensor, is_there: Arc::new(AtomicBool::new(true)), ledger: ledger.clone() }
    }

    /// All of it: `[elements]`.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Another owner of the same memory.
    pub fn share(&self) -> Memory {
        Memory {
            tensor: self.tensor.shallow_clone(),
            is_there: self.is_there.clone(),
            ledger: self.ledger.clone(),
        }
    }

    /// Gives the memory back; what views it must not be read until it is taken again.
    ///
    /// # Errors
    /// When libtorch refuses.
    pub fn release(&self) -> Result<()> {
        // SAFETY: the tensor is all of its storage, and lives through the call.
        check(unsafe { sys::phx_storage_release(raw(&self.tensor)) })?;
        if self.is_there.swap(false, Relaxed) {
            self.ledger.now.fetch_sub(bytes(&self.tensor), Relaxed);
        }
        Ok(())
    }

    /// Takes memory, of any content; nothing happens where it is there.
    ///
    /// # Errors
    /// When memory is short.
    pub fn take(&self) -> Result<()> {
        // SAFETY: as above.
        check(unsafe { sys::phx_storage_allocate(raw(&self.tensor)) })?;
        if !self.is_there.swap(true, Relaxed) {
            self.ledger.add(bytes(&self.tensor));
        }
        Ok(())
    }
}

/// Bytes of memory of one kind that are there, and the most that there were at once.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    now: AtomicU64,
    peak: AtomicU64,
}

impl Ledger {
    /// The most that there were at once.
    pub(super) fn peak(&self) -> u64 {
        self.peak.load(Relaxed)
    }

    fn add(&self, bytes: u64) {
        let now = self.now.fetch_add(bytes, Relaxed) + bytes;
        self.peak.fetch_max(now, Relaxed);
    }
}

pub(super) fn bytes(tensor: &Tensor) -> u64 {
    (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64
}
