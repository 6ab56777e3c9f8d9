//! RMSNorm: forward, backward, with and without a residual.

use kernels::ops::rms_norm::{MAX_WIDTH, Normed, backward, forward, reference};
use kernels::{Kernels, Storage};
use torch_shim::autograd;
use torch_shim::tch::{Kind, Tensor};

use super::{BLOCK_SUM, Extent, begin, close, exact, leaf, random, shifted, wide};

const EPS: f64 = 1e-5;

/// Rows and width: one element, less than a vector, no whole vectors, less and more than a thread
/// takes, each number of items, the widest.
const SHAPES: [[i64; 2]; 11] = [
    [1, 1],
    [3, 5],
    [2, 8],
    [40, 24],
    [5, 333],
    [5, 2048],
    [4, 4096],
    [2, 4100],
    [3, 8191],
    [2, 16376],
    [2, MAX_WIDTH],
];

/// Elements of a row that a thread sums up.
fn items(width: i64) -> f64 {
    if width <= 4096 {
        8.0
    } else if width <= 8192 {
        16.0
    } else {
        32.0
    }
}

/// All shapes and formats; the largest share of the tolerance that was used.
pub fn check(kernels: &Kernels, extent: Extent) -> f64 {
    let mut worst: f64 = 0.0;
    for &storage in Storage::ALL {
        for shape in SHAPES {
            worst = worst.max(case(kernels, storage, &shape, 0));
        }
        // Rows of whole vectors in memory that is not aligned.
        worst = worst.max(case(kernels, storage, &[3, 64], 1));
        if extent == Extent::Full {
            worst = worst.max(case(kernels, storage, &[2, 1024, 4096], 0));
        }
    }
    worst
}

fn case(kernels: &Kernels, storage: Storage, shape: &[i64], offset: i64) -> f64 {
    begin();
    let kind = storage.kind();
    let width = shape[shape.len() - 1];
    let make = |shape: &[i64]| shifted(&random(kernels, shape, kind), offset);
    let (x, residual, weight) = (make(shape), make(shape), make(&[width]));
    let (d_normed, d_sum) = (make(shape), make(shape));
    let mut worst: f64 = 0.0;
    // All four forms of narrow rows; of wide ones, which take long to emulate, that with
    // everything.
    let is_wide = width > 1000;
    for residual in [None, Some(&residual)].into_iter().filter(|x| x.is_some() || !is_wide) {
        let made = forward(kernels, &x, residual, &weight, EPS).unwrap();
        worst = worst.max(check_forward(storage, &x, residual, &weight, &made));
        for d_sum in [None, Some(&d_sum)].into_iter().filter(|x| x.is_some() || !is_wide) {
            let outer = (&d_normed, d_sum);
            worst = worst.max(check_backward(kernels, storage, outer, &weight, &made));
        }
    }
    worst
}

fn check_forward(
    storage: Storage,
    x: &Tensor,
    residual: Option<&Tensor>,
    weight: &Tensor,
    made: &Normed,
) -> f64 {
    let terms = residual.map_or_else(|| exact(x), |residual| exact(x) + exact(residual)).abs();
    let whole = residual.map_or_else(|| exact(x), |residual| exact(x) + exact(residual));
    // One addition, and the rounding to the format.
    let sum = close("sum", storage, (&made.sum, &whole), (1.0, &terms));
    // The norm is that of the rounded sum. A square and its sum go half into the root; then the
    // mean, eps, the root, the reciprocal, and two products.
    let (want, _) = reference(&exact(&made.sum), None, &exact(weight), EPS).unwrap();
    let roundings = items(weight.numel() as i64) / 2.0 + BLOCK_SUM / 2.0 + 7.0;
    let normed = close("normed", storage, (&made.normed, &want), (roundings, &want.abs()));
    let z = exact(&made.sum).view([-1, weight.numel() as i64]);
    let reciprocal = (z.square().mean_dim([1].as_slice(), false, Kind::Double) + EPS).rsqrt();
    let of = (&made.reciprocal, &reciprocal);
    let reciprocal = close("reciprocal", wide(storage), of, (roundings, &reciprocal));
    sum.max(normed).max(reciprocal)
}

fn check_backward(
    kernels: &Kernels,
    storage: Storage,
    (d_normed, d_sum): (&Tensor, Option<&Tensor>),
    weight: &Tensor,
    made: &Normed,
) -> f64 {
    let width = weight.numel() as i64;
    let rows = made.sum.numel() as i64 / width;
    let gradient = random(kernels, &[width], storage.wide());
    let before = exact(&gradient);
    let outer = (d_normed, d_sum);
    let got = backward(kernels, outer, &made.sum, weight, &made.reciprocal, &gradient).unwrap();
    // By libtorch, through the plain form.
    let (z, w) = (leaf(&made.sum), leaf(weight));
    let (normed, _) = reference(&z, None, &w, EPS).unwrap();
    autograd::backward(&[&normed], &[&exact(d_normed)]).unwrap();
    let extra = d_sum.map_or_else(|| exact(d_normed).zeros_like(), exact);
    let want = z.grad() + &extra;
    // What the terms come to: r (|dy w| + |u| mean |dy w u|), for u = z r.
    let scale = exact(&made.reciprocal).view([-1, 1]);
    let flat = |x: &Tensor| exact(x).view([-1, width]);
    let unit = (flat(&made.sum) * &scale).abs();
    let scaled = (flat(d_normed) * exact(weight)).abs();
    let mean = (&scaled * &unit).mean_dim([1].as_slice(), true, Kind::Double);
    let terms = (&scaled + &unit * mean) * &scale + flat(&extra.abs());
    // The reciprocal came with roundings of its own; three products and the sum over a row; the
    // mean, a product, a difference, a product, a sum.
    let inner = items(width) + BLOCK_SUM;
    let roundings = (inner / 2.0 + 7.0) * 3.0 + inner + 8.0;
    let dx = close("dx", storage, (&got, &want), (roundings, &terms.view(got.size().as_slice())));
    // Two products; the sums of a block's rows, of 16 warps' blocks, of the warps, and the
    // addition.
    let roundings = inner / 2.0 + 7.0 + rows as f64 + 18.0 + 2.0;
    let terms = (flat(d_normed).abs() * unit).sum_dim_intlist([0].as_slice(), false, None);
    let of = (&gradient, &(&before + w.grad()));
    let weight = close("dweight", wide(storage), of, (roundings, &(terms + before.abs())));
    dx.max(weight)
}
