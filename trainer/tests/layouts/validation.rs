//! Validation on any layout has the losses of one rank, and a pipeline's stages work on it at the
//! same time.

use crate::harness::{Meeting, batch, config, on_ranks, on_ranks_of};
use run_config::RunConfig;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// The sum of the losses of a batch over all ranks.
fn loss(config: &RunConfig) -> f64 {
    let losses = on_ranks(config, |member| {
        let (passes, _) = batch(config, &member.worker.groups, 0);
        member.worker.evaluate(&passes).unwrap()
    });
    losses.into_iter().flatten().sum()
}

#[track_caller]
fn check(layouts: &[&str]) {
    let base = ["model.layers=7", "training.global_batch=6"];
    let expected = loss(&config(&base));
    for layout in layouts {
        let set = format!("parallelism={{{layout}}}");
        let found = loss(&config(&[&base[..], &[&set]].concat()));
        assert!((found / expected - 1.0).abs() < 1e-10, "{layout}: {found} for {expected}");
    }
}

#[test]
fn losses_are_those_of_one_rank() {
    check(&[
        "pipeline: {stages: 2, schedule: gpipe}",
        "pipeline: {stages: 4, schedule: 1f1b}",
        "pipeline: {stages: 2, schedule: interleaved-1f1b, virtual_stages: 3}",
        "pipeline: {stages: 2, schedule: interleaved-1f1b, virtual_stages: 2, \
         contiguous_micro_batches: 4}",
        "pipeline: {stages: 3, schedule: zero-bubble, virtual_stages: 2}",
        "pipeline: {stages: 2, schedule: interleaved-1f1b, virtual_stages: 2}, tensor: 2",
        "pipeline: {stages: 2}, context: 2",
        "pipeline: {stages: 2}, shard: {ranks: 2, level: parameters}",
        "tensor: 2, replicate: 2",
    ]);
}

/// Whether micro-batches are evaluated together or one by one changes no bit.
#[test]
fn together_or_one_by_one() {
    let config = config(&["precision.compute=fp32"]);
    let losses = on_ranks(&config, |member| {
        let (passes, _) = batch(&config, &member.worker.groups, 0);
        let alone = passes.chunks(1).flat_map(|pass| member.worker.evaluate(pass).unwrap());
        let alone: Vec<u64> = alone.map(f64::to_bits).collect();
        let together = member.worker.evaluate(&passes).unwrap().into_iter().map(f64::to_bits);
        (alone, together.collect::<Vec<_>>())
    });
    let [(alone, together)] = &losses[..] else { panic!("{losses:?}") };
    assert_eq!((alone.len(), alone), (8, together));
}

/// The second stage holds what it sends back until the first has sent it a second micro-batch.
#[test]
fn stages_work_at_the_same_time() {
    let config = config(&[
        "parallelism.pipeline={stages: 2, schedule: interleaved-1f1b, virtual_stages: 2}",
    ]);
    let sent = Arc::new((Mutex::new(0), Condvar::new()));
    let heard = sent.clone();
    let meeting = Meeting::new(Duration::from_secs(30)).tapped(Arc::new(move |call| {
        let (count, changed) = &*heard;
        if call.operation == "send" && call.rank == 0 {
            *count.lock().unwrap() += 1;
            changed.notify_all();
        } else if call.operation == "send" {
            let patience = Duration::from_secs(5);
            let waits = |count: &mut i32| *count < 2;
            let count = count.lock().unwrap();
            let late = changed.wait_timeout_while(count, patience, waits).unwrap().1.timed_out();
            assert!(!late, "the first stage waits for the second");
        }
        None
    }));
    on_ranks_of(&meeting, &config, |member| {
        let (passes, _) = batch(&config, &member.worker.groups, 0);
        member.worker.evaluate(&passes).unwrap();
    });
}
