//! A checkpoint saved at any layout is loaded at any other: tensors and optimizer state bit-equal,
//! and the losses that follow are those of the run that was saved.

use crate::harness::{Member, config, gather, on_ranks, step};
use checkpoint::{SaveRequest, Target, TrainState};
use run_config::RunConfig;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use torch_shim::tch::{Kind, Tensor};

/// Steps before the checkpoint, and after it.
const BEFORE: usize = 3;
const AFTER: usize = 10;

/// Weights and both moments, whole.
type State = [BTreeMap<String, Tensor>; 3];

/// Gathers the whole state of all ranks.
#[derive(Default)]
struct Gathering([Mutex<BTreeMap<String, Tensor>>; 3]);

impl Gathering {
    fn add(&self, member: &Member) {
        let Member { worker, optimizer } = member;
        let buffers = [worker.params.owned_master(), optimizer.flat_m(), optimizer.flat_v()];
        for (buffer, whole) in buffers.into_iter().zip(&self.0) {
            gather(worker, buffer, whole);
        }
    }

    fn finish(self) -> State {
        self.0.map(|whole| whole.into_inner().unwrap())
    }
}

/// Trains, saves, and trains on; returns the state that was saved and the losses after it.
fn train_and_save(config: &RunConfig, dir: &Path) -> (State, Vec<f64>) {
    let gathering = Gathering::default();
    let losses = on_ranks(config, |member| {
        for at in 0..BEFORE {
            step(config, member, at);
        }
        save(config, member, dir);
        gathering.add(member);
        (BEFORE..BEFORE + AFTER).map(|at| step(config, member, at).0).collect()
    });
    (gathering.finish(), losses.into_iter().next().unwrap())
}

fn save(config: &RunConfig, member: &Member, dir: &Path) {
    let world = &member.worker.groups.world;
    let mut barrier = || {
        let met = world.barrier().and_then(|work| work.wait());
        met.map_err(|error| error.to_string())
    };
    requested(config, member, dir, |request| checkpoint::save(request, &mut barrier)).unwrap();
}

/// Does with what a rank saves in `dir` as `body` says.
pub fn requested<T>(
    config: &RunConfig,
    member: &Member,
    dir: &Path,
    body: impl FnOnce(&SaveRequest) -> T,
) -> T {
    let Member { worker, optimizer } = member;
    let (groups, step) = (&worker.groups, BEFORE as u64);
    body(&SaveRequest {
        checkpoints_dir: dir,
        step,
        generation: 1,
        rank: groups.rank,
        world_size: groups.mesh.size(),
        replica: groups.copies.as_ref().map_or(0, |copies| copies.rank()),
        replicas: groups.copies.as_ref().map_or(1, |copies| copies.size()),
        num_elements: model_spec::num_parameters(&config.model),
        held: &worker.held,
        params: &worker.params,
        moments: &[("m", optimizer.flat_m()), ("v", optimizer.flat_v())],
        state: TrainState::at(step),
        keep_last: 1,
        keep_every_steps: 0,
    })
}

/// Loads at another layout, and trains on.
fn load_and_train(config: &RunConfig, dir: &Path) -> (State, Vec<f64>) {
    let gathering = Gathering::default();
    let step_dir = dir.join(format!("step-{BEFORE:07}"));
    let losses = on_ranks(config, |member| {
        let Member { worker, optimizer } = &mut *member;
        let whole = model_spec::hf_tensors(&config.model);
        let target = Target { whole: &whole, held: &worker.held, params: &worker.params };
        let moments = [("m", optimizer.flat_m()), ("v", optimizer.flat_v())];
        checkpoint::load(&step_dir, target, &moments).unwrap();
        optimizer.set_num_steps(BEFORE as u64);
        worker.weights_changed().unwrap();
        gathering.add(member);
        (BEFORE..BEFORE + AFTER).map(|at| step(config, member, at).0).collect()
    });
    (gathering.finish(), losses.into_iter().next().unwrap())
}

/// The losses of the run that was saved, and of the one that loaded it, after the checkpoint.
type Losses = [Vec<f64>; 2];

/// Saves at one layout and loads at another: the state is that which was saved, to the last bit.
/// `look` sees it.
fn resharded(base: &[&str], [from, to]: [&str; 2], look: impl Fn(&State)) -> Losses {
    let of = |layout: &str| config(&[base, &[layout]].concat());
    let folder = tempfile::tempdir().unwrap();
    let (saved, losses) = train_and_save(&of(from), folder.path());
    look(&saved);
    let (loaded, next) = load_and_train(&of(to), folder.path());
    for (kind, (saved, loaded)) in ["weights", "m", "v"].iter().zip(saved.iter().zip(&loaded)) {
        assert!(saved.keys().eq(loaded.keys()));
        for (name, tensor) in saved {
            assert!(tensor.equal(&loaded[name]), "{kind} of {name}: {from} to {to}");
        }
    }
    [losses, next]
}

/// Saves at each layout and loads at the next, all around.
fn check(base: &[&str], layouts: &[&str]) {
    for (from, to) in layouts.iter().zip(layouts.iter().cycle().skip(1)) {
        let [losses, next] = resharded(base, [from, to], |_| ());
        for (at, (a, b)) in losses.iter().zip(&next).enumerate() {
            let difference = (a / b - 1.0).abs();
            assert!(difference < 1e-10, "{from} to {to}: loss {at} after it: {a} and {b}");
        }
    }
}

const ONE: &str = "parallelism.tensor=1";
const TENSOR: &str = "parallelism={tensor: 4, pipeline: {stages: 2}}";
const SHARDS: &str = "parallelism={tensor: 2, shard: {ranks: 2, level: parameters}, replicate: 2}";
const PIPELINE: &str = "parallelism={pipeline: {stages: 2, schedule: interleaved-1f1b, \
                        virtual_stages: 2}, context: 2, shard: {ranks: 2, level: gradients}}";
const ODD_SHARDS: &str = "parallelism={shard: {ranks: 8, level: optimizer}}";

#[test]
fn any_layout_to_any_other() {
    check(&[], &[ONE, TENSOR, SHARDS, PIPELINE, ODD_SHARDS]);
}

/// Some of these numbers have bits that BF16 has not.
#[track_caller]
fn assert_finer_than_bf16(tensors: &BTreeMap<String, Tensor>) {
    let rounded = |x: &Tensor| x.to_kind(Kind::BFloat16).to_kind(Kind::Double);
    assert!(tensors.values().any(|tensor| !rounded(tensor).equal(tensor)));
}

/// Where the weights that compute are BF16, the master weights and both moments are saved, and what
/// computes follows them: at the layout that saved, the losses go on to the last bit.
#[test]
fn master_weights_of_bf16() {
    let base = ["precision.compute=bf16"];
    for pair in [[SHARDS, TENSOR], [TENSOR, PIPELINE], [PIPELINE, ONE]] {
        resharded(&base, pair, |state| state.iter().for_each(assert_finer_than_bf16));
    }
    for layout in [ONE, SHARDS, TENSOR, ODD_SHARDS] {
        let [losses, next] = resharded(&base, [layout, layout], |_| ());
        assert_eq!(losses, next, "{layout}");
    }
}

#[test]
fn tied_embeddings() {
    check(&["model.tied_embeddings=true"], &[PIPELINE, SHARDS, TENSOR]);
}
