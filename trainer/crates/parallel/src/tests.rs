//! In tensor parallelism the sum of an input's gradient goes on while the weight's gradient is
//! made; and the loss over a cut vocabulary has its gradients for a loss gradient of one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use collectives::{Communicator, Group, GroupOptions, ReduceOp, local};
use model::Products;
use torch_shim::autograd;
use torch_shim::params::{ParameterSet, ParameterSpec};
use torch_shim::tch::{Device, Kind, Tensor};

use crate::failure::Failure;
use crate::tensor::TensorGroup;

/// How long the other rank holds.
const PATIENCE: Duration = Duration::from_secs(5);

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);
/// Tokens of a rank, inputs and outputs.
const TOKENS: i64 = 3;
const DIM: i64 = 4;
const OUTPUTS: i64 = 5;

/// Rank 1, operation by operation: it adds to the sum of the input's gradient only when rank 0 has
/// the gradient of its weight, and says whether that came.
fn other(comm: &Group, sequence: bool, gradient: &Tensor) -> bool {
    let tensor = |shape: &[i64]| Tensor::zeros(shape, F32);
    // Forward and backward each gather the input.
    for _ in 0..if sequence { 2 } else { 0 } {
        let whole = tensor(&[2, 1, TOKENS, DIM]);
        comm.all_gather(&whole, &tensor(&[1, TOKENS, DIM])).unwrap().wait().unwrap();
    }
    let start = Instant::now();
    // Rank 0 may be writing it: all that counts is whether it is there.
    let is_there = || gradient.abs().sum(Kind::Float).double_value(&[]) > 0.0;
    while !is_there() && start.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(1));
    }
    let was_there = is_there();
    let sum = if sequence {
        let (piece, whole) = (tensor(&[1, TOKENS, DIM]), tensor(&[1, 2, TOKENS, DIM]));
        comm.reduce_scatter(&piece, &whole, ReduceOp::Sum)
    } else {
        comm.all_reduce(&tensor(&[1, TOKENS, DIM]), ReduceOp::Sum)
    };
    sum.unwrap().wait().unwrap();
    was_there
}

fn check(sequence: bool) {
    let mut group = local::group(2, &GroupOptions::new("tensor", 1)).unwrap();
    let (peer, own) = (group.pop().unwrap(), group.pop().unwrap());
    let spec = ParameterSpec { name: "weight".into(), shape: vec![OUTPUTS, DIM], decay: true };
    let set = ParameterSet::new(vec![spec], Kind::Float, Kind::Float, Device::Cpu).unwrap();
    let _ = set.flat_master().shallow_clone().fill_(1.0);
    let gradient = set.flat_grad().shallow_clone();
    let other = std::thread::spawn(move || other(&peer, sequence, &gradient));
    let comm: Arc<dyn Communicator> = Arc::new(own);
    let group =
        TensorGroup { comm, sequence, failure: Failure::default(), products: Products::Same };
    let x = Tensor::ones([1, TOKENS, DIM], F32).set_requires_grad(true);
    let y = group.column(&x, set.at(0).unwrap()).unwrap();
    autograd::backward(&[&y.sum(Kind::Float)], &[]).unwrap();
    assert!(other.join().unwrap(), "sequence {sequence}: the sum was waited for first");
    assert!(x.grad().abs().sum(Kind::Float).double_value(&[]) > 0.0);
}

#[test]
fn the_weight_gradient_is_made_while_the_input_gradient_is_scattered() {
    check(true);
}

#[test]
fn the_weight_gradient_is_made_while_the_input_gradient_is_reduced() {
    check(false);
}

/// The gradient of a loss's input, where the loss is multiplied by `factor` before the backward
/// pass; and the same by libtorch's own functions, without a factor.
fn input_gradients(factor: Option<f64>) -> [Tensor; 2] {
    let comm = local::group(1, &GroupOptions::new("tensor", 1)).unwrap().pop().unwrap();
    let comm: Arc<dyn Communicator> = Arc::new(comm);
    let group = TensorGroup {
        comm,
        sequence: false,
        failure: Failure::default(),
        products: Products::Same,
    };
    let spec = ParameterSpec { name: "head".into(), shape: vec![OUTPUTS, DIM], decay: true };
    let set = ParameterSet::new(vec![spec], Kind::Float, Kind::Float, Device::Cpu).unwrap();
    let numbers = |count: i64| Tensor::arange(count, F32).sin();
    set.flat_master().shallow_clone().copy_(&numbers(set.flat_master().size()[0]));
    let x = numbers(TOKENS * DIM).view([1, TOKENS, DIM]);
    let (own, twin) = (x.copy().set_requires_grad(true), x.set_requires_grad(true));
    let targets = Tensor::from_slice(&[4i64, -100, 1]).view([1, TOKENS]);
    let weight = set.at(0).unwrap();
    let loss = group.loss(&own, weight, &targets, 0.5, 2).unwrap();
    let loss = factor.map_or(loss.shallow_clone(), |factor| loss * factor);
    autograd::backward(&[&loss], &[]).unwrap();
    let logits = twin.view([TOKENS, DIM]).matmul(&weight.compute.detach().tr());
    let by_hand = logits.log_softmax(1, Kind::Float).g_nll_loss::<Tensor>(
        &targets.view([TOKENS]),
        None,
        torch_shim::tch::Reduction::Sum,
        -100,
    ) * 0.5;
    autograd::backward(&[&by_hand], &[]).unwrap();
    [own.grad(), twin.grad()]
}

/// A gradient that is not one is no number in the end, without anybody having looked at it: on a
/// GPU that would wait for all that was issued before.
#[test]
fn a_loss_gradient_is_one_or_makes_no_number() {
    let [plain, by_hand] = input_gradients(None);
    assert!((&plain - &by_hand).abs().max().double_value(&[]) < 1e-6, "{plain} {by_hand}");
    let [times_one, _] = input_gradients(Some(1.0));
    assert_eq!(plain, times_one, "bit by bit");
    let [twice, _] = input_gradients(Some(2.0));
    assert_eq!(twice.isnan().logical_not().count_nonzero(None::<i64>).int64_value(&[]), 0);
}

/// Numbers and sizes of a layer in FP8: tokens of all ranks, inputs and outputs, whole.
const FP8_TOKENS: i64 = 64;
const FP8_IN: i64 = 64;
const FP8_OUT: i64 = 96;

/// A rank's weight, and what its products are by themselves.
struct Own {
    set: ParameterSet,
    products: Products,
}

impl Own {
    fn new(rank: i64, shape: [i64; 2]) -> Self {
        let spec = ParameterSpec { name: "weight".into(), shape: shape.to_vec(), decay: true };
        let set = ParameterSet::new(vec![spec], Kind::BFloat16, Kind::Float, Device::Cpu).unwrap();
        set.at(0).unwrap().master.shallow_clone().copy_(&numbers(&shape, 100 + rank));
        set.refresh_compute().unwrap();
        Self { set, products: Products::Fp8(None) }
    }

    fn project(&self, x: &Tensor) -> Tensor {
        self.products.project(x, self.set.at(0).unwrap()).unwrap()
    }

    fn product(&self, dy: &Tensor) -> Tensor {
        self.products.product(dy, self.set.at(0).unwrap()).unwrap()
    }

    fn gradient(&self, dy: &Tensor, x: &Tensor) -> Tensor {
        let weight = self.set.at(0).unwrap();
        let usage = torch_shim::uses::Use::open(weight).unwrap();
        self.products.accumulate(&usage, dy, x).unwrap();
        weight.grad.copy()
    }
}

/// Numbers that look random, in BF16.
fn numbers(shape: &[i64], seed: i64) -> Tensor {
    let count: i64 = shape.iter().product();
    let x = ((Tensor::arange(count, F32) + seed as f64) * 12.9898).sin() * 43758.547;
    ((x.frac() - 0.25) * 2.0).view(shape).to_kind(Kind::BFloat16)
}

/// What a rank gets of one layer: output, input gradient, weight gradient.
fn layer(own: Group, is_column: bool, sequence: bool, x: &Tensor, dy: &Tensor) -> [Tensor; 3] {
    let shape = if is_column { [FP8_OUT / 2, FP8_IN] } else { [FP8_OUT, FP8_IN / 2] };
    let rank = own.rank() as i64;
    let Own { set, products } = Own::new(rank, shape);
    let comm: Arc<dyn Communicator> = Arc::new(own);
    let group = TensorGroup { comm, sequence, failure: Failure::default(), products };
    let x = x.copy().set_requires_grad(true);
    let weight = set.at(0).unwrap();
    let y = match is_column {
        true => group.column(&x, weight).unwrap(),
        false => group.row(&x, weight, true).unwrap(),
    };
    let dx = autograd::gradients(&[&y], &[dy], &[&x], false).unwrap().remove(0).unwrap();
    [y.detach(), dx, weight.grad.copy()]
}

/// Two BF16 numbers summed and rounded once.
fn sum(parts: &[Tensor]) -> Tensor {
    (parts[0].to_kind(Kind::Float) + parts[1].to_kind(Kind::Float)).to_kind(Kind::BFloat16)
}

/// A layer cut by rows or columns of its weight makes all its products in FP8, and each rank rounds
/// its own part of what is summed over the ranks: what comes out is, to the last bit, the sum of
/// what the ranks make by themselves.
fn check_fp8(is_column: bool, sequence: bool) {
    let (wide, narrow) = if is_column { (FP8_IN, FP8_OUT / 2) } else { (FP8_OUT, FP8_IN / 2) };
    // What every rank has a token's whole width of, and what it has a part of the width of.
    let stream = numbers(&[1, FP8_TOKENS, wide], 1);
    let parts = [2, 3].map(|seed| numbers(&[1, FP8_TOKENS, narrow], seed));
    let own_tokens = |x: &Tensor, rank: i64| match sequence {
        true => x.narrow(1, rank * FP8_TOKENS / 2, FP8_TOKENS / 2),
        false => x.shallow_clone(),
    };
    let groups = local::group(2, &GroupOptions::new("tensor", 1)).unwrap();
    let found: Vec<[Tensor; 3]> = std::thread::scope(|scope| {
        let run = |(rank, group): (usize, Group)| {
            let (cut, part) = (own_tokens(&stream, rank as i64), parts[rank].shallow_clone());
            let (x, dy) = if is_column { (cut, part) } else { (part, cut) };
            scope.spawn(move || layer(group, is_column, sequence, &x, &dy))
        };
        let handles: Vec<_> = groups.into_iter().enumerate().map(run).collect();
        handles.into_iter().map(|handle| handle.join().unwrap()).collect()
    });
    let shape = if is_column { [FP8_OUT / 2, FP8_IN] } else { [FP8_OUT, FP8_IN / 2] };
    let owns = [0, 1].map(|rank| Own::new(rank, shape));
    let summed: Vec<Tensor> = owns
        .iter()
        .zip(&parts)
        .map(|(own, part)| if is_column { own.product(part) } else { own.project(part) })
        .collect();
    for (rank, ([y, dx, gradient], own)) in found.iter().zip(&owns).enumerate() {
        let what = format!("rank {rank}, column {is_column}, sequence {sequence}");
        let (of_stream, of_part) = if is_column { (dx, y) } else { (y, dx) };
        assert_eq!(of_stream, &own_tokens(&sum(&summed), rank as i64), "{what}: of the stream");
        let part = &parts[rank];
        let expected = if is_column { own.project(&stream) } else { own.product(&stream) };
        assert_eq!(of_part, &expected, "{what}: of its part");
        let (dy, x) = if is_column { (part, &stream) } else { (&stream, part) };
        assert_eq!(gradient, &own.gradient(dy, x), "{what}: of its weight");
    }
}

#[test]
fn layers_cut_in_two_make_their_products_in_fp8() {
    for sequence in [true, false] {
        check_fp8(true, sequence);
        check_fp8(false, sequence);
    }
}
