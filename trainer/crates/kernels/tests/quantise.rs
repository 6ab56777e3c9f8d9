//! The plain form of quantisation to FP8 against a computation of its own: all numbers of e4m3 by
//! its definition, and for each number of a row the nearest of them.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use kernels::ops::fp8::{columns, reference, rows};
use torch_shim::tch::{self, Device, Kind, Tensor};

const NAN: u8 = 0x7f;
const LARGEST: f32 = 448.0;
/// 2^-100: a row of smaller numbers is scaled as if this were its largest.
const SMALLEST: f32 = 7.888_609e-31;

/// The number of a byte without its sign, by the definition of e4m3 (Micikevicius et al. 2022,
/// table 1): 4 bits of exponent with bias 7, 3 of mantissa, no infinities, one NaN.
fn number(byte: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f64::from(byte & 7));
    match exponent {
        0 => mantissa / 8.0 * 2f64.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    }
}

/// The byte of the nearest number, the even one of two that are as near; NaN for what is none.
fn nearest(x: f32) -> u8 {
    if !x.is_finite() {
        return NAN;
    }
    let distance = |byte: &u8| (number(*byte) - f64::from(x.abs())).abs();
    let order = |a: &u8, b: &u8| distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1)));
    let byte = (0..NAN).min_by(order).unwrap();
    if x.is_sign_negative() { byte | 0x80 } else { byte }
}

/// The scale of a row, and its bytes, by the formula of the decision.
fn by_hand(row: &[f32]) -> (f32, Vec<u8>) {
    let sizes = row.iter().map(|x| x.abs()).filter(|x| !x.is_nan());
    let most = sizes.fold(SMALLEST, f32::max);
    let inverse = LARGEST / most;
    (most.min(f32::MAX) / LARGEST, row.iter().map(|x| nearest(x * inverse)).collect())
}

fn floats(x: &Tensor) -> Vec<f32> {
    Vec::try_from(x.to_kind(Kind::Float).flatten(0, -1)).unwrap()
}

fn bytes(x: &Tensor) -> Vec<u8> {
    assert_eq!(x.kind(), Kind::Float8e4m3fn);
    Vec::try_from(x.contiguous().view_dtype(Kind::Uint8).flatten(0, -1)).unwrap()
}

/// Each row against the computation by hand, and the error of each number against what rounding
/// may do: 2^-4 of it, or half of the least number, scaled.
fn check(x: &Tensor) {
    let width = x.size()[1] as usize;
    let found = reference(x).unwrap();
    let (scales, bytes, x) = (floats(&found.scales), bytes(&found.values), floats(x));
    for (row, x) in x.chunks(width).enumerate() {
        let (scale, expected) = by_hand(x);
        assert_eq!(scales[row].to_bits(), scale.to_bits(), "row {row}: {} {scale}", scales[row]);
        assert!(scale.is_normal() && scale > 0.0, "row {row}: {scale}");
        let is_finite = x.iter().all(|x| !x.is_infinite());
        for (column, (x, expected)) in x.iter().zip(expected).enumerate() {
            let byte = bytes[row * width + column];
            let is_nan = byte & NAN == NAN;
            // A NaN has no sign.
            let is_equal = byte == expected || is_nan && expected & NAN == NAN;
            assert!(is_equal, "{row}, {column}: {x} by {scale}: {byte:#x} for {expected:#x}");
            assert_eq!(is_nan, !x.is_finite(), "{row}, {column}: {x}");
            if is_finite && !is_nan {
                let sign = if byte >> 7 == 1 { -1.0 } else { 1.0 };
                let (x, scale) = (f64::from(*x), f64::from(scale));
                let error = (sign * number(byte & NAN) * scale - x).abs();
                let most = (x.abs() * 2f64.powi(-4)).max(scale * 2f64.powi(-10));
                // 448 / max, its product with x and max / 448 are rounded in FP32.
                assert!(error <= most * (1.0 + 2f64.powi(-18)), "{row}, {column}: {x}: {error}");
            }
        }
    }
}

fn matrix(table: &[Vec<f32>]) -> Tensor {
    let width = table[0].len() as i64;
    Tensor::from_slice(&table.concat()).view([-1, width])
}

#[test]
fn the_table_of_e4m3() {
    // Of table 1 of the paper: the largest, the least normal and the least number.
    let bounds = [0x7e, 0x08, 0x01].map(number);
    assert_eq!(bounds, [448.0, 2f64.powi(-6), 2f64.powi(-9)]);
    for (x, byte) in [(0.0, 0), (-0.0, 0x80), (448.0, 0x7e), (1.0, 0x38), (17.0, 0x58)] {
        assert_eq!(nearest(x), byte, "{x}");
    }
}

#[test]
fn random_rows() {
    tch::manual_seed(5);
    for kind in [Kind::Float, Kind::BFloat16] {
        let x = Tensor::randn([40, 64], (Kind::Float, Device::Cpu));
        // Rows of sizes apart, and within a row numbers that are small beside its largest.
        let sizes = Tensor::arange(40, (Kind::Float, Device::Cpu)).view([40, 1]) - 20.0;
        check(&(&x * sizes.exp2()).to_kind(kind));
        check(&(&x * (Tensor::randn_like(&x) * 8.0).exp2()).to_kind(kind));
    }
}

/// Numbers of e4m3, those between two, and their neighbours in FP32, in a row whose scale is one.
#[test]
fn numbers_and_ties() {
    let all: Vec<f32> = (0..NAN).map(|byte| number(byte) as f32).collect();
    let between: Vec<f32> = all.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect();
    let near = |x: &f32| [x.next_down().max(0.0), *x, x.next_up().min(LARGEST)];
    let row: Vec<f32> = all.iter().chain(&between).flat_map(near).collect();
    assert!(row.contains(&LARGEST));
    check(&matrix(&[row.clone(), row.iter().map(|x| -x).collect()]));
}

#[test]
fn zeros_tiny_rows_and_large_ones() {
    let row = |x: f32| [vec![x, -x / 2.0, x / 3.0], vec![0.0; 13]].concat();
    let found = matrix(&[
        row(0.0),
        row(f32::from_bits(1)),
        row(f32::MIN_POSITIVE),
        row(SMALLEST),
        row(SMALLEST.next_down()),
        row(f32::MAX),
    ]);
    check(&found);
    // A row of zeros stays one, and a number below the bound keeps what its scale leaves of it.
    let values = bytes(&reference(&found).unwrap().values);
    assert_eq!(values[..16].iter().map(|byte| byte & NAN).max(), Some(0));
    assert_eq!(values[5 * 16], 0x7e, "the largest number is hit exactly");
}

/// They make no number of themselves, and leave scales that are some.
#[test]
fn infinities_and_nan_become_nan() {
    let row = |x: f32| [vec![x, 1.0, -2.0], vec![0.5; 13]].concat();
    let x =
        matrix(&[row(f32::NAN), row(f32::INFINITY), row(f32::NEG_INFINITY), vec![f32::NAN; 16]]);
    check(&x);
    check(&x.to_kind(Kind::BFloat16));
    let found = reference(&x).unwrap();
    // Beside a NaN the numbers are what they would be without it.
    let alone = reference(&matrix(&[row(0.0)])).unwrap();
    assert_eq!(bytes(&found.values)[1..16], bytes(&alone.values)[1..16]);
    assert_eq!(floats(&found.scales)[0], floats(&alone.scales)[0]);
}

#[test]
fn columns_are_the_rows_of_the_transpose() {
    let x = Tensor::randn([48, 32], (Kind::Float, Device::Cpu));
    let (of_rows, of_columns) = (rows(None, &x.tr().contiguous()), columns(None, &x));
    let (of_rows, of_columns) = (of_rows.unwrap(), of_columns.unwrap());
    assert_eq!(of_columns.values.size(), [32, 48]);
    assert_eq!(bytes(&of_rows.values), bytes(&of_columns.values));
    assert_eq!(floats(&of_rows.scales), floats(&of_columns.scales));
}
