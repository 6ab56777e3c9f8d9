//! AdamW, the norm of gradients, clipping.

use kernels::ops::adamw::{self, Buffers, Chunks, adamw};
use kernels::ops::gradient_norm::{clip, reference, squared_norm};
use kernels::{Kernels, Storage};
use std::ops::Range;
use torch_shim::ops::AdamW;
use torch_shim::tch::{Kind, Tensor};

use super::{Extent, begin, close, exact, random, same};

/// Elements of a chunk, at the most, and threads that share one out.
const CHUNK: f64 = 16384.0;
const THREADS: f64 = 256.0;

fn constants(step: u64) -> AdamW {
    AdamW { learning_rate: 3e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step }
}

/// Runs in a buffer of `length` elements: long ones, single elements, ones that begin anywhere, and
/// gaps between them.
fn runs(length: i64) -> Vec<(Range<i64>, bool)> {
    vec![
        (0..length / 2, true),
        (length / 2..length / 2 + 1, false),
        (length / 2 + 33..length - 60, false),
        (length - 59..length - 1, true),
    ]
}

/// All formats; the largest share of the tolerance that was used.
pub fn check_adamw(kernels: &Kernels, extent: Extent) -> f64 {
    let mut worst: f64 = 0.0;
    let length = if extent == Extent::Full { 20_000_000 } else { 70_000 };
    for &storage in Storage::ALL {
        for length in [200, length] {
            for factor in [None, Some(0.37_f32)] {
                worst = worst.max(update(kernels, storage, length, factor));
            }
        }
        skip(kernels, storage);
    }
    worst
}

/// Master weights, gradients, both moments.
fn state(kernels: &Kernels, storage: Storage, length: i64) -> [Tensor; 4] {
    let random = || random(kernels, &[length], storage.wide());
    [random(), random(), random() * 0.1, random().square()]
}

fn update(kernels: &Kernels, storage: Storage, length: i64, factor: Option<f32>) -> f64 {
    begin();
    let [master, gradients, first, second] = &state(kernels, storage, length);
    let copy = (storage == Storage::Bf16).then(|| random(kernels, &[length], Kind::BFloat16));
    let before = [master, gradients, first, second].map(exact);
    let copy_before = copy.as_ref().map(Tensor::copy);
    let chunks = Chunks::new(kernels, &runs(length)).unwrap();
    let factor_tensor = factor.map(|factor| Tensor::from(factor).to_device(kernels.device()));
    let buffers = Buffers { master, gradients, first, second, copy: copy.as_ref() };
    adamw(kernels, buffers, &chunks, factor_tensor.as_ref(), &constants(3)).unwrap();

    let factor = f64::from(factor.unwrap_or(1.0));
    let covered = Tensor::zeros([length], (Kind::Bool, torch_shim::tch::Device::Cpu));
    let mut worst: f64 = 0.0;
    for (run, decays) in runs(length) {
        let cut = |x: &Tensor| x.narrow(0, run.start, run.end - run.start);
        let _ = cut(&covered).fill_(1);
        let decay = if decays { 0.1 } else { 0.0 };
        let constants = AdamW { weight_decay: decay, ..constants(3) };
        let [w, g, m, v] = [0, 1, 2, 3].map(|index| cut(&before[index]));
        let [want_w, want_m, want_v] =
            adamw::reference([&w, &g, &m, &v], factor, &constants).unwrap();
        let wide = super::wide(storage);
        // A gradient is scaled; the constants are rounded; two products and a sum.
        let m_terms = &m.abs() * 0.9 + &g.abs() * (0.1 * factor);
        worst = worst.max(close("first", wide, (&cut(first), &want_m), (5.0, &m_terms)));
        worst = worst.max(close("second", wide, (&cut(second), &want_v), (7.0, &want_v)));
        // The weight decays by three roundings of the decay, which is small; the change: those of
        // the first moment, half of those of the second, a root, a correction and its product, eps,
        // the step and its product, a quotient.
        let root = (&want_v / (1.0 - 0.95f64.powi(3))).sqrt() + 1e-8;
        let change = m_terms / root * (3e-3 / (1.0 - 0.9f64.powi(3)));
        let terms = w.abs() * (1.0 / 16.0) + change;
        worst = worst.max(close("weight", wide, (&cut(master), &want_w), (16.0, &terms)));
    }
    let outside = covered.logical_not();
    for (after, before) in [master, gradients, first, second].into_iter().zip(&before) {
        let changed = exact(after).ne_tensor(before).logical_and(&outside);
        assert_eq!(changed.sum(Kind::Int64).int64_value(&[]), 0, "outside the runs");
    }
    same("gradients", &exact(gradients), &before[1]);
    if let (Some(copy), Some(copy_before)) = (copy, copy_before) {
        let outside = outside.to_device(copy.device());
        same("copy", &copy, &copy_before.where_self(&outside, &master.to_kind(Kind::BFloat16)));
    }
    worst
}

/// A factor that is not finite leaves all as it is.
fn skip(kernels: &Kernels, storage: Storage) {
    begin();
    let [master, gradients, first, second] = &state(kernels, storage, 300);
    let before = [master, first, second].map(Tensor::copy);
    let chunks = Chunks::new(kernels, &[(0..300, true)]).unwrap();
    for factor in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let factor = Tensor::from(factor).to_device(kernels.device());
        let buffers = Buffers { master, gradients, first, second, copy: None };
        adamw(kernels, buffers, &chunks, Some(&factor), &constants(1)).unwrap();
        for (after, before) in [master, first, second].into_iter().zip(&before) {
            same("a skipped step", after, before);
        }
    }
}

/// The norm over runs, and the coefficient; the largest share of the tolerance that was used.
pub fn check_norm(kernels: &Kernels, extent: Extent) -> f64 {
    let mut worst: f64 = 0.0;
    let length = if extent == Extent::Full { 50_000_000 } else { 90_000 };
    for storage in [Storage::Fp32, Storage::Fp64] {
        for length in [200, length] {
            begin();
            let gradients = random(kernels, &[length], storage.kind());
            let chunks = Chunks::new(kernels, &runs(length)).unwrap();
            let counted: Vec<Tensor> = runs(length)
                .into_iter()
                .map(|(run, _)| exact(&gradients.narrow(0, run.start, run.end - run.start)))
                .collect();
            let counted = Tensor::cat(&counted, 0);
            let squares = squared_norm(kernels, &gradients, &chunks).unwrap();
            let (want, _) = reference(&counted, None).unwrap();
            let want = Tensor::from(want * want);
            // A square and the sum of a thread, in the format of the gradients; all else in FP64, of
            // which 60 roundings are less than one here.
            let roundings =
                CHUNK / THREADS + 2.0 + if storage == Storage::Fp64 { 60.0 } else { 1.0 };
            let got = squares.to_kind(storage.kind());
            worst = worst.max(close("squares", storage, (&got, &want), (roundings, &want)));
            for limit in [None, Some(1.0), Some(1e6)] {
                let norm = exact(&squares).sqrt();
                let (got, coefficient) = clip(kernels, &squares, limit).unwrap();
                let want = limit
                    .map_or(1.0, |limit: f64| (limit / (norm.double_value(&[]) + 1e-6)).min(1.0));
                worst = worst.max(close("norm", Storage::Fp64, (&got, &norm), (2.0, &norm)));
                let want = Tensor::from(want);
                worst =
                    worst.max(close("clip", Storage::Fp32, (&coefficient, &want), (1.0, &want)));
            }
        }
    }
    not_finite(kernels);
    long_sum(kernels);
    worst
}

/// Gradients that are not finite make a coefficient that is not, whatever the limit.
fn not_finite(kernels: &Kernels) {
    for wrong in [f32::NAN, f32::INFINITY] {
        let gradients = random(kernels, &[5000], Kind::Float);
        let _ = gradients.get(4321).fill_(f64::from(wrong));
        let chunks = Chunks::new(kernels, &[(0..5000, true)]).unwrap();
        let squares = squared_norm(kernels, &gradients, &chunks).unwrap();
        for limit in [None, Some(1.0)] {
            let (norm, coefficient) = clip(kernels, &squares, limit).unwrap();
            assert!(!norm.double_value(&[]).is_finite());
            assert!(coefficient.double_value(&[]).is_nan(), "{limit:?}");
        }
    }
    let none = Chunks::new(kernels, &[]).unwrap();
    let squares = squared_norm(kernels, &random(kernels, &[8], Kind::Float), &none).unwrap();
    assert_eq!(squares.double_value(&[]), 0.0);
}

/// 2^22 squares of three: beyond 2^24 a single FP32 sum of nines is not exact any more.
fn long_sum(kernels: &Kernels) {
    let ones = Tensor::ones([1 << 22], (Kind::Float, kernels.device())) * 3.0;
    let chunks = Chunks::new(kernels, &[(0..1 << 22, true)]).unwrap();
    let squares = squared_norm(kernels, &ones, &chunks).unwrap();
    assert_eq!(squares.double_value(&[]), 9.0 * f64::from(1 << 22));
}
