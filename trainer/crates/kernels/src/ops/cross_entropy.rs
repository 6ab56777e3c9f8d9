//! Cross-entropy over a chunk of logits, and the output head around it: the full logits never
//! exist.
//!
//! Shapes: `N` positions, `D` model width, `V` vocabulary.

use torch_shim::params::Parameter;
use torch_shim::tch::{Device, Kind, Reduction, Tensor};
use torch_shim::uses::{Use, product, project};
use torch_shim::{Result as ShimResult, ShimError, autograd, fused};

use super::{exactly, expect, given};
use crate::error::Result;
use crate::launch::{Argument, Grid, Kernels, int, pieces, plain, rows, threads};
use crate::program::{Program, Storage};

pub(super) const KERNEL: &str = "cross_entropy";

/// The CUDA source.
pub static PROGRAM: Program = Program {
    name: KERNEL,
    source: include_str!("cross_entropy.cu"),
    kernels: &[KERNEL, "cut_gauge", "cut_rescale", "cut_cross_entropy"],
    storages: Storage::ALL,
    items: &[],
};

/// Stands for no target.
pub const NO_TARGET: i64 = -100;
const MAX_THREADS: u32 = 1024;
/// Blocks of a multiprocessor: rows beyond those that lie in the L2 cache at once are left for
/// later.
const BLOCKS: u32 = 2;

/// The cross-entropy of each row of `logits`, `[N, V]`, at `targets`, `[N]` int64: `[N]`, FP32
/// (FP64 for FP64), 0 where the target is [`NO_TARGET`], and NaN where it lies outside the
/// vocabulary. With `gradients`, `logits` become `scale * (softmax(logits) - onehot(target))`. No
/// graph.
///
/// # Errors
/// Where the tensors do not fit, or the launch fails.
pub fn cross_entropy(
    kernels: &Kernels,
    logits: &Tensor,
    targets: &Tensor,
    scale: f64,
    gradients: bool,
) -> Result<Tensor> {
    let storage = Storage::of(KERNEL, logits)?;
    let (count, width) = rows(KERNEL, logits)?;
    kernels.check(KERNEL, "the logits", logits, storage.kind(), &[count, width])?;
    kernels.check(KERNEL, "the targets", targets, Kind::Int64, &[count])?;
    let losses = kernels.empty(&[count], storage.wide())?;
    let arguments = [
        if gradients { Argument::update(logits) } else { Argument::read(logits) },
        Argument::read(targets),
        Argument::write(&losses),
        Argument::I64(count),
        Argument::I32(int(KERNEL, "the vocabulary", width)?),
        Argument::F64(scale),
        Argument::I32(i32::from(gradients)),
    ];
    let grid = grid(kernels, storage, [count, width]);
    // SAFETY: the parameters are those of the source; logits have `count` rows of `width` elements,
    // targets and losses `count` elements.
    unsafe { kernels.launch(plain(&PROGRAM, storage), KERNEL, grid, &arguments)? };
    Ok(losses)
}

/// A block for a row at a time.
pub(super) fn grid(kernels: &Kernels, storage: Storage, [count, width]: [i64; 2]) -> Grid {
    let threads = threads(pieces(width, storage.lanes()), MAX_THREADS);
    Grid::line(kernels.share(count, BLOCKS * MAX_THREADS / threads), threads)
}

/// `scale` times the summed cross-entropy of `softmax(x head^T)` at `targets`, as
/// [`fused::head_loss`], which does it where the kernels do not take `x`: for x `[.., D]`, a head
/// `[V, D]` and as many targets as rows. The gradients are made in the forward pass, for a gradient
/// of one of the loss. Another is refused; on a GPU, where it is not read, it makes NaNs.
///
/// # Errors
/// Where the tensors do not fit, or a launch fails.
pub fn head_loss(
    kernels: &Kernels,
    x: &Tensor,
    head: &Parameter,
    targets: &Tensor,
    scale: f64,
    chunk_tokens: i64,
) -> Result<Tensor> {
    if !kernels.takes(x) {
        return Ok(fused::head_loss(x, head, targets, scale, chunk_tokens)?);
    }
    expect(chunk_tokens > 0, KERNEL, "chunk_tokens", chunk_tokens, "at least 1")?;
    let (count, _) = rows(KERNEL, x)?;
    let num_targets = targets.numel() as i64;
    expect(num_targets == count, KERNEL, "the number of targets", num_targets, count.to_string())?;
    let usage = Use::open(head)?;
    let with_gradients = usage.counts();
    let chunks = Chunks {
        kernels: kernels.clone(),
        head: head.shallow_clone(),
        targets: targets.f_reshape([-1])?.f_to_kind(Kind::Int64)?,
        scale,
        tokens: chunk_tokens,
    };
    // Opened before the function, used in its forward pass, and done in its backward pass.
    let usage = std::sync::Arc::new(std::sync::Mutex::new(usage));
    let usage_forward = usage.clone();
    let locked = |usage: &std::sync::Mutex<Use>, body: &dyn Fn(&Use) -> ShimResult<()>| {
        body(&usage.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    };
    let make = move |inputs: &[Option<Tensor>]| -> ShimResult<Vec<Tensor>> {
        let x = given(inputs, 0)?;
        let accumulate = |d_logits: &Tensor, part: &Tensor| {
            locked(&usage_forward, &|usage| usage.accumulate(d_logits, part))
        };
        let (loss, dx) = chunks.run(x, with_gradients.then_some(&accumulate))?;
        Ok(vec![loss, dx])
    };
    let derive = move |tensors: &[Option<Tensor>]| -> ShimResult<Vec<Option<Tensor>>> {
        let dx = of_one(given(tensors, 0)?, given(tensors, 1)?)?;
        locked(&usage, &Use::done)?;
        Ok(vec![Some(dx), None])
    };
    let inputs = [x, &head.compute];
    let [loss] = exactly(autograd::apply_saving(&inputs, (1, 1), make, derive)?)?;
    Ok(loss)
}

/// `dx`, which was made for a gradient of one of the loss.
fn of_one(gradient: &Tensor, dx: &Tensor) -> ShimResult<Tensor> {
    if dx.device() == Device::Cpu {
        if gradient.f_double_value(&[])? != 1.0 {
            let text = "head_loss computes its gradients in the forward pass, for a loss gradient \
                        of one; put every factor into its scale";
            return Err(ShimError::Closure(text.into()));
        }
        return Ok(dx.shallow_clone());
    }
    // The host does not wait for the number: another than one shows as a norm that is not finite.
    let is_one = gradient.f_eq(1.0)?.f_to_kind(Kind::Float)?;
    let factor = is_one.f_div(&is_one)?;
    Ok(dx.f_mul(&factor)?)
}

/// The head, a chunk of tokens at a time.
struct Chunks {
    kernels: Kernels,
    head: Parameter,
    /// `[N]`, int64.
    targets: Tensor,
    scale: f64,
    tokens: i64,
}

/// Adds the weight's gradient of a chunk.
type Accumulate<'a> = &'a dyn Fn(&Tensor, &Tensor) -> ShimResult<()>;

impl Chunks {
    /// The loss, and the gradient of x; an empty one without gradients.
    fn run(&self, x: &Tensor, accumulate: Option<Accumulate<'_>>) -> ShimResult<(Tensor, Tensor)> {
        let (count, width) = rows(KERNEL, x)?;
        let wide = Storage::of(KERNEL, x)?.wide();
        let rows_ND = x.f_reshape([count, width])?;
        // In FP64, because the sum is over all tokens.
        let mut sum = Tensor::f_zeros([] as [i64; 0], (Kind::Double, x.device()))?;
        let size = if accumulate.is_some() { x.size() } else { vec![0] };
        let dx = Tensor::f_empty(size, (x.kind(), x.device()))?;
        let mut first = 0;
        while first < count {
            let part = self.tokens.min(count - first);
            let part_ND = rows_ND.f_narrow(0, first, part)?;
            let logits_NV = project(&part_ND, &self.head)?;
            let targets_N = self.targets.f_narrow(0, first, part)?;
            let gradients = accumulate.is_some();
            let losses_N =
                cross_entropy(&self.kernels, &logits_NV, &targets_N, self.scale, gradients)?;
            sum = sum.f_add(&losses_N.f_sum(Kind::Double)?)?;
            if let Some(accumulate) = accumulate {
                let mut place = dx.f_view([count, width])?.f_narrow(0, first, part)?;
                place.f_copy_(&product(&logits_NV, &self.head)?)?;
                accumulate(&logits_NV, &part_ND)?;
            }
            first += part;
        }
        Ok((sum.f_mul_scalar(self.scale)?.f_to_kind(wide)?, dx))
    }
}

/// The plain form, differentiable by libtorch: `scale` times the loss of each row.
///
/// # Errors
/// Where libtorch refuses.
pub fn reference(logits: &Tensor, targets: &Tensor, scale: f64) -> Result<Tensor> {
    let none = None::<&Tensor>;
    let losses = logits.f_cross_entropy_loss(targets, none, Reduction::None, NO_TARGET, 0.0)?;
    Ok(losses.f_mul_scalar(scale)?)
}
