//! Packed documents: a row of several documents equals the documents run apart, values and
//! gradients, and a document sees nothing of its neighbours.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{small_config, small_model};
use model::{Inputs, Llama, targets};
use run_config::ComputeDtype;
use torch_shim::params::ParameterSet;
use torch_shim::tch::{Device, Kind, Tensor};

/// Two rows of 12 tokens: documents of 5, 4 and 3, and of 1 and 11.
const LENGTHS: [&[usize]; 2] = [&[5, 4, 3], &[1, 11]];
const SEQUENCE: usize = 12;

struct Packed {
    tokens: Vec<i32>,
    targets: Vec<i32>,
    positions: Vec<i32>,
    document_ids: Vec<i32>,
}

/// Rows of pseudo-random tokens; the last token of a document predicts nothing.
fn packed() -> Packed {
    let stream: Vec<i32> =
        (0..2 * SEQUENCE as i32).map(|i| (i * i * 7 + 11 * i + 5) % 61).collect();
    let mut packed = Packed {
        tokens: stream.clone(),
        targets: Vec::new(),
        positions: Vec::new(),
        document_ids: Vec::new(),
    };
    for (document, length) in LENGTHS.iter().flat_map(|row| row.iter().enumerate()) {
        for position in 0..*length {
            let next = packed.targets.len() + 1;
            let last = position + 1 == *length;
            packed.targets.push(if last { -100 } else { stream[next] });
            packed.positions.push(position as i32);
            packed.document_ids.push(document as i32);
        }
    }
    packed
}

fn loss(model: &Llama, inputs: &Inputs, goal: &[i32], batch: usize) -> f64 {
    let goal = targets(goal, batch, Device::Cpu).unwrap();
    let loss = model.forward_loss(inputs, &goal, 0.125).unwrap();
    loss.backward();
    loss.double_value(&[])
}

fn gradients(set: &ParameterSet) -> Vec<(String, Tensor)> {
    set.iter().map(|parameter| (parameter.name.clone(), parameter.grad.copy())).collect()
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().to_kind(Kind::Double).double_value(&[])
}

fn check(compute: ComputeDtype, tolerance: f64) {
    let (model, set) = small_model(&small_config(), compute);
    let all = packed();
    let inputs =
        Inputs::new(&all.tokens, &all.positions, Some(&all.document_ids), 2, Device::Cpu).unwrap();
    let packed_logits = model.forward_logits(&inputs, None).unwrap().view([24, -1]);
    let packed_loss = loss(&model, &inputs, &all.targets, 2);
    let packed_gradients = gradients(&set);
    set.zero_grad().unwrap();

    let mut start = 0;
    let mut summed_loss = 0.0;
    for length in LENGTHS.concat() {
        let range = start..start + length;
        let alone = Inputs::consecutive(&all.tokens[range.clone()], 1, 0, Device::Cpu).unwrap();
        let logits = model.forward_logits(&alone, None).unwrap().squeeze_dim(0);
        let expected = packed_logits.narrow(0, start as i64, length as i64);
        assert!(largest_difference(&logits, &expected) < tolerance, "document at {start}");
        summed_loss += loss(&model, &alone, &all.targets[range], 1);
        start += length;
    }
    assert!((summed_loss - packed_loss).abs() < tolerance, "{summed_loss} {packed_loss}");
    for ((name, packed), (_, apart)) in packed_gradients.iter().zip(gradients(&set)) {
        let largest = packed.abs().max().double_value(&[]);
        assert!(largest > 1e-3, "{name}: no gradient to compare");
        let difference = largest_difference(packed, &apart);
        assert!(difference < tolerance * (1.0 + largest), "{name}: {difference}");
    }
}

#[test]
fn packed_documents_equal_the_documents_apart() {
    check(ComputeDtype::Fp64, 1e-12);
    check(ComputeDtype::Fp32, 1e-5);
}

#[test]
fn a_document_sees_nothing_of_its_neighbours() {
    let (model, _set) = small_model(&small_config(), ComputeDtype::Fp32);
    let all = packed();
    let logits = |tokens: &[i32], masked: bool| {
        let ids = masked.then_some(all.document_ids.as_slice());
        let inputs = Inputs::new(tokens, &all.positions, ids, 2, Device::Cpu).unwrap();
        model.forward_logits(&inputs, None).unwrap()
    };
    let mut changed = all.tokens.clone();
    changed[2] = (changed[2] + 1) % 61;
    // Tokens 5..12 of row 0 are other documents.
    let rest = |logits: &Tensor| logits.get(0).narrow(0, 5, 7);
    let same = |masked| {
        let (before, after) = (logits(&all.tokens, masked), logits(&changed, masked));
        largest_difference(&rest(&before), &rest(&after)) == 0.0
    };
    assert!(same(true));
    assert!(!same(false), "without document ids the row is one document");
}
