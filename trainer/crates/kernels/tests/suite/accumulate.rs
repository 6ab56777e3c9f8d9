//! Adding to an accumulator: to the bit, because it is one rounding.

use kernels::ops::accumulate::{accumulate, reference};
use kernels::{Kernels, Storage};

use super::{Extent, begin, random, same, shifted};

const SHAPES: [&[i64]; 6] = [&[1], &[7], &[8], &[1000], &[33, 65], &[200, 300]];

/// All shapes and formats.
pub fn check(kernels: &Kernels, extent: Extent) {
    for &storage in Storage::ALL {
        let full: &[&[i64]] = if extent == Extent::Full { &[&[4096, 14336]] } else { &[] };
        for shape in SHAPES.iter().chain(full) {
            for offset in [0, 1] {
                begin();
                let sum = shifted(&random(kernels, shape, storage.wide()), offset);
                let x = shifted(&random(kernels, shape, storage.kind()), offset);
                let want = reference(&sum, &x).unwrap();
                accumulate(kernels, &sum, &x).unwrap();
                same("sum", &sum, &want);
            }
        }
    }
}
