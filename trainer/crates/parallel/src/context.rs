//! Context parallelism: each rank holds a part of every sequence (Llama 3 paper, section 3.3.2).
//!
//! A sequence is cut in 2 C chunks for C ranks, and rank i takes chunks i and 2 C - 1 - i, so that
//! all have as much causal attention to compute. Keys and values of all tokens are gathered (in the
//! backward pass their gradients reduce-scattered), because with few key and value heads they are
//! small, and because it is exact with any mask of documents.
//!
//! Shapes: `B` batch, `H` query heads, `K` key and value heads, `S` whole sequence, `s` this rank's
//! part, `E` head_dim.

use std::collections::HashMap;
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

/// Masks of queries at the end of a span of keys, added to the scores. They are as large as a chunk
/// times its span, and every graph keeps the one that it used, so all blocks share them.
#[derive(Clone, Default)]
pub(crate) struct Masks(Arc<Mutex<HashMap<(i64, i64), Tensor>>>);

impl Masks {
    /// Masks at hand; documents of other lengths want others with each batch.
    const LIMIT: usize = 16;

    /// That of the last `queries` of `length` tokens, of the kind of `like`.
    fn get(&self, queries: i64, length: i64, like: &Tensor) -> ShimResult<Tensor> {
        let mut masks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mask) = masks.get(&(queries, length)) {
            return Ok(mask.shallow_clone());
        }
        if masks.len() >= Self::LIMIT {
            masks.clear();
        }
        let options = (like.kind(), like.device());
        let never = Tensor::f_full([queries, length], f64::NEG_INFINITY, options)?;
        let mask = never.f_triu(length - queries + 1)?;
        masks.insert((queries, length), mask.shallow_clone());
        Ok(mask)
    }
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
        let mut parts = Vec::new();
        let mut at = 0;
        for chunk in chunks(sequence, self.comm.rank(), ranks) {
            let query = qkv.query_BHSE.f_narrow(2, at as i64, chunk.len() as i64)?;
            at += chunk.len();
            let keys_values = (&keys, &values);
            parts.push(attend_chunk(&query, keys_values, &chunk, documents, &self.masks)?);
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

/// Attention of the queries at `chunk` of the sequence: `[B, H, chunk, E]`.
fn attend_chunk(
    query: &Tensor,
    (keys, values): (&Tensor, &Tensor),
    chunk: &Range<usize>,
    documents: &Documents,
    masks: &Masks,
) -> ShimResult<Tensor> {
    let batch = query.size()[0];
    if documents.is_causal() {
        return attend_tail(query, (keys, values), 0..chunk.end as i64, masks);
    }
    let mut rows = Vec::with_capacity(batch as usize);
    for (row, lengths) in (0..).zip(documents.rows()) {
        let of_row = |x: &Tensor| x.f_narrow(0, row, 1);
        let (query, keys, values) = (of_row(query)?, of_row(keys)?, of_row(values)?);
        let mut parts = Vec::new();
        let mut start = 0;
        for &length in lengths {
            let document = start..start + length;
            start = document.end;
            let (from, to) =
                (document.start.max(chunk.start as i64), document.end.min(chunk.end as i64));
            if from < to {
                let own = query.f_narrow(2, from - chunk.start as i64, to - from)?;
                parts.push(attend_tail(&own, (&keys, &values), document.start..to, masks)?);
            }
        }
        rows.push(Tensor::f_cat(&parts, 2)?);
    }
    Ok(Tensor::f_cat(&rows, 0)?)
}

/// Attention of the last tokens of `span` of the sequence, as many as there are queries, each to
/// those of the span up to itself: `[B, H, queries, E]`.
fn attend_tail(
    query: &Tensor,
    (keys, values): (&Tensor, &Tensor),
    span: Range<i64>,
    masks: &Masks,
) -> ShimResult<Tensor> {
    let length = span.end - span.start;
    let queries = query.size()[2];
    let (keys, values) =
        (keys.f_narrow(2, span.start, length)?, values.f_narrow(2, span.start, length)?);
    if queries == length {
        let [batch, heads, _, head_dim] = [0, 1, 2, 3].map(|dim| query.size()[dim]);
        let mixed = fused::attention(query, &keys, &values, &Documents::causal())?;
        return Ok(mixed.f_view([batch, queries, heads, head_dim])?.f_transpose(1, 2)?);
    }
    let mask = masks.get(queries, length, query)?;
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
    fn places_and_chunks_are_each_others_inverse() {
        for ranks in 1..6 {
            let places = place_of_chunks(ranks);
            let held = chunks_by_rank(ranks);
            assert!((0..2 * ranks).all(|chunk| held[places[chunk]] == chunk));
        }
    }
}
