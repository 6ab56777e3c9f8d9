//! Sums of gradients are issued while backward goes on, and nothing waits for them before they are
//! needed.
//!
//! In the group that sums, all ranks but rank 0 hold their first sum back until rank 0, which has
//! issued its own, goes on to another operation of its backward pass. Where a sum is issued after
//! the backward pass, or waited for at once, they hold in vain.

use crate::harness::{Meeting, config, on_ranks_of, step};
use crate::tapped::Call;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

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
    /// Ranks that held in vain, and those that did not.
    outcomes: Mutex<[Vec<usize>; 2]>,
}

impl Holding {
    fn hear(&self, call: Call<'_>) {
        let is_sum = (call.group, call.operation) == self.sums;
        if call.rank == 0 {
            let mut progress = self.progress.lock().unwrap();
            *progress = match *progress {
                Progress::NoSum if is_sum => Progress::SumIssued,
                // Those of tensor parallelism are within the backward pass of a block.
                Progress::SumIssued if call.group == "tensor-0" => Progress::GoneOn,
                other => other,
            };
            self.changed.notify_all();
        } else if is_sum {
            self.hold(call.rank);
        }
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
            outcomes: Mutex::default(),
        });
        let heard = holding.clone();
        let meeting = Meeting::new(Duration::from_secs(30)).tapped(Arc::new(move |call| {
            heard.hear(call);
            None
        }));
        on_ranks_of(&meeting, &config, |member| {
            step(&config, member, 0);
        });
        let [vain, fine] = &*holding.outcomes.lock().unwrap();
        assert!(vain.is_empty(), "{layout}: ranks {vain:?} held {sums:?} in vain");
        assert!(!fine.is_empty(), "{layout}: no rank had {sums:?} to hold");
    }
}

/// Forms of pipeline, by what comes between the braces. Not zero-bubble: its last weight gradients
/// are made without another rank, so that no operation tells how far they are.
const PIPELINES: [&str; 3] = [
    "stages: 1",
    "stages: 2, schedule: 1f1b",
    "stages: 2, schedule: interleaved-1f1b, virtual_stages: 2",
];

fn in_pipelines(data: &str) -> Vec<String> {
    let of = |pipeline| format!("parallelism={{tensor: 2, pipeline: {{{pipeline}}}, {data}}}");
    PIPELINES.map(of).to_vec()
}

#[track_caller]
fn check_in_pipelines(data: &str, sums: (&'static str, &'static str)) {
    let layouts = in_pipelines(data);
    check(&layouts.iter().map(String::as_str).collect::<Vec<_>>(), sums);
}

#[test]
fn sums_of_replicas() {
    check_in_pipelines("replicate: 2", ("data-0", "all_reduce"));
}

#[test]
fn sums_of_shards() {
    for level in ["optimizer", "gradients", "parameters"] {
        let shard = format!("shard: {{ranks: 2, level: {level}}}");
        check_in_pipelines(&shard, ("shard-0", "reduce_scatter"));
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
