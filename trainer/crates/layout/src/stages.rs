//! Which blocks each chunk of the model holds, and on which pipeline stage the chunk lies.

use std::ops::Range;

/// One chunk of the model: consecutive blocks that one stage runs as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkSpan {
    /// Pipeline stage that holds the chunk.
    pub stage: usize,
    /// Number of the chunk on its stage.
    pub virtual_stage: usize,
    /// Whether the chunk begins with the embedding.
    pub embedding: bool,
    /// Blocks of the chunk.
    pub blocks: Range<usize>,
    /// Whether the chunk ends with the last norm and the output head.
    pub head: bool,
}

/// The chunks of a model of `layers` blocks, in the order in which a token passes them: chunk c
/// lies on stage c % `stages`, as its virtual stage c / `stages`. None where there is no stage.
///
/// Blocks that are left over go to the middle chunks: the first has the embedding besides and the
/// last the head. Where all chunks but one get one more, the last has the fewer blocks. Llama 3
/// 405B has 126 blocks on 16 stages: 7, 14 times 8, and 7 (Llama team 2024, arXiv 2407.21783,
/// section 3.3.2).
pub fn chunks(layers: usize, stages: usize, virtual_stages: usize) -> Vec<ChunkSpan> {
    let num_chunks = stages.saturating_mul(virtual_stages);
    if num_chunks == 0 {
        return Vec::new();
    }
    let (base, left_over) = (layers / num_chunks, layers % num_chunks);
    let first_larger = (num_chunks - left_over) / 2;
    let larger = first_larger..first_larger + left_over;
    let mut next = 0;
    let chunk = |index: usize| {
        let first = next;
        next += base + usize::from(larger.contains(&index));
        ChunkSpan {
            stage: index % stages,
            virtual_stage: index / stages,
            embedding: index == 0,
            blocks: first..next,
            head: index + 1 == num_chunks,
        }
    };
    (0..num_chunks).map(chunk).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(layers: usize, stages: usize, virtual_stages: usize, blocks: &[usize]) {
        let chunks = chunks(layers, stages, virtual_stages);
        let found: Vec<usize> = chunks.iter().map(|chunk| chunk.blocks.len()).collect();
        assert_eq!(found, blocks, "{layers} layers, {stages} x {virtual_stages}");
    }

    #[test]
    fn left_over_blocks_go_to_the_middle() {
        check(32, 4, 1, &[8, 8, 8, 8]);
        check(126, 16, 1, &[7, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 7]);
        check(6, 4, 1, &[1, 2, 2, 1]);
        check(6, 2, 2, &[1, 2, 2, 1]);
        check(7, 2, 2, &[2, 2, 2, 1]);
        check(5, 4, 1, &[1, 2, 1, 1]);
        check(1, 3, 1, &[0, 1, 0]);
        check(3, 1, 1, &[3]);
        check(3, 0, 2, &[]);
        check(3, 2, 0, &[]);
    }

    #[test]
    fn chunks_go_round_the_stages() {
        let chunk = |stage, virtual_stage, blocks, embedding, head| ChunkSpan {
            stage,
            virtual_stage,
            embedding,
            blocks,
            head,
        };
        let expected = [
            chunk(0, 0, 0..2, true, false),
            chunk(1, 0, 2..5, false, false),
            chunk(0, 1, 5..8, false, false),
            chunk(1, 1, 8..10, false, true),
        ];
        assert_eq!(chunks(10, 2, 2), expected);
        assert_eq!(chunks(3, 1, 1), [chunk(0, 0, 0..3, true, true)]);
    }

    /// Every block once and in order, sizes at most one apart, no end larger than a middle chunk.
    #[test]
    fn every_split_is_whole_and_even() {
        for (layers, stages, virtual_stages) in (0..40).flat_map(|layers| {
            (1..=8)
                .flat_map(move |p| (1..=4).map(move |virtual_stages| (layers, p, virtual_stages)))
        }) {
            let chunks = chunks(layers, stages, virtual_stages);
            assert_eq!(chunks.len(), stages * virtual_stages);
            let blocks: Vec<usize> = chunks.iter().flat_map(|chunk| chunk.blocks.clone()).collect();
            assert_eq!(blocks, (0..layers).collect::<Vec<_>>());
            let sizes: Vec<usize> = chunks.iter().map(|chunk| chunk.blocks.len()).collect();
            let (least, most) = (layers / chunks.len(), layers.div_ceil(chunks.len()));
            assert!(sizes.iter().all(|size| (least..=most).contains(size)), "{sizes:?}");
            assert!(sizes.last() == Some(&least), "{sizes:?}");
            let num_larger = sizes.iter().filter(|size| **size > least).count();
            assert!(num_larger + 1 >= sizes.len() || sizes[0] == least, "{sizes:?}");
        }
    }
}
