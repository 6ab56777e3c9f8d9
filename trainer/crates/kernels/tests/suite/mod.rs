//! Each kernel against its plain form, in FP64 from the same stored numbers: run on the CPU through
//! the emulation of a block's threads, and on a GPU as it is.
//!
//! **Tolerances** follow from the formats. A number that is stored in a format with unit roundoff
//! `u_T` (BF16 2^-8, FP32 2^-24, FP64 2^-53) after `k` roundings in the compute format (`u_W`) is
//! off by at most `u_T |y| + k u_W m`, where `m` is what the terms of `y` come to without
//! cancelling (Higham 2002, chapter 3; terms of second order are far smaller than what the counts
//! round up). A sum of `n` terms counts as many roundings as additions lie between a term and the
//! result. Each check states `k` and `m`. With FP64 the plain form errs as much, and the tolerance
//! is twice that.

pub mod accumulate;
pub mod cross_entropy;
pub mod cut_cross_entropy;
pub mod embedding;
pub mod fp8;
pub mod graph;
pub mod optimizer;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;

use kernels::{Kernels, Storage};
use torch_shim::tch::{self, Device, Kind, Tensor};

/// How large the shapes are that are tried.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// What an emulation gets through; every path and edge.
    Small,
    /// Besides, those of Llama 3 8B.
    Full,
}

/// Additions between a thread's sum and that of a block: 5 steps over a warp, twice.
pub const BLOCK_SUM: f64 = 10.0;
/// Below the smallest normal FP32 number, times what it may be multiplied by.
const UNDERFLOW: f64 = 1e-36;

/// Unit roundoff.
pub fn unit(storage: Storage) -> f64 {
    match storage {
        Storage::Bf16 => 2f64.powi(-8),
        Storage::Fp32 => 2f64.powi(-24),
        Storage::Fp64 => 2f64.powi(-53),
    }
}

/// The storage of what is computed with.
pub fn wide(storage: Storage) -> Storage {
    if storage == Storage::Fp64 { Storage::Fp64 } else { Storage::Fp32 }
}

/// A random tensor on the kernels' device, from the same seed for the same shape.
pub fn random(kernels: &Kernels, shape: &[i64], kind: Kind) -> Tensor {
    let values = Tensor::randn(shape, (Kind::Double, Device::Cpu));
    values.to_kind(kind).to_device(kernels.device())
}

/// The same numbers in FP64 on the CPU, in memory of their own.
pub fn exact(x: &Tensor) -> Tensor {
    x.detach().to_device(Device::Cpu).to_kind(Kind::Double).copy()
}

/// The same, as a leaf.
pub fn leaf(x: &Tensor) -> Tensor {
    exact(x).set_requires_grad(true)
}

/// Begins a case: the same random numbers whatever ran before.
pub fn begin() {
    tch::manual_seed(7);
}

/// Every element of `got`, stored as `storage` says, is within its tolerance of `want`: `roundings`
/// in the compute format on terms that come to `terms`. Returns the largest share of it that was
/// used.
pub fn close(
    name: &str,
    storage: Storage,
    (got, want): (&Tensor, &Tensor),
    (roundings, terms): (f64, &Tensor),
) -> f64 {
    assert_eq!(got.size(), want.size(), "{name}: shape");
    assert_eq!(got.kind(), storage.kind(), "{name}: dtype");
    if got.numel() == 0 {
        return 0.0;
    }
    let (got, want) = (exact(got), exact(want));
    let times = if storage == Storage::Fp64 { 2.0 } else { 1.0 };
    let wide_unit = unit(wide(storage));
    let tolerance = (want.abs() * unit(storage) + exact(terms) * (roundings * wide_unit)) * times;
    let share = (&got - &want).abs() / (tolerance + UNDERFLOW);
    let worst = share.max().double_value(&[]);
    if worst > 1.0 || worst.is_nan() {
        // A NaN counts as the largest.
        let at = share.nan_to_num(1e300, 1e300, 0.0).flatten(0, -1).argmax(0, false);
        let at = at.int64_value(&[]);
        let value = |x: &Tensor| x.flatten(0, -1).double_value(&[at]);
        panic!(
            "{name} {storage:?} {:?}: element {at} is {:e}, not {:e}: {worst:.3} of its tolerance",
            got.size(),
            value(&got),
            value(&want)
        );
    }
    worst
}

/// Every bit is the same.
pub fn same(name: &str, got: &Tensor, want: &Tensor) {
    assert_eq!(got.size(), want.size(), "{name}: shape");
    assert_eq!(got.kind(), want.kind(), "{name}: dtype");
    let (got, want) = (got.detach().to_device(Device::Cpu), want.detach().to_device(Device::Cpu));
    let bits = |x: &Tensor| match x.kind().elt_size_in_bytes() {
        1 => x.view_dtype(Kind::Uint8),
        2 => x.view_dtype(Kind::Int16),
        4 => x.view_dtype(Kind::Int),
        _ => x.view_dtype(Kind::Int64),
    };
    let (got_bits, want_bits) = (bits(&got.contiguous()), bits(&want.contiguous()));
    let other = got_bits.ne_tensor(&want_bits).sum(Kind::Int64).int64_value(&[]);
    assert_eq!(other, 0, "{name}: {other} elements have other bits");
}

/// A view of a larger buffer that begins `offset` elements into it: memory that is not aligned.
pub fn shifted(x: &Tensor, offset: i64) -> Tensor {
    let count = x.numel() as i64;
    let buffer = Tensor::zeros([count + offset], (x.kind(), x.device()));
    let mut view = buffer.narrow(0, offset, count).view(x.size().as_slice());
    view.copy_(x);
    view
}
