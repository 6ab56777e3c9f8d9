//! The three products of a linear layer in FP8: against the products of what rounding made of the
//! operands, in FP64; against those of the operands themselves, within what rounding may do; and a
//! whole model of such layers.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use kernels::ops::fp8::{columns, rows};
use model::llama::init::initialize;
use model::{Dense, Inputs, Llama, Products, Stage, allocate, targets};
use model_spec::{LocalParameter, parameters};
use run_config::{ComputeDtype, Matmul, ModelConfig, Rope, RopeFrequencies};
use std::sync::Arc;
use torch_shim::autograd;
use torch_shim::params::{ParameterSet, ParameterSpec};
use torch_shim::scaled::Scaled;
use torch_shim::tch::{self, Device, Kind, Tensor};
use torch_shim::uses::Use;

/// Unit roundoff of e4m3, whose significands have 4 bits.
const U: f64 = 1.0 / 16.0;
/// Half of its least number.
const HALF_LEAST: f64 = 1.0 / 1024.0;
/// Unit roundoffs of BF16 and FP32.
const U_BF16: f64 = 1.0 / 256.0;
const U_FP32: f64 = 1.0 / (1 << 24) as f64;

/// Tokens, inputs and outputs: no two alike.
const TOKENS: i64 = 96;
const IN: i64 = 64;
const OUT: i64 = 160;

fn exact(x: &Tensor) -> Tensor {
    x.detach().to_kind(Kind::Double)
}

/// What an operand is after rounding: `[rows, summed]`.
fn rounded(x: &Scaled) -> Tensor {
    exact(&x.values) * exact(&x.scales).unsqueeze(1)
}

fn norm(x: &Tensor) -> f64 {
    x.norm().double_value(&[])
}

fn assert_within(what: &str, found: &Tensor, expected: &Tensor, bound: &Tensor) {
    assert_eq!(found.size(), expected.size(), "{what}");
    let share = ((exact(found) - expected).abs() / bound).max().double_value(&[]);
    assert!(share <= 1.0, "{what}: {share} of its bound");
}

fn product(a: &Tensor, b: &Tensor) -> Tensor {
    a.matmul(&b.tr())
}

/// `times` a product `a b^T` against that of the rounded operands in FP64, within FP32 sums, two
/// scales and one rounding to BF16; returns the bound.
fn check_rounded(what: &str, found: &Tensor, (a, b): (&Scaled, &Scaled), times: f64) -> Tensor {
    let (a, b) = (rounded(a), rounded(b));
    let roundings = (a.size()[1] + 2) as f64 * U_FP32;
    let expected = product(&a, &b) * times;
    let bound = product(&a.abs(), &b.abs()) * (roundings * times) + expected.abs() * U_BF16 * 1.01;
    assert_within(&format!("{what} of rounded operands"), found, &expected, &bound);
    bound
}

/// A product `a b^T` of rows against what is exact.
///
/// Rounding an operand errs by at most `e = U |x| + HALF_LEAST scale` in each number, so that a
/// product errs by `e_a |b| + |a| e_b + e_a e_b`, summed. Of many independent roundings, each of at
/// most U and without bias, the errors are in the root mean square below `U / sqrt(3)` (that is of a
/// uniform one), so that those of sums of products of independent numbers are `U sqrt(2 / 3)` of
/// the sums. What is far below was not rounded to FP8.
fn check(what: &str, found: &Tensor, a: (&Tensor, Scaled), b: (&Tensor, Scaled)) {
    let ((a, a_scaled), (b, b_scaled)) = (a, b);
    let bound = check_rounded(what, found, (&a_scaled, &b_scaled), 1.0);
    let (a, b) = (exact(a), exact(b));
    let error = |x: &Tensor, scaled: &Scaled| {
        x.abs() * U + exact(&scaled.scales).unsqueeze(1) * (HALF_LEAST * 1.001)
    };
    let (e_a, e_b) = (error(&a, &a_scaled), error(&b, &b_scaled));
    let of_errors = product(&e_a, &b.abs()) + product(&a.abs(), &e_b) + product(&e_a, &e_b);
    let expected = product(&a, &b);
    assert_within(what, found, &expected, &(of_errors + bound));
    let relative = norm(&(exact(found) - &expected)) / norm(&expected);
    let most = U * (2.0f64 / 3.0).sqrt();
    println!("{what}: {:.3} of its largest error", relative / most);
    assert!(relative < most && relative > most / 4.0, "{what}: {relative}, at most {most}");
}

fn weight(out: i64, input: i64) -> ParameterSet {
    let spec = ParameterSpec { name: "w".into(), shape: vec![out, input], decay: true };
    let set = ParameterSet::new(vec![spec], Kind::BFloat16, Kind::Float, Device::Cpu).unwrap();
    let random = Tensor::randn([out, input], (Kind::Float, Device::Cpu));
    set.at(0).unwrap().master.shallow_clone().copy_(&random);
    set.refresh_compute().unwrap();
    set
}

fn bf16(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(Kind::BFloat16)
}

/// Rows and columns of sizes far apart, so that another's scale shows.
fn uneven(shape: [i64; 2]) -> Tensor {
    let sizes = |count: i64| (Tensor::randn([count], (Kind::Float, Device::Cpu)) * 3.0).exp2();
    let x = Tensor::randn(shape, (Kind::Float, Device::Cpu));
    (x * sizes(shape[0]).unsqueeze(1) * sizes(shape[1])).to_kind(Kind::BFloat16)
}

#[test]
fn forward_and_both_backward_products() {
    tch::manual_seed(7);
    let set = weight(OUT, IN);
    let weight = set.at(0).unwrap();
    let products = Products::Fp8(None);
    let x = bf16(&[2, TOKENS / 2, IN]).set_requires_grad(true);
    let dy = bf16(&[2, TOKENS / 2, OUT]);
    let y = products.linear(&x, weight).unwrap();
    assert_eq!((y.size(), y.kind()), (vec![2, TOKENS / 2, OUT], Kind::BFloat16));
    let dx = autograd::gradients(&[&y], &[&dy], &[&x], false).unwrap().remove(0).unwrap();
    assert_eq!((dx.size(), dx.kind()), (x.size(), Kind::BFloat16));
    let (x, dy, w) = (x.detach().view([-1, IN]), dy.view([-1, OUT]), weight.compute.detach());
    let of_rows = |x: &Tensor| rows(None, x).unwrap();
    let of_columns = |x: &Tensor| columns(None, x).unwrap();
    check("forward", &y.view([-1, OUT]), (&x, of_rows(&x)), (&w, of_rows(&w)));
    check("input gradient", &dx.view([-1, IN]), (&dy, of_rows(&dy)), (&w.tr(), of_columns(&w)));
    let (dy_t, x_t) = (dy.tr(), x.tr());
    check("weight gradient", &weight.grad, (&dy_t, of_columns(&dy)), (&x_t, of_columns(&x)));
}

/// Sums of operands whose rows and columns are of sizes apart are as exact: each row has its own
/// scale. And a second use adds to what the first left.
#[test]
fn each_row_has_its_own_scale() {
    tch::manual_seed(8);
    let set = weight(OUT, IN);
    let weight = set.at(0).unwrap();
    let products = Products::Fp8(None);
    let (x, dy) = (uneven([TOKENS, IN]), uneven([TOKENS, OUT]));
    let y = products.project(&x, weight).unwrap();
    let w = weight.compute.detach();
    let of = |x: &Tensor, is_column| if is_column { columns(None, x) } else { rows(None, x) };
    let [x_rows, dy_rows, w_rows] = [&x, &dy, &w].map(|x| of(x, false).unwrap());
    let [x_columns, dy_columns, w_columns] = [&x, &dy, &w].map(|x| of(x, true).unwrap());
    drop(check_rounded("forward", &y, (&x_rows, &w_rows), 1.0));
    let dx = products.product(&dy, weight).unwrap();
    drop(check_rounded("input gradient", &dx, (&dy_rows, &w_columns), 1.0));
    for times in 1..=3 {
        let usage = Use::open(weight).unwrap();
        products.accumulate(&usage, &dy, &x).unwrap();
        usage.done().unwrap();
        let operands = (&dy_columns, &x_columns);
        drop(check_rounded("weight gradient", &weight.grad, operands, f64::from(times)));
    }
    // The sizes of rows differ by more than FP8 could hold with one scale for all.
    let sizes = exact(&x_rows.scales);
    assert!((sizes.max() / sizes.min()).double_value(&[]) > 100.0);
}

#[test]
fn what_does_not_fit_is_an_error() {
    let set = weight(32, 24);
    let error = Products::Fp8(None).project(&bf16(&[4, 24]), set.at(0).unwrap()).unwrap_err();
    assert!(error.to_string().contains("multiples of 16"), "{error}");
    let set = weight(24, 32);
    let error = Products::Fp8(None).project(&bf16(&[4, 32]), set.at(0).unwrap()).unwrap_err();
    assert!(error.to_string().contains("multiples of 16"), "{error}");
    let error = Products::Fp8(None).project(&bf16(&[4, 16]), set.at(0).unwrap()).unwrap_err();
    assert!(error.to_string().contains("rows of 16 and of 32"), "{error}");
}

/// What is no number comes out as none, wherever it is summed, and nowhere else.
#[test]
fn what_is_no_number_stays_none() {
    let set = weight(32, 16);
    let weight = set.at(0).unwrap();
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let x = bf16(&[16, 16]);
        let _ = x.get(5).get(3).fill_(bad);
        let y = Products::Fp8(None).project(&x, weight).unwrap();
        let is_none = y.isnan().all_dim(1, false);
        let expected = Tensor::arange(16, (Kind::Int64, Device::Cpu)).eq(5);
        assert_eq!(is_none, expected, "{bad}");
        assert!(bool::try_from(y.isnan().any_dim(1, false).eq_tensor(&expected).all()).unwrap());
    }
}

fn config() -> ModelConfig {
    ModelConfig {
        preset: None,
        dim: 32,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        ffn_dim: 48,
        vocab_size: 61,
        norm_eps: 1e-5,
        tied_embeddings: false,
        init_std: 0.2,
        rope: Rope { theta: 10_000.0, frequencies: RopeFrequencies::Exact, scaling: None },
        init_from: None,
    }
}

fn gradients(config: &ModelConfig, matmul: Matmul) -> (f64, ParameterSet) {
    tch::set_num_threads(1);
    let held: Vec<_> = parameters(config).iter().map(LocalParameter::whole).collect();
    let set = allocate(&held, false, ComputeDtype::Bf16, Device::Cpu).unwrap();
    initialize(11, &held, &set).unwrap();
    set.refresh_compute().unwrap();
    let dense = Arc::new(Dense::default().with_products(matmul));
    let model = Llama::new(config, Stage::whole(config), &set, dense, 64).unwrap();
    let tokens: Vec<i32> = (0..64).map(|i| (i * 13 + 5) % 61).collect();
    let goal: Vec<i32> = (0..64).map(|i| (i * 7) % 61).collect();
    let inputs = Inputs::consecutive(&tokens, 2, 0, Device::Cpu).unwrap();
    let goal = targets(&goal, 2, Device::Cpu).unwrap();
    let loss = model.forward_loss(&inputs, &goal, 1.0 / 64.0).unwrap();
    loss.backward();
    (loss.double_value(&[]), set)
}

/// Every parameter has a gradient, which is that of BF16 but for the noise of FP8. Two operands of
/// each product err by up to U, forward and backward, in two blocks of two branches: no gradient
/// is off by as much as a half of itself, and one that was wrong or another's would be by more.
#[test]
fn a_model_has_all_its_gradients() {
    for config in [config(), ModelConfig { tied_embeddings: true, ..config() }] {
        let (loss, expected) = gradients(&config, Matmul::Same);
        let (loss_fp8, found) = gradients(&config, Matmul::Fp8);
        assert_ne!(loss, loss_fp8, "FP8 is used");
        assert!((loss - loss_fp8).abs() < 0.02 * loss, "{loss} {loss_fp8}");
        for (found, expected) in found.iter().zip(expected.iter()) {
            let relative = norm(&(&found.grad - &expected.grad)) / norm(&expected.grad);
            println!("{}: {relative:.4}", found.name);
            assert!(relative > 0.0 && relative < 0.5, "{}: {relative}", found.name);
        }
    }
}
