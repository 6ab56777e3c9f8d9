//! A launch: which kernel, over how many blocks, on which tensors; and who carries it out.

use std::fmt;
use std::sync::Arc;

use torch_shim::tch::{Device, Kind, Tensor};

use crate::error::{KernelError, Result};
use crate::program::{Storage, Variant};

/// What a kernel does with a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads it.
    Read,
    /// Writes all of it, and does not read it.
    Write,
    /// Reads and writes it.
    Update,
}

/// One parameter of a kernel.
#[derive(Clone, Copy, Debug)]
pub enum Argument<'a> {
    /// The address of a tensor's first element.
    Tensor(&'a Tensor, Access),
    /// No address.
    Null,
    /// `int`.
    I32(i32),
    /// `long long`.
    I64(i64),
    /// `float`.
    F32(f32),
    /// `double`.
    F64(f64),
}

impl<'a> Argument<'a> {
    /// A tensor that is read, or none.
    pub fn read(tensor: impl Into<Option<&'a Tensor>>) -> Argument<'a> {
        tensor.into().map_or(Argument::Null, |tensor| Argument::Tensor(tensor, Access::Read))
    }

    /// A tensor that is written, or none.
    pub fn write(tensor: impl Into<Option<&'a Tensor>>) -> Argument<'a> {
        tensor.into().map_or(Argument::Null, |tensor| Argument::Tensor(tensor, Access::Write))
    }

    /// A tensor that is read and written, or none.
    pub fn update(tensor: impl Into<Option<&'a Tensor>>) -> Argument<'a> {
        tensor.into().map_or(Argument::Null, |tensor| Argument::Tensor(tensor, Access::Update))
    }

    /// Bytes from the first element of a tensor to the end of the one that lies farthest.
    pub fn extent(tensor: &Tensor) -> usize {
        if tensor.numel() == 0 {
            return 0;
        }
        let farthest: i64 = tensor
            .size()
            .iter()
            .zip(tensor.stride())
            .map(|(size, stride)| (size - 1) * stride)
            .sum();
        usize::try_from(farthest + 1).unwrap_or(0) * tensor.kind().elt_size_in_bytes()
    }
}

/// Blocks of a launch, and the threads of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// In x and y.
    pub blocks: (u32, u32),
    /// In x: a multiple of 32, at most 1024.
    pub threads: u32,
}

impl Grid {
    /// Blocks in one row.
    pub fn line(blocks: u32, threads: u32) -> Grid {
        Grid { blocks: (blocks, 1), threads }
    }
}

/// A kernel and its arguments.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The compiled source.
    pub variant: Variant,
    /// The kernel in it.
    pub kernel: &'static str,
    /// The blocks.
    pub grid: Grid,
    /// As many as the kernel has parameters.
    pub arguments: &'a [Argument<'a>],
}

/// Who carries launches out.
pub trait Executor: Send + Sync {
    /// Where the tensors are.
    fn device(&self) -> Device;

    /// How many blocks share out work of any size, where each multiprocessor should get `each`.
    fn sharing_blocks(&self, each: u32) -> u32;

    /// Carries a launch out, after what was issued before on the same stream.
    ///
    /// # Errors
    /// Where the kernel cannot be had, or the device refuses.
    ///
    /// # Safety
    /// The arguments are the kernel's parameters, in number and types, and the tensors are as
    /// large as it takes them to be.
    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()>;
}

/// The kernels of one device.
#[derive(Clone)]
pub struct Kernels {
    executor: Arc<dyn Executor>,
}

impl Kernels {
    /// Those that `executor` carries out.
    pub fn new(executor: Arc<dyn Executor>) -> Kernels {
        Kernels { executor }
    }

    /// Where the tensors are.
    pub fn device(&self) -> Device {
        self.executor.device()
    }

    /// Whether operators on this tensor use kernels: it is on the device, and FP32 or BF16. FP64 is
    /// for proofs, and has the plain form.
    pub fn takes(&self, tensor: &Tensor) -> bool {
        tensor.device() == self.device() && matches!(tensor.kind(), Kind::Float | Kind::BFloat16)
    }

    /// Blocks that take turns at `work` pieces: at most `each` a multiprocessor.
    pub(crate) fn share(&self, work: i64, each: u32) -> u32 {
        cover(work).min(self.executor.sharing_blocks(each)).max(1)
    }

    /// Carries a launch out.
    ///
    /// # Errors
    /// As [`Executor::launch`].
    ///
    /// # Safety
    /// As [`Executor::launch`].
    pub(crate) unsafe fn launch(
        &self,
        variant: Variant,
        kernel: &'static str,
        grid: Grid,
        arguments: &[Argument<'_>],
    ) -> Result<()> {
        let launch = Launch { variant, kernel, grid, arguments };
        // SAFETY: the caller's promise.
        unsafe { self.executor.launch(&launch) }
    }

    /// That a tensor is on the device, of this format and shape, and without gaps.
    pub(crate) fn check(
        &self,
        kernel: &'static str,
        name: &str,
        tensor: &Tensor,
        kind: Kind,
        shape: &[i64],
    ) -> Result<()> {
        let wrong = |what: &str, value: String, expected: String| {
            let what = format!("{what} of {name}");
            Err(KernelError::Argument { kernel, what, value, expected })
        };
        let (device, own) = (tensor.device(), self.device());
        if device != own {
            return wrong("the device", format!("{device:?}"), format!("{own:?}"));
        }
        if tensor.kind() != kind {
            return wrong("the dtype", format!("{:?}", tensor.kind()), format!("{kind:?}"));
        }
        if tensor.size() != shape {
            return wrong("the shape", format!("{:?}", tensor.size()), format!("{shape:?}"));
        }
        if !tensor.is_contiguous() {
            let strides = format!("strides {:?}", tensor.stride());
            return wrong("the memory", strides, "contiguous".into());
        }
        Ok(())
    }

    /// An uninitialised tensor on the device.
    pub(crate) fn empty(&self, shape: &[i64], kind: Kind) -> Result<Tensor> {
        Ok(Tensor::f_empty(shape, (kind, self.device()))?)
    }
}

impl fmt::Debug for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kernels on {:?}", self.device())
    }
}

/// Rows and width of a tensor whose last dimension is a row.
pub(crate) fn rows(kernel: &'static str, tensor: &Tensor) -> Result<(i64, i64)> {
    match tensor.size().split_last() {
        Some((&width, rows)) if width > 0 => Ok((rows.iter().product(), width)),
        _ => Err(KernelError::Argument {
            kernel,
            what: "the shape".into(),
            value: format!("{:?}", tensor.size()),
            expected: "rows of at least one element".into(),
        }),
    }
}

/// A number that a kernel takes as `int`.
pub(crate) fn int(kernel: &'static str, what: &str, value: i64) -> Result<i32> {
    i32::try_from(value).map_err(|_| KernelError::Argument {
        kernel,
        what: what.into(),
        value: value.to_string(),
        expected: format!("at most {}", i32::MAX),
    })
}

/// Blocks that take one of `work` pieces each.
pub(crate) fn cover(work: i64) -> u32 {
    u32::try_from(work.max(1)).unwrap_or(u32::MAX)
}

/// How many pieces of a size cover `count`.
pub(crate) fn pieces(count: i64, size: i64) -> i64 {
    (count + size - 1) / size
}

/// `value` rounded up to whole warps, between one and `most` threads.
pub(crate) fn threads(value: i64, most: u32) -> u32 {
    let whole = u32::try_from(value.clamp(1, 1024)).unwrap_or(1024).next_multiple_of(32);
    whole.min(most)
}

/// The variant for a tensor of a program that does not ask for items.
pub(crate) fn plain(program: &'static crate::Program, storage: Storage) -> Variant {
    Variant { program, storage, items: 0 }
}
