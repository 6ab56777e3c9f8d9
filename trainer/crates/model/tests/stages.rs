//! Pipeline pieces: stages run one after the other, with the stream and its gradient passed on by
//! hand, equal the whole model.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{POSITIONS, small_config, small_model};
use model::llama::init::initialize;
use model::{Dense, Inputs, Llama, ModelError, Residual, Stage, allocate, targets};
use model_spec::LocalParameter;
use run_config::{ComputeDtype, ModelConfig};
use std::collections::BTreeMap;
use std::sync::Arc;
use torch_shim::params::ParameterSet;
use torch_shim::tch::{Device, Tensor};

const SCALE: f64 = 0.1;

fn stage(config: &ModelConfig, stage: Stage) -> (Llama, ParameterSet) {
    let held: Vec<_> = stage.parameters(config).iter().map(LocalParameter::whole).collect();
    let set = allocate(&held, false, ComputeDtype::Fp64, Device::Cpu).unwrap();
    initialize(11, &held, &set).unwrap();
    let model = Llama::new(config, stage, &set, Arc::new(Dense::default()), POSITIONS).unwrap();
    (model, set)
}

/// Adds up gradients by name: a tied embedding is on two stages.
fn add_gradients(into: &mut BTreeMap<String, Tensor>, set: &ParameterSet) {
    for parameter in set.iter() {
        let sum = match into.get(&parameter.name) {
            Some(sum) => sum + &parameter.grad,
            None => parameter.grad.copy(),
        };
        into.insert(parameter.name.clone(), sum);
    }
}

fn check(config: &ModelConfig) {
    let tokens: Vec<i32> = (0..24).map(|i| (i * 13 + 5) % 61).collect();
    let goal: Vec<i32> = (0..24).map(|i| if i % 5 == 0 { -100 } else { (i * 7) % 61 }).collect();
    let inputs = Inputs::consecutive(&tokens, 2, 0, Device::Cpu).unwrap();
    let goal = targets(&goal, 2, Device::Cpu).unwrap();
    let (model, set) = small_model(config, ComputeDtype::Fp64);
    let loss = model.forward_loss(&inputs, &goal, SCALE).unwrap();
    loss.backward();
    let mut expected = BTreeMap::new();
    add_gradients(&mut expected, &set);

    let (first, first_set) = stage(config, Stage { embedding: true, blocks: 0..1, head: false });
    let (second, second_set) = stage(config, Stage { embedding: false, blocks: 1..2, head: true });
    let stream = first.embed(&inputs).unwrap();
    let sent = first.blocks(0..1, stream, &inputs, None).unwrap().sum().unwrap();
    let received = sent.detach().set_requires_grad(true);
    let stream = Residual::new(received.shallow_clone());
    let stream = second.blocks(1..2, stream, &inputs, None).unwrap();
    let staged_loss = second.loss(stream, &inputs, &goal, SCALE).unwrap();
    staged_loss.backward();
    (sent * received.grad()).sum(None).backward();

    let difference = (loss - staged_loss).abs().double_value(&[]);
    assert!(difference < 1e-13, "{difference}");
    let mut staged = BTreeMap::new();
    add_gradients(&mut staged, &first_set);
    add_gradients(&mut staged, &second_set);
    assert_eq!(staged.len(), expected.len());
    for (name, expected) in &expected {
        let difference = (expected - &staged[name]).abs().max().double_value(&[]);
        assert!(difference < 1e-12, "{name}: {difference}");
    }
}

#[test]
fn stages_equal_the_whole() {
    check(&small_config());
    check(&ModelConfig { tied_embeddings: true, ..small_config() });
}

#[test]
fn what_a_stage_does_not_hold_is_an_error() {
    let config = small_config();
    let (first, set) = stage(&config, Stage { embedding: true, blocks: 0..1, head: false });
    let inputs = Inputs::consecutive(&[1, 2], 1, 0, Device::Cpu).unwrap();
    let stream = || first.embed(&inputs).unwrap();
    let message = |result: Result<Residual, ModelError>| result.unwrap_err().to_string();
    let beyond = first.blocks(1..2, stream(), &inputs, None);
    assert_eq!(message(beyond), "this stage does not hold block 1");
    let head = first.final_norm(stream(), &inputs).map(Residual::new);
    assert_eq!(message(head), "this stage does not hold the output head");
    let whole =
        Llama::new(&config, Stage::whole(&config), &set, Arc::new(Dense::default()), POSITIONS);
    let message = whole.err().unwrap().to_string();
    assert!(message.starts_with("parameter `layers.1."), "{message}");
}
