//! Sums of gradients are issued while backward goes on, and what is gathered is asked for ahead of
//! need: nothing waits for either before it must.
//!
//! In the group of such an operation, all ranks but rank 0 hold it back until rank 0, which has
//! issued its own, goes on with its pass. Where it is issued after the pass, or waited for at once,
//! they hold in vain.
//!
//! That rank 0 goes on shows in an operation of tensor parallelism, or by another sum in gradients
//! that were not there at the first: deferred gradients of weights need no other rank.

use crate::harness::{Meeting, config, on_ranks_of, step};
use crate::tapped::Call;
use run_config::ShardLevel;
use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;
use torch_shim::tch::Tensor;

/// How long the others hold.
const PATIENCE: Duration = Duration::from_secs(5);
/// Blocks of the model.
const BLOCKS: usize = 8;

/// Where rank 0 is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    Before,
    Issued,
    GoneOn,
}

/// The operation that is held back.
#[derive(Clone, Copy, Debug)]
struct Held {
    group: &'static str,
    operation: &'static str,
    /// Those of its kind and group that a rank issues before it in a step.
    number: usize,
}

impl Held {
    /// The first of its kind.
    fn first(group: &'static str, operation: &'static str) -> Self {
        Self { group, operation, number: 0 }
    }

    fn gather(group: &'static str, number: usize) -> Self {
        Self { group, operation: "all_gather", number }
    }
}

/// What the ranks know of each other.
struct Holding {
    held: Held,
    /// How many operations of its kind each rank has issued.
    issued: Mutex<HashMap<usize, usize>>,
    progress: Mutex<Progress>,
    changed: Condvar,
    /// The gradients of rank 0, where they have their memory all along, and those when it issued.
    gradients: Mutex<[Vec<Tensor>; 2]>,
    /// Ranks that held in vain, and those that did not.
    outcomes: Mutex<[Vec<usize>; 2]>,
}

impl Holding {
    fn hear(&self, call: Call<'_>) {
        let is_of_its_kind = (call.group, call.operation) == (self.held.group, self.held.operation);
        let is_held = is_of_its_kind && self.number_of(call.rank) == self.held.number;
        if call.rank != 0 {
            if is_held {
                self.hold(call.rank);
            }
            return;
        }
        let mut progress = self.progress.lock().unwrap();
        *progress = match *progress {
            Progress::Before if is_held => {
                let [gradients, first] = &mut *self.gradients.lock().unwrap();
                *first = gradients.iter().map(Tensor::copy).collect();
                Progress::Issued
            }
            Progress::Issued if is_of_its_kind && self.has_more_gradients() => Progress::GoneOn,
            // Those of tensor parallelism are within the pass through a block.
            Progress::Issued if call.group == "tensor-0" => Progress::GoneOn,
            other => other,
        };
        self.changed.notify_all();
    }

    /// How many of the kind a rank issued before the one that it issues now.
    fn number_of(&self, rank: usize) -> usize {
        let mut issued = self.issued.lock().unwrap();
        let count = issued.entry(rank).or_default();
        *count += 1;
        *count - 1
    }

    fn has_more_gradients(&self) -> bool {
        let [gradients, first] = &*self.gradients.lock().unwrap();
        gradients.iter().zip(first).any(|(now, then)| !now.equal(then))
    }

    fn hold(&self, rank: usize) {
        let progress = self.progress.lock().unwrap();
        let stays = |progress: &mut Progress| *progress != Progress::GoneOn;
        let waited = self.changed.wait_timeout_while(progress, PATIENCE, stays).unwrap().1;
        self.outcomes.lock().unwrap()[usize::from(!waited.timed_out())].push(rank);
    }
}

#[track_caller]
fn check(layouts: &[&str], held: Held) {
    let layers = format!("model.layers={BLOCKS}");
    for layout in layouts {
        let config = config(&[&layers, layout]);
        let holding = Arc::new(Holding {
            held,
            issued: Mutex::default(),
            progress: Mutex::new(Progress::Before),
            changed: Condvar::new(),
            gradients: Mutex::default(),
            outcomes: Mutex::default(),
        });
        let heard = holding.clone();
        let meeting = Meeting::new(Duration::from_secs(30)).tapped(Arc::new(move |call| {
            heard.hear(call);
            None
        }));
        let shard = &config.parallelism.shard;
        let has_memory = shard.ranks == 1 || shard.level == ShardLevel::Optimizer;
        on_ranks_of(&meeting, &config, |member| {
            if has_memory && member.worker.groups.rank == 0 {
                let units = member.worker.params.units().iter();
                holding.gradients.lock().unwrap()[0] =
                    units.map(|unit| unit.grad.tensor().shallow_clone()).collect();
            }
            step(&config, member, 0);
        });
        let [vain, fine] = &*holding.outcomes.lock().unwrap();
        assert!(vain.is_empty(), "{layout}: ranks {vain:?} held {held:?} in vain");
        assert!(!fine.is_empty(), "{layout}: no rank had {held:?} to hold");
    }
}

/// Each form of pipeline, by what comes between the braces.
const PIPELINES: [&str; 5] = [
    "stages: 1",
    "stages: 2, schedule: 1f1b",
    "stages: 2, schedule: interleaved-1f1b, virtual_stages: 2",
    "stages: 2, schedule: zero-bubble",
    "stages: 2, schedule: zero-bubble, virtual_stages: 2",
];

#[track_caller]
fn check_in(pipelines: &[&str], data: &str, held: Held) {
    let of = |pipeline| format!("parallelism={{tensor: 2, pipeline: {{{pipeline}}}, {data}}}");
    let layouts: Vec<String> = pipelines.iter().map(of).collect();
    check(&layouts.iter().map(String::as_str).collect::<Vec<_>>(), held);
}

#[test]
fn sums_of_replicas() {
    check_in(&PIPELINES, "replicate: 2", Held::first("data-0", "all_reduce"));
}

#[test]
fn sums_of_shards() {
    let sums = Held::first("shard-0", "reduce_scatter");
    check_in(&PIPELINES, "shard: {ranks: 2, level: optimizer}", sums);
    // Gradients that are cut are summed whenever no graph is alive. Deferred ones do not show: they
    // need no other rank, and have no memory that stays.
    for level in ["gradients", "parameters"] {
        check_in(&PIPELINES[..3], &format!("shard: {{ranks: 2, level: {level}}}"), sums);
    }
}

/// What is owned goes on to the ranks that own the same.
#[test]
fn sums_of_copies() {
    for level in ["optimizer", "gradients", "parameters"] {
        let shard = format!("shard: {{ranks: 2, level: {level}}}");
        let replicas = format!("parallelism={{tensor: 2, {shard}, replicate: 2}}");
        let context = format!("parallelism={{tensor: 2, {shard}, context: 2}}");
        check(&[&replicas, &context], Held::first("copies-0", "all_reduce"));
    }
}

/// Weights that are cut are gathered one block ahead, on the way forward and on the way back. The
/// embedding's and the first block's own are waited for, and on the way back the last block's.
#[test]
fn gathers_of_weights() {
    let forward = 2;
    // After those of the embedding, the blocks, the head, and the last block once more.
    let backward = 1 + BLOCKS + 1 + 1;
    let shard = "shard: {ranks: 2, level: parameters, reshard_after_forward: true}";
    for recompute in ["none", "full"] {
        let layout = format!("parallelism={{tensor: 2, {shard}, recompute: {recompute}}}");
        for number in [forward, backward] {
            check(&[&layout], Held::gather("shard-0", number));
        }
    }
}

/// For the gradient of a weight the sequence comes back while the gradient of the input is made.
#[test]
fn gathers_of_sequences() {
    // Two in each block and the head's on the way forward, then the last block's gradient.
    let number = 2 * BLOCKS + 1 + 1;
    check(&["parallelism.tensor=2"], Held::gather("tensor-0", number));
}
