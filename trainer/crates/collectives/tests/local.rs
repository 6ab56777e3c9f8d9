//! The conformance suite on threads.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use collectives::{
    Check, Communicator, Group, GroupOptions, ReduceOp, Whereabouts, Work, conformance, local,
};
use torch_shim::gloo::{Store, StoreBackend};
use torch_shim::tch::{Device, Kind, Tensor};

/// Runs `body` on `size` threads; `connect` hands out the ranks' ends of each group.
fn on_ranks(size: usize, body: impl Fn(usize, &conformance::Connect<'_>) + Send + Sync + 'static) {
    let body = Arc::new(body);
    let made: Arc<Mutex<HashMap<String, Vec<Option<Group>>>>> = Arc::default();
    let store = Store::new(Arc::new(local::MemoryStore::default()) as Arc<dyn StoreBackend>);
    let threads: Vec<_> = (0..size)
        .map(|rank| {
            let (body, made) = (body.clone(), made.clone());
            let whereabouts = Whereabouts::new(&store, 1, rank).unwrap();
            std::thread::spawn(move || {
                body(rank, &|options| {
                    let mut made = made.lock().unwrap();
                    let group = made.entry(options.name.clone()).or_insert_with(|| {
                        local::group(size, options).unwrap().into_iter().map(Some).collect()
                    });
                    Ok(group[rank].take().unwrap().among(&whereabouts))
                });
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn threads_pass_the_suite() {
    for size in [1, 2, 3, 4] {
        on_ranks(size, |_, connect| conformance::test_all(connect).unwrap());
    }
}

#[test]
fn ranks_that_wait_for_each_other_in_two_groups_are_told() {
    on_ranks(3, |_, connect| conformance::test_elsewhere(connect).unwrap());
}

#[test]
fn a_dead_thread_is_an_error_in_every_survivor() {
    on_ranks(4, |_, connect| {
        let comm = connect(&GroupOptions::new("death", 1)).unwrap();
        conformance::test_death(comm, drop).unwrap();
        let comm = connect(&GroupOptions::new("death-in-messages", 1)).unwrap();
        conformance::test_death_in_messages(comm, drop).unwrap();
    });
}

#[test]
fn an_abort_ends_every_wait() {
    on_ranks(4, |_, connect| {
        let comm = connect(&GroupOptions::new("abort", 1)).unwrap();
        conformance::test_abort(&comm).unwrap();
        std::thread::sleep(Duration::from_millis(300));
    });
}

/// Operations on nothing send nothing, so that no rank misses a message of another: only their
/// comparison can tell that the ranks disagree.
#[test]
fn ranks_that_disagree_are_told_as_far_as_operations_are_compared() {
    let told = |check: Check, numbers_by_rank: [&'static [usize]; 2]| {
        let group = local::group(2, &GroupOptions { check, ..GroupOptions::new("none", 1) });
        let ranks = group.unwrap().into_iter().zip(numbers_by_rank);
        let threads = ranks.map(|(comm, numbers)| {
            std::thread::spawn(move || {
                let nothing = || Tensor::zeros([0], (Kind::Float, Device::Cpu));
                let issue = |number: &usize| match number {
                    0 => comm.all_reduce(&nothing(), ReduceOp::Sum),
                    _ => comm.all_gather(&nothing(), &nothing()),
                };
                numbers.iter().try_for_each(|number| issue(number).and_then(Work::wait)).err()
            })
        });
        let threads: Vec<_> = threads.collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    };
    let (at_first, at_second) = ([&[0][..], &[1]], [&[0, 1, 0][..], &[0, 1, 1]]);
    for (check, is_told) in
        [(Check::Off, [false, false]), (Check::FirstUse, [true, false]), (Check::All, [true, true])]
    {
        for (numbers, is_told) in [at_first, at_second].into_iter().zip(is_told) {
            for error in told(check, numbers) {
                let text = error.map_or_else(String::new, |error| error.to_string());
                let names = ["rank 0 issues all_reduce", "rank 1 issues all_gather"];
                let is_said = names.iter().all(|name| text.contains(name));
                assert_eq!((is_said, text.is_empty()), (is_told, !is_told), "{check:?}: {text}");
            }
        }
    }
}

#[test]
fn a_peer_that_does_not_come_is_a_time_out() {
    let mut options = GroupOptions::new("late", 1);
    options.timeout = Duration::from_millis(100);
    let group = local::group(2, &options).unwrap();
    let tensor = Tensor::ones([4], (Kind::Float, Device::Cpu));
    let start = Instant::now();
    let error =
        group[0].all_reduce(&tensor, ReduceOp::Sum).unwrap().wait().unwrap_err().to_string();
    assert!(error.contains("rank 1") && error.contains("100 ms"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(2));
}
