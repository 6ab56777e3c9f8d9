//! In tensor parallelism the sum of an input's gradient goes on while the weight's gradient is
//! made.

use std::sync::Arc;
use std::time::{Duration, Instant};

use collectives::{Communicator, Group, GroupOptions, ReduceOp, local};
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
    let group = TensorGroup { comm, sequence, failure: Failure::default() };
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
