//! AdamW against its formula, one element at a time in FP64.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use optim::{AdamW, OptimError, gradient_norm};
use run_config::{Optimizer, OptimizerKind};
use torch_shim::params::{ParameterSet, ParameterSpec};
use torch_shim::tch::{Device, Kind, Tensor, no_grad};

const STEPS: usize = 7;

fn config() -> Optimizer {
    Optimizer {
        kind: OptimizerKind::Adamw,
        learning_rate: 0.05,
        betas: [0.9, 0.95],
        eps: 1e-8,
        weight_decay: 0.1,
        decay_norms: false,
    }
}

/// Decaying and spared parameters in turn, of sizes that leave padding between them.
fn parameters(compute: Kind, master: Kind) -> ParameterSet {
    let spec = |name: &str, shape: &[i64], decay| ParameterSpec {
        name: name.to_owned(),
        shape: shape.to_vec(),
        decay,
    };
    let specs = vec![
        spec("a", &[3, 5], true),
        spec("norm", &[5], false),
        spec("b", &[7, 5], true),
        spec("c", &[2, 11], true),
        spec("last_norm", &[5], false),
    ];
    let set = ParameterSet::new(specs, compute, master, Device::Cpu).unwrap();
    no_grad(|| {
        for parameter in set.iter() {
            fill(&parameter.master, parameter.index, 0);
        }
    });
    set.refresh_compute().unwrap();
    set
}

/// Numbers between -1 and 1 that depend on where and when.
fn value(parameter: usize, element: usize, step: usize) -> f64 {
    ((parameter * 31 + element * 17 + step * 7) as f64 * 0.7).sin()
}

fn fill(tensor: &Tensor, parameter: usize, step: usize) {
    let values: Vec<f64> = (0..tensor.numel()).map(|i| value(parameter, i, step)).collect();
    let values = Tensor::from_slice(&values).view(tensor.size().as_slice());
    tensor.shallow_clone().copy_(&values);
}

fn set_gradients(set: &ParameterSet, step: usize) {
    for parameter in set.iter() {
        fill(&parameter.grad, parameter.index, step);
    }
}

/// The formula: (weight, first moment, second moment) after all steps.
fn plain(parameter: usize, element: usize, decay: f64, coefficient: f64) -> (f64, f64, f64) {
    let Optimizer { learning_rate: rate, betas: [b1, b2], eps, .. } = config();
    let (mut weight, mut m, mut v) = (value(parameter, element, 0), 0.0, 0.0);
    for step in 1..=STEPS {
        let gradient = coefficient * value(parameter, element, step);
        weight -= rate * decay * weight;
        m = b1 * m + (1.0 - b1) * gradient;
        v = b2 * v + (1.0 - b2) * gradient * gradient;
        let (m_hat, v_hat) = (m / (1.0 - b1.powi(step as i32)), v / (1.0 - b2.powi(step as i32)));
        weight -= rate * m_hat / (v_hat.sqrt() + eps);
    }
    (weight, m, v)
}

fn run(set: &ParameterSet, coefficient: f64) -> AdamW {
    let mut optimizer = AdamW::new(&config(), set).unwrap();
    for step in 1..=STEPS {
        set_gradients(set, step);
        optimizer.step(set, config().learning_rate, coefficient).unwrap();
    }
    optimizer
}

fn check(compute: Kind, master: Kind, coefficient: f64, tolerance: f64) {
    let set = parameters(compute, master);
    let optimizer = run(&set, coefficient);
    assert_eq!(optimizer.num_steps(), STEPS as u64);
    for parameter in set.iter() {
        let moments = optimizer.moments(parameter).unwrap();
        let decay = if parameter.decay { config().weight_decay } else { 0.0 };
        let flat = |tensor: &Tensor| tensor.to_kind(Kind::Double).contiguous().view([-1]);
        let tensors = [&parameter.master, &moments.m, &moments.v].map(flat);
        for element in 0..parameter.master.numel() {
            let expected = plain(parameter.index, element, decay, coefficient);
            let at = [element as i64];
            for (ours, expected) in tensors.iter().zip([expected.0, expected.1, expected.2]) {
                let difference = (ours.double_value(&at) - expected).abs();
                assert!(difference < tolerance, "{} {element}: {difference}", parameter.name);
            }
        }
        let copy = parameter.master.to_kind(compute);
        assert!(copy == parameter.compute, "{}: compute copy not refreshed", parameter.name);
    }
}

#[test]
fn it_follows_the_formula() {
    check(Kind::Double, Kind::Double, 1.0, 1e-14);
    check(Kind::Double, Kind::Double, 0.3, 1e-14);
    check(Kind::Float, Kind::Float, 1.0, 1e-6);
    check(Kind::BFloat16, Kind::Float, 0.3, 1e-6);
}

/// An update by what the device decides has the bits of one by what the host knows; one that is
/// held back leaves everything as it was, and the next one is as if it had not been.
#[test]
fn updates_by_the_device_are_the_same() {
    for (compute, master) in [(Kind::BFloat16, Kind::Float), (Kind::Double, Kind::Double)] {
        let (set, other) = (parameters(compute, master), parameters(compute, master));
        let expected = run(&set, 0.3);
        let mut optimizer = AdamW::new(&config(), &other).unwrap();
        let (go, hold) = (Tensor::from(0f32), Tensor::from(1f32));
        let coefficient = Tensor::from(0.3f64);
        for step in 1..=STEPS {
            let _ = other.flat_grad().shallow_clone().fill_(f64::NAN);
            let before = (other.flat_master().copy(), optimizer.flat_v().copy());
            let rate = config().learning_rate;
            optimizer.step_unless(&other, rate, Some(&coefficient), &hold).unwrap();
            optimizer.take_back();
            assert!(other.flat_master() == &before.0 && optimizer.flat_v() == &before.1);
            let _ = other.flat_grad().shallow_clone().zero_();
            set_gradients(&other, step);
            optimizer.step_unless(&other, rate, Some(&coefficient), &go).unwrap();
        }
        assert_eq!(optimizer.num_steps(), STEPS as u64);
        assert!(set.flat_master() == other.flat_master());
        assert!(set.flat_compute() == other.flat_compute());
        assert!(optimizer.flat_m() == expected.flat_m() && optimizer.flat_v() == expected.flat_v());
    }
}

#[test]
fn padding_stays_zero() {
    let set = parameters(Kind::Float, Kind::Float);
    let optimizer = run(&set, 0.5);
    let held: f64 = set.iter().map(|p| p.master.abs().sum(Kind::Double).double_value(&[])).sum();
    for (buffer, expected) in [(set.flat_master(), Some(held)), (optimizer.flat_v(), None)] {
        let outside = buffer.copy();
        for parameter in set.iter() {
            let mut inside = outside.narrow(0, parameter.range.start, parameter.num_elements());
            let _ = inside.zero_();
        }
        assert_eq!(outside.abs().sum(Kind::Double).double_value(&[]), 0.0);
        if let Some(expected) = expected {
            let all = buffer.abs().sum(Kind::Double).double_value(&[]);
            assert!((all - expected).abs() < 1e-9);
        }
    }
}

#[test]
fn restored_state_continues_bit_equal() {
    let (set, other) = (parameters(Kind::Float, Kind::Float), parameters(Kind::Float, Kind::Float));
    let mut optimizer = run(&set, 1.0);
    let mut restored = AdamW::new(&config(), &other).unwrap();
    for (from, to) in set.iter().zip(other.iter()) {
        let (from_moments, to_moments) =
            (optimizer.moments(from).unwrap(), restored.moments(to).unwrap());
        no_grad(|| to.master.shallow_clone().copy_(&from.master));
        to_moments.m.shallow_clone().copy_(&from_moments.m);
        to_moments.v.shallow_clone().copy_(&from_moments.v);
    }
    restored.set_num_steps(optimizer.num_steps());
    for (set, optimizer) in [(&set, &mut optimizer), (&other, &mut restored)] {
        set_gradients(set, 99);
        optimizer.step(set, 0.01, 1.0).unwrap();
    }
    assert!(set.flat_master() == other.flat_master());
    assert!(optimizer.flat_m() == restored.flat_m() && optimizer.flat_v() == restored.flat_v());
}

#[test]
fn another_set_is_refused() {
    let set = parameters(Kind::Float, Kind::Float);
    let small = ParameterSpec { name: "x".to_owned(), shape: vec![4], decay: true };
    let other = ParameterSet::new(vec![small], Kind::Float, Kind::Float, Device::Cpu).unwrap();
    let mut optimizer = AdamW::new(&config(), &set).unwrap();
    let error = optimizer.step(&other, 0.1, 1.0).unwrap_err();
    assert!(matches!(error, OptimError::OtherSet { state: 192, parameters: 32 }), "{error}");
    assert_eq!(optimizer.num_steps(), 0);
}

#[test]
fn the_norm_is_that_of_all_gradients() {
    let set = parameters(Kind::Double, Kind::Double);
    set_gradients(&set, 3);
    let square = |tensor: &Tensor| tensor.square().sum(Kind::Double).double_value(&[]);
    let expected: f64 = set.iter().map(|parameter| square(&parameter.grad)).sum();
    assert!((gradient_norm(&set).unwrap() - expected.sqrt()).abs() < 1e-13);
    let _ = set.at(2).unwrap().grad.get(0).fill_(f64::NAN);
    assert!(gradient_norm(&set).unwrap().is_nan());
}
