//! Who writes what: tensors that several ranks hold are written once, in shares of nearly equal
//! size.

/// Tensors up to this size are not cut.
const SMALL: u64 = 1 << 20;

/// A tensor that all of a group's ranks hold whole.
#[derive(Clone, Copy, Debug)]
pub struct SharedTensor {
    /// Rows: the length of the first dimension (1 for a scalar).
    pub rows: u64,
    /// Bytes of one row.
    pub row_bytes: u64,
}

/// For each tensor the rows that `rank` of `world_size` writes, as (first, count).
///
/// The tensors make one line of bytes, cut in `world_size` equal stretches at row boundaries. All
/// ranks compute the same cuts, so that every row has exactly one writer.
pub fn rows_of_rank(tensors: &[SharedTensor], rank: usize, world_size: usize) -> Vec<(u64, u64)> {
    let total: u128 = tensors.iter().map(size).sum();
    let cut = |rank: usize| total * rank as u128 / world_size.max(1) as u128;
    let (low, high) = (cut(rank), cut(rank + 1));
    let mut start = 0u128;
    tensors
        .iter()
        .map(|tensor| {
            let size = size(tensor);
            let mine = if size <= u128::from(SMALL) || tensor.rows <= 1 {
                // Nothing lies at the last cut, so a tensor without bytes there is written by the
                // last.
                let middle = (start + size / 2).min(total.saturating_sub(1));
                let writer = (low..high).contains(&middle) || (total == 0 && rank == 0);
                if writer { (0, tensor.rows) } else { (0, 0) }
            } else {
                let row_at = |cut: u128| {
                    let row = cut.saturating_sub(start).div_ceil(u128::from(tensor.row_bytes));
                    row.min(u128::from(tensor.rows)) as u64
                };
                (row_at(low), row_at(high) - row_at(low))
            };
            start += size;
            mine
        })
        .collect()
}

fn size(tensor: &SharedTensor) -> u128 {
    u128::from(tensor.rows) * u128::from(tensor.row_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tensors(sizes: &[(u64, u64)]) -> Vec<SharedTensor> {
        sizes.iter().map(|&(rows, row_bytes)| SharedTensor { rows, row_bytes }).collect()
    }

    #[test]
    fn shares_are_balanced() {
        let tensors = tensors(&[(128_256, 8192), (4096, 8192), (1, 8192), (14_336, 8192)]);
        let total: u128 = tensors.iter().map(size).sum();
        for rank in 0..4 {
            let mine: u128 = rows_of_rank(&tensors, rank, 4)
                .iter()
                .zip(&tensors)
                .map(|(rows, tensor)| u128::from(rows.1) * u128::from(tensor.row_bytes))
                .sum();
            assert!(mine.abs_diff(total / 4) < 1 << 20, "rank {rank}: {mine} of {total}");
        }
    }

    proptest! {
        #[test]
        fn every_row_has_one_writer(
            sizes in prop::collection::vec((0u64..5000, 0u64..3000), 1..8), world in 1usize..9
        ) {
            let tensors = tensors(&sizes);
            let mut next = vec![0; tensors.len()];
            for rank in 0..world {
                for (index, (first, count)) in
                    rows_of_rank(&tensors, rank, world).into_iter().enumerate()
                {
                    if count > 0 {
                        prop_assert_eq!(first, next[index]);
                        next[index] += count;
                    }
                }
            }
            let rows: Vec<u64> = tensors.iter().map(|tensor| tensor.rows).collect();
            prop_assert_eq!(next, rows);
        }
    }
}
