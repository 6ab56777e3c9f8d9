//! FP8: to the bit, because every step is one rounding that the standard prescribes.

use kernels::ops::fp8::{quantise_columns, quantise_rows, reference};
use kernels::{Kernels, Storage};
use torch_shim::tch::{Device, Kind, Tensor};

use super::{Extent, begin, random, same, shifted};

const SHAPES: [[i64; 2]; 8] =
    [[1, 1], [3, 5], [16, 64], [33, 40], [257, 72], [128, 1032], [300, 130], [48, 9000]];

/// All shapes and formats.
pub fn check(kernels: &Kernels, extent: Extent) {
    for storage in [Storage::Fp32, Storage::Bf16] {
        for shape in SHAPES {
            begin();
            case(kernels, &(random(kernels, &shape, storage.kind()) * 2.0));
        }
        case(kernels, &shifted(&random(kernels, &[32, 64], storage.kind()), 1));
        if extent == Extent::Full {
            case(kernels, &random(kernels, &[2048, 14336], storage.kind()));
        }
        case(kernels, &edges(storage).to_device(kernels.device()));
    }
    every_number(kernels);
}

fn case(kernels: &Kernels, x: &Tensor) {
    let own = x.to_device(Device::Cpu);
    let want = reference(&own).unwrap();
    let got = quantise_rows(kernels, x).unwrap();
    same("scales of rows", &got.scales, &want.scales);
    same("rows", &got.values, &want.values);
    let want = reference(&own.tr().contiguous()).unwrap();
    let got = quantise_columns(kernels, x).unwrap();
    same("scales of columns", &got.scales, &want.scales);
    same("columns", &got.values, &want.values);
}

/// Zeros, tiny rows, rows of one large number, and numbers of all sizes.
fn edges(storage: Storage) -> Tensor {
    let rows: Vec<f64> = (0..64)
        .flat_map(|row| {
            (0..48).map(move |column| match row {
                0 => 0.0,
                1 => 1e-35,
                2 => 1e-30 * f64::from(column),
                3 if column == 7 => -3e38,
                3 => 1.0,
                _ => {
                    2f64.powi(column - 40) * f64::from(row) * if row % 2 == 0 { 1.0 } else { -1.0 }
                }
            })
        })
        .collect();
    Tensor::from_slice(&rows).view([64, 48]).to_kind(storage.kind())
}

/// A row with every BF16 number up to 448, whose scale is one, so that each is rounded as it is;
/// and FP32 numbers around every number of e4m3 and half-way between two.
fn every_number(kernels: &Kernels) {
    let bits: Vec<i16> = (0..=0x43e0_i16).collect();
    let all = Tensor::from_slice(&bits).view_dtype(Kind::BFloat16).view([1, -1]);
    let all = Tensor::cat(&[&all, &-&all], 1);
    case(kernels, &all.to_device(kernels.device()));
    let bytes: Vec<u8> = (0..=0x7e).collect();
    let numbers = Tensor::from_slice(&bytes).view_dtype(Kind::Float8e4m3fn).to_kind(Kind::Float);
    let between = (numbers.narrow(0, 0, 126) + numbers.narrow(0, 1, 126)) / 2.0;
    let centres = Tensor::cat(&[&numbers, &between], 0);
    let around = [-2_i64, -1, 0, 1, 2]
        .map(|step| (centres.view_dtype(Kind::Int) + step).clamp(0, 0x43e0_0000));
    let around = Tensor::cat(&around, 0).view_dtype(Kind::Float).view([1, -1]);
    case(kernels, &around.to_device(kernels.device()));
}
