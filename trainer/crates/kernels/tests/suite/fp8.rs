//! FP8: to the bit, because every step is one rounding that the standard prescribes.

use kernels::ops::fp8::{quantise_columns, quantise_rows, reference};
use kernels::{Kernels, Storage};
use torch_shim::scaled::{Scaled, accumulation, product};
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
        case(kernels, &no_numbers(storage).to_device(kernels.device()));
    }
    every_number(kernels);
}

fn case(kernels: &Kernels, x: &Tensor) {
    let own = x.to_device(Device::Cpu);
    let want = reference(&own).unwrap();
    let got = quantise_rows(kernels, x).unwrap();
    same("scales of rows", &got.scales, &want.scales);
    same("rows", &unsigned(&got.values), &unsigned(&want.values));
    let want = reference(&own.tr().contiguous()).unwrap();
    let got = quantise_columns(kernels, x).unwrap();
    same("scales of columns", &got.scales, &want.scales);
    same("columns", &unsigned(&got.values), &unsigned(&want.values));
}

/// The bytes, those of NaN without their sign, of which nothing is said.
fn unsigned(values: &Tensor) -> Tensor {
    assert_eq!(values.kind(), Kind::Float8e4m3fn);
    let bytes = values.to_device(Device::Cpu).contiguous().view_dtype(Kind::Uint8);
    let is_none = bytes.bitwise_and(0x7f).eq(0x7f);
    bytes.masked_fill(&is_none, 0x7f)
}

/// Infinities and NaN, alone and beside numbers.
fn no_numbers(storage: Storage) -> Tensor {
    let x = Tensor::arange(64 * 48, (Kind::Float, Device::Cpu)).sin().view([64, 48]);
    for (row, column, value) in [
        (0, 0, f64::NAN),
        (1, 47, f64::INFINITY),
        (2, 3, f64::NEG_INFINITY),
        (3, 5, f64::NAN),
        (3, 6, f64::INFINITY),
    ] {
        let _ = x.get(row).get(column).fill_(value);
    }
    let _ = x.get(4).fill_(f64::NAN);
    x.to_kind(storage.kind())
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

/// Rows, columns and summed numbers of products.
const PRODUCTS: [[i64; 3]; 4] = [[1, 16, 16], [48, 80, 32], [96, 64, 144], [256, 128, 512]];

/// The product of FP8 matrices, `a b^T`, against that of the same numbers in FP64. `unit` bounds the
/// error of a sum by the sum of its terms' magnitudes, for so many terms. Returns the largest share
/// of the tolerance that was used.
pub fn products(kernels: &Kernels, extent: Extent, unit: impl Fn(i64) -> f64) -> f64 {
    let large: &[[i64; 3]] =
        if extent == Extent::Full { &[[2048, 4096, 4096], [4096, 1024, 14336]] } else { &[] };
    let mut worst: f64 = 0.0;
    for &[rows, columns, summed] in PRODUCTS.iter().chain(large) {
        begin();
        let device = kernels.device();
        let make = |count| {
            let sizes = Tensor::randn([count, 1], (Kind::Float, device)).exp2();
            let x = random(kernels, &[count, summed], Kind::BFloat16);
            quantise_rows(kernels, &(x * sizes).to_kind(Kind::BFloat16)).unwrap()
        };
        let (a, b) = (make(rows), make(columns));
        let got = product(&a, &b, accumulation()).unwrap();
        assert_eq!((got.size(), got.kind()), (vec![rows, columns], Kind::BFloat16));
        let whole = |x: &Scaled| {
            x.values.to_kind(Kind::Double) * x.scales.to_kind(Kind::Double).unsqueeze(1)
        };
        let (a, b) = (whole(&a), whole(&b));
        let want = a.matmul(&b.tr());
        let terms = a.abs().matmul(&b.abs().tr());
        // BF16's unit roundoff, and the sum's.
        let tolerance = want.abs() * (1.01 / 256.0) + terms * unit(summed);
        let share = ((got.to_kind(Kind::Double) - &want).abs() / tolerance).max();
        let share = share.double_value(&[]);
        assert!(share <= 1.0, "{rows} x {columns} x {summed}: {share} of the tolerance");
        worst = worst.max(share);
    }
    worst
}
