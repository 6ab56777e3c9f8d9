//! Each fused operator against its plain reference: values and gradients, in FP64, FP32 and BF16.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use torch_shim::autograd;
use torch_shim::fused::{self, Documents, reference};
use torch_shim::params::{Parameter, ParameterSet, ParameterSpec};
use torch_shim::tch::{self, Device, Kind, Tensor};

const KINDS: [Kind; 3] = [Kind::Double, Kind::Float, Kind::BFloat16];

/// Largest difference allowed, relative to the largest value of the reference.
fn tolerance(kind: Kind) -> f64 {
    match kind {
        Kind::Double => 1e-12,
        Kind::Float => 1e-5,
        _ => 2e-2,
    }
}

fn check(name: &str, got: &Tensor, expected: &Tensor, tolerance: f64) {
    assert_eq!(got.size(), expected.size(), "{name}");
    let (got, expected) = (got.to_kind(Kind::Double), expected.to_kind(Kind::Double));
    let scale = expected.abs().max().double_value(&[]).max(1e-30);
    let worst = (&got - &expected).abs().max().double_value(&[]) / scale;
    assert!(worst <= tolerance, "{name}: relative difference {worst:e}, allowed {tolerance:e}");
}

fn random(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(shape, (Kind::Double, Device::Cpu)).to_kind(kind)
}

fn leaf(shape: &[i64], kind: Kind) -> Tensor {
    random(shape, kind).set_requires_grad(true)
}

fn parameter(shape: &[i64], kind: Kind) -> (ParameterSet, Parameter) {
    let master = if kind == Kind::Double { Kind::Double } else { Kind::Float };
    let spec = ParameterSpec { name: "w".into(), shape: shape.to_vec(), decay: true };
    let set = ParameterSet::new(vec![spec], kind, master, Device::Cpu).unwrap();
    set.flat_master().shallow_clone().copy_(&random(&set.flat_master().size(), master));
    set.refresh_compute().unwrap();
    let parameter = set.at(0).unwrap().shallow_clone();
    (set, parameter)
}

/// The reference runs in FP64 on the same (rounded) values, so that it is the truth for every
/// dtype.
fn twin(x: &Tensor) -> Tensor {
    x.detach().to_kind(Kind::Double).set_requires_grad(true)
}

/// Runs both on random output gradients; compares outputs, input gradients and the weight's
/// gradient (twice accumulated).
fn compare(
    name: &str,
    kind: Kind,
    inputs: &[Tensor],
    weight: Option<&Parameter>,
    fused: impl Fn(&[Tensor]) -> Vec<Tensor>,
    plain: impl Fn(&[Tensor], Option<&Tensor>) -> Vec<Tensor>,
) {
    let name = format!("{name} {kind:?}");
    let tolerance = tolerance(kind);
    let twins: Vec<Tensor> = inputs.iter().map(twin).collect();
    let twin_weight = weight.map(|weight| twin(&weight.compute));
    let expected = plain(&twins, twin_weight.as_ref());
    let given: Vec<Tensor> = expected.iter().map(|out| random(&out.size(), kind)).collect();
    let (out, given_ref): (Vec<&Tensor>, Vec<Tensor>) =
        (expected.iter().collect(), given.iter().map(|g| g.to_kind(Kind::Double)).collect());
    autograd::backward(&out, &given_ref.iter().collect::<Vec<_>>()).unwrap();
    for _ in 0..2 {
        let got = fused(inputs);
        for (got, expected) in got.iter().zip(&expected) {
            assert_eq!(got.kind(), kind);
            check(&name, got, expected, tolerance);
        }
        let gradients = autograd::gradients(
            &got.iter().collect::<Vec<_>>(),
            &given.iter().collect::<Vec<_>>(),
            &inputs.iter().collect::<Vec<_>>(),
            false,
        )
        .unwrap();
        for (index, (gradient, twin)) in gradients.iter().zip(&twins).enumerate() {
            let gradient = gradient.as_ref().unwrap();
            check(&format!("{name}: gradient {index}"), gradient, &twin.grad(), tolerance);
        }
    }
    if let (Some(weight), Some(twin)) = (weight, twin_weight) {
        check(&format!("{name}: weight"), &weight.grad, &(twin.grad() * 2.0), tolerance);
    }
}

#[test]
fn linear_equals_its_reference() {
    for kind in KINDS {
        // The last three are large enough for products by blocks: rows, columns and terms of whole
        // blocks, and with a rest in each, with an odd number of tokens and an even one.
        let large = [([2, 256, 256], 128), ([3, 199, 333], 209), ([2, 299, 333], 209)];
        let shapes = [[2, 7, 33], [1, 64, 16]].map(|shape| (shape, 19)).into_iter().chain(large);
        for (shape, rows) in shapes {
            let (_set, weight) = parameter(&[rows, shape[2]], kind);
            compare(
                "linear",
                kind,
                &[leaf(&shape, kind)],
                Some(&weight),
                |x| vec![fused::linear(&x[0], &weight).unwrap()],
                |x, w| vec![reference::linear(&x[0], w.unwrap()).unwrap()],
            );
        }
    }
}

#[test]
fn sums_do_not_depend_on_the_number_of_threads() {
    for kind in [Kind::Float, Kind::BFloat16] {
        let (given, x) = (random(&[2, 300, 300], kind), random(&[2, 300, 200], kind));
        let (set, weight) = parameter(&[300, 200], kind);
        let (norm_set, norm) = parameter(&[200], kind);
        let on_threads = |threads| {
            tch::set_num_threads(threads);
            set.zero_grad().unwrap();
            norm_set.zero_grad().unwrap();
            let x = x.copy().set_requires_grad(true);
            let out = fused::linear(&fused::rms_norm(&x, &norm, 1e-5).unwrap(), &weight).unwrap();
            autograd::backward(&[&out], &[&given]).unwrap();
            [out.detach(), x.grad(), weight.grad.copy(), norm.grad.copy()]
        };
        let (one, three) = (on_threads(1), on_threads(3));
        for (index, (one, three)) in one.iter().zip(&three).enumerate() {
            assert!(one.equal(three), "{kind:?}: result {index} differs");
        }
    }
}

#[test]
fn norms_equal_their_references() {
    for kind in KINDS {
        for shape in [[2, 7, 33], [1, 40, 256], [3, 1, 8]] {
            let (_set, weight) = parameter(&[shape[2]], kind);
            compare(
                "rms_norm",
                kind,
                &[leaf(&shape, kind)],
                Some(&weight),
                |x| vec![fused::rms_norm(&x[0], &weight, 1e-5).unwrap()],
                |x, w| vec![reference::rms_norm(&x[0], w.unwrap(), 1e-5).unwrap()],
            );
            let (_set, weight) = parameter(&[shape[2]], kind);
            compare(
                "add_rms_norm",
                kind,
                &[leaf(&shape, kind), leaf(&shape, kind)],
                Some(&weight),
                |x| {
                    let (normed, sum) = fused::add_rms_norm(&x[0], &x[1], &weight, 1e-5).unwrap();
                    vec![normed, sum]
                },
                |x, w| {
                    let sum = &x[0] + &x[1];
                    vec![reference::rms_norm(&sum, w.unwrap(), 1e-5).unwrap(), sum]
                },
            );
        }
    }
}

#[test]
fn rope_equals_its_reference() {
    for kind in KINDS {
        for (heads, kv_heads, head_dim, per_row) in
            [(4, 2, 16, false), (3, 3, 10, true), (2, 1, 64, false)]
        {
            let (batch, sequence) = (2, 9);
            let table = if kind == Kind::Double { Kind::Double } else { Kind::Float };
            let shape = if per_row {
                vec![batch, sequence, head_dim / 2]
            } else {
                vec![sequence, head_dim / 2]
            };
            let angle = random(&shape, table);
            let angle = Tensor::cat(&[&angle, &angle], -1);
            let (cos, sin) = (angle.cos(), angle.sin());
            let (wide_cos, wide_sin) = (cos.to_kind(Kind::Double), sin.to_kind(Kind::Double));
            compare(
                "rope_qkv",
                kind,
                &[leaf(&[batch, sequence, (heads + 2 * kv_heads) * head_dim], kind)],
                None,
                |x| {
                    let out =
                        fused::rope_qkv(&x[0], &cos, &sin, heads, kv_heads, head_dim).unwrap();
                    vec![out.0, out.1, out.2]
                },
                |x, _| {
                    let (cos, sin) = (&wide_cos, &wide_sin);
                    let out =
                        reference::rope_qkv(&x[0], cos, sin, heads, kv_heads, head_dim).unwrap();
                    vec![out.0, out.1, out.2]
                },
            );
        }
    }
}

#[test]
fn attention_equals_its_reference() {
    for kind in KINDS {
        for (heads, kv_heads) in [(4, 2), (3, 3), (4, 1)] {
            for head_dim in [16, 48] {
                check_attention(kind, (heads, kv_heads), head_dim, 33, &[5, 1, 27]);
            }
        }
        // More than one block of queries and keys, whole and not.
        check_attention(kind, (2, 1), 32, 128, &[64, 64]);
        check_attention(kind, (2, 1), 32, 200, &[3, 130, 67]);
        check_attention(kind, (2, 2), 20, 70, &[69, 1]);
    }
}

/// With plain rows and with `lengths` in the second of two, as the projection lays heads out (a
/// row a token) and as libtorch's own attention does.
fn check_attention(
    kind: Kind,
    (heads, kv_heads): (i64, i64),
    head_dim: i64,
    sequence: i64,
    lengths: &[i64],
) {
    let rows = vec![vec![sequence], lengths.to_vec()];
    for documents in [Documents::causal(), Documents::from_lengths(rows)] {
        for by_token in [true, false] {
            let made = |heads| match by_token {
                true => leaf(&[2, sequence, heads, head_dim], kind),
                false => leaf(&[2, heads, sequence, head_dim], kind),
            };
            let head_first = |x: &Tensor| match by_token {
                true => x.transpose(1, 2),
                false => x.shallow_clone(),
            };
            let inputs = [made(heads), made(kv_heads), made(kv_heads)];
            let split = |x: &[Tensor]| [head_first(&x[0]), head_first(&x[1]), head_first(&x[2])];
            compare(
                "attention",
                kind,
                &inputs,
                None,
                |x| {
                    let [q, k, v] = split(x);
                    vec![fused::attention(&q, &k, &v, &documents).unwrap()]
                },
                |x, _| {
                    let [q, k, v] = split(x);
                    vec![reference::attention(&q, &k, &v, &documents).unwrap()]
                },
            );
        }
    }
}

#[test]
fn documents_that_do_not_cover_a_row_are_refused() {
    let x = random(&[2, 1, 8, 4], Kind::Float);
    for rows in [vec![vec![8, 1], vec![8]], vec![vec![4, 4]], vec![vec![9, -1], vec![8]]] {
        assert!(fused::attention(&x, &x, &x, &Documents::from_lengths(rows)).is_err());
    }
}

#[test]
fn swiglu_equals_its_reference() {
    for kind in KINDS {
        for shape in [[2, 7, 66], [1, 5, 512]] {
            compare(
                "swiglu",
                kind,
                &[leaf(&shape, kind)],
                None,
                |x| vec![fused::swiglu(&x[0]).unwrap()],
                |x, _| vec![reference::swiglu(&x[0]).unwrap()],
            );
        }
    }
}

#[test]
fn embedding_equals_its_reference() {
    for kind in KINDS {
        let (_set, weight) = parameter(&[11, 24], kind);
        let twin = twin(&weight.compute);
        let tokens = Tensor::from_slice(&[3i32, 3, 0, 10, 9, 3]).view([2, 3]);
        let got = fused::embedding(&tokens, &weight).unwrap();
        let expected = reference::embedding(&tokens, &twin).unwrap();
        check("embedding", &got, &expected, 0.0);
        let given = random(&[2, 3, 24], kind);
        autograd::backward(&[&got], &[&given]).unwrap();
        autograd::backward(&[&expected], &[&given.to_kind(Kind::Double)]).unwrap();
        check("embedding: weight", &weight.grad, &twin.grad(), tolerance(kind) / 100.0);
    }
}

#[test]
fn head_loss_equals_its_reference_for_every_chunk() {
    for kind in KINDS {
        for chunk in [1, 3, 100] {
            let (_set, weight) = parameter(&[37, 24], kind);
            let (x, labels) =
                (leaf(&[2, 5, 24], kind), [3i32, -100, 0, 36, 9, 3, -100, -100, 1, 2]);
            let targets = Tensor::from_slice(&labels).view([2, 5]);
            let (x_twin, w_twin) = (twin(&x), twin(&weight.compute));
            let expected = reference::head_loss(&x_twin, &w_twin, &targets, 1.0 / 7.0).unwrap();
            let got = fused::head_loss(&x, &weight, &targets, 1.0 / 7.0, chunk).unwrap();
            check("head_loss", &got, &expected, tolerance(kind));
            autograd::backward(&[&expected], &[]).unwrap();
            autograd::backward(&[&got], &[]).unwrap();
            check("head_loss: x", &x.grad(), &x_twin.grad(), tolerance(kind));
            check("head_loss: weight", &weight.grad, &w_twin.grad(), tolerance(kind));
            let quiet =
                tch::no_grad(|| fused::head_loss(&x, &weight, &targets, 1.0 / 7.0, chunk).unwrap());
            assert_eq!(quiet.double_value(&[]), got.double_value(&[]));
            check("head_loss: weight after no_grad", &weight.grad, &w_twin.grad(), tolerance(kind));
        }
    }
}

#[test]
fn head_loss_refuses_a_gradient_other_than_one() {
    let (_set, weight) = parameter(&[7, 4], Kind::Float);
    let targets = Tensor::from_slice(&[3i32, 1]).view([1, 2]);
    let loss = fused::head_loss(&leaf(&[1, 2, 4], Kind::Float), &weight, &targets, 0.5, 8).unwrap();
    let error = autograd::backward(&[&(loss * 2.0)], &[]).unwrap_err().to_string();
    assert!(error.contains("loss gradient of one"), "{error}");
}

#[test]
fn targets_outside_the_vocabulary_are_an_error() {
    let (_set, weight) = parameter(&[7, 4], Kind::Float);
    for target in [7i32, -1, i32::MAX] {
        let targets = Tensor::from_slice(&[3i32, target]).view([1, 2]);
        let x = leaf(&[1, 2, 4], Kind::Float);
        assert!(fused::head_loss(&x, &weight, &targets, 0.5, 8).is_err(), "target {target}");
    }
}

#[test]
fn gradients_equal_finite_differences_in_fp64() {
    let (set, weight) = parameter(&[6, 8], Kind::Double);
    let x = random(&[1, 4, 8], Kind::Double);
    let targets = Tensor::from_slice(&[3i64, 1, -100, 5]).view([1, 4]);
    let loss = || fused::head_loss(&x, &weight, &targets, 0.25, 2).unwrap();
    autograd::backward(&[&loss()], &[]).unwrap();
    let flat = set.flat_master().shallow_clone();
    for element in [0, 9, 30, 47] {
        let value = flat.double_value(&[element]);
        let at = |shifted: f64| {
            let _ = flat.get(element).fill_(shifted);
            tch::no_grad(|| loss().double_value(&[]))
        };
        let slope = (at(value + 1e-6) - at(value - 1e-6)) / 2e-6;
        at(value);
        let gradient = set.flat_grad().double_value(&[element]);
        assert!((slope - gradient).abs() < 1e-8, "element {element}: {slope} against {gradient}");
    }
}
