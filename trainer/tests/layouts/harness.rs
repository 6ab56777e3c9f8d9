//! Trains a small model on any layout with one thread a rank, and gathers what came of it.

use crate::tapped::{Tap, Tapped};
use collectives::local::{self, MemoryStore};
use collectives::{CommError, Communicator, Group, GroupOptions, gloo};
use layout::Mesh;
use model::{Dense, Inputs, llama::init::initialize, targets};
use optim::{AdamW, clip_coefficient};
use parallel::{Groups, Pass, Worker, all_reduce_scalars};
use run_config::{BatchStage, RunConfig};
use std::collections::{BTreeMap, HashMap};
use std::error::Error;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use torch_shim::gloo::{Store, StoreBackend};
use torch_shim::tch::{Device, Kind, Tensor, no_grad};

/// Bytes of a bucket of gradients: small, so that there are several.
pub const BUCKET_BYTES: usize = 4096;

/// A model as wide as the fused attention wants it.
pub const FUSED: [&str; 4] =
    ["model.head_dim=16", "model.ffn_dim=80", "data.sequence_length=64", "training.global_batch=4"];

/// What a run leaves; the same on every rank.
#[derive(Debug, Default)]
pub struct Trained {
    /// Loss of each step.
    pub losses: Vec<f64>,
    /// Gradient norm of each step, before clipping.
    pub norms: Vec<f64>,
    /// All weights at the end under their Hugging Face names, in FP64.
    pub weights: BTreeMap<String, Tensor>,
}

/// A config of the small model with `sets` over it.
pub fn config(sets: &[&str]) -> RunConfig {
    let text = "name: layouts\nseed: 3\n\
                model: {dim: 32, layers: 4, heads: 8, kv_heads: 2, head_dim: 8, ffn_dim: 48, \
                vocab_size: 64, init_std: 0.2, rope: {theta: 10000.0}}\n\
                data: {tokenizer: t, sources: [{name: a, path: b}], sequence_length: 32}\n\
                training: {steps: 10, global_batch: 8, micro_batch: 1, clip_norm: 0.5}\n\
                optimizer: {learning_rate: 0.01}\n\
                precision: {compute: fp64}\n";
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    match RunConfig::from_yaml_str(text, Path::new("/"), &sets) {
        Ok(loaded) => loaded.config,
        Err(error) => panic!("{error}"),
    }
}

/// The sequences of every step.
pub fn batch_stage(config: &RunConfig) -> &BatchStage {
    &config.training.batch_stages[0]
}

/// Number of ranks that the degrees make.
pub fn num_ranks(config: &RunConfig) -> usize {
    let p = &config.parallelism;
    p.tensor * p.context * p.pipeline.stages * p.shard.ranks * p.replicate.unwrap_or(1)
}

/// One rank: its piece of the model, and the optimizer of what it owns.
pub struct Member {
    /// The model.
    pub worker: Worker,
    /// The optimizer.
    pub optimizer: AdamW,
}

/// Calls `body` on a thread for each rank, at its initial weights.
pub fn on_ranks<T: Send>(config: &RunConfig, body: impl Fn(&mut Member) -> T + Sync) -> Vec<T> {
    on_ranks_of(&Meeting::new(Duration::from_secs(30)), config, body)
}

/// As [`on_ranks`], for ranks that find each other at `meeting`.
pub fn on_ranks_of<T: Send>(
    meeting: &Meeting,
    config: &RunConfig,
    body: impl Fn(&mut Member) -> T + Sync,
) -> Vec<T> {
    std::thread::scope(|scope| {
        let run = |rank| {
            let body = &body;
            scope.spawn(move || {
                let mut member = member(config, rank, meeting);
                let result = body(&mut member);
                // Nobody leaves while another still talks to it.
                member.worker.groups.world.barrier().unwrap().wait().unwrap();
                result
            })
        };
        let handles: Vec<_> = (0..num_ranks(config)).map(run).collect();
        handles.into_iter().map(|handle| handle.join().unwrap()).collect()
    })
}

/// A rank at its initial weights; the others are made at the same time.
pub fn member(config: &RunConfig, rank: usize, meeting: &Meeting) -> Member {
    torch_shim::tch::set_num_threads(1);
    let mesh = Mesh::new(&config.parallelism, num_ranks(config)).unwrap();
    let mut connect = |name: &str, ranks: &[usize]| meeting.join(name, ranks, rank);
    let groups = Groups::connect(config, mesh, rank, &mut connect).unwrap();
    let positions = batch_stage(config).sequence_length;
    let dense = Dense::default();
    let worker = Worker::new(config, groups, Device::Cpu, positions, BUCKET_BYTES, dense).unwrap();
    initialize(config.seed, &worker.held, &worker.params).unwrap();
    worker.weights_changed().unwrap();
    let optimizer = AdamW::new(&config.optimizer, &worker.params).unwrap();
    Member { worker, optimizer }
}

/// Trains `steps` steps on the `local` backend.
pub fn train(config: &RunConfig, steps: usize) -> Trained {
    let weights = Mutex::new(BTreeMap::new());
    let results = on_ranks(config, |member| {
        let numbers: Vec<_> = (0..steps).map(|at| step(config, member, at)).collect();
        gather(&member.worker, member.worker.params.owned_master(), &weights);
        numbers
    });
    for result in &results[1..] {
        assert_eq!(result, &results[0], "every rank reports the same numbers");
    }
    let (losses, norms) = results[0].iter().copied().unzip();
    Trained { losses, norms, weights: weights.into_inner().unwrap() }
}

/// Does a step; returns its loss and its gradient norm.
pub fn step(config: &RunConfig, member: &mut Member, step: usize) -> (f64, f64) {
    try_step(config, member, step).unwrap()
}

/// As [`step`], where a peer may fail.
pub fn try_step(
    config: &RunConfig,
    member: &mut Member,
    step: usize,
) -> Result<(f64, f64), Box<dyn Error + Send + Sync>> {
    let Member { worker, optimizer } = member;
    let groups = worker.groups.clone();
    let (passes, num_targets) = batch(config, &groups, step);
    let mut targets = [if groups.reads_first() { num_targets } else { 0.0 }];
    let sum = collectives::ReduceOp::Sum;
    all_reduce_scalars(groups.world.as_ref(), &mut targets, sum)?;
    worker.params.zero_grad()?;
    let loss = worker.forward_backward(&passes, 1.0 / targets[0])?.double_value(&[]);
    let gradients = worker.counted_gradients()?;
    let square = |x: &Tensor| torch_shim::norm::squared_norm(x).unwrap().double_value(&[]);
    // As many numbers as in training, where a rank's wish to stop is the third.
    let mut sums = [loss, gradients.iter().map(square).sum(), 0.0];
    all_reduce_scalars(groups.world.as_ref(), &mut sums, sum)?;
    let norm = sums[1].sqrt();
    let coefficient = clip_coefficient(norm, config.training.clip_norm);
    optimizer.step(&worker.params, config.optimizer.learning_rate, coefficient)?;
    worker.weights_changed()?;
    Ok((sums[0], norm))
}

/// Puts what this rank owns of a buffer, laid out as the master weights are, in its place of the
/// whole tensors; copies must be the same.
pub fn gather(worker: &Worker, buffer: &Tensor, whole: &Mutex<BTreeMap<String, Tensor>>) {
    let mut tensors = whole.lock().unwrap();
    let owned = worker.params.owned();
    for (local, parameter) in worker.held.iter().zip(worker.params.iter()) {
        let width: usize = local.shape.iter().skip(1).product();
        for part in &local.parts {
            let shape: Vec<i64> = part.shape.iter().map(|&size| size as i64).collect();
            let options = (Kind::Double, Device::Cpu);
            let nan = || Tensor::full(&shape, f64::NAN, options);
            let whole = tensors.entry(part.hf_name.clone()).or_insert_with(nan);
            let first = parameter.range.start as usize + part.row_start * width;
            for run in &owned {
                let (from, to) = (run.elements.start as usize, run.elements.end as usize);
                let (low, high) = (first.max(from), (first + part.num_elements()).min(to));
                if low >= high {
                    continue;
                }
                for piece in part.rectangles(low - first..high - first) {
                    let start = run.start as usize + first + piece.start - from;
                    let count = piece.num_elements() as i64;
                    let own = buffer.narrow(0, start as i64, count);
                    let own = own.to_kind(Kind::Double);
                    let rows = piece.rows.len() as i64;
                    let mut place = whole.narrow(0, piece.rows.start as i64, rows);
                    if shape.len() > 1 {
                        let columns = piece.columns.len() as i64;
                        place = place.narrow(1, piece.columns.start as i64, columns);
                    }
                    let own = own.view_as(&place);
                    if place.isnan().any().int64_value(&[]) == 0 {
                        assert!(place.equal(&own), "copies of {} differ", part.hf_name);
                    }
                    no_grad(|| place.copy_(&own));
                }
            }
        }
    }
}

/// Losses, norms and weights are those expected but for a relative difference of `limit`.
#[track_caller]
pub fn compare(found: &Trained, expected: &Trained, limit: f64, what: &str) {
    for (step, (a, b)) in found.norms.iter().zip(&expected.norms).enumerate() {
        assert!(relative(*a, *b) < limit, "{what}: norm of step {step}: {a} for {b}");
    }
    compare_losses_and_weights(found, expected, limit, what);
}

/// As [`compare`], without the norms.
#[track_caller]
pub fn compare_losses_and_weights(found: &Trained, expected: &Trained, limit: f64, what: &str) {
    for (step, (a, b)) in found.losses.iter().zip(&expected.losses).enumerate() {
        assert!(relative(*a, *b) < limit, "{what}: loss of step {step}: {a} for {b}");
    }
    assert!(found.weights.keys().eq(expected.weights.keys()));
    for (name, weight) in &found.weights {
        let expected = &expected.weights[name];
        let norm = |x: &Tensor| x.norm().double_value(&[]);
        let difference = norm(&(weight - expected)) / norm(expected);
        assert!(difference < limit, "{what}: {name} is off by {difference:e}");
    }
}

fn relative(a: f64, b: f64) -> f64 {
    (a - b).abs() / b.abs()
}

/// A step's micro-batches of this rank, and how many targets they have. Documents of uneven
/// lengths, some tokens without a target.
pub fn batch(config: &RunConfig, groups: &Groups, step: usize) -> (Vec<Pass>, f64) {
    let BatchStage { global_batch, sequence_length, .. } = *batch_stage(config);
    let per_rank = global_batch / groups.mesh.data_size();
    let first = groups.mesh.data_rank(groups.rank) * per_rank;
    let micro = config.training.micro_batch;
    let mut num_targets = 0.0;
    let rows: Vec<usize> = (first..first + per_rank).collect();
    let passes = rows.chunks(micro).map(|rows| {
        let (mut tokens, mut goals, mut positions, mut documents) =
            (vec![], vec![], vec![], vec![]);
        for &row in rows {
            let mut document = 0;
            let mut position = 0;
            for at in 0..sequence_length {
                let noise = mix((step * global_batch + row) as u64, at as u64);
                if noise.is_multiple_of(7) && at > 0 {
                    (document, position) = (document + 1, 0);
                }
                tokens.push((noise % 64) as i32);
                goals.push(if noise.is_multiple_of(11) { -100 } else { (noise >> 8) as i32 % 64 });
                positions.push(position);
                documents.push(document);
                position += 1;
            }
        }
        num_targets += goals.iter().filter(|&&goal| goal >= 0).count() as f64;
        let documents = config.data.document_mask.then_some(documents.as_slice());
        let inputs = Inputs::new(&tokens, &positions, documents, rows.len(), Device::Cpu).unwrap();
        Pass { inputs, targets_BS: targets(&goals, rows.len(), Device::Cpu).unwrap() }
    });
    let passes = passes.collect();
    (passes, num_targets)
}

/// Numbers below 2^24 that look random.
fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ b.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 30)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x ^ (x >> 31)) >> 40
}

/// Where the threads of a group find each other.
pub struct Meeting {
    groups: Mutex<HashMap<String, Vec<Option<Group>>>>,
    timeout: Duration,
    tap: Option<Arc<Tap>>,
    /// Where those find each other that are connected by Gloo.
    store: Option<Store>,
}

impl Meeting {
    /// For groups whose longest wait is `timeout`.
    pub fn new(timeout: Duration) -> Self {
        Self { groups: Mutex::default(), timeout, tap: None, store: None }
    }

    /// With connections of Gloo in every group, in place of the process's own memory.
    pub fn over_gloo(self) -> Self {
        let store: Arc<dyn StoreBackend> = Arc::new(MemoryStore::default());
        Self { store: Some(Store::new(store)), ..self }
    }

    /// With a tap on every group.
    pub fn tapped(self, tap: Arc<Tap>) -> Self {
        Self { tap: Some(tap), ..self }
    }

    fn join(
        &self,
        name: &str,
        ranks: &[usize],
        rank: usize,
    ) -> Result<Arc<dyn Communicator>, CommError> {
        let options =
            GroupOptions { timeout: self.timeout, ..GroupOptions::new(name, 1).of(ranks) };
        let at = ranks.iter().position(|&other| other == rank).unwrap();
        let own = match &self.store {
            Some(store) => gloo::connect(store, at, ranks.len(), "127.0.0.1", &options)?,
            None => self.take(name, ranks.len(), at, &options)?,
        };
        let group: Arc<dyn Communicator> = Arc::new(own);
        let Some(tap) = self.tap.clone() else { return Ok(group) };
        Ok(Arc::new(Tapped { group, name: name.to_owned(), rank, tap }))
    }

    /// A member of a group of threads, of which the first to come makes all.
    fn take(
        &self,
        name: &str,
        size: usize,
        at: usize,
        options: &GroupOptions,
    ) -> Result<Group, CommError> {
        let mut groups = self.groups.lock().unwrap();
        if !groups.contains_key(name) {
            let made = local::group(size, options)?;
            groups.insert(name.to_owned(), made.into_iter().map(Some).collect());
        }
        Ok(groups.get_mut(name).and_then(|group| group[at].take()).unwrap())
    }
}
