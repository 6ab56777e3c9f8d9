//! A rank of a tensor-parallel group with the kernels, emulated on the CPU: the loss over a cut
//! vocabulary, the norm of the gradients that count, and clipping, against the plain forms.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(unsafe_code, reason = "the emulator calls what the host compiler made of a kernel")]

mod emulator;

use std::collections::HashMap;
use std::panic::catch_unwind;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use collectives::{Communicator, Group, GroupOptions, local};
use emulator::Planted;
use kernels::Kernels;
use layout::Mesh;
use model::llama::init::initialize;
use model::{Dense, Inputs, targets};
use optim::{AdamW, clip_coefficient};
use parallel::{Groups, Pass, Worker};
use run_config::RunConfig;
use torch_shim::tch::{Device, Kind, Tensor};

/// A vocabulary whose parts are no whole vectors, on 2 and on 4 ranks.
fn config(compute: &str, ranks: usize) -> RunConfig {
    let text = "name: sharded\nseed: 3\n\
                model: {dim: 32, layers: 1, heads: 4, kv_heads: 4, head_dim: 8, ffn_dim: 48, \
                vocab_size: 84, init_std: 0.2, rope: {theta: 10000.0}}\n\
                data: {tokenizer: t, sources: [{name: a, path: b}], sequence_length: 16}\n\
                training: {steps: 1, global_batch: 2, micro_batch: 2, clip_norm: 0.5}\n";
    let sets = [format!("precision.compute={compute}"), format!("parallelism.tensor={ranks}")];
    match RunConfig::from_yaml_str(text, Path::new("/"), &sets) {
        Ok(loaded) => loaded.config,
        Err(error) => panic!("{error}"),
    }
}

/// What came of the passes of a step.
#[derive(Clone, Copy, Debug)]
struct Found {
    loss: f64,
    /// Sum of the squares of the gradients that count, over all ranks.
    squares: f64,
}

type Meeting = Mutex<HashMap<String, Vec<Option<Group>>>>;

/// A member of a group of threads, of which the first to come makes all.
fn join(
    meeting: &Meeting,
    name: &str,
    ranks: &[usize],
    rank: usize,
) -> Result<Arc<dyn Communicator>, collectives::CommError> {
    let mut groups = meeting.lock().unwrap();
    let make = || {
        // Where one fails, the others do not wait for long.
        let timeout = Duration::from_secs(60);
        let options = GroupOptions { timeout, ..GroupOptions::new(name, 1) };
        let made = local::group(ranks.len(), &options).unwrap();
        made.into_iter().map(Some).collect()
    };
    let group = groups.entry(name.to_owned()).or_insert_with(make);
    let at = ranks.iter().position(|&other| other == rank).unwrap();
    Ok(Arc::new(group[at].take().unwrap()))
}

fn member(config: &RunConfig, rank: usize, meeting: &Meeting, kernels: Option<Kernels>) -> Worker {
    let mesh = Mesh::new(&config.parallelism, config.parallelism.tensor).unwrap();
    let mut connect = |name: &str, ranks: &[usize]| join(meeting, name, ranks, rank);
    let groups = Groups::connect(config, mesh, rank, &mut connect).unwrap();
    let dense = Dense::new(kernels);
    let worker = Worker::new(config, groups, Device::Cpu, 16, 4096, dense).unwrap();
    initialize(config.seed, &worker.held, &worker.params).unwrap();
    worker.weights_changed().unwrap();
    worker
}

fn pass() -> Pass {
    let ids = |step: i32| -> Vec<i32> { (0..32).map(|at| (at * 37 + step * 11) % 84).collect() };
    let inputs = Inputs::consecutive(&ids(0), 2, 0, Device::Cpu).unwrap();
    let mut goal = ids(1);
    (goal[5], goal[6], goal[7]) = (-100, 0, 83);
    Pass { inputs, targets_BS: targets(&goal, 2, Device::Cpu).unwrap() }
}

/// The passes of a step on each rank of a group.
fn step(compute: &str, ranks: usize, kernels: Option<&Kernels>) -> Found {
    let (config, meeting) = (config(compute, ranks), Meeting::default());
    let run = |rank: usize| {
        torch_shim::tch::set_num_threads(1);
        let worker = member(&config, rank, &meeting, kernels.cloned());
        let loss = worker.forward_backward(&[pass()], 1.0 / 31.0).unwrap().double_value(&[]);
        let counted = worker.counted_squares().unwrap();
        // The same, run by run and without kernels.
        let squares = |x: &Tensor| x.to_kind(Kind::Double).square().sum(Kind::Double);
        let gradients = worker.counted_gradients().unwrap();
        let plain: f64 = gradients.iter().map(|x| squares(x).double_value(&[])).sum();
        let counted = counted.double_value(&[]);
        // FP32 squares of a thread's share of a chunk, or of rows.
        assert!((counted - plain).abs() <= plain * 80.0 * 2f64.powi(-24), "{counted} {plain}");
        worker.groups.world.barrier().unwrap().wait().unwrap();
        (loss, counted)
    };
    let results: Vec<(f64, f64)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..ranks).map(|rank| scope.spawn(move || run(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    // The loss counts on the first rank.
    Found { loss: results[0].0, squares: results.iter().map(|found| found.1).sum() }
}

/// Both err from one rank in FP64. They round in the same places, so that kernels do not err much
/// more than plain operators do.
fn check(compute: &str, ranks: usize, planted: Option<Planted>) {
    let exact = step("fp64", 1, None);
    let error = |found: Found| {
        let relative = |found: f64, exact: f64| ((found - exact) / exact).abs();
        (relative(found.loss, exact.loss), relative(found.squares, exact.squares))
    };
    let plain = error(step(compute, ranks, None));
    let own = error(step(compute, ranks, Some(&emulator::kernels(planted))));
    println!("{compute} on {ranks}: loss and squares are off by {own:?}, plainly by {plain:?}");
    // Means of many roundings, of which more or fewer cancel: a few more units.
    let unit = if compute == "bf16" { 2f64.powi(-8) } else { 2f64.powi(-24) };
    assert!(own.0 < 1.5 * plain.0 + 4.0 * unit, "loss: {own:?} {plain:?}");
    assert!(own.1 < 1.5 * plain.1 + 8.0 * unit, "squares: {own:?} {plain:?}");
}

#[test]
fn fp32() {
    for ranks in [1, 2, 4] {
        check("fp32", ranks, None);
    }
}

#[test]
fn bf16() {
    for ranks in [1, 2, 4] {
        check("bf16", ranks, None);
    }
}

/// FP64 is the oracle: the kernels leave it alone, to the bit.
#[test]
fn fp64_is_not_touched() {
    let (plain, own) = (step("fp64", 2, None), step("fp64", 2, Some(&emulator::kernels(None))));
    assert_eq!(plain.loss.to_bits(), own.loss.to_bits());
    assert_eq!(plain.squares.to_bits(), own.squares.to_bits());
}

#[test]
fn a_loss_that_is_wrong_is_found() {
    for planted in [
        ("sums[row] *= exponential(maxima[row] - largest[row]);", ""),
        ("width, target - first, most,", "width, target, most,"),
        ("if (at >= 0 && at < width) at_target", "if (at > 0 && at < width) at_target"),
        ("bool is_target = target >= 0 && target < vocabulary;", "bool is_target = true;"),
    ] {
        assert!(kernels::ops::cross_entropy::PROGRAM.source.contains(planted.0), "{planted:?}");
        let found = catch_unwind(|| check("fp32", 2, Some(planted)));
        assert!(found.is_err(), "not found: {planted:?}");
    }
}

/// The norm and the coefficient on the device have the bits of those that the host works out.
#[test]
fn clipping_has_the_bits_of_the_host() {
    let config = config("bf16", 1);
    let worker = member(&config, 0, &Meeting::default(), None);
    let optimizer = || AdamW::new(&config.optimizer, &worker.params).unwrap();
    let own = optimizer().with_kernels(Some(emulator::kernels(None))).unwrap();
    for squares in [0.0, 1e-30, 0.09, 1.0, 59.3, 1e18] {
        for limit in [None, Some(0.1), Some(1.0), Some(3.3)] {
            let (norm, coefficient) = own.clip(&Tensor::from(squares), limit).unwrap();
            let (plain_norm, plain) = optimizer().clip(&Tensor::from(squares), limit).unwrap();
            let on_host = f64::sqrt(squares);
            for norm in [norm, plain_norm] {
                assert_eq!(norm.double_value(&[]).to_bits(), on_host.to_bits());
            }
            let want = limit.map(|_| clip_coefficient(on_host, limit) as f32);
            for coefficient in [coefficient, plain] {
                let got = coefficient.map(|number| number.double_value(&[]) as f32);
                assert_eq!(got.map(f32::to_bits), want.map(f32::to_bits), "{squares} {limit:?}");
            }
        }
    }
    for squares in [f64::NAN, f64::INFINITY] {
        let (norm, _) = own.clip(&Tensor::from(squares), Some(1.0)).unwrap();
        assert!(!norm.double_value(&[]).is_finite());
    }
    let _ = worker.params.flat_grad().shallow_clone().fill_(0.5);
    let squares =
        |optimizer: &AdamW| optimizer.squared_norm(&worker.params).unwrap().double_value(&[]);
    let expected = 0.25 * worker.held.iter().map(|local| local.num_elements() as f64).sum::<f64>();
    // The plain form counts the padding too, which is not zero here.
    assert!((squares(&own) - expected).abs() <= expected * 1e-2, "{} {expected}", squares(&own));
    assert!(squares(&optimizer()) >= squares(&own));
}
