//! The gradient of an embedding table.

use kernels::ops::embedding::{accumulate_rows, reference};
use kernels::{Kernels, Storage};
use torch_shim::tch::{Kind, Tensor};

use super::{Extent, begin, close, exact, random, same, wide};

/// Tokens, vocabulary, width: one, more tokens than rows, no whole vectors, whole ones, more than a
/// block takes across.
const SHAPES: [[i64; 3]; 5] = [[1, 1, 1], [40, 7, 5], [23, 100, 24], [9, 3, 2560], [300, 11, 64]];

/// All shapes and formats; the largest share of the tolerance that was used.
pub fn check(kernels: &Kernels, extent: Extent) -> f64 {
    let mut worst: f64 = 0.0;
    for &storage in Storage::ALL {
        for shape in SHAPES {
            worst = worst.max(case(kernels, storage, shape));
        }
        if extent == Extent::Full {
            worst = worst.max(case(kernels, storage, [8192, 1000, 4096]));
        }
    }
    worst
}

fn case(kernels: &Kernels, storage: Storage, [count, vocabulary, width]: [i64; 3]) -> f64 {
    begin();
    let tokens: Vec<i64> = (0..count).map(|at| (at * at * 31 + at / 3) % vocabulary).collect();
    let tokens = Tensor::from_slice(&tokens);
    let dy = random(kernels, &[count, width], storage.kind());
    let gradient = random(kernels, &[vocabulary, width], storage.wide());
    let (before, again) = (exact(&gradient), gradient.copy());
    let on_device = tokens.to_device(kernels.device());
    accumulate_rows(kernels, &on_device, &dy, &gradient).unwrap();
    accumulate_rows(kernels, &on_device, &dy, &again).unwrap();
    same("twice", &gradient, &again);
    let want = reference(&tokens, &exact(&dy), &before).unwrap();
    let terms = reference(&tokens, &exact(&dy).abs(), &before.abs()).unwrap();
    // As many additions as a token comes.
    let ones = Tensor::ones([count, 1], (Kind::Double, before.device()));
    let times = reference(&tokens, &ones, &before.zeros_like().narrow(1, 0, 1)).unwrap();
    let most = times.max().double_value(&[]);
    close("gradient", wide(storage), (&gradient, &want), (most, &terms))
}
