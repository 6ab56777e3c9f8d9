//! Cross-entropy: losses, and gradients in the place of the logits.

use kernels::ops::cross_entropy::{NO_TARGET, cross_entropy, reference};
use kernels::{Kernels, Storage};
use torch_shim::autograd;
use torch_shim::tch::{Device, Kind, Tensor};

use super::{BLOCK_SUM, Extent, begin, close, exact, leaf, random, same, shifted, wide};

/// Llama 3's vocabulary.
const VOCABULARY: i64 = 128_256;

/// Rows and vocabulary: one token, no whole vectors in a row or at its beginning, more than a block
/// takes at once, Llama 3's.
const SHAPES: [[i64; 2]; 7] =
    [[1, 1], [3, 7], [5, 64], [9, 1021], [40, 37], [2, 9001], [2, VOCABULARY]];

/// All shapes and formats; the largest share of the tolerance that was used.
pub fn check(kernels: &Kernels, extent: Extent) -> f64 {
    let mut worst: f64 = 0.0;
    for &storage in Storage::ALL {
        for shape in SHAPES {
            worst = worst.max(case(kernels, storage, shape, 0));
        }
        worst = worst.max(case(kernels, storage, [3, 64], 1));
        if extent == Extent::Full {
            worst = worst.max(case(kernels, storage, [128, VOCABULARY], 0));
        }
        check_no_targets(kernels, storage);
    }
    worst
}

fn case(kernels: &Kernels, storage: Storage, [rows, width]: [i64; 2], offset: i64) -> f64 {
    let (logits, targets) = problem(kernels, storage, [rows, width]);
    let logits = shifted(&logits, offset);
    let before = logits.copy();
    let quiet = cross_entropy(kernels, &logits, &targets, SCALE, false).unwrap();
    same("logits without gradients", &logits, &before);
    let losses = cross_entropy(kernels, &logits, &targets, SCALE, true).unwrap();
    same("losses with and without gradients", &losses, &quiet);
    judge(storage, (&before, &targets), (&losses, &logits), sums(storage, width))
}

/// What losses are multiplied by.
pub const SCALE: f64 = 1.0 / 37.0;

/// Logits and targets, on the device.
pub fn problem(kernels: &Kernels, storage: Storage, [rows, width]: [i64; 2]) -> (Tensor, Tensor) {
    begin();
    // The first row is as flat as can be, the others have maxima anywhere.
    let logits = random(kernels, &[rows, width], storage.kind()) * 4.0;
    let _ = logits.get(0).fill_(-2.5);
    let targets: Vec<i64> =
        (0..rows).map(|row| if row == 3 { NO_TARGET } else { (row * 7919 + 5) % width }).collect();
    (logits, Tensor::from_slice(&targets).to_device(kernels.device()))
}

/// Roundings of a block's sum of exponentials, but for those of what is exponentiated. A thread's
/// sum: its elements, and as often as it takes a vector (or an element at the edges), four
/// roundings of an exponential and one of a product.
pub fn sums(storage: Storage, width: i64) -> f64 {
    let lanes = storage.lanes() as f64;
    let vectors = (width as f64 / lanes / threads(width, storage)).ceil() + 2.0;
    vectors * (lanes + 5.0) + BLOCK_SUM + 4.0
}

/// Losses and gradients within their tolerances, of logits as they were before: `sums` roundings of
/// the sum. Returns the largest share that was used.
pub fn judge(
    storage: Storage,
    (before, targets): (&Tensor, &Tensor),
    (losses, gradients): (&Tensor, &Tensor),
    sums: f64,
) -> f64 {
    let (twin, targets) = (leaf(before), targets.to_device(Device::Cpu));
    let want = reference(&twin, &targets, SCALE).unwrap();
    autograd::backward(&[&want.sum(Kind::Double)], &[]).unwrap();
    // An exponential of x is off by two units in the last place, which are four roundings, and by
    // |x| for the rounding of x; all such |x| together are at most the range of a row for a
    // rescaled sum, and again for a term.
    let largest = exact(before).amax([1].as_slice(), true);
    let smallest = exact(before).amin([1].as_slice(), true);
    let range = (&largest - smallest).max().double_value(&[]);
    let sums = sums + 2.0 * range;
    // The loss: a logarithm, a sum, a difference.
    let safe = targets.clamp_min(0).unsqueeze(1);
    let at_target = exact(before).gather(1, &safe, false).abs();
    let plain = reference(&exact(before), &targets, 1.0).unwrap();
    let terms = (at_target + largest.abs() + 1.0).squeeze_dim(1) + plain.abs();
    let loss = close("loss", wide(storage), (losses, &plain), (sums + 4.0, &terms));
    // The gradient: an exponential, the factor, a product, a difference.
    let terms = twin.grad().abs() + onehot(&safe, &twin) * SCALE * 2.0;
    let gradient = close("gradient", storage, (gradients, &twin.grad()), (sums + 8.0, &terms));
    loss.max(gradient)
}

fn onehot(index: &Tensor, like: &Tensor) -> Tensor {
    let ones = Tensor::ones(index.size().as_slice(), (Kind::Double, index.device()));
    like.detach().zeros_like().scatter(1, index, &ones)
}

/// Threads of a block.
fn threads(width: i64, storage: Storage) -> f64 {
    ((width as f64 / storage.lanes() as f64 / 32.0).ceil() * 32.0).clamp(32.0, 1024.0)
}

/// Rows without a target count for nothing, and one outside the vocabulary is not overlooked.
fn check_no_targets(kernels: &Kernels, storage: Storage) {
    let logits = random(kernels, &[4, 21], storage.kind());
    let targets = Tensor::from_slice(&[NO_TARGET, 21, -1, 20]).to_device(kernels.device());
    let losses = cross_entropy(kernels, &logits, &targets, 1.0, true).unwrap();
    let (losses, logits) = (exact(&losses), exact(&logits));
    assert_eq!(losses.double_value(&[0]), 0.0);
    assert_eq!(logits.get(0).abs().max().double_value(&[]), 0.0);
    for row in [1, 2] {
        assert!(losses.double_value(&[row]).is_nan(), "row {row}");
        assert_eq!(logits.get(row).isnan().sum(Kind::Int64).int64_value(&[]), 21, "row {row}");
    }
    assert!(losses.double_value(&[3]).is_finite());
}
