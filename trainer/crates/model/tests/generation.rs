//! Generation: the cache changes nothing but the speed, and choices depend on the seed alone.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{POSITIONS, small_config, small_model};
use model::{Inputs, KvCache, Sampling, generate};
use run_config::{ComputeDtype, ModelConfig};
use torch_shim::tch::{Device, Kind};

fn sampling(temperature: f64, use_cache: bool) -> Sampling {
    Sampling {
        max_new_tokens: 30,
        temperature,
        top_p: 0.9,
        seed: 5,
        stop_tokens: Vec::new(),
        use_cache,
    }
}

fn sample(config: &ModelConfig, prompt: &[i32], sampling: &Sampling) -> Vec<i32> {
    let (model, _set) = small_model(config, ComputeDtype::Fp64);
    let mut seen = Vec::new();
    let tokens = generate(&model, prompt, sampling, Device::Cpu, |token| seen.push(token)).unwrap();
    assert_eq!(tokens, seen);
    tokens
}

#[test]
fn the_cache_changes_nothing() {
    let tied = ModelConfig { tied_embeddings: true, kv_heads: 1, ..small_config() };
    for config in [small_config(), tied] {
        for temperature in [0.0, 1.0] {
            let with = sample(&config, &[7, 3, 60], &sampling(temperature, true));
            let without = sample(&config, &[7, 3, 60], &sampling(temperature, false));
            assert_eq!(with, without);
            assert_eq!(with.len(), 30);
            let distinct: std::collections::BTreeSet<_> = with.iter().collect();
            assert!(distinct.len() > 3, "all alike, the comparison says nothing: {with:?}");
        }
    }
}

#[test]
fn logits_with_a_cache_filled_in_pieces_equal_those_of_the_whole() {
    let (model, _set) = small_model(&small_config(), ComputeDtype::Fp64);
    let tokens: Vec<i32> = (0..20).map(|i| (i * 17 + 3) % 61).collect();
    let inputs = Inputs::consecutive(&tokens, 1, 0, Device::Cpu).unwrap();
    let whole = model.forward_logits(&inputs, None).unwrap();
    let mut cache = KvCache::new(0, 2, 20);
    for piece in [0..6, 6..7, 7..15, 15..16, 16..20] {
        let inputs =
            Inputs::consecutive(&tokens[piece.clone()], 1, piece.start, Device::Cpu).unwrap();
        let logits = model.forward_logits(&inputs, Some(&mut cache)).unwrap();
        let expected = whole.narrow(1, piece.start as i64, piece.len() as i64);
        let difference = (logits - expected).abs().max().double_value(&[]);
        assert!(difference < 1e-12, "{piece:?}: {difference}");
    }
    let next = model.next_logits(&inputs, None).unwrap();
    let difference = (next - whole.select(1, 19)).abs().max().double_value(&[]);
    assert!(difference < 1e-12, "{difference}");
    assert_eq!(cache.len(), 20);
    let one_more = Inputs::consecutive(&[1], 1, 20, Device::Cpu).unwrap();
    let message = model.forward_logits(&one_more, Some(&mut cache)).unwrap_err().to_string();
    assert_eq!(message, "tokens in the cache is 21, expected <= 20");
}

#[test]
fn sampling_depends_on_the_seed_alone() {
    let config = small_config();
    let first = sample(&config, &[1, 2], &sampling(1.0, true));
    assert_eq!(first, sample(&config, &[1, 2], &sampling(1.0, true)));
    let other_seed = Sampling { seed: 6, ..sampling(1.0, true) };
    assert_ne!(first, sample(&config, &[1, 2], &other_seed));
    let greedy = Sampling { top_p: 1e-9, ..sampling(1.0, true) };
    let greedy = sample(&config, &[1, 2], &greedy);
    assert_eq!(greedy, sample(&config, &[1, 2], &sampling(0.0, true)));
}

#[test]
fn it_stops_at_a_stop_token_and_where_positions_end() {
    let config = small_config();
    let all = sample(&config, &[1, 2], &sampling(1.0, true));
    let stop = Sampling { stop_tokens: vec![all[4]], ..sampling(1.0, true) };
    let end = all.iter().position(|token| *token == all[4]).unwrap();
    assert_eq!(sample(&config, &[1, 2], &stop), all[..=end]);
    let long = Sampling { max_new_tokens: 1000, ..sampling(1.0, true) };
    // The last position's logits still choose one more token.
    assert_eq!(sample(&config, &[1, 2], &long).len(), POSITIONS - 2 + 1);
}

#[test]
fn out_of_range_inputs_are_errors() {
    let (model, _set) = small_model(&small_config(), ComputeDtype::Fp32);
    let run = |tokens: &[i32], first| {
        let inputs = Inputs::consecutive(tokens, 1, first, Device::Cpu)?;
        model.forward_logits(&inputs, None)
    };
    assert_eq!(run(&[0, 60], 0).unwrap().kind(), Kind::Float);
    let message = run(&[0, 61], 0).unwrap_err().to_string();
    assert_eq!(message, "token id is 61, expected below the vocabulary's 61");
    let message = run(&[0, 1], POSITIONS - 1).unwrap_err().to_string();
    assert!(message.starts_with("position id is 64"), "{message}");
    let prompt = |prompt: &[i32]| {
        generate(&model, prompt, &sampling(0.0, true), Device::Cpu, |_| ()).is_err()
    };
    assert!(prompt(&[]));
    assert!(prompt(&[0; POSITIONS + 1]));
}
