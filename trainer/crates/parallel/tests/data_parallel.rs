//! 1, 2 and 4 ranks give the gradients of one rank with the same global batch.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;

use collectives::{Communicator, GroupOptions, ReduceOp, local};
use parallel::{DataParallel, all_reduce_scalars};
use torch_shim::params::{ParameterSet, ParameterSpec};
use torch_shim::tch::{Device, Kind, Tensor};
use torch_shim::{autograd, fused};

const SEQUENCES: i64 = 8;
const SEQUENCE: i64 = 6;
const VOCABULARY: i64 = 13;
const WIDTH: i64 = 16;

fn parameters(kind: Kind) -> ParameterSet {
    let spec = |name: &str, shape: &[i64]| ParameterSpec {
        name: name.into(),
        shape: shape.to_vec(),
        decay: true,
    };
    let specs = vec![
        spec("embedding", &[VOCABULARY, WIDTH]),
        spec("norm", &[WIDTH]),
        spec("linear", &[WIDTH, WIDTH]),
        spec("unused", &[3]),
        spec("head", &[VOCABULARY, WIDTH]),
    ];
    let master = if kind == Kind::Double { Kind::Double } else { Kind::Float };
    let set = ParameterSet::new(specs, kind, master, Device::Cpu).unwrap();
    let count = set.flat_master().numel() as i64;
    let values = Tensor::arange(count, (Kind::Double, Device::Cpu)).sin() * 0.3;
    set.flat_master().shallow_clone().copy_(&values);
    set.refresh_compute().unwrap();
    set
}

fn all(set: &ParameterSet) -> Vec<usize> {
    (0..set.len()).collect()
}

fn loss(set: &ParameterSet, first: i64, count: i64) -> Tensor {
    let tokens = Tensor::arange(SEQUENCES * SEQUENCE, (Kind::Int64, Device::Cpu));
    let tokens = (&tokens * &tokens * 7 + 3).remainder(VOCABULARY);
    let tokens = tokens.view([SEQUENCES, SEQUENCE]).narrow(0, first, count);
    let targets = (&tokens * 5 + 1).remainder(VOCABULARY);
    let at = |name: &str| set.get(name).unwrap();
    let x = fused::embedding(&tokens, at("embedding")).unwrap();
    let x = fused::linear(&fused::rms_norm(&x, at("norm"), 1e-5).unwrap(), at("linear")).unwrap();
    fused::head_loss(&x, at("head"), &targets, 1.0 / (SEQUENCES * SEQUENCE) as f64, 5).unwrap()
}

/// Gradients and loss of one rank's share of the batch, one sequence a micro-batch, summed over the
/// group.
fn share(comm: Arc<dyn Communicator>, kind: Kind, bucket_bytes: usize) -> (Vec<f64>, f64) {
    torch_shim::tch::set_num_threads(1);
    let (rank, size) = (comm.rank() as i64, comm.size() as i64);
    let set = parameters(kind);
    let data_parallel = DataParallel::new(&set, comm.clone(), bucket_bytes).unwrap();
    let mut total = [0.0];
    for _step in 0..2 {
        set.zero_grad().unwrap();
        data_parallel.begin_step();
        total = [0.0];
        let mine = SEQUENCES / size;
        for sequence in rank * mine..(rank + 1) * mine {
            if sequence + 1 == (rank + 1) * mine {
                data_parallel.begin_last_pass(&all(&set));
            }
            let loss = loss(&set, sequence, 1);
            autograd::backward(&[&loss], &[]).unwrap();
            total[0] += loss.double_value(&[]);
        }
        data_parallel.finish().unwrap();
        all_reduce_scalars(comm.as_ref(), &mut total, ReduceOp::Sum).unwrap();
    }
    (Vec::try_from(&set.flat_grad().to_kind(Kind::Double)).unwrap(), total[0])
}

fn run(ranks: usize, kind: Kind, bucket_bytes: usize) -> Vec<(Vec<f64>, f64)> {
    let group = local::group(ranks, &GroupOptions::new("data", 1)).unwrap();
    let threads: Vec<_> = group
        .into_iter()
        .map(|comm| std::thread::spawn(move || share(Arc::new(comm), kind, bucket_bytes)))
        .collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}

#[test]
fn ranks_together_equal_one_rank() {
    for (kind, tolerance) in [(Kind::Double, 1e-13), (Kind::Float, 1e-5)] {
        let set = parameters(kind);
        let whole = loss(&set, 0, SEQUENCES);
        autograd::backward(&[&whole], &[]).unwrap();
        let expected: Vec<f64> = Vec::try_from(&set.flat_grad().to_kind(Kind::Double)).unwrap();
        let scale = expected.iter().fold(0f64, |a, b| a.max(b.abs()));
        for ranks in [1, 2, 4] {
            for bucket_bytes in [1, 1500, 1 << 20] {
                let outcomes = run(ranks, kind, bucket_bytes);
                for (gradients, loss) in &outcomes {
                    assert_eq!(gradients, &outcomes[0].0, "ranks differ");
                    assert!((loss - whole.double_value(&[])).abs() < tolerance * 10.0);
                    for (got, expected) in gradients.iter().zip(&expected) {
                        let difference = (got - expected).abs() / scale;
                        assert!(difference <= tolerance, "{ranks} ranks: {got} against {expected}");
                    }
                }
            }
        }
    }
}

#[test]
fn two_runs_are_bit_equal() {
    assert_eq!(run(4, Kind::Float, 600), run(4, Kind::Float, 600));
}

#[test]
fn a_dead_rank_is_an_error_of_the_step() {
    let mut group = local::group(2, &GroupOptions::new("data", 1)).unwrap();
    drop(group.pop());
    let comm: Arc<dyn Communicator> = Arc::new(group.pop().unwrap());
    let set = parameters(Kind::Float);
    let data_parallel = DataParallel::new(&set, comm, 1).unwrap();
    data_parallel.begin_step();
    data_parallel.begin_last_pass(&all(&set));
    let backward = autograd::backward(&[&loss(&set, 0, 1)], &[]);
    let error = backward
        .err()
        .map(|e| e.to_string())
        .or(data_parallel.finish().err().map(|e| e.to_string()));
    assert!(error.is_some_and(|text| text.contains("rank 1") || text.contains("dead")));
}
