//! How the flat gradient buffer is cut into buckets.

use std::ops::Range;

/// A run of parameters and their elements of the flat gradient buffer, padding between them
/// included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bucket {
    /// The parameters' places in the set.
    pub(crate) parameters: Range<usize>,
    /// Their elements of the flat buffer.
    pub(crate) elements: Range<i64>,
}

/// Cuts parameters, given by their element ranges in the flat buffer, into buckets of about `limit`
/// elements. Backward readies the last parameters first, so buckets are filled, and numbered, from
/// the end. A parameter is never split; one larger than the limit is a bucket by itself.
pub(crate) fn cut(parameters: &[Range<i64>], limit: i64) -> Vec<Bucket> {
    let mut buckets: Vec<Bucket> = Vec::new();
    for (index, range) in parameters.iter().enumerate().rev() {
        match buckets.last_mut() {
            Some(last) if last.elements.end - range.start <= limit => {
                last.parameters.start = index;
                last.elements.start = range.start;
            }
            _ => buckets.push(Bucket { parameters: index..index + 1, elements: range.clone() }),
        }
    }
    buckets
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(parameters: &[Range<i64>], limit: i64, expected: &[(Range<usize>, Range<i64>)]) {
        let expected: Vec<Bucket> = expected
            .iter()
            .map(|(parameters, elements)| Bucket {
                parameters: parameters.clone(),
                elements: elements.clone(),
            })
            .collect();
        assert_eq!(cut(parameters, limit), expected);
    }

    #[test]
    fn buckets_fill_from_the_end() {
        let parameters = [0..10, 32..64, 64..100, 128..130];
        check(&parameters, 1000, &[(0..4, 0..130)]);
        check(&parameters, 66, &[(2..4, 64..130), (0..2, 0..64)]);
        check(&parameters, 1, &[(3..4, 128..130), (2..3, 64..100), (1..2, 32..64), (0..1, 0..10)]);
        check(&[], 1, &[]);
    }
}
