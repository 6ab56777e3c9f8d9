//! The autograd functions: they give what the kernels give, to the bit; gradients of weights are
//! added in place; what they do not take has the plain form.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kernels::ops::rope::{Layout, Tables};
use kernels::ops::{cross_entropy, embedding, rms_norm, rope, swiglu};
use kernels::{Kernels, Storage};
use torch_shim::params::{Parameter, ParameterSet, ParameterSpec};
use torch_shim::tch::{self, Device, Kind, Tensor};
use torch_shim::{autograd, fused};

use super::{begin, close, exact, leaf, random, same, unit};

const TAKEN: [Storage; 2] = [Storage::Fp32, Storage::Bf16];
const EPS: f64 = 1e-5;

/// A set of one weight with random values, and how often its gradient was ready.
fn parameter(
    kernels: &Kernels,
    shape: &[i64],
    kind: Kind,
) -> (ParameterSet, Parameter, Arc<AtomicUsize>) {
    let master = if kind == Kind::Double { Kind::Double } else { Kind::Float };
    let spec = ParameterSpec { name: "w".into(), shape: shape.to_vec(), decay: true };
    let set = ParameterSet::new(vec![spec], kind, master, kernels.device()).unwrap();
    let parameter = set.at(0).unwrap().shallow_clone();
    parameter.master.shallow_clone().copy_(&random(kernels, shape, master));
    set.refresh_compute().unwrap();
    let ready = Arc::new(AtomicUsize::new(0));
    let count = ready.clone();
    let hook = move |_| {
        count.fetch_add(1, Ordering::SeqCst);
        Ok(())
    };
    set.set_ready_hook(hook).unwrap();
    (set, parameter, ready)
}

fn input(kernels: &Kernels, shape: &[i64], kind: Kind) -> Tensor {
    random(kernels, shape, kind).set_requires_grad(true)
}

fn gradients_of(outputs: &[&Tensor], given: &[&Tensor], inputs: &[&Tensor]) -> Vec<Tensor> {
    let gradients = autograd::gradients(outputs, given, inputs, false).unwrap();
    gradients.into_iter().map(Option::unwrap).collect()
}

/// All of them.
pub fn check(kernels: &Kernels) {
    for storage in TAKEN {
        begin();
        norm(kernels, storage.kind());
        add_norm(kernels, storage.kind());
        turn(kernels, storage.kind());
        glu(kernels, storage.kind());
        table(kernels, storage.kind());
        head(kernels, storage);
    }
    refusals(kernels);
    if kernels.device() == Device::Cpu {
        plain_forms(kernels);
    }
}

fn norm(kernels: &Kernels, kind: Kind) {
    let shape = [2, 9, 72];
    let (_set, weight, ready) = parameter(kernels, &[72], kind);
    let (x, dy) = (input(kernels, &shape, kind), random(kernels, &shape, kind));
    let made = rms_norm::forward(kernels, &x, None, &weight.compute, EPS).unwrap();
    let sum = Tensor::zeros([72], (Kind::Float, kernels.device()));
    for times in 1..=2 {
        let y = rms_norm::rms_norm(kernels, &x, &weight, EPS).unwrap();
        same("rms_norm", &y, &made.normed);
        let dx = gradients_of(&[&y], &[&dy], &[&x]);
        let (z, outer) = (&made.sum, (&dy, None));
        let want =
            rms_norm::backward(kernels, outer, z, &weight.compute, &made.reciprocal, &sum).unwrap();
        same("rms_norm: x", &dx[0], &want);
        same("rms_norm: weight", &weight.grad, &sum);
        assert_eq!(ready.load(Ordering::SeqCst), times);
    }
    // A transposed input, and no graph.
    let y = tch::no_grad(|| rms_norm::rms_norm(kernels, &x.transpose(0, 1), &weight, EPS)).unwrap();
    same("rms_norm without a graph", &y.transpose(0, 1), &made.normed);
    assert!(!y.requires_grad());
}

fn add_norm(kernels: &Kernels, kind: Kind) {
    let shape = [3, 5, 40];
    let (_set, weight, ready) = parameter(kernels, &[40], kind);
    let (x, residual) = (input(kernels, &shape, kind), input(kernels, &shape, kind));
    let (d_normed, d_sum) = (random(kernels, &shape, kind), random(kernels, &shape, kind));
    let add_norm = || rms_norm::add_rms_norm(kernels, &x, &residual, &weight, EPS).unwrap();
    let made = rms_norm::forward(kernels, &x, Some(&residual), &weight.compute, EPS).unwrap();
    let sum = Tensor::zeros([40], (Kind::Float, kernels.device()));
    let want = |d_sum| {
        let (z, w) = (&made.sum, &weight.compute);
        rms_norm::backward(kernels, (&d_normed, d_sum), z, w, &made.reciprocal, &sum).unwrap()
    };
    let (normed, stream) = add_norm();
    same("add_rms_norm: normed", &normed, &made.normed);
    same("add_rms_norm: sum", &stream, &made.sum);
    let both = want(Some(&d_sum));
    for got in gradients_of(&[&normed, &stream], &[&d_normed, &d_sum], &[&x, &residual]) {
        same("add_rms_norm: both used", &got, &both);
    }
    let (normed, _) = add_norm();
    same("add_rms_norm: x", &gradients_of(&[&normed], &[&d_normed], &[&x])[0], &want(None));
    let (_, stream) = add_norm();
    same("add_rms_norm: sum alone", &gradients_of(&[&stream], &[&d_sum], &[&x])[0], &d_sum);
    same("add_rms_norm: weight", &weight.grad, &sum);
    assert_eq!(ready.load(Ordering::SeqCst), 3);
}

fn turn(kernels: &Kernels, kind: Kind) {
    let layout = Layout { heads: 4, kv_heads: 2, head_dim: 16 };
    let qkv = random(kernels, &[2, 6, 128], kind).set_requires_grad(true);
    let angles = random(kernels, &[6, 8], Kind::Float);
    let angles = Tensor::cat(&[&angles, &angles], -1);
    let (cos, sin) = (angles.cos(), angles.sin());
    let tables = Tables { cos: &cos, sin: &sin };
    let memory = qkv.detach().copy();
    let want = rope::forward(kernels, &memory, tables, layout).unwrap();
    let given = want.each_ref().map(|part| random(kernels, &part.size(), kind));
    let want_gradient = rope::backward(kernels, given.each_ref(), tables, layout).unwrap();
    let run = |qkv: &Tensor| {
        let (q, k, v) = rope::rope_qkv(kernels, qkv, tables, layout).unwrap();
        [q, k, v]
    };
    // A leaf keeps its values; what was computed is turned where it is.
    let before = qkv.detach().copy();
    let computed = &qkv * 1.0;
    let address = computed.data_ptr();
    for (of_leaf, got) in [(true, run(&qkv)), (false, run(&computed))] {
        for (got, want) in got.iter().zip(&want) {
            same("rope_qkv", got, want);
        }
        assert_eq!(got[0].data_ptr() == address, !of_leaf);
        let outputs: Vec<&Tensor> = got.iter().collect();
        let gradient = gradients_of(&outputs, &given.iter().collect::<Vec<_>>(), &[&qkv]);
        same("rope_qkv: gradient", &gradient[0], &want_gradient);
    }
    same("a leaf", &qkv, &before);
    // One output alone.
    let got = run(&(&qkv * 1.0));
    let none = Tensor::zeros_like(&given[1]);
    let want = rope::backward(kernels, [&given[0], &none, &none], tables, layout).unwrap();
    same("rope_qkv: q alone", &gradients_of(&[&got[0]], &[&given[0]], &[&qkv])[0], &want);
    // Whoever else needs the values that were there hears of it.
    let computed = &qkv * 1.0;
    let square = &computed * &computed;
    let _ = run(&computed);
    let error = autograd::backward(&[&square.sum(kind)], &[]).unwrap_err().to_string();
    assert!(error.contains("modified by an inplace operation"), "{error}");
}

fn glu(kernels: &Kernels, kind: Kind) {
    let gate_up = input(kernels, &[3, 4, 48], kind);
    let y = swiglu::swiglu(kernels, &gate_up).unwrap();
    same("swiglu", &y, &swiglu::forward(kernels, &gate_up).unwrap());
    let dy = random(kernels, &y.size(), kind);
    let got = gradients_of(&[&y], &[&dy], &[&gate_up]);
    same("swiglu: gradient", &got[0], &swiglu::backward(kernels, &dy, &gate_up).unwrap());
}

fn table(kernels: &Kernels, kind: Kind) {
    let (_set, weight, ready) = parameter(kernels, &[11, 24], kind);
    let tokens = Tensor::from_slice(&[3_i64, 0, 10, 3, 3, 7]).view([2, 3]);
    let tokens = tokens.to_device(kernels.device());
    let rows = || embedding::embedding(kernels, &tokens, &weight).unwrap();
    same(
        "embedding",
        &rows(),
        &weight.compute.index_select(0, &tokens.view([-1])).view([2, 3, 24]),
    );
    let dy = random(kernels, &[2, 3, 24], kind);
    let want = Tensor::zeros([11, 24], (Kind::Float, kernels.device()));
    for times in 1..=2 {
        autograd::backward(&[&rows()], &[&dy]).unwrap();
        let flat = (tokens.view([-1]), dy.view([-1, 24]));
        embedding::accumulate_rows(kernels, &flat.0, &flat.1, &want).unwrap();
        same("embedding: weight", &weight.grad, &want);
        assert_eq!(ready.load(Ordering::SeqCst), times);
    }
}

/// The head in chunks, against the plain form in FP64 of all logits at once.
fn head(kernels: &Kernels, storage: Storage) {
    let (kind, scale) = (storage.kind(), 1.0 / 7.0);
    for chunk in [1, 3, 100] {
        let (_set, weight, ready) = parameter(kernels, &[37, 24], kind);
        let x = input(kernels, &[2, 5, 24], kind);
        let labels = [3_i32, -100, 0, 36, 9, 3, -100, -100, 1, 2];
        let targets = Tensor::from_slice(&labels).view([2, 5]);
        let (twin, twin_weight) = (leaf(&x), leaf(&weight.compute));
        let want = fused::reference::head_loss(&twin, &twin_weight, &targets, scale).unwrap();
        autograd::backward(&[&want], &[]).unwrap();
        let targets = targets.to_device(kernels.device());
        let loss = || cross_entropy::head_loss(kernels, &x, &weight, &targets, scale, chunk);
        let got = loss().unwrap();
        // Logits are sums of 24 products, and are stored: as many roundings as that makes in the
        // compute format, each of them off by as much as the logits are large. Gradients of logits
        // are stored too, and summed over 37 tokens, or over 10 rows.
        let largest = exact(&x).matmul(&exact(&weight.compute).tr()).abs().max();
        let stored = unit(storage) / unit(Storage::Fp32);
        let roundings = (24.0 + stored) * largest.double_value(&[]) * 2.0 + 2.0 * stored + 100.0;
        let sum = |of: &Tensor| of.abs().max() * 37.0 * scale;
        let (in_x, in_weight) = (sum(&twin_weight), sum(&twin));
        let wide = Storage::Fp32;
        close("head_loss", wide, (&got, &want), (roundings, &Tensor::from(scale * 7.0)));
        autograd::backward(&[&got], &[]).unwrap();
        close("head_loss: x", storage, (&x.grad(), &twin.grad()), (roundings, &in_x));
        let of = (&weight.grad, &twin_weight.grad());
        close("head_loss: weight", wide, of, (roundings, &in_weight));
        assert_eq!(ready.load(Ordering::SeqCst), 1);
        let before = weight.grad.copy();
        same("head_loss without a graph", &tch::no_grad(loss).unwrap(), &got);
        same("head_loss without a graph: weight", &weight.grad, &before);
    }
    other_gradient(kernels, kind);
}

/// A gradient of the loss that is not one does not pass unseen.
fn other_gradient(kernels: &Kernels, kind: Kind) {
    let (_set, weight, _) = parameter(kernels, &[7, 4], kind);
    let x = input(kernels, &[2, 4], kind);
    let targets = Tensor::from_slice(&[3_i64, 1]).to_device(kernels.device());
    let loss = cross_entropy::head_loss(kernels, &x, &weight, &targets, 0.5, 8).unwrap();
    match autograd::backward(&[&(loss * 2.0)], &[]) {
        Err(error) => assert!(error.to_string().contains("loss gradient of one"), "{error}"),
        Ok(()) => {
            assert!(kernels.device() != Device::Cpu);
            assert_eq!(x.grad().isnan().sum(Kind::Int64).int64_value(&[]), 8);
        }
    }
}

/// What does not fit is one clear error, before anything is launched.
fn refusals(kernels: &Kernels) {
    let says = |error: kernels::KernelError, parts: &[&str]| {
        let text = error.to_string();
        for part in parts {
            assert!(text.contains(part), "{text:?} does not say {part:?}");
        }
    };
    let make = |shape: &[i64]| random(kernels, shape, Kind::Float);
    let (x, weight) = (make(&[3, 8]), make(&[8]));
    let error = rms_norm::forward(kernels, &x, None, &make(&[7]), EPS).unwrap_err();
    says(error, &["rms_norm: the shape of the weight is [7], expected [8]"]);
    let error =
        rms_norm::forward(kernels, &x, Some(&make(&[8, 3]).tr()), &weight, EPS).unwrap_err();
    says(error, &["the memory of the residual is strides [1, 3], expected contiguous"]);
    let wide = make(&[1, 16385]);
    let error = rms_norm::forward(kernels, &wide, None, &make(&[16385]), EPS).unwrap_err();
    says(error, &["the width of a row is 16385, expected at most 16384"]);
    let half = x.to_kind(Kind::Half);
    let error = rms_norm::forward(kernels, &half, None, &weight, EPS).unwrap_err();
    says(error, &["the dtype is Half, expected Float, BFloat16 or Double"]);
    let error = swiglu::forward(kernels, &make(&[3, 5])).unwrap_err();
    says(error, &["the width of gate and up is 5, expected an even number"]);
    let targets = Tensor::from_slice(&[1_i32, 2, 3]).to_device(kernels.device());
    let error = cross_entropy::cross_entropy(kernels, &x, &targets, 1.0, true).unwrap_err();
    says(error, &["the dtype of the targets is Int, expected Int64"]);
    let layout = Layout { heads: 1, kv_heads: 1, head_dim: 4 };
    let (table, qkv) = (make(&[2, 4]), make(&[1, 3, 12]));
    let tables = Tables { cos: &table, sin: &table };
    let error = rope::forward(kernels, &qkv, tables, layout).unwrap_err();
    says(error, &["the shape of the cosines is [2, 4], expected [3, 4]"]);
}

/// FP64 has the plain form.
fn plain_forms(kernels: &Kernels) {
    let kind = Kind::Double;
    let (_set, weight, _) = parameter(kernels, &[12], kind);
    let x = input(kernels, &[3, 12], kind);
    assert!(!kernels.takes(&x) && kernels.takes(&x.to_kind(Kind::BFloat16)));
    let got = rms_norm::rms_norm(kernels, &x, &weight, EPS).unwrap();
    same("plain rms_norm", &got, &fused::rms_norm(&x, &weight, EPS).unwrap());
    let (got, _) = rms_norm::add_rms_norm(kernels, &x, &x, &weight, EPS).unwrap();
    same("plain add_rms_norm", &got, &fused::add_rms_norm(&x, &x, &weight, EPS).unwrap().0);
    same("plain swiglu", &swiglu::swiglu(kernels, &x).unwrap(), &fused::swiglu(&x).unwrap());
    // Rows that are too wide for the kernels.
    let kind = Kind::Float;
    let (_set, weight, _) = parameter(kernels, &[16400], kind);
    let wide = input(kernels, &[2, 16400], kind);
    let got = rms_norm::rms_norm(kernels, &wide, &weight, EPS).unwrap();
    same("wide rms_norm", &got, &fused::rms_norm(&wide, &weight, EPS).unwrap());
    let kind = Kind::Double;
    let layout = Layout { heads: 1, kv_heads: 1, head_dim: 4 };
    let (qkv, table) = (input(kernels, &[1, 3, 12], kind), random(kernels, &[3, 4], kind));
    let tables = Tables { cos: &table, sin: &table };
    let (got, ..) = rope::rope_qkv(kernels, &qkv, tables, layout).unwrap();
    let (want, ..) = fused::rope_qkv(&qkv, &table, &table, 1, 1, 4).unwrap();
    same("plain rope_qkv", &got, &want);
    let (_set, head, _) = parameter(kernels, &[5, 12], kind);
    let targets = Tensor::from_slice(&[1_i64, 4, -100]);
    let got = cross_entropy::head_loss(kernels, &x, &head, &targets, 0.5, 2).unwrap();
    same("plain head_loss", &got, &fused::head_loss(&x, &head, &targets, 0.5, 2).unwrap());
}
