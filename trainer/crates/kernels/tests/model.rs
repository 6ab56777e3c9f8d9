//! A whole model with the kernels, emulated on the CPU, against the same model with the shim's
//! operators: loss, and gradients of all parameters.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(unsafe_code, reason = "the emulator calls what the host compiler made of a kernel")]

mod emulator;

use std::panic::catch_unwind;
use std::sync::Arc;

use kernels::Kernels;
use model::llama::init::initialize;
use model::{Dense, Inputs, Llama, Stage, allocate, targets};
use model_spec::{LocalParameter, parameters};
use optim::AdamW;
use run_config::{ComputeDtype, ModelConfig, Optimizer, OptimizerKind, Rope, RopeFrequencies};
use torch_shim::params::ParameterSet;
use torch_shim::tch::{Device, Kind, Tensor};

const POSITIONS: usize = 32;

/// Sizes of whole vectors, and of none: the vocabulary and the feed-forward width.
fn config() -> ModelConfig {
    ModelConfig {
        preset: None,
        dim: 64,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        ffn_dim: 42,
        vocab_size: 83,
        norm_eps: 1e-5,
        tied_embeddings: false,
        init_std: 0.2,
        rope: Rope { theta: 10_000.0, frequencies: RopeFrequencies::Exact, scaling: None },
        init_from: None,
    }
}

/// Loss and all gradients, flat, in FP64. Two documents in a row, so that positions are no plain
/// count, and targets that are none.
fn run(compute: ComputeDtype, kernels: Option<Kernels>) -> (f64, Tensor) {
    torch_shim::tch::set_num_threads(1);
    let config = config();
    let held: Vec<_> = parameters(&config).iter().map(LocalParameter::whole).collect();
    let set = allocate(&held, false, compute, Device::Cpu).unwrap();
    initialize(11, &held, &set).unwrap();
    let dense = Arc::new(Dense::new(kernels));
    let model = Llama::new(&config, Stage::whole(&config), &set, dense, POSITIONS).unwrap();
    let (batch, sequence) = (2, 24);
    let ids = |step: i32| -> Vec<i32> {
        (0..batch * sequence).map(|at| (at as i32 * 37 + step * 11) % 83).collect()
    };
    let positions: Vec<i32> = (0..batch * sequence).map(|at| (at % sequence % 15) as i32).collect();
    let documents: Vec<i32> = (0..batch * sequence).map(|at| (at % sequence / 15) as i32).collect();
    let inputs = Inputs::new(&ids(0), &positions, Some(&documents), batch, Device::Cpu).unwrap();
    let mut goal = ids(1);
    goal[5] = -100;
    let goal = targets(&goal, batch, Device::Cpu).unwrap();
    let loss = model.forward_loss(&inputs, &goal, 1.0 / 47.0).unwrap();
    loss.backward();
    (loss.double_value(&[]), set.flat_grad().to_kind(Kind::Double))
}

/// Both err from the same model in FP64. They round in the same places, so that neither errs much
/// more than the other: by half as much again at the most, which is far less than what any operator
/// that is wrong would make of it.
fn check(compute: ComputeDtype) {
    let (exact_loss, exact) = run(ComputeDtype::Fp64, None);
    let error = |(loss, gradients): (f64, Tensor)| {
        let distance =
            (gradients - &exact).norm().double_value(&[]) / exact.norm().double_value(&[]);
        (((loss - exact_loss) / exact_loss).abs(), distance)
    };
    let plain = error(run(compute, None));
    let own = error(run(compute, Some(emulator::kernels(None))));
    println!("{compute:?}: loss and gradients are off by {own:?}, without kernels by {plain:?}");
    let unit = if compute == ComputeDtype::Bf16 { 2f64.powi(-8) } else { 2f64.powi(-24) };
    assert!(own.1 > 0.0 && own.1 < 1.5 * plain.1, "{own:?} {plain:?}");
    // A loss is a mean of 47, each off by few roundings: that they cancel more in one is no error.
    assert!(own.0 < 1.5 * plain.0 + 4.0 * unit, "{own:?} {plain:?}");
}

#[test]
fn fp32() {
    check(ComputeDtype::Fp32);
}

#[test]
fn bf16() {
    check(ComputeDtype::Bf16);
}

/// Who decides about an update.
#[derive(Clone, Copy, PartialEq)]
enum Decided {
    /// The host, before it is given.
    AtOnce,
    /// The device; and an update by gradients that are not numbers is held back before each.
    Late,
}

/// Master weights, weights that compute, both moments.
fn state(set: &ParameterSet, optimizer: &AdamW) -> [Tensor; 4] {
    [set.flat_master(), set.flat_compute(), optimizer.flat_m(), optimizer.flat_v()]
        .map(Tensor::copy)
}

fn same_bits(one: &[Tensor; 4], other: &[Tensor; 4], what: &str) {
    for (at, (one, other)) in one.iter().zip(other).enumerate() {
        assert!(one.equal(other), "{what}: buffer {at}");
    }
}

/// The state after three updates, with gradients that are the same whoever computes. Coefficients
/// of one and of less, parameters that decay and such that do not.
fn updated(compute: ComputeDtype, kernels: Option<Kernels>, decided: Decided) -> [Tensor; 4] {
    let config = config();
    let held: Vec<_> = parameters(&config).iter().map(LocalParameter::whole).collect();
    let set = allocate(&held, false, compute, Device::Cpu).unwrap();
    initialize(11, &held, &set).unwrap();
    let optimizer = Optimizer {
        kind: OptimizerKind::Adamw,
        learning_rate: 1e-3,
        betas: [0.9, 0.95],
        eps: 1e-8,
        weight_decay: 0.1,
        decay_norms: false,
    };
    let mut optimizer = AdamW::new(&optimizer, &set).unwrap().with_kernels(kernels).unwrap();
    for step in 0..3 {
        let coefficient = [0.3, 1.0, 1.0 / 3.0][step as usize];
        if decided == Decided::Late {
            let before = state(&set, &optimizer);
            let _ = set.flat_grad().shallow_clone().fill_(f64::NAN);
            let coefficient = (step > 0).then(|| Tensor::from(coefficient));
            optimizer.step_unless(&set, 1e-3, coefficient.as_ref(), &Tensor::from(1f32)).unwrap();
            optimizer.take_back();
            same_bits(&before, &state(&set, &optimizer), "an update that was held back");
        }
        torch_shim::tch::manual_seed(step);
        let _ = set.flat_grad().shallow_clone().zero_();
        for parameter in set.iter() {
            let mut gradient = parameter.grad.shallow_clone();
            gradient.copy_(&Tensor::randn(&parameter.shape[..], (Kind::Float, Device::Cpu)));
        }
        match decided {
            Decided::AtOnce => optimizer.step(&set, 1e-3, coefficient).unwrap(),
            Decided::Late => {
                let (coefficient, held) = (Tensor::from(coefficient), Tensor::from_slice(&[0f32]));
                optimizer.step_unless(&set, 1e-3, Some(&coefficient), &held).unwrap();
            }
        }
    }
    assert_eq!(optimizer.num_steps(), 3);
    state(&set, &optimizer)
}

/// Plain updates and those of `kernels`, decided at once and late.
fn check_updates(compute: ComputeDtype, kernels: &Kernels) {
    let plain = updated(compute, None, Decided::AtOnce);
    same_bits(&plain, &updated(compute, None, Decided::Late), "plain, late");
    let own = updated(compute, Some(kernels.clone()), Decided::AtOnce);
    same_bits(&own, &updated(compute, Some(kernels.clone()), Decided::Late), "late");
    // Gradients are below 6, weights below 4. Both sides round in each step: of a first moment the
    // gradient, two products and a sum; of a second one product more; of a weight, which changes by
    // about the learning rate (below four times of it), some twenty times this change, and itself.
    let unit = 2f64.powi(-24);
    let limits = [(0, 20.0 * 1e-3 * 4.0 + 4.0), (2, 4.0 * 6.0), (3, 5.0 * 36.0)];
    for (at, limit) in limits {
        let limit = 3.0 * 2.0 * limit * unit;
        let worst = (&own[at] - &plain[at]).abs().max().double_value(&[]);
        assert!(worst > 0.0 && worst < limit, "{compute:?}, buffer {at}: {worst:e} {limit:e}");
    }
    assert!(plain[0].abs().max().double_value(&[]) < 4.0);
    assert!(own[1].equal(&own[0].to_kind(own[1].kind())), "{compute:?}: the copy");
}

#[test]
fn the_optimizer_takes_the_same_steps() {
    for compute in [ComputeDtype::Fp32, ComputeDtype::Bf16] {
        check_updates(compute, &emulator::kernels(None));
    }
}

#[test]
fn an_update_that_is_wrong_is_found() {
    for planted in [
        ("if (!(magnitude(scale) <= (Wide)3.0e38f)) return;", ""),
        ("g[lane] * factor, m[lane]", "g[lane], m[lane]"),
        ("c.decay : (Wide)0;", "c.decay : c.decay;"),
        ("if (copy) store<kVector>(copy + at, w);", "if (copy) store<kVector>(copy + at, m);"),
    ] {
        assert!(kernels::ops::adamw::PROGRAM.source.contains(planted.0), "{planted:?}");
        let found = catch_unwind(|| {
            check_updates(ComputeDtype::Bf16, &emulator::kernels(Some(planted)));
        });
        let text = found.unwrap_err().downcast_ref::<String>().cloned();
        let text = text.unwrap_or_default();
        assert!(!text.contains("host compiler"), "{planted:?}: {text}");
        println!("found: {planted:?}: {text}");
    }
}

/// FP64 is the oracle: the kernels leave it alone, to the bit.
#[test]
fn fp64_is_not_touched() {
    let (loss, gradients) = run(ComputeDtype::Fp64, None);
    let (same_loss, same) = run(ComputeDtype::Fp64, Some(emulator::kernels(None)));
    assert_eq!(loss.to_bits(), same_loss.to_bits());
    assert!(gradients.equal(&same));
}
