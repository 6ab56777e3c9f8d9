//! Context parallelism: each rank holds a part of every sequence (Llama 3 paper, section 3.3.2).
//!
//! A sequence is cut in 2 C chunks for C ranks, and rank i takes chunks i and 2 C - 1 - i, so that
//! all have as much causal attention to compute. Keys and values of all tokens are gathered (in the
//! backward pass their gradients reduce-scattered), because with few key and value heads they are
//! small, and because it is exact with any mask of documents.
//!
//! Shapes: `B` batch, `H` query heads, `K` key and value heads, `S` whole sequence, `s` this rank's
//! part, `E` head_dim.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use collectives::Communicator;
use model::Qkv;
use torch_shim::fused::{self, Documents};
use torch_shim::tch::Tensor;
use torch_shim::{Result as ShimResult, autograd};

use crate::failure::Failure;
use crate::slices::{begin_gather, begin_scatter};
use crate::tensor::{input, one};

/// The dimension of tokens in keys and values that are stacked.
const SEQUENCE: i64 = 3;

/// One rank's end of a context-parallel group.
#[derive(Clone)]
pub(crate) struct ContextGroup {
    pub(crate) comm: Arc<dyn Communicator>,
    pub(crate) failure: Failure,
    pub(crate) masks: Masks,
}

/// Queries and keys of a mask.
type MaskShape = (i64, i64);

/// Masks of queries at the end of a span of keys, added to the scores: as large as a chunk times
/// its span. At hand are those that the last attention read, and no others: the blocks of a pass
/// come one after another and share them, and so do all micro-batches where documents do not
/// matter. A graph keeps those that it reads in its backward pass.
#[derive(Clone, Default)]
pub(crate) struct Masks(Arc<Mutex<HashMap<MaskShape, Tensor>>>);

impl Masks {
    /// Drops all others, before those of `shapes` that are missing are made.
    fn keep_only(&self, shapes: &HashSet<MaskShape>) {
        let mut masks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        masks.retain(|shape, _| shapes.contains(shape));
    }

    /// That of the last `queries` of `length` tokens, of the kind of `like`.
    fn get(&self, (queries, length): MaskShape, like: &Tensor) -> ShimResult<Tensor> {
        let mut masks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mask) = masks.get(&(queries, length)) {
            return Ok(mask.shallow_clone());
        }
        let options = (like.kind(), like.device());
        let mut never = Tensor::f_full([queries, length], f64::NEG_INFINITY, options)?;
        let mask = never.f_triu_(length - queries + 1)?;
        masks.insert((queries, length), mask.shallow_clone());
        Ok(mask)
    }
}

/// Queries of a chunk, and the span of keys at whose end they are.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Tail {
    /// Where they are in the chunk.
    queries: Range<i64>,
    /// The tokens that the last of them reads, in the sequence.
    span: Range<i64>,
}

impl Tail {
    /// The queries of `chunk` within `document`, if there are any.
    fn new(chunk: &Range<i64>, document: &Range<i64>) -> Option<Self> {
        let (from, to) = (document.start.max(chunk.start), document.end.min(chunk.end));
        let queries = from - chunk.start..to - chunk.start;
        (from < to).then_some(Self { queries, span: document.start..to })
    }

    fn num_queries(&self) -> i64 {
        self.queries.end - self.queries.start
    }

    fn length(&self) -> i64 {
        self.span.end - self.span.start
    }

    /// The mask that it needs; queries that are their own keys are plain causal attention.
    fn mask(&self) -> Option<MaskShape> {
        (self.num_queries() < self.length()).then(|| (self.num_queries(), self.length()))
    }
}

/// The queries of `chunk` in each row of the batch; of all rows at once where each is one document.
fn tails(chunk: &Range<usize>, documents: &Documents) -> Vec<Vec<Tail>> {
    let chunk = chunk.start as i64..chunk.end as i64;
    if documents.is_causal() {
        return vec![Tail::new(&chunk, &(0..chunk.end)).into_iter().collect()];
    }
    let of_row = |lengths: &Vec<i64>| {
        let mut end = 0;
        let documents = lengths.iter().map(|length| {
            end += length;
            end - length..end
        });
        documents.filter_map(|document| Tail::new(&chunk, &document)).collect()
    };
    documents.rows().iter().map(of_row).collect()
}

/// The two chunks of a sequence that a context-parallel rank holds; all of it with one rank.
pub fn chunks(sequence: usize, rank: usize, ranks: usize) -> Vec<Range<usize>> {
    if ranks == 1 {
        return std::iter::once(0..sequence).collect();
    }
    let length = sequence / (2 * ranks);
    [rank, 2 * ranks - 1 - rank].map(|chunk| chunk * length..(chunk + 1) * length).to_vec()
}

impl ContextGroup {
    /// Causal attention within documents of this rank's queries to all keys: `[B, s, H E]`.
    pub(crate) fn attention(&self, qkv: &Qkv, documents: &Documents) -> ShimResult<Tensor> {
        let ranks = self.comm.size();
        let own = qkv.query_BHSE.size()[2] as usize;
        let sequence = own * ranks;
        let all = self.gather(&Tensor::f_stack(&[&qkv.key_BKSE, &qkv.value_BKSE], 0)?)?;
        let (keys, values) = (all.f_select(0, 0)?, all.f_select(0, 1)?);
        let chunks = chunks(sequence, self.comm.rank(), ranks);
        let tails: Vec<_> = chunks.iter().map(|chunk| tails(chunk, documents)).collect();
        self.masks.keep_only(&tails.iter().flatten().flatten().filter_map(Tail::mask).collect());
        let mut parts = Vec::with_capacity(chunks.len());
        let mut at = 0;
        for (chunk, tails) in chunks.iter().zip(&tails) {
            let query = qkv.query_BHSE.f_narrow(2, at as i64, chunk.len() as i64)?;
            at += chunk.len();
            parts.push(attend_chunk(&query, (&keys, &values), tails, &self.masks)?);
        }
        let mixed_BHsE = Tensor::f_cat(&parts, 2)?;
        Ok(mixed_BHsE.f_transpose(1, 2)?.f_flatten(2, -1)?)
    }

    /// Keys and values of all tokens, in their order, of those of this rank.
    fn gather(&self, x: &Tensor) -> ShimResult<Tensor> {
        let group = self.clone();
        let forward = move |inputs: &[Option<Tensor>]| {
            let x = input(inputs, 0)?;
            let pieces =
                begin_gather(group.comm.as_ref(), &group.failure, x, SEQUENCE)?.finish()?;
            Ok(vec![reorder(&pieces, &place_of_chunks(group.comm.size()))?])
        };
        let group = self.clone();
        let backward = move |gradients: &[Option<Tensor>]| {
            let order = chunks_by_rank(group.comm.size());
            let by_rank = reorder(input(gradients, 0)?, &order)?;
            let scattering =
                begin_scatter(group.comm.as_ref(), &group.failure, &by_rank, SEQUENCE)?;
            Ok(vec![Some(scattering.finish()?)])
        };
        one(autograd::apply(&[x], 1, forward, backward)?)
    }
}

/// Which chunks the ranks hold, one rank after another.
fn chunks_by_rank(ranks: usize) -> Vec<usize> {
    (0..ranks).flat_map(|rank| [rank, 2 * ranks - 1 - rank]).collect()
}

/// Where in [`chunks_by_rank`] each chunk of the sequence is.
fn place_of_chunks(ranks: usize) -> Vec<usize> {
    let held = chunks_by_rank(ranks);
    let mut places = vec![0; held.len()];
    for (place, chunk) in held.into_iter().enumerate() {
        places[chunk] = place;
    }
    places
}

/// The chunks of the sequence dimension in another order.
fn reorder(x: &Tensor, order: &[usize]) -> ShimResult<Tensor> {
    let chunks = x.f_chunk(order.len() as i64, SEQUENCE)?;
    let ordered: Vec<&Tensor> = order.iter().map(|&chunk| &chunks[chunk]).collect();
    Ok(Tensor::f_cat(&ordered, SEQUENCE)?)
}

/// Attention of the queries of a chunk: `[B, H, chunk, E]`. `tails` are theirs, by row, or those of
/// all rows at once.
fn attend_chunk(
    query: &Tensor,
    (keys, values): (&Tensor, &Tensor),
    tails: &[Vec<Tail>],
    masks: &Masks,
) -> ShimResult<Tensor> {
    if let [all_rows] = tails
        && let [tail] = all_rows.as_slice()
    {
        return attend_tail(query, (keys, values), tail, masks);
    }
    let mut rows = Vec::with_capacity(tails.len());
    for (row, tails) in (0..).zip(tails) {
        let of_row = |x: &Tensor| x.f_narrow(0, row, 1);
        let (query, keys, values) = (of_row(query)?, of_row(keys)?, of_row(values)?);
        let mut parts = Vec::with_capacity(tails.len());
        for tail in tails {
            let own = query.f_narrow(2, tail.queries.start, tail.num_queries())?;
            parts.push(attend_tail(&own, (&keys, &values), tail, masks)?);
        }
        rows.push(Tensor::f_cat(&parts, 2)?);
    }
    Ok(Tensor::f_cat(&rows, 0)?)
}

/// Attention of queries that are the last tokens of their span, each to those of the span up to
/// itself: `[B, H, queries, E]`.
fn attend_tail(
    query: &Tensor,
    (keys, values): (&Tensor, &Tensor),
    tail: &Tail,
    masks: &Masks,
) -> ShimResult<Tensor> {
    let of_span = |x: &Tensor| x.f_narrow(2, tail.span.start, tail.length());
    let (keys, values) = (of_span(keys)?, of_span(values)?);
    let Some(shape) = tail.mask() else {
        let [batch, heads, queries, head_dim] = [0, 1, 2, 3].map(|dim| query.size()[dim]);
        let mixed = fused::attention(query, &keys, &values, &Documents::causal())?;
        return Ok(mixed.f_view([batch, queries, heads, head_dim])?.f_transpose(1, 2)?);
    };
    let mask = masks.get(shape, query)?;
    let grouped = query.size()[1] != keys.size()[1];
    Ok(Tensor::f_scaled_dot_product_attention(
        query,
        &keys,
        &values,
        Some(&mask),
        0.0,
        false,
        None,
        grouped,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use torch_shim::tch::{Device, Kind};

    #[test]
    fn chunks_cover_a_sequence_once_with_equal_work() {
        for ranks in 1..6 {
            let sequence = 60 * ranks;
            let mut seen = vec![0; sequence];
            let mut works = Vec::new();
            for rank in 0..ranks {
                let held = chunks(sequence, rank, ranks);
                // Causal attention: a token reads as many as are before it, and itself.
                works.push(held.iter().flat_map(Clone::clone).map(|at| at + 1).sum::<usize>());
                held.into_iter().flatten().for_each(|at| seen[at] += 1);
            }
            assert!(seen.iter().all(|&count| count == 1));
            assert!(works.iter().all(|work| *work == works[0]), "{works:?}");
        }
        assert_eq!(chunks(16, 1, 2), [4..8, 8..12]);
    }

    #[test]
    fn tails_of_a_chunk() {
        let check = |documents: Vec<Vec<i64>>, expected: &[&[(Range<i64>, Range<i64>)]]| {
            let found = tails(&(4..8), &Documents::from_lengths(documents));
            let tail = |(queries, span): &(Range<i64>, Range<i64>)| Tail {
                queries: queries.clone(),
                span: span.clone(),
            };
            let expected: Vec<Vec<Tail>> =
                expected.iter().map(|row| row.iter().map(tail).collect()).collect();
            assert_eq!(found, expected);
        };
        check(vec![vec![12]], &[&[(0..4, 0..8)]]);
        check(vec![vec![4, 8], vec![3, 3, 6]], &[&[(0..4, 4..8)], &[(0..2, 3..6), (2..4, 6..8)]]);
        check(vec![vec![2, 3, 7], vec![12]], &[&[(0..1, 2..5), (1..4, 5..8)], &[(0..4, 0..8)]]);
    }

    #[test]
    fn masks_at_hand_are_those_of_the_last_attention() {
        let masks = Masks::default();
        let like = Tensor::zeros([1], (Kind::Double, Device::Cpu));
        let get = |shape| masks.get(shape, &like).unwrap();
        let at_hand = || masks.0.lock().unwrap().len();
        let never = f64::NEG_INFINITY;
        let expected = Tensor::from_slice2(&[[0.0, 0.0, never], [0.0, 0.0, 0.0]]);
        assert!(get((2, 3)).equal(&expected));
        let first = get((2, 3)).data_ptr();
        for length in 4..100 {
            masks.keep_only(&HashSet::from([(2, 3), (2, length)]));
            assert_eq!(get((2, length)).size(), [2, length]);
            assert_eq!(at_hand(), 2);
        }
        assert_eq!(get((2, 3)).data_ptr(), first);
        masks.keep_only(&HashSet::new());
        assert_eq!(at_hand(), 0);
    }

    #[test]
    fn places_and_chunks_are_each_others_inverse() {
        for ranks in 1..6 {
            let places = place_of_chunks(ranks);
            let held = chunks_by_rank(ranks);
            assert!((0..2 * ranks).all(|chunk| held[places[chunk]] == chunk));
        }
    }
}
