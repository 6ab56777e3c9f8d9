//! Layer 2: every call checked. Error texts become `ShimError`, raw tensors become owned ones,
//! closures cross safely.

use std::any::Any;
use std::ffi::{CStr, CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null_mut;

use tch::Tensor;

use crate::error::{Result, ShimError};
use crate::sys;
use crate::sys::{ErrorText, RawTensor};

/// Turns a returned text into an error, and frees it.
pub(crate) fn check(text: ErrorText) -> Result<()> {
    if text.is_null() {
        return Ok(());
    }
    // SAFETY: a non-null answer of the shim is a malloc'd, zero-terminated text that is ours to
    // free.
    let message = unsafe {
        let message = CStr::from_ptr(text).to_string_lossy().into_owned();
        sys::phx_free(text.cast());
        message
    };
    match message.strip_prefix(CLOSURE_MARK) {
        Some(closure) => Err(ShimError::Closure(closure.to_string())),
        None => Err(ShimError::Torch(message)),
    }
}

/// The pointer that the shim reads a tensor through.
pub(crate) fn raw(tensor: &Tensor) -> RawTensor {
    tensor.as_ptr().cast_mut()
}

/// The pointers of a list of tensors; they live as long as the tensors do.
pub(crate) fn raw_list<T: std::borrow::Borrow<Tensor>>(tensors: &[T]) -> Vec<RawTensor> {
    tensors.iter().map(|tensor| raw(tensor.borrow())).collect()
}

/// Takes over `N` tensors that `call` makes.
pub(crate) fn made<const N: usize>(
    call: impl FnOnce(*mut RawTensor) -> ErrorText,
) -> Result<[Tensor; N]> {
    let mut out = [null_mut(); N];
    check(call(out.as_mut_ptr()))?;
    Ok(out.map(|pointer| own(pointer).unwrap_or_default()))
}

/// Takes over one tensor that `call` makes.
pub(crate) fn made_one(call: impl FnOnce(*mut RawTensor) -> ErrorText) -> Result<Tensor> {
    made::<1>(call).map(|[tensor]| tensor)
}

/// Owns a tensor that the shim gave; null stands for an undefined one.
pub(crate) fn own(pointer: RawTensor) -> Option<Tensor> {
    // SAFETY: the shim gives away tensors that it made with `new`, each once.
    (!pointer.is_null()).then(|| unsafe { Tensor::from_ptr(pointer) })
}

/// A closure over tensors; `None` stands for an undefined tensor. Its second argument: how many
/// results are wanted.
pub(crate) type TensorClosure =
    Box<dyn FnMut(&[Option<Tensor>], usize) -> Result<Vec<Option<Tensor>>> + Send>;
/// A closure over a parameter's index.
pub(crate) type ReadyClosure = Box<dyn Fn(usize) -> Result<()> + Send>;

/// Marks texts that came out of a Rust closure, so that they are told apart from libtorch's own.
const CLOSURE_MARK: &str = "rust closure: ";

/// Boxes a closure for C++, to be dropped by `drop_tensor_closure`.
pub(crate) fn context(closure: TensorClosure) -> *mut c_void {
    Box::into_raw(Box::new(closure)).cast()
}

/// Boxes a ready closure for C++, to be dropped by `drop_ready_closure`.
pub(crate) fn ready_context(closure: ReadyClosure) -> *mut c_void {
    Box::into_raw(Box::new(closure)).cast()
}

pub(crate) unsafe extern "C" fn drop_tensor_closure(context: *mut c_void) {
    // SAFETY: `context` made this box, and C++ drops it once.
    drop(unsafe { Box::from_raw(context.cast::<TensorClosure>()) });
}

pub(crate) unsafe extern "C" fn drop_ready_closure(context: *mut c_void) {
    // SAFETY: `ready_context` made this box, and C++ drops it once.
    drop(unsafe { Box::from_raw(context.cast::<ReadyClosure>()) });
}

pub(crate) unsafe extern "C" fn call_tensor_closure(
    context: *mut c_void,
    inputs: *const RawTensor,
    num_in: usize,
    outputs: *mut RawTensor,
    num_out: usize,
) -> *mut c_char {
    let run = || -> Result<()> {
        // SAFETY: the context is a boxed closure that C++ calls from one thread at a time; `inputs`
        // holds `num_in` borrowed tensors or nulls (an empty list may have a null address).
        let (closure, inputs) = unsafe {
            let closure = &mut *context.cast::<TensorClosure>();
            let inputs =
                if num_in == 0 { &[][..] } else { std::slice::from_raw_parts(inputs, num_in) };
            let clone = |&p: &RawTensor| (!p.is_null()).then(|| Tensor::clone_from_ptr(p));
            (closure, inputs.iter().map(clone).collect::<Vec<_>>())
        };
        let results = closure(&inputs, num_out)?;
        if results.len() != num_out {
            let got = results.len();
            return Err(ShimError::Closure(format!(
                "returned {got} tensors where {num_out} are wanted"
            )));
        }
        for (slot, result) in results.into_iter().enumerate() {
            if let Some(mut tensor) = result {
                // SAFETY: `outputs` has `num_out` places; C++ takes over the tensor, so Rust
                // forgets it.
                unsafe { *outputs.add(slot) = tensor.as_mut_ptr() };
                std::mem::forget(tensor);
            }
        }
        Ok(())
    };
    answer(catch_unwind(AssertUnwindSafe(run)))
}

pub(crate) unsafe extern "C" fn call_ready_closure(
    context: *mut c_void,
    index: usize,
) -> *mut c_char {
    // SAFETY: the context is a boxed closure, which C++ calls under a lock.
    let run = || unsafe { (*context.cast::<ReadyClosure>())(index) };
    answer(catch_unwind(AssertUnwindSafe(run)))
}

/// Null, or a malloc'd text for C++ to throw.
pub(crate) fn answer(outcome: std::thread::Result<Result<()>>) -> *mut c_char {
    let text = match outcome {
        Ok(Ok(())) => return null_mut(),
        Ok(Err(error)) => error.to_string(),
        Err(panic) => format!("panic: {}", panic_text(panic.as_ref())),
    };
    let line = text.lines().next().unwrap_or("unknown error").replace('\0', " ");
    let marked =
        if line.starts_with(CLOSURE_MARK) { line } else { format!("{CLOSURE_MARK}{line}") };
    let text = CString::new(marked).unwrap_or_default();
    // SAFETY: the text is zero-terminated; C++ frees the copy.
    unsafe { sys::strdup(text.as_ptr()) }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_string())
}
