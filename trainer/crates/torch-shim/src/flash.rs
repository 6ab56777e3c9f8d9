//! Causal attention by kernels that never make the scores, over documents of any length: what GPUs
//! compute with.
//!
//! Rows that hold several documents are one line of tokens, with the places at which documents
//! begin: no token is computed against another document's, and none is padded. The kernels are
//! libtorch's; [`Kernel::Plain`] does the same slowly on any device, so that all around them is
//! tested without a GPU.
//!
//! Shapes: `B` batch, `S` sequence, `T` = B S tokens, `H` query heads, `K` key and value heads,
//! `E` head_dim.
#![expect(non_snake_case, reason = "tensor variables end in their shape, one letter a dimension")]

mod plain;

use std::ptr::null_mut;
use std::sync::{Arc, Mutex, PoisonError};

use tch::{Device, Kind, Tensor};

use crate::autograd;
use crate::cuda::upload;
use crate::error::{Result, ShimError};
use crate::fused::Documents;
use crate::result::{made, raw};
use crate::sys;

/// Who computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kernel {
    /// FlashAttention 2, of libtorch (Dao 2023).
    #[default]
    Flash,
    /// cuDNN's.
    Cudnn,
    /// The formulas, one after another: a reference.
    Plain,
}

/// Where documents lie in the tokens of all rows, one row after another.
#[derive(Debug)]
pub struct Packed {
    /// The first token of each, and the end of the last: int32 `[documents + 1]`, on the device.
    starts: Tensor,
    /// Tokens of the longest.
    longest: i64,
}

impl Packed {
    /// Of `batch` rows of `sequence` tokens, on `device`; the host does not wait. `None` where each
    /// row is one document.
    ///
    /// # Errors
    /// When the documents are not those of so many rows of that length.
    pub fn new(
        documents: &Documents,
        batch: i64,
        sequence: i64,
        device: Device,
    ) -> Result<Option<Self>> {
        documents.check(batch, sequence)?;
        if documents.is_causal() {
            return Ok(None);
        }
        let too_many = || ShimError::Invalid(format!("{batch} rows of {sequence} tokens"));
        let mut starts = vec![0_i32];
        let (mut at, mut longest) = (0, 0);
        for length in documents.rows().iter().flatten() {
            at += length;
            longest = longest.max(*length);
            starts.push(i32::try_from(at).map_err(|_| too_many())?);
        }
        let starts = upload(&Tensor::f_from_slice(&starts)?, device)?;
        Ok(Some(Self { starts, longest }))
    }

    /// Another owner of the same.
    pub fn share(&self) -> Self {
        Self { starts: self.starts.shallow_clone(), longest: self.longest }
    }
}

/// Whether the kernels take heads of this kind and width; the others are [`crate::fused`]'s.
pub fn takes(query_BHSE: &Tensor) -> bool {
    let width = query_BHSE.size().last().copied().unwrap_or(0);
    let is_half = matches!(query_BHSE.kind(), Kind::BFloat16 | Kind::Half);
    is_half && width > 0 && width <= 256 && width % 8 == 0
}

/// What the forward pass leaves.
struct Kept {
    /// Queries, keys, values, in the form that the kernel takes.
    inputs: [Tensor; 3],
    /// Attention, the logarithms of the sums of exponentials, and two that only the kernel knows.
    made: [Tensor; 4],
}

/// Causal attention within documents, of `[B, H, S, E]` queries and `[B, K, S, E]` keys and values:
/// `[B, S, H * E]`. `packed` says where documents lie; none: each row is one.
///
/// # Errors
/// When the shapes do not fit, or the kernel refuses.
pub fn attention(
    kernel: Kernel,
    query_BHSE: &Tensor,
    key_BKSE: &Tensor,
    value_BKSE: &Tensor,
    packed: Option<&Packed>,
) -> Result<Tensor> {
    let (batch, heads, sequence, width) = query_BHSE.size4()?;
    let packed = packed.map(Packed::share);
    // Within the function, gradients are off.
    let is_recording = autograd::is_recording();
    let slot = Arc::new(Mutex::new(None));
    let (kept, by) = (slot.clone(), packed.as_ref().map(Packed::share));
    let forward = move |inputs: &[Option<Tensor>]| {
        let input = |index: usize| -> Result<Tensor> {
            let x_BHSE = inputs.get(index).and_then(Option::as_ref);
            let x_BHSE = x_BHSE.ok_or_else(|| ShimError::Closure("no tensor".into()))?;
            by_token(&x_BHSE.f_detach()?, by.is_some())
        };
        let inputs = [input(0)?, input(1)?, input(2)?];
        let made = run_forward(kernel, &inputs, by.as_ref(), sequence)?;
        let out = made[0].f_reshape([batch, sequence, heads * width])?;
        if is_recording {
            *kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(Kept { inputs, made });
        }
        Ok(vec![out])
    };
    let backward = move |gradients: &[Option<Tensor>]| {
        let missing = || ShimError::Closure("attention has no gradient, or is run again".into());
        let kept = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
        let kept = kept.ok_or_else(missing)?;
        let d_out = gradients.first().and_then(Option::as_ref).ok_or_else(missing)?;
        let d_out = d_out.f_reshape(kept.made[0].size())?;
        let gradients = run_backward(kernel, &d_out, &kept, packed.as_ref(), sequence)?;
        let by_head = |dx: &Tensor| -> Result<Option<Tensor>> {
            let heads = dx.size().iter().rev().nth(1).copied().unwrap_or(1);
            Ok(Some(dx.f_reshape([batch, sequence, heads, width])?.f_transpose(1, 2)?))
        };
        gradients.iter().map(by_head).collect()
    };
    let outputs = autograd::apply(&[query_BHSE, key_BKSE, value_BKSE], 1, forward, backward)?;
    outputs.into_iter().next().ok_or_else(|| ShimError::Closure("no attention".into()))
}

/// `[B, S, H, E]`, as it lies in memory, or the tokens of all rows, `[T, H, E]`.
fn by_token(x_BHSE: &Tensor, is_packed: bool) -> Result<Tensor> {
    let x_BSHE = x_BHSE.f_transpose(1, 2)?;
    if !is_packed {
        return Ok(x_BSHE.f_contiguous()?);
    }
    let (batch, sequence, heads, width) = x_BSHE.size4()?;
    Ok(x_BSHE.f_reshape([batch * sequence, heads, width])?.f_contiguous()?)
}

fn number(kernel: Kernel) -> i32 {
    match kernel {
        Kernel::Flash | Kernel::Plain => 0,
        Kernel::Cudnn => 1,
    }
}

fn run_forward(
    kernel: Kernel,
    inputs: &[Tensor; 3],
    packed: Option<&Packed>,
    sequence: i64,
) -> Result<[Tensor; 4]> {
    if kernel == Kernel::Plain {
        return plain::forward(inputs, packed.map(|packed| &packed.starts));
    }
    let (starts, longest) = places(packed, sequence);
    let [q, k, v] = [0, 1, 2].map(|index| raw(&inputs[index]));
    // SAFETY: the tensors live through the call, which makes four; null stands for no places.
    made::<4>(|out| unsafe {
        sys::phx_flash_forward(number(kernel), q, k, v, starts, longest, out)
    })
}

fn run_backward(
    kernel: Kernel,
    d_out: &Tensor,
    kept: &Kept,
    packed: Option<&Packed>,
    sequence: i64,
) -> Result<[Tensor; 3]> {
    if kernel == Kernel::Plain {
        let starts = packed.map(|packed| &packed.starts);
        return plain::backward(d_out, &kept.inputs, &kept.made, starts);
    }
    let (starts, longest) = places(packed, sequence);
    let [q, k, v] = [0, 1, 2].map(|index| raw(&kept.inputs[index]));
    let made_before = [0, 1, 2, 3].map(|index| raw(&kept.made[index]));
    let d_out = d_out.f_contiguous()?;
    // SAFETY: the tensors live through the call, which makes three; null stands for no places.
    made::<3>(|out| unsafe {
        sys::phx_flash_backward(
            number(kernel),
            raw(&d_out),
            q,
            k,
            v,
            made_before.as_ptr(),
            starts,
            longest,
            out,
        )
    })
}

fn places(packed: Option<&Packed>, sequence: i64) -> (sys::RawTensor, i64) {
    packed.map_or((null_mut(), sequence), |packed| (raw(&packed.starts), packed.longest))
}

/// Whether a kernel computes what [`Kernel::Plain`] does, on this device and for heads like these,
/// each way and with the same bits twice: `None`; or what is wrong with it. For short rows, with
/// documents where `is_packed`.
///
/// # Errors
/// When the reference itself cannot be computed.
pub fn misbehaviour(
    kernel: Kernel,
    (heads, kv_heads, width): (i64, i64, i64),
    device: Device,
    is_packed: bool,
) -> Result<Option<String>> {
    let (batch, sequence) = (2, 256);
    let documents = match is_packed {
        true => Documents::from_lengths(vec![vec![1, 130, 125], vec![200, 56]]),
        false => Documents::causal(),
    };
    let packed = Packed::new(&documents, batch, sequence, device)?;
    let values = |heads: i64, seed: f64| -> Result<Tensor> {
        let count = batch * sequence * heads * width;
        // No two rows are alike, and no random generator is touched.
        let numbers = Tensor::f_arange(count, (Kind::Double, Device::Cpu))?;
        let numbers = numbers.f_mul_scalar(0.731 + seed)?.f_sin()?.f_to_kind(Kind::BFloat16)?;
        let numbers = numbers.f_view([batch, sequence, heads, width])?;
        Ok(numbers.f_to_device(device)?.f_transpose(1, 2)?)
    };
    let inputs = [values(heads, 0.0)?, values(kv_heads, 0.1)?, values(kv_heads, 0.2)?];
    let d_out = values(heads, 0.3)?.f_transpose(1, 2)?.f_reshape([batch, sequence, -1])?;
    let run = |kernel: Kernel| -> Result<Vec<Tensor>> {
        let leaf = |x: &Tensor| x.f_detach()?.f_set_requires_grad(true);
        let [q, k, v] = [leaf(&inputs[0])?, leaf(&inputs[1])?, leaf(&inputs[2])?];
        let out = attention(kernel, &q, &k, &v, packed.as_ref())?;
        let gradients = autograd::gradients(&[&out], &[&d_out], &[&q, &k, &v], false)?;
        Ok(std::iter::once(out.f_detach()?).chain(gradients.into_iter().flatten()).collect())
    };
    let expected = run(Kernel::Plain)?;
    let found = match run(kernel).and_then(|first| Ok((first, run(kernel)?))) {
        Ok(found) => found,
        Err(error) => return Ok(Some(error.to_string())),
    };
    compare(&found, &expected)
}

/// BF16 keeps 8 bits, and each of two products and the softmax between them rounds: a few parts in
/// a hundred are an error, and no rounding.
const LIMIT: f64 = 0.02;

fn compare(
    (first, second): &(Vec<Tensor>, Vec<Tensor>),
    expected: &[Tensor],
) -> Result<Option<String>> {
    let names = ["values", "gradients of queries", "gradients of keys", "gradients of values"];
    for (index, name) in names.into_iter().enumerate() {
        let of = |all: &[Tensor]| -> Result<Tensor> {
            let missing = || ShimError::Invalid(format!("no {name}"));
            Ok(all.get(index).ok_or_else(missing)?.f_to_kind(Kind::Double)?)
        };
        let (found, again, expected) = (of(first)?, of(second)?, of(expected)?);
        let difference = found.f_sub(&expected)?.f_norm()?.f_double_value(&[])?;
        let relative = difference / expected.f_norm()?.f_double_value(&[])?;
        if relative.is_nan() || relative > LIMIT {
            return Ok(Some(format!("its {name} are off by {relative:.1e}")));
        }
        if !found.f_equal(&again)? {
            return Ok(Some(format!("its {name} are not the same twice")));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests;
