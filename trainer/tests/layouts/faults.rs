//! A rank that dies or stops in the middle of training is an error on every other, in every
//! parallel form, and soon.

use crate::harness::{Meeting, config, member, num_ranks, try_step};
use crate::tapped::Call;
use collectives::{Communicator, GroupOptions, ReduceOp, Work, local};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use torch_shim::tch::{Device, Kind, Tensor};

/// Steps that all ranks do.
const GOOD_STEPS: usize = 2;

/// What a survivor came to: when it got an error, and which.
type Outcome = (Instant, String);

/// Rank `victim` leaves after two steps (`stays`: for that long, it is there and does nothing);
/// what the others came to, and when the victim left.
fn outcomes(
    layout: &str,
    victim: usize,
    timeout: Duration,
    stays: Duration,
) -> (Instant, Vec<Outcome>) {
    let config = config(&[layout]);
    let meeting = Meeting::new(timeout);
    std::thread::scope(|scope| {
        let run = |rank| {
            let (meeting, config) = (&meeting, &config);
            scope.spawn(move || {
                let mut member = member(config, rank, meeting);
                for at in 0..GOOD_STEPS {
                    try_step(config, &mut member, at).unwrap();
                }
                if rank == victim {
                    let left = Instant::now();
                    std::thread::sleep(stays);
                    return (left, None);
                }
                let result = try_step(config, &mut member, GOOD_STEPS);
                let told = Instant::now();
                // A rank that fails ends, as its process would.
                member.worker.groups.abort();
                (told, Some(result.map(|_| ()).map_err(|error| error.to_string())))
            })
        };
        let handles: Vec<_> = (0..num_ranks(&config)).map(run).collect();
        let (mut left, mut survivors) = (Instant::now(), Vec::new());
        for (rank, handle) in handles.into_iter().enumerate() {
            let (at, result) = handle.join().unwrap();
            match result {
                None => left = at,
                Some(Err(error)) => survivors.push((at, error)),
                Some(Ok(())) => panic!("{layout}: rank {rank} noticed nothing"),
            }
        }
        (left, survivors)
    })
}

const FORMS: [&str; 11] = [
    "parallelism={tensor: 2, sequence: true}",
    "parallelism={context: 2}",
    "parallelism={pipeline: {stages: 2, schedule: gpipe}}",
    "parallelism={pipeline: {stages: 2, schedule: 1f1b}}",
    "parallelism={pipeline: {stages: 2, schedule: interleaved-1f1b, virtual_stages: 2}}",
    "parallelism={pipeline: {stages: 2, schedule: zero-bubble}}",
    "parallelism={shard: {ranks: 2, level: parameters}}",
    "parallelism={shard: {ranks: 2, level: optimizer}}",
    "parallelism={shard: {ranks: 2, level: gradients}, replicate: 2}",
    "parallelism={replicate: 2}",
    "parallelism={tensor: 2, pipeline: {stages: 2}, shard: {ranks: 2, level: gradients}}",
];

/// An operation that was issued and has failed.
fn failed() -> Work {
    let mut group = local::group(2, &GroupOptions::new("lost-message", 1)).unwrap();
    drop(group.pop());
    let tensor = Tensor::zeros([1], (Kind::Float, Device::Cpu));
    // The end of the group waits for its end.
    group[0].all_reduce(&tensor, ReduceOp::Sum).unwrap()
}

/// A message that does not get through is the error of its sender, which would else wait for what
/// never comes back, and blame that.
#[test]
fn a_lost_message() {
    let layout = "parallelism.pipeline={stages: 2, schedule: gpipe}";
    let (config, wait) = (config(&[layout]), Duration::from_secs(5));
    let is_lost = |call: Call<'_>| (call.rank, call.operation) == (0, "send");
    let meeting = Meeting::new(wait).tapped(Arc::new(move |call| is_lost(call).then(failed)));
    let errors: Vec<String> = std::thread::scope(|scope| {
        let run = |rank| {
            let (meeting, config) = (&meeting, &config);
            scope.spawn(move || {
                let mut member = member(config, rank, meeting);
                let error = try_step(config, &mut member, 0).unwrap_err().to_string();
                member.worker.groups.abort();
                error
            })
        };
        let handles = [0, 1].map(run);
        handles.map(|handle| handle.join().unwrap()).to_vec()
    });
    assert!(errors[0].contains("group lost-message, operation 0"), "{errors:?}");
    assert!(errors[1].contains("lost rank 0"), "{errors:?}");
}

/// Who waited for the rank that is gone names it, by its number in the run.
#[track_caller]
fn assert_names(victim: usize, survivors: &[Outcome], layout: &str) {
    let name = format!("lost rank {victim}:");
    let errors: Vec<&str> = survivors.iter().map(|(_, error)| error.as_str()).collect();
    assert!(errors.iter().any(|error| error.contains(&name)), "{layout}: {errors:?}");
}

/// The first ranks, and the last.
fn victims(layout: &str) -> BTreeSet<usize> {
    BTreeSet::from([0, 1, num_ranks(&config(&[layout])) - 1])
}

#[test]
fn a_dead_peer() {
    for layout in FORMS {
        for victim in victims(layout) {
            let wait = Duration::from_secs(30);
            let (left, survivors) = outcomes(layout, victim, wait, Duration::ZERO);
            assert_names(victim, &survivors, layout);
            for (told, error) in survivors {
                let elapsed = told.saturating_duration_since(left);
                assert!(elapsed < Duration::from_secs(1), "{layout}: {elapsed:?}: {error}");
                let named = error.contains("lost rank") || error.contains("is dead");
                assert!(named, "{layout}: {error}");
            }
        }
    }
}

/// All forms at once, since most of it is waiting.
#[test]
fn a_stalled_peer() {
    let limit = Duration::from_secs(2);
    let check = |layout: &str| {
        let victim = num_ranks(&config(&[layout])) - 1;
        let (left, survivors) = outcomes(layout, victim, limit, 2 * limit);
        assert_names(victim, &survivors, layout);
        for (told, error) in survivors {
            let elapsed = told.saturating_duration_since(left);
            assert!(elapsed < limit + Duration::from_secs(1), "{layout}: {elapsed:?}: {error}");
            let named = error.contains("no message in 2000 ms") || error.contains("is dead");
            assert!(named || error.contains("lost rank"), "{layout}: {error}");
        }
    };
    std::thread::scope(|scope| {
        for layout in FORMS {
            scope.spawn(|| check(layout));
        }
    });
}
