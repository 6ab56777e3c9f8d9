//! Sums of gradients are issued while backward goes on, and nothing waits for them before they are
//! needed.
//!
//! In the group that sums, all ranks but rank 0 hold their first sum back until rank 0, which has
//! issued its own, goes on with its backward pass. Where a sum is issued after the backward pass,
//! or waited for at once, they hold in vain.
//!
//! That rank 0 goes on shows in an operation of tensor parallelism, or by another sum in gradients
//! that were not there at the first: deferred gradients of weights need no other rank.

use crate::harness::{Meeting, config, on_ranks_of, step};
use crate::tapped::Call;
use run_config::ShardLevel;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;
use torch_shim::tch::Tensor;

/// How long the others hold.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where rank 0 is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    NoSum,
    SumIssued,
    GoneOn,
}

/// What the ranks know of each other.
struct Holding {
    /// The group that sums, and its operation.
    sums: (&'static str, &'static str),
    progress: Mutex<Progress>,
    changed: Condvar,
    /// The gradients of rank 0, where they have their memory all along, and those at its first sum.
    gradients: Mutex<[Vec<Tensor>; 2]>,
    /// Ranks that held in vain, and those that did not.
    outcomes: Mutex<[Vec<usize>; 2]>,
}

impl Holding {
    fn hear(&self, call: Call<'_>) {
        let is_sum = (call.group, call.operation) == self.sums;
        if call.rank == 0 {
            let mut progress = self.progress.lock().unwrap();
            *progress = match *progress {
                Progress::NoSum if is_sum => {
                    let [gradients, first] = &mut *self.gradients.lock().unwrap();
                    *first = gradients.iter().map(Tensor::copy).collect();
                    Progress::SumIssued
                }
                Progress::SumIssued if is_sum && self.has_more_gradients() => Progress::GoneOn,
                // Those of tensor parallelism are within the backward pass of a block.
                Progress::SumIssued if call.group == "tensor-0" => Progress::GoneOn,
                other => other,
            };
            self.changed.notify_all();
        } else if is_sum {
            self.hold(call.rank);
        }
    }

    fn has_more_gradients(&self) -> bool {
        let [gradients, first] = &*self.gradients.lock().unwrap();
        gradients.iter().zip(first).any(|(now, then)| !now.equal(then))
    }

    fn hold(&self, rank: usize) {
        let held = |[vain, fine]: &[Vec<usize>; 2]| vain.contains(&rank) || fine.contains(&rank);
        if held(&self.outcomes.lock().unwrap()) {
            return;
        }
        let progress = self.progress.lock().unwrap();
        let stays = |progress: &mut Progress| *progress != Progress::GoneOn;
        let waited = self.changed.wait_timeout_while(progress, PATIENCE, stays).unwrap().1;
        self.outcomes.lock().unwrap()[usize::from(!waited.timed_out())].push(rank);
    }
}

#[track_caller]
fn check(layouts: &[&str], sums: (&'static str, &'static str)) {
    for layout in layouts {
        let config = config(&["model.layers=8", layout]);
        let holding = Arc::new(Holding {
            sums,
            progress: Mutex::new(Progress::NoSum),
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
        assert!(vain.is_empty(), "{layout}: ranks {vain:?} held {sums:?} in vain");
        assert!(!fine.is_empty(), "{layout}: no rank had {sums:?} to hold");
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
fn check_in(pipelines: &[&str], data: &str, sums: (&'static str, &'static str)) {
    let of = |pipeline| format!("parallelism={{tensor: 2, pipeline: {{{pipeline}}}, {data}}}");
    let layouts: Vec<String> = pipelines.iter().map(of).collect();
    check(&layouts.iter().map(String::as_str).collect::<Vec<_>>(), sums);
}

#[test]
fn sums_of_replicas() {
    check_in(&PIPELINES, "replicate: 2", ("data-0", "all_reduce"));
}

#[test]
fn sums_of_shards() {
    let sums = ("shard-0", "reduce_scatter");
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
        check(&[&replicas, &context], ("copies-0", "all_reduce"));
    }
}
