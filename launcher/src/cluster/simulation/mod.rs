//! A run on several nodes under faults, on a clock that jumps: the production's own policy,
//! membership, conversations, agents and rendezvous store, between which a simulated network loses
//! connections and delays, repeats and swaps messages, while processes are killed and paused.
//!
//! Everything follows from a seed. [`world`] owns the clock and all that happens; [`network`] is
//! what lies between the nodes; [`head`] stands for the coordinator's process and its loop, whose
//! order is that of `supervisor/run.rs`; [`node`] for agents, [`ranks`] for what they start;
//! [`faults`] says what goes wrong, and when.
#![cfg(test)]

mod faults;
mod head;
mod network;
mod node;
mod ranks;
mod world;

use faults::{Fault, Kind};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use world::{Outcome, World};

/// So many seeds, from the first one on, in place of the few of every day.
const NUM_SEEDS: &str = "PHALANX_SEEDS";
const FIRST_SEED: &str = "PHALANX_FIRST_SEED";
/// So many lines of the trace of a seed that failed, in place of [`MAX_SHOWN`].
const SHOWN: &str = "PHALANX_TRACE_LINES";
const MAX_SHOWN: u64 = 400;

fn from_env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// What came of a seed; a panic is an error like others.
fn run(seed: u64, is_traced: bool) -> Result<Outcome, String> {
    let world = || World::new(seed, is_traced).run();
    catch_unwind(AssertUnwindSafe(world)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        Err(format!("panic: {}", text.or(panic.downcast_ref().copied()).unwrap_or("?")))
    })
}

/// The seed once more, with its trace, for whoever mends it.
fn show(seed: u64, why: &str) -> String {
    let trace = match run(seed, true) {
        Ok(outcome) => outcome.trace,
        Err(trace) => trace.lines().map(str::to_owned).collect(),
    };
    let shown = from_env(SHOWN).unwrap_or(MAX_SHOWN);
    let skipped = trace.len().saturating_sub(usize::try_from(shown).unwrap());
    let shown = trace[skipped..].join("\n");
    format!("seed {seed}: {why}\n… {skipped} lines before\n{shown}\nseed {seed}: {why}")
}

/// All seeds keep the rules, come to their end, and every kind of fault has been met. A tenth of
/// them is run twice, and does the same both times.
#[expect(clippy::print_stdout, reason = "ops/simulate-faults shows it")]
fn check_seeds(first: u64, count: u64) {
    let next = AtomicU64::new(0);
    let sums = Mutex::new(BTreeMap::<Kind, u64>::new());
    let failed = Mutex::new(None::<(u64, String)>);
    let work = || {
        while failed.lock().unwrap().is_none() {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return;
            }
            let seed = first + index;
            let result = run(seed, false).and_then(|outcome| {
                let again = index.is_multiple_of(10).then(|| run(seed, false)).transpose()?;
                match again.is_some_and(|again| again.hash != outcome.hash) {
                    true => Err("it does not do the same twice".to_owned()),
                    false => Ok(outcome),
                }
            });
            match result {
                Ok(outcome) => {
                    let mut sums = sums.lock().unwrap();
                    for (kind, number) in outcome.fired {
                        *sums.entry(kind).or_default() += number;
                    }
                }
                Err(why) => drop(failed.lock().unwrap().get_or_insert((seed, why))),
            }
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..cores).for_each(|_| drop(scope.spawn(work))));
    if let Some((seed, why)) = failed.into_inner().unwrap() {
        panic!("{}", show(seed, &why));
    }
    let sums = sums.into_inner().unwrap();
    println!("{count} seeds from {first} on: {sums:?}");
    for kind in Kind::ALL {
        assert!(sums.get(&kind).is_some_and(|number| *number > 0), "{kind:?} never happened");
    }
}

#[test]
fn there_are_never_two_active_worlds() {
    check_seeds(from_env(FIRST_SEED).unwrap_or(1), from_env(NUM_SEEDS).unwrap_or(200));
}

#[test]
fn a_seed_does_the_same_again_and_another_does_not() {
    let hash = |seed| run(seed, false).unwrap().hash;
    assert_eq!(hash(5), hash(5));
    assert_ne!(hash(5), hash(6));
}

/// A coordinator that is away says nothing of the ranks: they go on to the end.
#[test]
fn an_hour_without_a_coordinator_costs_no_restart() {
    for seed in 1..=3 {
        let mut world = World::without_faults(seed, false);
        let (away, loses) = (Duration::from_secs(3600), seed % 2 == 0);
        world.plan(Duration::from_secs(20), Fault::KillHead { away, loses });
        let outcome = world.run().unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        assert_eq!(outcome.fired.get(&Kind::HeadKilled), Some(&1), "the fault must fire");
        assert_eq!(outcome.generations, [1], "seed {seed}");
    }
}
