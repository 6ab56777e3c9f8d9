//! Gloo out of libtorch: messages between the ranks of a group, over a store that lives in Rust.

use std::ffi::{CStr, CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null_mut;
use std::sync::Arc;
use std::time::Duration;

use tch::Tensor;

use crate::error::{Result, ShimError};
use crate::result::{answer, check, raw};
use crate::sys::{self, ErrorText, Push, RawGloo, RawMessage, StoreCalls};

/// A key-value store that all ranks of a run share; Gloo finds its peers through it.
pub trait StoreBackend: Send + Sync {
    /// Sets a key.
    ///
    /// # Errors
    /// When the store cannot be reached.
    fn set(&self, key: &str, value: &[u8]) -> Result<()>;

    /// Waits for a key, and returns its value.
    ///
    /// # Errors
    /// When the key is not there in time, or the store cannot be reached.
    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>>;

    /// Adds to a counter (0 where absent) and returns the sum.
    ///
    /// # Errors
    /// When the value is no number, or the store cannot be reached.
    fn add(&self, key: &str, delta: i64) -> Result<i64>;

    /// Waits until all keys are there.
    ///
    /// # Errors
    /// When one is not there in time, or the store cannot be reached.
    fn wait(&self, keys: &[String], timeout: Duration) -> Result<()>;

    /// Whether all keys are there now.
    ///
    /// # Errors
    /// When the store cannot be reached.
    fn check(&self, keys: &[String]) -> Result<bool>;

    /// Deletes a key; whether it was there.
    ///
    /// # Errors
    /// When the store cannot be reached.
    fn delete(&self, key: &str) -> Result<bool>;
}

type Backend = Arc<dyn StoreBackend>;

/// The store that Gloo calls: a Rust [`StoreBackend`], with a prefix for all its keys.
#[derive(Clone)]
pub struct Store {
    backend: Backend,
    prefix: String,
}

impl Store {
    /// A store over `backend`, without a prefix.
    pub fn new(backend: impl Into<Arc<dyn StoreBackend>>) -> Self {
        Store { backend: backend.into(), prefix: String::new() }
    }

    /// The same store, with `prefix/` before every key (generation and group, so that nothing stale
    /// is read).
    #[must_use]
    pub fn with_prefix(&self, prefix: &str) -> Self {
        Store { backend: self.backend.clone(), prefix: format!("{}{prefix}/", self.prefix) }
    }

    fn key(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// Sets a key.
    ///
    /// # Errors
    /// As [`StoreBackend::set`].
    pub fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        self.backend.set(&self.key(key), value)
    }

    /// Waits for a key.
    ///
    /// # Errors
    /// As [`StoreBackend::get`].
    pub fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>> {
        self.backend.get(&self.key(key), timeout)
    }

    /// A key's value, where it is there now.
    ///
    /// # Errors
    /// When the store cannot be reached.
    pub fn find(&self, key: &str) -> Result<Option<Vec<u8>>> {
        let key = self.key(key);
        if !self.backend.check(std::slice::from_ref(&key))? {
            return Ok(None);
        }
        self.backend.get(&key, Duration::from_secs(1)).map(Some)
    }
}

/// The connections of one rank to all others of a group.
pub struct Gloo(*mut RawGloo);

// SAFETY: c10d's process group is counted atomically and locks its connections.
unsafe impl Send for Gloo {}
// SAFETY: as above: send and recv may be called from several threads.
unsafe impl Sync for Gloo {}

impl Gloo {
    /// Connects to all ranks of the group through the store. `hostname` is this rank's own address,
    /// as others reach it.
    ///
    /// # Errors
    /// When the others do not come within `timeout`, or the address cannot be bound.
    pub fn connect(
        store: Store,
        rank: usize,
        size: usize,
        timeout: Duration,
        hostname: &str,
    ) -> Result<Gloo> {
        let hostname = CString::new(hostname)?;
        let context = Box::into_raw(Box::new(store)).cast::<c_void>();
        let mut gloo = null_mut();
        // SAFETY: the shim owns the context from here on; the texts live through the call.
        check(unsafe {
            let (rank, size, timeout) = (rank as i32, size as i32, milliseconds(timeout));
            sys::phx_gloo_new(context, &CALLS, rank, size, timeout, hostname.as_ptr(), &mut gloo)
        })?;
        Ok(Gloo(gloo))
    }

    /// Starts to send a contiguous tensor.
    ///
    /// # Errors
    /// When the peer is gone.
    pub fn send(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Message> {
        let mut message = null_mut();
        // SAFETY: the message keeps the tensor alive until it is freed.
        check(unsafe {
            sys::phx_gloo_send(self.0, raw(tensor), peer as i32, tag as i32, &mut message)
        })?;
        Ok(Message(message))
    }

    /// Starts to receive into a contiguous tensor.
    ///
    /// # Errors
    /// When the peer is gone.
    pub fn recv(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Message> {
        let mut message = null_mut();
        // SAFETY: the message keeps the tensor alive until it is freed.
        check(unsafe {
            sys::phx_gloo_recv(self.0, raw(tensor), peer as i32, tag as i32, &mut message)
        })?;
        Ok(Message(message))
    }
}

impl Drop for Gloo {
    fn drop(&mut self) {
        // SAFETY: this is the only owner; the connections close.
        unsafe { sys::phx_gloo_free(self.0) }
    }
}

/// A message on its way. Waited for by one thread, aborted from any.
pub struct Message(*mut RawMessage);

// SAFETY: the C++ work is counted atomically, and abort is made for another thread than the waiting
// one.
unsafe impl Send for Message {}
// SAFETY: as above.
unsafe impl Sync for Message {}

impl Message {
    /// Waits until the message is through.
    ///
    /// # Errors
    /// When the peer is gone, the time is up, or the message was aborted.
    pub fn wait(&self, timeout: Duration) -> Result<()> {
        // SAFETY: the message is alive with `self`.
        check(unsafe { sys::phx_message_wait(self.0, milliseconds(timeout)) })
    }

    /// Ends a wait in another thread with an error.
    ///
    /// # Errors
    /// When libtorch refuses.
    pub fn abort(&self) -> Result<()> {
        // SAFETY: the message is alive with `self`.
        check(unsafe { sys::phx_message_abort(self.0) })
    }
}

impl Drop for Message {
    fn drop(&mut self) {
        // SAFETY: this is the only owner.
        unsafe { sys::phx_message_free(self.0) }
    }
}

fn milliseconds(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX).max(1)
}

fn duration(milliseconds: i64) -> Duration {
    Duration::from_millis(u64::try_from(milliseconds).unwrap_or(0))
}

static CALLS: StoreCalls =
    StoreCalls { set, get, add, wait, check: check_keys, remove, drop: drop_store };

/// Runs one call of the store; a panic becomes an error.
fn call(run: impl FnOnce() -> Result<()>) -> ErrorText {
    answer(catch_unwind(AssertUnwindSafe(run)))
}

/// # Safety
/// `context` is a boxed [`Store`] and `key` a zero-terminated text, both alive through the call.
unsafe fn open<'a>(context: *mut c_void, key: *const c_char) -> Result<(&'a Store, &'a str)> {
    // SAFETY: as the caller promises.
    let (store, key) = unsafe { (&*context.cast::<Store>(), CStr::from_ptr(key)) };
    let key =
        key.to_str().map_err(|error| ShimError::Invalid(format!("a store's key: {error}")))?;
    Ok((store, key))
}

/// # Safety
/// As [`open`], for `count` keys.
unsafe fn open_all<'a>(
    context: *mut c_void,
    keys: *const *const c_char,
    count: usize,
) -> Result<(&'a Store, Vec<String>)> {
    // SAFETY: as the caller promises.
    let store = unsafe { &*context.cast::<Store>() };
    let key = |index| {
        // SAFETY: as the caller promises.
        let (_, key) = unsafe { open(context, *keys.add(index)) }?;
        Ok(store.key(key))
    };
    Ok((store, (0..count).map(key).collect::<Result<_>>()?))
}

unsafe extern "C" fn set(
    context: *mut c_void,
    key: *const c_char,
    data: *const u8,
    length: usize,
) -> ErrorText {
    call(|| {
        // SAFETY: C++ passes the context that it was given, a text and `length` bytes.
        let (store, key, value) = unsafe {
            let (store, key) = open(context, key)?;
            (
                store,
                key,
                if length == 0 { &[][..] } else { std::slice::from_raw_parts(data, length) },
            )
        };
        store.set(key, value)
    })
}

unsafe extern "C" fn get(
    context: *mut c_void,
    key: *const c_char,
    timeout_ms: i64,
    sink: *mut c_void,
    push: Push,
) -> ErrorText {
    call(|| {
        // SAFETY: C++ passes the context that it was given and a text.
        let (store, key) = unsafe { open(context, key) }?;
        let value = store.get(key, duration(timeout_ms))?;
        // SAFETY: C++ copies the bytes during the call.
        unsafe { push(sink, value.as_ptr(), value.len()) };
        Ok(())
    })
}

unsafe extern "C" fn add(
    context: *mut c_void,
    key: *const c_char,
    delta: i64,
    out: *mut i64,
) -> ErrorText {
    call(|| {
        // SAFETY: C++ passes the context that it was given, a text and a place for the answer.
        unsafe {
            let (store, key) = open(context, key)?;
            *out = store.backend.add(&store.key(key), delta)?;
        }
        Ok(())
    })
}

unsafe extern "C" fn wait(
    context: *mut c_void,
    keys: *const *const c_char,
    count: usize,
    timeout_ms: i64,
) -> ErrorText {
    call(|| {
        // SAFETY: C++ passes the context that it was given and `count` texts.
        let (store, keys) = unsafe { open_all(context, keys, count) }?;
        store.backend.wait(&keys, duration(timeout_ms))
    })
}

unsafe extern "C" fn check_keys(
    context: *mut c_void,
    keys: *const *const c_char,
    count: usize,
    out: *mut bool,
) -> ErrorText {
    call(|| {
        // SAFETY: C++ passes the context that it was given, `count` texts and a place for the
        // answer.
        unsafe {
            let (store, keys) = open_all(context, keys, count)?;
            *out = store.backend.check(&keys)?;
        }
        Ok(())
    })
}

unsafe extern "C" fn remove(context: *mut c_void, key: *const c_char, out: *mut bool) -> ErrorText {
    call(|| {
        // SAFETY: C++ passes the context that it was given, a text and a place for the answer.
        unsafe {
            let (store, key) = open(context, key)?;
            *out = store.backend.delete(&store.key(key))?;
        }
        Ok(())
    })
}

unsafe extern "C" fn drop_store(context: *mut c_void) {
    // SAFETY: `connect` made this box, and C++ drops it once.
    drop(unsafe { Box::from_raw(context.cast::<Store>()) });
}
