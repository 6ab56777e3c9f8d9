//! What one rank holds of a parameter: all of it, or a block of rows and columns of each part.
//!
//! The layout decides which; the model allocates and fills it; a checkpoint writes it where it
//! belongs in the whole.

use crate::parameters::ParameterSpec;
use std::ops::Range;

/// The elements of a [`crate::Part`] that a rank holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalPart {
    /// Name in Hugging Face's files.
    pub hf_name: String,
    /// Shape of the whole tensor there.
    pub shape: Vec<usize>,
    /// Rows of it that are held.
    pub rows: Range<usize>,
    /// Columns of it that are held; `0..1` for a vector.
    pub columns: Range<usize>,
    /// First row within the local parameter.
    pub row_start: usize,
    /// Whether this rank's copy stands for the elements wherever each counts once: in the gradient
    /// norm and in a checkpoint.
    pub counts: bool,
}

impl LocalPart {
    /// Number of elements held.
    pub fn num_elements(&self) -> usize {
        self.rows.len() * self.columns.len()
    }
}

/// A parameter as one rank holds it.
#[derive(Clone, Debug, PartialEq)]
pub struct LocalParameter {
    /// The whole parameter.
    pub spec: ParameterSpec,
    /// Shape of what is held.
    pub shape: Vec<usize>,
    /// The elements held of each part, in the order of their rows.
    pub parts: Vec<LocalPart>,
}

impl LocalParameter {
    /// All of a parameter.
    pub fn whole(spec: &ParameterSpec) -> Self {
        let columns = spec.shape.get(1).copied().unwrap_or(1);
        let part = |part: &crate::Part| LocalPart {
            hf_name: part.hf_name.clone(),
            shape: spec.part_shape(part),
            rows: 0..part.row_count,
            columns: 0..columns,
            row_start: part.row_start,
            counts: true,
        };
        Self {
            shape: spec.shape.clone(),
            parts: spec.parts.iter().map(part).collect(),
            spec: spec.clone(),
        }
    }

    /// Number of elements held.
    pub fn num_elements(&self) -> u64 {
        self.shape.iter().map(|&size| size as u64).product()
    }
}

/// A rectangle of consecutive elements of a local part, which lie without gaps in its memory and
/// are rows `rows` by columns `columns` of the whole tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rectangle {
    /// First element, counted in the local part.
    pub start: usize,
    /// Rows of the whole tensor.
    pub rows: Range<usize>,
    /// Columns of the whole tensor.
    pub columns: Range<usize>,
}

impl Rectangle {
    /// Number of elements.
    pub fn num_elements(&self) -> usize {
        self.rows.len() * self.columns.len()
    }
}

impl LocalPart {
    /// The elements `range` of this part, counted in its own memory, as at most three rectangles:
    /// the end of a row, whole rows, the beginning of a row.
    pub fn rectangles(&self, range: Range<usize>) -> Vec<Rectangle> {
        let width = self.columns.len();
        let end = range.end.min(self.num_elements());
        let mut found = Vec::new();
        let mut at = range.start;
        while at < end {
            let (row, column) = (at / width, at % width);
            let (rows, columns) = if column == 0 && end - at >= width {
                ((end - at) / width, width)
            } else {
                (1, (width - column).min(end - at))
            };
            let (first_row, first_column) = (self.rows.start + row, self.columns.start + column);
            found.push(Rectangle {
                start: at,
                rows: first_row..first_row + rows,
                columns: first_column..first_column + columns,
            });
            at += rows * columns;
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(rows: Range<usize>, columns: Range<usize>) -> LocalPart {
        LocalPart {
            hf_name: "w".into(),
            shape: vec![10, 8],
            rows,
            columns,
            row_start: 0,
            counts: true,
        }
    }

    fn check(range: Range<usize>, expected: &[(usize, Range<usize>, Range<usize>)]) {
        let expected: Vec<Rectangle> = expected
            .iter()
            .cloned()
            .map(|(start, rows, columns)| Rectangle { start, rows, columns })
            .collect();
        assert_eq!(part(2..6, 3..7).rectangles(range.clone()), expected, "{range:?}");
    }

    #[test]
    fn any_run_of_elements_is_at_most_three_rectangles() {
        check(0..16, &[(0, 2..6, 3..7)]);
        check(0..8, &[(0, 2..4, 3..7)]);
        check(1..3, &[(1, 2..3, 4..6)]);
        check(3..9, &[(3, 2..3, 6..7), (4, 3..4, 3..7), (8, 4..5, 3..4)]);
        check(2..6, &[(2, 2..3, 5..7), (4, 3..4, 3..5)]);
        check(5..5, &[]);
        check(12..99, &[(12, 5..6, 3..7)]);
    }

    #[test]
    fn rectangles_cover_a_run_once() {
        let held = part(1..10, 2..7);
        for start in 0..held.num_elements() {
            for end in start..=held.num_elements() {
                let found = held.rectangles(start..end);
                assert!(found.len() <= 3);
                let mut at = start;
                for rectangle in found {
                    assert_eq!(rectangle.start, at);
                    at += rectangle.num_elements();
                }
                assert_eq!(at, end);
            }
        }
    }
}
