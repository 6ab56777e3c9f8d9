//! The one suite that every backend passes: each rank runs it at the same time, on groups that a
//! closure connects.

use std::time::{Duration, Instant};

use torch_shim::tch::{Device, Kind, Tensor};

use crate::error::{CommError, Result};
use crate::{Communicator, Group, GroupOptions, ReduceOp, Work};

const KINDS: [Kind; 4] = [Kind::Float, Kind::BFloat16, Kind::Double, Kind::Int64];
/// Elements of a tensor: none, one, odd, and one that is far over the limit of a single hop.
const SIZES: [i64; 4] = [0, 1, 77, 40_000];

/// Connects this rank to a group with these options; all ranks call it with the same ones, in the
/// same order.
pub type Connect<'a> = dyn Fn(&GroupOptions) -> Result<Group> + 'a;

fn fail<T>(text: String) -> Result<T> {
    Err(CommError::Backend(format!("conformance: {text}")))
}

/// What rank `rank` brings: small whole numbers, exact in every dtype and in every order of
/// summation.
fn brings(rank: usize, count: i64, kind: Kind) -> Result<Tensor> {
    let place = Tensor::f_arange(count, (Kind::Int64, Device::Cpu))?;
    let value = (place * (rank as i64 + 1)).f_remainder(7)?;
    Ok(value.f_add_scalar(rank as i64)?.f_to_kind(kind)?)
}

/// [`brings`], where this group takes its tensors.
fn own(comm: &Group, rank: usize, count: i64, kind: Kind) -> Result<Tensor> {
    Ok(brings(rank, count, kind)?.f_to_device(comm.device())?)
}

fn check(what: &str, got: &Tensor, expected: &Tensor) -> Result<()> {
    let got = got.f_to_device(Device::Cpu)?;
    let expected = expected.f_to_device(Device::Cpu)?.f_to_kind(got.kind())?;
    if got.size() == expected.size() && got.f_equal(&expected)? {
        return Ok(());
    }
    fail(format!("{what} ({:?}, {:?}) is wrong", got.kind(), got.size()))
}

/// The reduction of what all ranks bring, in FP64.
fn reduced(size: usize, count: i64, op: ReduceOp) -> Result<Tensor> {
    let mut total = brings(0, count, Kind::Double)?;
    for rank in 1..size {
        let next = brings(rank, count, Kind::Double)?;
        total = match op {
            ReduceOp::Sum | ReduceOp::Avg => total.f_add(&next)?,
            ReduceOp::Min => total.f_minimum(&next)?,
            ReduceOp::Max => total.f_maximum(&next)?,
        };
    }
    Ok(if op == ReduceOp::Avg { total.f_div_scalar(size as f64)? } else { total })
}

/// Runs the whole suite on this rank. Other ranks of the same backend do so at the same time.
///
/// # Errors
/// The first thing that is not as it must be.
pub fn test_all(connect: &Connect<'_>) -> Result<()> {
    let comm = connect(&GroupOptions::new("all", 1))?;
    for kind in KINDS {
        for count in SIZES {
            reductions(&comm, kind, count)?;
            movements(&comm, kind, count)?;
            messages(&comm, kind, count)?;
        }
    }
    asynchronous(&comm)?;
    traffic(&comm)?;
    refusals(&comm)?;
    comm.barrier()?.wait()?;
    several_groups(connect)?;
    disagreement(connect)
}

fn reductions(comm: &Group, kind: Kind, count: i64) -> Result<()> {
    let (rank, size) = (comm.rank(), comm.size());
    for op in [ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Min, ReduceOp::Max] {
        if op == ReduceOp::Avg && kind == Kind::Int64 {
            continue;
        }
        let tensor = own(comm, rank, count, kind)?;
        comm.all_reduce(&tensor, op)?.wait()?;
        check(&format!("all_reduce {op:?}"), &tensor, &reduced(size, count, op)?)?;

        let input = own(comm, rank, count * size as i64, kind)?;
        let output = Tensor::f_zeros([count], (kind, comm.device()))?;
        comm.reduce_scatter(&output, &input, op)?.wait()?;
        let expected =
            reduced(size, count * size as i64, op)?.f_narrow(0, count * rank as i64, count)?;
        check(&format!("reduce_scatter {op:?}"), &output, &expected)?;
        check("the input of reduce_scatter", &input, &brings(rank, count * size as i64, kind)?)?;
    }
    Ok(())
}

fn movements(comm: &Group, kind: Kind, count: i64) -> Result<()> {
    let (rank, size) = (comm.rank(), comm.size());
    let of_all = |rank: usize| own(comm, rank, count, kind);
    let output = Tensor::f_zeros([count * size as i64], (kind, comm.device()))?;
    comm.all_gather(&output, &of_all(rank)?)?.wait()?;
    let expected: Vec<Tensor> = (0..size).map(of_all).collect::<Result<_>>()?;
    check("all_gather", &output, &Tensor::f_cat(&expected, 0)?)?;

    for root in 0..size {
        let tensor = of_all(rank)?;
        comm.broadcast(&tensor, root)?.wait()?;
        check("broadcast", &tensor, &of_all(root)?)?;
    }

    let input = own(comm, rank, count * size as i64, kind)?;
    comm.all_to_all(&output, &input)?.wait()?;
    let from = |peer: usize| -> Result<Tensor> {
        Ok(brings(peer, count * size as i64, kind)?.f_narrow(0, count * rank as i64, count)?)
    };
    let expected: Vec<Tensor> = (0..size).map(from).collect::<Result<_>>()?;
    check("all_to_all", &output, &Tensor::f_cat(&expected, 0)?)
}

/// Round the ring, two messages a tag, received in the order of sending.
fn messages(comm: &Group, kind: Kind, count: i64) -> Result<()> {
    let (rank, size) = (comm.rank(), comm.size());
    if size == 1 {
        return Ok(());
    }
    let (right, left) = ((rank + 1) % size, (rank + size - 1) % size);
    let (first, second) = (own(comm, rank, count, kind)?, own(comm, rank + 1, count, kind)?);
    let sent = [comm.send(&first, right, 7)?, comm.send(&second, right, 7)?];
    for expected in [own(comm, left, count, kind)?, own(comm, left + 1, count, kind)?] {
        let tensor = expected.f_zeros_like()?;
        comm.recv(&tensor, left, 7)?.wait()?;
        check("a message", &tensor, &expected)?;
    }
    // What the right one has taken is known to be through, without a wait: its tensor can go.
    comm.barrier()?.wait()?;
    let start = Instant::now();
    while !sent.iter().all(Work::is_done) {
        if start.elapsed() > Duration::from_secs(2) {
            return fail("messages that were taken are not done after 2 s".to_string());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    sent.into_iter().try_for_each(Work::wait)
}

/// Many operations under way at once end in the order of issue, each with its own result.
fn asynchronous(comm: &Group) -> Result<()> {
    let tensors: Vec<Tensor> =
        (1..=8).map(|n| own(comm, comm.rank(), n * 3001, Kind::Float)).collect::<Result<_>>()?;
    let works: Vec<Work> = tensors
        .iter()
        .map(|tensor| comm.all_reduce(tensor, ReduceOp::Sum))
        .collect::<Result<_>>()?;
    let mut works: Vec<Option<Work>> = works.into_iter().map(Some).collect();
    if let Some(last) = works.last_mut().and_then(Option::take) {
        last.wait()?;
    }
    if let Some(last) = tensors.last() {
        // On a GPU it is this reading that waits.
        let _ = last.f_sum(Kind::Double)?.f_double_value(&[])?;
    }
    for work in works.into_iter().flatten() {
        if !work.is_done() {
            return fail("a later operation ended before an earlier one".to_string());
        }
        work.wait()?;
    }
    for tensor in &tensors {
        let expected = reduced(comm.size(), tensor.numel() as i64, ReduceOp::Sum)?;
        check("an asynchronous all_reduce", tensor, &expected)?;
    }
    Ok(())
}

/// The bytes sent are the least possible.
fn traffic(comm: &Group) -> Result<()> {
    let size = comm.size() as u64;
    let piece = 10_000u64;
    let bytes = |run: &dyn Fn() -> Result<Work>| -> Result<u64> {
        let before = comm.bytes_sent();
        run()?.wait()?;
        Ok(comm.bytes_sent() - before)
    };
    let large = own(comm, comm.rank(), (piece * size) as i64, Kind::Float)?;
    let small = Tensor::f_zeros([piece as i64], (Kind::Float, comm.device()))?;
    let least = 4 * piece * (size - 1);
    let cases = [
        ("all_reduce", 2 * least, bytes(&|| comm.all_reduce(&large, ReduceOp::Sum))?),
        ("reduce_scatter", least, bytes(&|| comm.reduce_scatter(&small, &large, ReduceOp::Sum))?),
        ("all_gather", least, bytes(&|| comm.all_gather(&large, &small))?),
    ];
    for (name, expected, sent) in cases {
        if sent != expected {
            return fail(format!("{name} sent {sent} bytes where {expected} do"));
        }
    }
    Ok(())
}

/// What cannot be is refused at once, and the group lives on.
fn refusals(comm: &Group) -> Result<()> {
    let float = Tensor::f_zeros([6, 4], (Kind::Float, comm.device()))?;
    let whole = Tensor::f_zeros([6], (Kind::Int64, comm.device()))?;
    let half = Tensor::f_zeros([6], (Kind::Half, comm.device()))?;
    let refused = [
        comm.all_reduce(&float.f_transpose(0, 1)?, ReduceOp::Sum).is_err(),
        comm.all_reduce(&whole, ReduceOp::Avg).is_err(),
        comm.all_reduce(&half, ReduceOp::Sum).is_err(),
        comm.broadcast(&float, comm.size()).is_err(),
        comm.send(&float, comm.rank(), 0).is_err(),
        comm.recv(&float, comm.size(), 0).is_err(),
        comm.send(&float, 0, u32::MAX).is_err(),
        comm.all_gather(&float, &whole).is_err(),
        comm.size() > 1 && comm.all_gather(&float, &float).is_err() || comm.size() == 1,
    ];
    match refused.iter().position(|refused| !refused) {
        None => Ok(()),
        Some(case) => fail(format!("case {case} of the impossible operations was accepted")),
    }
}

/// Operations of several groups at once, issued in different orders, do not disturb each other.
fn several_groups(connect: &Connect<'_>) -> Result<()> {
    let groups: Vec<Group> = ["a", "b", "c"]
        .iter()
        .map(|name| connect(&GroupOptions::new(*name, 1)))
        .collect::<Result<_>>()?;
    let tensors: Vec<Tensor> = groups
        .iter()
        .map(|group| own(group, group.rank(), 9001, Kind::Double))
        .collect::<Result<_>>()?;
    let rank = groups.first().map_or(0, Group::rank);
    let mut works = Vec::new();
    for turn in 0..groups.len() {
        let index = (turn + rank) % groups.len();
        works.push(groups[index].all_reduce(&tensors[index], ReduceOp::Max)?);
    }
    works.into_iter().try_for_each(Work::wait)?;
    for (group, tensor) in groups.iter().zip(&tensors) {
        check("one of several groups", tensor, &reduced(group.size(), 9001, ReduceOp::Max)?)?;
    }
    Ok(())
}

/// Longest time until ranks that disagree know it; far below the groups' time-out.
const SOON: Duration = Duration::from_secs(5);

/// A group whose members have other numbers in the run.
fn renumbered(connect: &Connect<'_>, name: &str) -> Result<Group> {
    let in_run: Vec<usize> = (100..116).collect();
    connect(&GroupOptions::new(name, 1).of(&in_run))
}

/// The operation ends soon with an error that names who issued what, and the group is dead.
fn disagrees(comm: &Group, start: Instant, outcome: Result<()>, issued: &[&str]) -> Result<()> {
    let mut outcome = outcome;
    // On a GPU the host has not waited.
    while outcome.is_ok() && comm.device() != Device::Cpu && start.elapsed() < SOON {
        outcome = comm.alive();
        std::thread::sleep(Duration::from_millis(1));
    }
    let elapsed = start.elapsed();
    let text = outcome.map_or_else(|error| error.to_string(), |()| "no error".to_string());
    let names = text.contains("do not agree") && issued.iter().all(|part| text.contains(part));
    if !names || elapsed > SOON {
        return fail(format!("ranks disagreed: {text:?} after {} ms", elapsed.as_millis()));
    }
    match comm.barrier().and_then(Work::wait) {
        Err(CommError::Dead { .. }) => Ok(()),
        other => fail(format!("a dead group answered {other:?}")),
    }
}

/// Ranks that issue different operations, which each of them issues for the first time, or some of
/// them, or none.
fn disagreement(connect: &Connect<'_>) -> Result<()> {
    const OTHER: &str = "rank 101 issues all_reduce Sum Float [6]";
    let num_cases = 3;
    for known in 0..num_cases {
        let comm = renumbered(connect, &format!("disagreement-{known}"))?;
        if comm.size() == 1 {
            return Ok(());
        }
        // Messages of another length NCCL takes for what it expects.
        if known == 2 && comm.device() != Device::Cpu {
            continue;
        }
        for count in [5, 6].into_iter().take(known) {
            comm.all_reduce(&own(&comm, 0, count, Kind::Float)?, ReduceOp::Sum)?.wait()?;
        }
        let count = if comm.rank() == 1 { 6 } else { 5 };
        let tensor = own(&comm, comm.rank(), count, Kind::Float)?;
        let start = Instant::now();
        let outcome = comm.all_reduce(&tensor, ReduceOp::Sum)?.wait();
        disagrees(&comm, start, outcome, &[OTHER])?;
    }
    let comm = renumbered(connect, "disagreement-of-messages")?;
    let start = Instant::now();
    let barrier = || comm.barrier().and_then(Work::wait);
    let outcome = match comm.rank() {
        // Where a message can be through before it is taken, the next operation fails of it.
        0 => comm
            .send(&own(&comm, 0, 4, Kind::Float)?, 1, 7)
            .and_then(Work::wait)
            .and_then(|()| barrier()),
        1 => {
            // So that rank 0 comes first.
            std::thread::sleep(Duration::from_millis(200));
            comm.recv(&own(&comm, 1, 4, Kind::Double)?, 0, 7).and_then(Work::wait)
        }
        // Those whom it does not concern lose rank 1 by it, and are told why.
        _ => barrier(),
    };
    disagrees(&comm, start, outcome, &["rank 100 sends Float [4], rank 101 takes Double [4]"])
}

/// Ranks that wait for each other in different groups are told so soon, each of them, with who
/// waits where. A rank that is late is not accused, whatever it has under way. The groups of
/// `connect` share a [`crate::Whereabouts`].
///
/// # Errors
/// The first thing that is not as it must be.
pub fn test_elsewhere(connect: &Connect<'_>) -> Result<()> {
    late(connect)?;
    let pair = |name: &str| -> Result<[Group; 2]> {
        let other = format!("{name}-other");
        Ok([connect(&GroupOptions::new(name, 1))?, connect(&GroupOptions::new(other, 1))?])
    };
    // Rank 0 waits in the first, all others in the second. In the end both are dead, everywhere.
    let check = |[first, second]: &[Group; 2], start, outcome, waits: &[&str]| {
        let (here, there) = if first.rank() == 0 { (first, second) } else { (second, first) };
        disagrees(here, start, outcome, waits)?;
        match there.alive() {
            Err(CommError::Dead { .. }) => Ok(()),
            other => fail(format!("a rank that waited elsewhere goes on: {other:?}")),
        }
    };
    let groups = pair("elsewhere")?;
    let [first, second] = &groups;
    let (start, tensor) = (Instant::now(), own(first, 0, 5, Kind::Float)?);
    let outcome = match first.rank() {
        0 => first.all_reduce(&tensor, ReduceOp::Sum).and_then(Work::wait),
        _ => second.barrier().and_then(Work::wait),
    };
    let waits = [
        "rank 0 waits in operation 0 (all_reduce Sum Float [5]) of group elsewhere, which rank",
        "waits in operation 0 (barrier) of group elsewhere-other, which rank 0 has not issued",
    ];
    check(&groups, start, outcome, &waits)?;

    let groups = pair("elsewhere-message")?;
    let [first, second] = &groups;
    let start = Instant::now();
    let outcome = match first.rank() {
        0 => first.recv(&tensor, 1, 3).and_then(Work::wait),
        _ => second.barrier().and_then(Work::wait),
    };
    let waits = [
        "rank 0 waits in the receive of message 0 with tag 3 from rank 1 of group \
         elsewhere-message, which rank 1 has not issued",
        "rank 1 waits in operation 0 (barrier) of group elsewhere-message-other, which rank 0 has \
         not issued",
    ];
    check(&groups, start, outcome, &waits)
}

/// Rank 1 has an operation under way in one group, and is slow before it comes to another, in which
/// the others wait for it meanwhile.
fn late(connect: &Connect<'_>) -> Result<()> {
    /// Longer than ranks wait before they look for each other, twice.
    const SLOW: Duration = Duration::from_millis(2500);
    let first = connect(&GroupOptions::new("late", 1))?;
    let second = connect(&GroupOptions::new("late-second", 1))?;
    let tensors = [own(&first, first.rank(), 5, Kind::Float)?, own(&second, 0, 5, Kind::Float)?];
    let begin = || second.all_reduce(&tensors[1], ReduceOp::Max);
    let ahead = if first.rank() == 1 { Some(begin()?) } else { None };
    if ahead.is_some() {
        std::thread::sleep(SLOW);
    }
    first.all_reduce(&tensors[0], ReduceOp::Sum)?.wait()?;
    ahead.map_or_else(begin, Ok)?.wait()?;
    check("a sum with a rank that is late", &tensors[0], &reduced(first.size(), 5, ReduceOp::Sum)?)
}

/// The last rank dies (`die` must not return on it, or drops what is its) after some rounds; every
/// other rank must get an error within a second.
///
/// # Errors
/// When a survivor notices nothing, or too late.
pub fn test_death(comm: Group, die: impl FnOnce(Group)) -> Result<()> {
    let tensor = Tensor::f_ones([200_000], (Kind::Float, comm.device()))?;
    for _round in 0..3 {
        comm.all_reduce(&tensor, ReduceOp::Avg)?.wait()?;
    }
    if comm.rank() + 1 == comm.size() {
        die(comm);
        return Ok(());
    }
    let start = Instant::now();
    let outcome = comm.all_reduce(&tensor, ReduceOp::Avg).and_then(Work::wait);
    let elapsed = start.elapsed();
    match outcome {
        Err(CommError::Peer { .. }) if elapsed < Duration::from_secs(1) => Ok(()),
        other => fail(format!("a peer died: {other:?} after {} ms", elapsed.as_millis())),
    }
}

/// As [`test_death`], where half of the others wait for a message from the last rank, and half for
/// one to be taken by it: each says that it lost that one.
///
/// # Errors
/// When a survivor notices nothing, or too late, or says something else.
pub fn test_death_in_messages(comm: Group, die: impl FnOnce(Group)) -> Result<()> {
    let tensor = Tensor::f_ones([200_000], (Kind::Float, comm.device()))?;
    comm.all_reduce(&tensor, ReduceOp::Avg)?.wait()?;
    let last = comm.size() - 1;
    if comm.rank() == last {
        die(comm);
        return Ok(());
    }
    let start = Instant::now();
    let mut outcome = Ok(());
    let takes = comm.rank().is_multiple_of(2);
    if takes {
        outcome = comm.recv(&tensor, last, 1).and_then(Work::wait);
    }
    // One that is sent may be through before anybody takes it.
    while outcome.is_ok() && !takes && start.elapsed() < Duration::from_secs(1) {
        outcome = comm.send(&tensor, last, 1).and_then(Work::wait);
        std::thread::sleep(Duration::from_millis(10));
    }
    let elapsed = start.elapsed();
    match outcome {
        Err(CommError::Peer { peer, .. }) if peer == last && elapsed < Duration::from_secs(1) => {
            Ok(())
        }
        other => fail(format!("rank {last} died: {other:?} after {} ms", elapsed.as_millis())),
    }
}

/// Rank 1 of four or more stops altogether, and `stop` returns on it once it runs again, well after
/// `timeout`, which is the group's. A wait for its message, one for it to take a message, and a
/// collective end with the time-out, and say that it is rank 1 that did nothing.
///
/// # Errors
/// When a wait ends too early or too late, or says something else.
pub fn test_stall(comm: &Group, timeout: Duration, stop: impl FnOnce()) -> Result<()> {
    /// What a time-out may take beyond itself.
    const SLACK: Duration = Duration::from_secs(1);
    let tensor = Tensor::f_ones([300_000], (Kind::Float, comm.device()))?;
    comm.all_reduce(&tensor, ReduceOp::Sum)?.wait()?;
    if comm.rank() == 1 {
        stop();
        return Ok(());
    }
    let start = Instant::now();
    let outcome = match comm.rank() {
        0 => comm.recv(&tensor, 1, 1).and_then(Work::wait),
        3 => comm.send(&tensor, 1, 1).and_then(Work::wait),
        _ => comm.all_reduce(&tensor, ReduceOp::Sum).and_then(Work::wait),
    };
    let elapsed = start.elapsed();
    let text = outcome.map_or_else(|error| error.to_string(), |()| "no error".to_string());
    let did_nothing = format!("nothing in {} ms", timeout.as_millis());
    let names = text.contains("lost rank 1: it ") && text.contains(&did_nothing);
    if !names || elapsed < timeout.mul_f64(0.9) || elapsed > timeout + SLACK {
        return fail(format!("rank 1 stopped: {text:?} after {} ms", elapsed.as_millis()));
    }
    Ok(())
}

/// Rank 0 aborts while the others wait for it: all end with an error within a second.
///
/// # Errors
/// When a rank notices nothing, or too late.
pub fn test_abort(comm: &Group) -> Result<()> {
    let tensor = Tensor::f_ones([100_000], (Kind::Float, comm.device()))?;
    comm.all_reduce(&tensor, ReduceOp::Sum)?.wait()?;
    if comm.rank() == 0 {
        std::thread::sleep(Duration::from_millis(100));
        comm.abort();
        return match comm.barrier() {
            Err(CommError::Dead { .. }) => Ok(()),
            _ => fail("an aborted group takes operations".to_string()),
        };
    }
    let start = Instant::now();
    let outcome = comm.all_reduce(&tensor, ReduceOp::Sum).and_then(Work::wait);
    match outcome {
        Err(_) if start.elapsed() < Duration::from_secs(1) => Ok(()),
        other => fail(format!("an abort: {other:?} after {} ms", start.elapsed().as_millis())),
    }
}
