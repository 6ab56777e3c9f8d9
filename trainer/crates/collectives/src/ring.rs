//! The algorithms, on top of messages. Large tensors go round a ring (each rank sends `2 (n - 1) /
//! n` of an all-reduced tensor, the least possible, and `(n - 1) / n` of a reduce-scattered one);
//! small ones go to every rank at once, in one hop. The order of summation is fixed by the group's
//! size: ring order, or rank order.

use layout::communication::SMALL_BYTES;
use torch_shim::reduce::{self, Combine};
use torch_shim::tch::{Kind, Tensor};

use crate::ReduceOp;
use crate::error::Result;

/// The messages of one operation.
pub(crate) trait Exchange {
    fn rank(&self) -> usize;
    fn size(&self) -> usize;

    /// Sends and receives at once: `outgoing` to its peers and `incoming` from theirs. Empty
    /// tensors do not travel.
    fn exchange(&self, outgoing: &[(Tensor, usize)], incoming: &[(Tensor, usize)]) -> Result<()>;
}

fn combine(op: ReduceOp) -> Combine {
    match op {
        ReduceOp::Sum | ReduceOp::Avg => Combine::Sum,
        ReduceOp::Min => Combine::Min,
        ReduceOp::Max => Combine::Max,
    }
}

fn finish(tensor: &Tensor, op: ReduceOp, size: usize) -> Result<()> {
    if op == ReduceOp::Avg {
        reduce::divide(tensor, size as f64)?;
    }
    Ok(())
}

fn bytes(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

/// The `index`-th of `size` pieces, as equal as they can be.
fn piece(flat: &Tensor, index: usize, size: usize) -> Result<Tensor> {
    let numel = flat.numel();
    let start = numel * index / size;
    let end = numel * (index + 1) / size;
    Ok(flat.f_narrow(0, start as i64, (end - start) as i64)?)
}

fn flat(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.f_detach()?.f_view([-1i64])?)
}

pub(crate) fn all_reduce(ranks: &impl Exchange, tensor: &Tensor, op: ReduceOp) -> Result<()> {
    let (rank, size) = (ranks.rank(), ranks.size());
    let tensor = flat(tensor)?;
    if size > 1 && bytes(&tensor) <= SMALL_BYTES {
        return all_reduce_small(ranks, &tensor, op);
    }
    for step in 0..size - 1 {
        let outgoing = piece(&tensor, (rank + 2 * size - 1 - step) % size, size)?;
        let own = piece(&tensor, (rank + 2 * size - 2 - step) % size, size)?;
        let incoming = own.f_empty_like()?;
        pass(ranks, &outgoing, &incoming)?;
        reduce::combine(&own, &incoming, combine(op))?;
    }
    finish(&piece(&tensor, rank, size)?, op, size)?;
    for step in 0..size - 1 {
        let outgoing = piece(&tensor, (rank + size - step) % size, size)?;
        let incoming = piece(&tensor, (rank + 2 * size - 1 - step) % size, size)?;
        pass(ranks, &outgoing, &incoming)?;
    }
    Ok(())
}

fn all_reduce_small(ranks: &impl Exchange, tensor: &Tensor, op: ReduceOp) -> Result<()> {
    let (rank, size) = (ranks.rank(), ranks.size());
    let mut parts = Vec::with_capacity(size);
    for _ in 0..size {
        parts.push(tensor.f_empty_like()?);
    }
    reduce::copy(&parts[rank], tensor)?;
    let peers = || (0..size).filter(|&peer| peer != rank);
    let outgoing: Vec<_> = peers().map(|peer| (parts[rank].shallow_clone(), peer)).collect();
    let incoming: Vec<_> = peers().map(|peer| (parts[peer].shallow_clone(), peer)).collect();
    ranks.exchange(&outgoing, &incoming)?;
    reduce::copy(tensor, &parts[0])?;
    for part in &parts[1..] {
        reduce::combine(tensor, part, combine(op))?;
    }
    finish(tensor, op, size)
}

/// One step of a ring: to the right neighbour, from the left one.
fn pass(ranks: &impl Exchange, outgoing: &Tensor, incoming: &Tensor) -> Result<()> {
    let (rank, size) = (ranks.rank(), ranks.size());
    let (right, left) = ((rank + 1) % size, (rank + size - 1) % size);
    ranks.exchange(&[(outgoing.shallow_clone(), right)], &[(incoming.shallow_clone(), left)])
}

pub(crate) fn reduce_scatter(
    ranks: &impl Exchange,
    output: &Tensor,
    input: &Tensor,
    op: ReduceOp,
) -> Result<()> {
    let (rank, size) = (ranks.rank(), ranks.size());
    let (output, input) = (flat(output)?, flat(input)?);
    let mut passing = piece(&input, (rank + size - 1) % size, size)?;
    for step in 0..size - 1 {
        let incoming = output.f_empty_like()?;
        pass(ranks, &passing, &incoming)?;
        let own = piece(&input, (rank + 2 * size - 2 - step) % size, size)?;
        reduce::combine(&incoming, &own, combine(op))?;
        passing = incoming;
    }
    reduce::copy(&output, &passing)?;
    finish(&output, op, size)
}

pub(crate) fn all_gather(ranks: &impl Exchange, output: &Tensor, input: &Tensor) -> Result<()> {
    let (rank, size) = (ranks.rank(), ranks.size());
    let (output, input) = (flat(output)?, flat(input)?);
    reduce::copy(&piece(&output, rank, size)?, &input)?;
    for step in 0..size - 1 {
        let outgoing = piece(&output, (rank + size - step) % size, size)?;
        let incoming = piece(&output, (rank + 2 * size - 1 - step) % size, size)?;
        pass(ranks, &outgoing, &incoming)?;
    }
    Ok(())
}

/// Down a binomial tree: the number of ranks that hold the tensor doubles with each step.
pub(crate) fn broadcast(ranks: &impl Exchange, tensor: &Tensor, root: usize) -> Result<()> {
    let (size, tensor) = (ranks.size(), flat(tensor)?);
    let place = (ranks.rank() + size - root) % size;
    let mut reach = 1;
    while reach < size {
        if place < reach && place + reach < size {
            ranks.exchange(&[(tensor.shallow_clone(), (place + reach + root) % size)], &[])?;
        } else if (reach..2 * reach).contains(&place) {
            ranks.exchange(&[], &[(tensor.shallow_clone(), (place - reach + root) % size)])?;
        }
        reach *= 2;
    }
    Ok(())
}

pub(crate) fn all_to_all(ranks: &impl Exchange, output: &Tensor, input: &Tensor) -> Result<()> {
    let (rank, size) = (ranks.rank(), ranks.size());
    let (output, input) = (flat(output)?, flat(input)?);
    reduce::copy(&piece(&output, rank, size)?, &piece(&input, rank, size)?)?;
    let (mut outgoing, mut incoming) = (Vec::new(), Vec::new());
    for distance in 1..size {
        let (to, from) = ((rank + distance) % size, (rank + size - distance) % size);
        outgoing.push((piece(&input, to, size)?, to));
        incoming.push((piece(&output, from, size)?, from));
    }
    ranks.exchange(&outgoing, &incoming)
}

pub(crate) fn barrier(ranks: &impl Exchange) -> Result<()> {
    let token = Tensor::f_zeros([1], (Kind::Int64, torch_shim::tch::Device::Cpu))?;
    all_reduce(ranks, &token, ReduceOp::Sum)
}
