//! Boxes: axis-aligned parts of a tensor, and the arithmetic that makes a checkpoint independent of
//! any layout: intersection, copying, exact cover, and the boxes of a range of flat elements.

use serde::{Deserialize, Serialize};

/// Most dimensions a tensor may have.
pub const MAX_DIMS: usize = 8;

/// A part of a tensor: `lengths` elements along each dimension, from `offsets` on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TensorBox {
    /// First index along each dimension.
    pub offsets: Vec<u64>,
    /// Number of indices along each dimension.
    pub lengths: Vec<u64>,
}

impl TensorBox {
    /// The whole of a tensor of that shape.
    pub fn whole(shape: &[u64]) -> TensorBox {
        TensorBox { offsets: vec![0; shape.len()], lengths: shape.to_vec() }
    }

    /// Rows `start..start + count` (along the first dimension); a scalar has no rows and is whole.
    pub fn rows(shape: &[u64], start: u64, count: u64) -> TensorBox {
        let mut rows = TensorBox::whole(shape);
        if let (Some(offset), Some(length)) = (rows.offsets.first_mut(), rows.lengths.first_mut()) {
            *offset = start;
            *length = count;
        }
        rows
    }

    /// Number of elements; `None` where it is over 2^63.
    pub fn num_elements(&self) -> Option<u64> {
        num_elements(&self.lengths)
    }

    /// Whether it lies inside a tensor of that shape.
    pub fn fits(&self, shape: &[u64]) -> bool {
        self.offsets.len() == shape.len()
            && self.lengths.len() == shape.len()
            && self.ends().zip(shape).all(|(end, size)| end.is_some_and(|end| end <= *size))
    }

    /// The common part, where there is one that holds at least one element.
    pub fn intersect(&self, other: &TensorBox) -> Option<TensorBox> {
        if self.offsets.len() != other.offsets.len() {
            return None;
        }
        let mut common = TensorBox { offsets: Vec::new(), lengths: Vec::new() };
        for dim in 0..self.offsets.len() {
            let start = self.offsets[dim].max(other.offsets[dim]);
            let end = (self.offsets[dim].saturating_add(self.lengths[dim]))
                .min(other.offsets[dim].saturating_add(other.lengths[dim]));
            if end <= start {
                return None;
            }
            common.offsets.push(start);
            common.lengths.push(end - start);
        }
        Some(common)
    }

    fn ends(&self) -> impl Iterator<Item = Option<u64>> + '_ {
        self.offsets.iter().zip(&self.lengths).map(|(offset, length)| offset.checked_add(*length))
    }
}

/// Number of elements of a shape; `None` where it is over 2^63.
pub fn num_elements(shape: &[u64]) -> Option<u64> {
    let product = shape.iter().try_fold(1u64, |product, size| product.checked_mul(*size));
    product.filter(|product| *product <= 1 << 63)
}

/// The boxes that hold the flat (row-major) elements `start..start + count` of a tensor, in order.
///
/// A range that begins and ends inside rows needs at most `2 dims - 1` boxes. What lies outside the
/// tensor is left out.
pub fn boxes_of_flat_range(shape: &[u64], start: u64, count: u64) -> Vec<TensorBox> {
    let Some(total) = num_elements(shape) else { return Vec::new() };
    let end = start.saturating_add(count).min(total);
    let mut boxes = Vec::new();
    if start < end {
        flat_range(shape, &mut Vec::new(), start, end, &mut boxes);
    }
    boxes
}

/// `start..end`, not empty, within the sub-tensor of `shape` under the leading indices `prefix`.
fn flat_range(
    shape: &[u64],
    prefix: &mut Vec<u64>,
    start: u64,
    end: u64,
    out: &mut Vec<TensorBox>,
) {
    let push_rows = |prefix: &[u64], first: u64, count: u64, out: &mut Vec<TensorBox>| {
        let rows = TensorBox::rows(shape, first, count);
        out.push(TensorBox {
            offsets: [prefix, &rows.offsets].concat(),
            lengths: [vec![1; prefix.len()], rows.lengths].concat(),
        });
    };
    if shape.len() <= 1 {
        push_rows(prefix, start, end - start, out);
        return;
    }
    let row: u64 = shape[1..].iter().product();
    let mut within_row = |from: u64, to: u64, out: &mut Vec<TensorBox>| {
        let index = from / row;
        prefix.push(index);
        flat_range(&shape[1..], prefix, from - index * row, to - index * row, out);
        prefix.pop();
    };
    let mut at = start;
    if !at.is_multiple_of(row) {
        let stop = end.min(at.next_multiple_of(row));
        within_row(at, stop, out);
        at = stop;
    }
    let whole = (end - at) / row;
    let tail = at + whole * row;
    if tail < end {
        let mut last = Vec::new();
        within_row(tail, end, &mut last);
        if whole > 0 {
            push_rows(prefix, at / row, whole, out);
        }
        out.append(&mut last);
    } else if whole > 0 {
        push_rows(prefix, at / row, whole, out);
    }
}

/// Whether the boxes cover each element of a tensor of that shape exactly once.
///
/// # Errors
/// Says which box lies outside, which two overlap, or how many elements are left over.
pub fn check_exact_cover(shape: &[u64], boxes: &[&TensorBox]) -> Result<(), String> {
    let total = num_elements(shape).ok_or_else(|| format!("shape {shape:?} is too large"))?;
    let mut covered = 0u64;
    for part in boxes {
        if !part.fits(shape) {
            return Err(format!(
                "a box at {:?} of {:?} lies outside of shape {shape:?}",
                part.offsets, part.lengths
            ));
        }
        let volume = part.num_elements().ok_or("a box is too large")?;
        covered = covered.checked_add(volume).ok_or("the boxes are too large")?;
    }
    // Disjoint boxes inside the tensor that hold as many elements as it does cover it exactly.
    let mut order: Vec<&TensorBox> = boxes.iter().copied().filter(|b| !b.is_empty()).collect();
    order.sort_unstable();
    for (index, part) in order.iter().enumerate() {
        let end = part.offsets.first().map_or(1, |offset| offset + part.lengths[0]);
        for other in &order[index + 1..] {
            if other.offsets.first().copied().unwrap_or(0) >= end {
                break;
            }
            if part.intersect(other).is_some() {
                return Err(format!(
                    "boxes at {:?} of {:?} and at {:?} of {:?} overlap",
                    part.offsets, part.lengths, other.offsets, other.lengths
                ));
            }
        }
    }
    if covered != total {
        return Err(format!("{} of {total} elements are in no box", total - covered.min(total)));
    }
    Ok(())
}

impl TensorBox {
    fn is_empty(&self) -> bool {
        self.lengths.contains(&0)
    }
}

/// Copies `part` (which lies in both boxes) from `source`, the row-major elements of `source_box`,
/// to `target`, those of `target_box`.
///
/// # Errors
/// Says so where a buffer does not have its box's size or `part` is not in both.
pub fn copy_part(
    part: &TensorBox,
    (source, source_box): (&[u8], &TensorBox),
    (target, target_box): (&mut [u8], &TensorBox),
    element_size: usize,
) -> Result<(), String> {
    let bytes = |b: &TensorBox| b.num_elements().and_then(|n| n.checked_mul(element_size as u64));
    if bytes(source_box) != Some(source.len() as u64)
        || bytes(target_box) != Some(target.len() as u64)
    {
        return Err("a buffer does not have the size of its box".to_string());
    }
    let inside = |outer: &TensorBox| part.intersect(outer).as_ref() == Some(part);
    if !inside(source_box) || !inside(target_box) {
        return Err("the part to copy is not in both boxes".to_string());
    }
    // Trailing dimensions that the part spans in both boxes make one contiguous run.
    let dims = part.lengths.len();
    let spans = |dim: usize| {
        part.lengths[dim] == source_box.lengths[dim] && part.lengths[dim] == target_box.lengths[dim]
    };
    let mut outer = dims;
    while outer > 0 && spans(outer - 1) {
        outer -= 1;
    }
    // The dimension before them, whose indices are neighbours in both, joins the run.
    let outer = outer.saturating_sub(1);
    let run = part.lengths[outer..].iter().product::<u64>() as usize * element_size;
    let mut index = vec![0u64; outer];
    loop {
        let from = flat_offset(part, &index, source_box) * element_size;
        let to = flat_offset(part, &index, target_box) * element_size;
        target[to..to + run].copy_from_slice(&source[from..from + run]);
        if !advance(&mut index, &part.lengths) {
            return Ok(());
        }
    }
}

/// Element offset, within the row-major `container`, of the part's element at `index` (0 in the
/// dimensions that `index` does not have).
fn flat_offset(part: &TensorBox, index: &[u64], container: &TensorBox) -> usize {
    let mut flat = 0u64;
    for dim in 0..part.offsets.len() {
        let position = part.offsets[dim] + index.get(dim).copied().unwrap_or(0);
        flat = flat * container.lengths[dim] + (position - container.offsets[dim]);
    }
    flat as usize
}

/// The next index in row-major order; false after the last.
fn advance(index: &mut [u64], lengths: &[u64]) -> bool {
    for dim in (0..index.len()).rev() {
        index[dim] += 1;
        if index[dim] < lengths[dim] {
            return true;
        }
        index[dim] = 0;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn whole_bytes(shape: &[u64]) -> Vec<u8> {
        let count = num_elements(shape).unwrap();
        (0..count).flat_map(|i| (i as u16).to_le_bytes()).collect()
    }

    fn boxed(offsets: &[u64], lengths: &[u64]) -> TensorBox {
        TensorBox { offsets: offsets.to_vec(), lengths: lengths.to_vec() }
    }

    #[track_caller]
    fn check_cover(shape: &[u64], boxes: &[TensorBox], expected: Result<(), &str>) {
        let result = check_exact_cover(shape, &boxes.iter().collect::<Vec<_>>());
        match (result, expected) {
            (Ok(()), Ok(())) => {}
            (Err(found), Err(part)) => assert!(found.contains(part), "{found}"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn cover_finds_gaps_overlaps_and_strays() {
        check_cover(&[4, 3], &[boxed(&[0, 0], &[4, 3])], Ok(()));
        check_cover(&[4, 3], &[boxed(&[0, 0], &[2, 3]), boxed(&[2, 0], &[2, 3])], Ok(()));
        check_cover(&[], &[boxed(&[], &[])], Ok(()));
        check_cover(&[], &[], Err("1 of 1 elements are in no box"));
        check_cover(&[0, 3], &[], Ok(()));
        check_cover(&[4, 3], &[boxed(&[0, 0], &[3, 3])], Err("3 of 12 elements"));
        // As many elements as the tensor has, but one twice and one never.
        let twice = [boxed(&[0, 0], &[2, 3]), boxed(&[1, 0], &[2, 3])];
        check_cover(&[4, 3], &twice, Err("overlap"));
        check_cover(&[], &[boxed(&[], &[]), boxed(&[], &[])], Err("overlap"));
        check_cover(&[4, 3], &[boxed(&[2, 0], &[3, 3])], Err("outside"));
        check_cover(&[4, 3], &[boxed(&[u64::MAX, 0], &[2, 3])], Err("outside"));
        check_cover(&[u64::MAX, u64::MAX], &[], Err("too large"));
    }

    #[test]
    fn a_flat_range_is_few_boxes() {
        let expected =
            vec![boxed(&[0, 2], &[1, 1]), boxed(&[1, 0], &[2, 3]), boxed(&[3, 0], &[1, 1])];
        assert_eq!(boxes_of_flat_range(&[4, 3], 2, 8), expected);
        assert_eq!(boxes_of_flat_range(&[4, 3], 0, 12), vec![TensorBox::whole(&[4, 3])]);
        assert_eq!(boxes_of_flat_range(&[7], 2, 99), vec![boxed(&[2], &[5])]);
        assert!(boxes_of_flat_range(&[4, 3], 5, 0).is_empty());
    }

    proptest! {
        #[test]
        fn flat_ranges_hold_their_elements_in_order(
            shape in prop::collection::vec(1u64..5, 0..4), cut in 0u64..130, count in 0u64..130
        ) {
            let total = num_elements(&shape).unwrap();
            let start = cut.min(total);
            let boxes = boxes_of_flat_range(&shape, start, count);
            let bytes = whole_bytes(&shape);
            let whole = TensorBox::whole(&shape);
            let mut found = Vec::new();
            for part in &boxes {
                let mut out = vec![0; part.num_elements().unwrap() as usize * 2];
                copy_part(part, (&bytes, &whole), (&mut out, part), 2).unwrap();
                found.extend(out);
            }
            let end = (start + count).min(total);
            prop_assert_eq!(&found, &bytes[start as usize * 2..end as usize * 2]);
            prop_assert!(boxes.len() <= (2 * shape.len()).saturating_sub(1).max(1));
        }

        #[test]
        fn parts_copied_in_and_out_reassemble(
            shape in prop::collection::vec(1u64..6, 1..4), seed in any::<u64>()
        ) {
            // Cut along every dimension at a place of its own: the pieces cover the tensor exactly
            // and reassemble to it.
            let mut pieces = vec![TensorBox::whole(&shape)];
            for (dim, size) in shape.iter().enumerate() {
                let at = (seed >> (8 * dim)) % (size + 1);
                pieces = pieces.iter().flat_map(|piece| {
                    let (mut low, mut high) = (piece.clone(), piece.clone());
                    low.lengths[dim] = at;
                    high.offsets[dim] += at;
                    high.lengths[dim] -= at;
                    [low, high]
                }).collect();
            }
            pieces.retain(|piece| !piece.is_empty());
            prop_assert!(check_exact_cover(&shape, &pieces.iter().collect::<Vec<_>>()).is_ok());
            let bytes = whole_bytes(&shape);
            let whole = TensorBox::whole(&shape);
            let mut back = vec![0xff; bytes.len()];
            for piece in &pieces {
                let mut out = vec![0; piece.num_elements().unwrap() as usize * 2];
                copy_part(piece, (&bytes, &whole), (&mut out, piece), 2).unwrap();
                copy_part(piece, (&out, piece), (&mut back, &whole), 2).unwrap();
            }
            prop_assert_eq!(back, bytes);
        }
    }
}
