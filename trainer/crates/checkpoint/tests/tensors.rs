//! Tensors of a parameter set go out and come back bit for bit, whatever number of ranks writes and
//! whatever type computes.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use checkpoint::{
    CheckpointError, SaveReport, SaveRequest, Target, TrainState, load, load_weights, save, scan,
};
use checkpoint_format::source::CheckpointSource;
use checkpoint_format::{Checkpoint, Dtype, FormatError};
use model_spec::{Axis, HfTensor, Init, LocalParameter, Part, Place};
use std::path::Path;
use std::sync::{Barrier, Mutex};
use torch_shim::bytes::as_bytes;
use torch_shim::params::{ParameterSet, ParameterSpec};
use torch_shim::tch::{Device, Kind, Tensor, no_grad};

/// A fused projection, a norm of odd size, and an embedding large enough to be shared by rows.
fn held(columns: usize) -> Vec<LocalParameter> {
    let local = |name: &str, shape: &[usize], parts: &[(&str, usize)]| {
        let mut row_start = 0;
        let parts = parts.iter().map(|(hf_name, row_count)| {
            row_start += row_count;
            let hf_name = hf_name.to_string();
            let axis = Axis::Embed;
            Part { hf_name, row_start: row_start - row_count, row_count: *row_count, axis }
        });
        LocalParameter::whole(&model_spec::ParameterSpec {
            name: name.to_string(),
            parts: parts.collect(),
            shape: shape.to_vec(),
            axes: vec![Axis::Embed; shape.len()],
            place: Place::Head,
            init: Init::Ones,
            norm: false,
        })
    };
    vec![
        local("embedding", &[1001, 400], &[("embed.weight", 1001)]),
        local("qkv", &[10, columns], &[("q.weight", 6), ("k.weight", 2), ("v.weight", 2)]),
        local("norm", &[13], &[("norm.weight", 13)]),
    ]
}

/// The tensors that `held` holds.
fn whole(held: &[LocalParameter]) -> Vec<HfTensor> {
    let tensors = held.iter().flat_map(|local| {
        local.parts.iter().map(|part| HfTensor {
            name: part.hf_name.clone(),
            shape: part.shape.clone(),
            parameter: local.spec.name.clone(),
            row_start: part.row_start,
        })
    });
    tensors.collect()
}

fn num_elements(held: &[LocalParameter]) -> u64 {
    held.iter().map(LocalParameter::num_elements).sum()
}

/// The parameters of `held`.
fn allocated(held: &[LocalParameter], compute: Kind) -> ParameterSet {
    let master = if compute == Kind::Double { Kind::Double } else { Kind::Float };
    let spec = |local: &LocalParameter| ParameterSpec {
        name: local.spec.name.clone(),
        shape: local.shape.iter().map(|&size| size as i64).collect(),
        decay: true,
    };
    let specs = held.iter().map(spec).collect();
    ParameterSet::new(specs, compute, master, Device::Cpu).unwrap()
}

/// Parameters of known, distinct values, and two moments.
fn filled(compute: Kind, columns: usize) -> (ParameterSet, Tensor, Tensor) {
    let params = allocated(&held(columns), compute);
    let master = params.flat_master().kind();
    let total = params.flat_master().size()[0];
    let values = Tensor::arange(total, (Kind::Double, Device::Cpu)).sin();
    no_grad(|| params.flat_master().shallow_clone().copy_(&values));
    params.refresh_compute().unwrap();
    let m = (&values * 3.0).to_kind(master);
    let v = values.square().to_kind(master);
    (params, m, v)
}

/// The same layout with other values.
fn other(compute: Kind, columns: usize) -> (ParameterSet, Tensor, Tensor) {
    let (params, m, v) = filled(compute, columns);
    let _ = no_grad(|| params.flat_master().shallow_clone().fill_(7.0));
    params.refresh_compute().unwrap();
    (params, m.zeros_like(), v.zeros_like())
}

/// `world_size` threads that each hold the same, as data-parallel ranks do.
fn save_all(dir: &Path, step: u64, world_size: usize, compute: Kind) -> Vec<SaveReport> {
    let barrier = Barrier::new(world_size);
    let reports = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for rank in 0..world_size {
            let (barrier, reports) = (&barrier, &reports);
            scope.spawn(move || {
                let (params, m, v) = filled(compute, 5);
                let held = held(5);
                let request = SaveRequest {
                    checkpoints_dir: dir,
                    step,
                    generation: 1,
                    rank,
                    world_size,
                    replica: rank,
                    replicas: world_size,
                    num_elements: num_elements(&held),
                    held: &held,
                    params: &params,
                    moments: &[("m", &m), ("v", &v)],
                    state: TrainState { tokens: 4096, ..TrainState::at(step) },
                    keep_last: 10,
                    keep_every_steps: 0,
                };
                let report = save(&request, &mut || {
                    barrier.wait();
                    Ok(())
                });
                reports.lock().unwrap().push(report.unwrap());
            });
        }
    });
    reports.into_inner().unwrap()
}

/// Equal bytes of all parameters; the padding between them may differ.
#[track_caller]
fn assert_same(a: &ParameterSet, b: &ParameterSet, flats: [(&Tensor, &Tensor); 4]) {
    for (a_flat, b_flat) in flats {
        for (a, b) in a.iter().zip(b.iter()) {
            let bytes = |flat: &Tensor| {
                let narrow = flat.narrow(0, a.range.start, a.num_elements());
                as_bytes(&narrow).unwrap().to_vec()
            };
            assert_eq!(a.range, b.range);
            assert!(bytes(a_flat) == bytes(b_flat), "{}", a.name);
        }
    }
}

#[track_caller]
fn check_round_trip(compute: Kind, world_size: usize) {
    let folder = tempfile::tempdir().unwrap();
    for report in save_all(folder.path(), 3, world_size, compute) {
        assert!(report.bytes > 1_000_000 && report.seconds > 0.0);
    }
    let newest = scan::newest_verified(folder.path()).unwrap().found.unwrap();
    let (params, m, v) = other(compute, 5);
    let held = held(5);
    let target = Target { whole: &whole(&held), held: &held, params: &params };
    let state = load(&newest.path, target, &[("m", &m), ("v", &v)]).unwrap();
    assert_eq!((state.step, state.tokens, state.world_size), (3, 4096, world_size));
    let (expected, em, ev) = filled(compute, 5);
    let weights = [
        (params.flat_master(), expected.flat_master()),
        (params.flat_compute(), expected.flat_compute()),
        (&m, &em),
        (&v, &ev),
    ];
    assert_same(&params, &expected, weights);
}

#[test]
fn fp32_comes_back() {
    check_round_trip(Kind::Float, 1);
    check_round_trip(Kind::Float, 2);
}

#[test]
fn bf16_with_masters_comes_back() {
    check_round_trip(Kind::BFloat16, 3);
}

#[test]
fn fp64_comes_back() {
    check_round_trip(Kind::Double, 4);
}

#[test]
fn names_and_types_are_the_canon() {
    let folder = tempfile::tempdir().unwrap();
    save_all(folder.path(), 1, 2, Kind::BFloat16);
    let checkpoint = Checkpoint::open(&folder.path().join("step-0000001")).unwrap();
    let weights = ["embed.weight", "k.weight", "norm.weight", "q.weight", "v.weight"];
    let prefixed = |prefix: &str| weights.map(|name| format!("{prefix}{name}"));
    let mut expected = [prefixed(""), prefixed("m/"), prefixed("master/"), prefixed("v/")].concat();
    expected.sort();
    assert!(checkpoint.tensors().keys().eq(expected.iter()));
    assert_eq!(checkpoint.tensor("k.weight").unwrap().shape, [2, 5]);
    assert_eq!(checkpoint.tensor("k.weight").unwrap().dtype, Dtype::Bf16);
    assert_eq!(checkpoint.tensor("master/k.weight").unwrap().dtype, Dtype::F32);
    // Both ranks wrote nearly as much.
    let sizes: Vec<u64> = checkpoint
        .manifest()
        .files
        .iter()
        .filter(|(name, _)| name.starts_with("rank-"))
        .map(|(_, file)| file.size)
        .collect();
    assert_eq!(sizes.len(), 2);
    assert!(sizes[0].abs_diff(sizes[1]) < 10_000, "{sizes:?}");
}

#[test]
fn another_type_of_compute_takes_the_weights() {
    let folder = tempfile::tempdir().unwrap();
    save_all(folder.path(), 1, 1, Kind::BFloat16);
    let source =
        CheckpointSource::new(Checkpoint::open(&folder.path().join("step-0000001")).unwrap());
    let (wide, _, _) = other(Kind::Double, 5);
    let held = held(5);
    let target = Target { whole: &whole(&held), held: &held, params: &wide };
    load_weights(&source, target).unwrap();
    let (expected, _, _) = filled(Kind::BFloat16, 5);
    for (a, b) in wide.iter().zip(expected.iter()) {
        assert!(a.master.equal(&b.master.to_kind(Kind::Double)), "{}", a.name);
    }
}

#[test]
fn a_checkpoint_of_another_model_is_named() {
    let folder = tempfile::tempdir().unwrap();
    save_all(folder.path(), 1, 1, Kind::Float);
    let (params, m, v) = other(Kind::Float, 6);
    let path = folder.path().join("step-0000001");
    let six = held(6);
    let target = Target { whole: &whole(&six), held: &six, params: &params };
    let error = load(&path, target, &[("m", &m), ("v", &v)]).unwrap_err();
    assert!(matches!(error, CheckpointError::OtherModel { .. }));
    let expected = "tensor q.weight has shape [6, 5], its shape is [6, 6] in this model";
    assert!(error.to_string().contains(expected), "{error}");
    let two = &held(5)[..2];
    let fewer = allocated(two, Kind::Float);
    let target = Target { whole: &whole(two), held: two, params: &fewer };
    let error = load(&path, target, &[]).unwrap_err().to_string();
    assert!(error.contains("tensor norm.weight has shape [13], it does not exist"), "{error}");
}

#[test]
fn weights_alone_are_not_a_state_to_resume() {
    let folder = tempfile::tempdir().unwrap();
    let (params, m, _) = filled(Kind::Float, 5);
    let held = held(5);
    let request = SaveRequest {
        checkpoints_dir: folder.path(),
        step: 0,
        generation: 1,
        rank: 0,
        world_size: 1,
        replica: 0,
        replicas: 1,
        num_elements: num_elements(&held),
        held: &held,
        params: &params,
        moments: &[],
        state: TrainState::at(0),
        keep_last: 1,
        keep_every_steps: 0,
    };
    save(&request, &mut || Ok(())).unwrap();
    let target = Target { whole: &whole(&held), held: &held, params: &params };
    let error = load(&folder.path().join("step-0000000"), target, &[("m", &m)]).unwrap_err();
    assert!(error.to_string().contains("no optimizer state (m/embed.weight"), "{error}");
    let short = Tensor::zeros([3], (Kind::Float, Device::Cpu));
    let request = SaveRequest { moments: &[("m", &short)], step: 1, ..request };
    let error = save(&request, &mut || Ok(())).unwrap_err();
    assert!(error.to_string().contains("buffer m has shape [3]"), "{error}");
    assert_eq!(scan::scan(folder.path()).unwrap().committed.len(), 1);
}

#[test]
fn a_full_disk_says_so_and_keeps_the_old_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    save_all(folder.path(), 1, 1, Kind::Float);
    let error = checkpoint_format::Save::new(folder.path(), 2, 1).begin(u64::MAX).unwrap_err();
    let error = CheckpointError::from(error);
    assert!(error.is_out_of_space());
    assert!(matches!(error, CheckpointError::Format(FormatError::NoSpace { .. })));
    assert_eq!(scan::newest_verified(folder.path()).unwrap().found.unwrap().step, 1);
}
