//! From documents to rows of a batch: the documents of a split, best-fit bins, and the filling of
//! tokens, targets, positions and document ids.
//!
//! The boundaries of documents are carried as lengths; they are never guessed from a special token.

use crate::shards::split::{HoldOut, Split};
use std::ops::Range;

/// The target of a position without one; the loss leaves it out.
pub const NO_TARGET: i32 = -100;

/// A document of a row group, by its row there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Row in the row group.
    pub row: u32,
    /// First token among those of the row group.
    pub start: u64,
    /// Its tokens.
    pub len: u32,
}

/// The documents of a row group that belong to `split`, those without tokens left out.
pub fn split_rows(lengths: &[u32], first_row: u64, hold_out: &HoldOut, split: Split) -> Vec<Row> {
    let mut start = 0;
    let mut rows = Vec::with_capacity(lengths.len());
    for (row, &len) in lengths.iter().enumerate() {
        if len > 0 && hold_out.split_of(first_row + row as u64) == split {
            rows.push(Row { row: row as u32, start, len });
        }
        start += u64::from(len);
    }
    rows
}

/// A part of a document, or all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// First token among those of the row group.
    pub start: u64,
    /// Its tokens.
    pub len: u32,
    /// Whether the document goes on after it.
    pub continues: bool,
}

/// Packs documents in bins of `bin_len` tokens: longer ones are cut in full bins first, then what
/// is left goes, longest first, into the bin with the least room that holds it.
/// O(parts · log parts) and a pure function of the lengths.
pub fn best_fit(rows: &[Row], bin_len: u64) -> Vec<Vec<Part>> {
    let mut bins: Vec<Vec<Part>> = Vec::new();
    let mut parts: Vec<Part> = Vec::new();
    for row in rows {
        let full = u64::from(row.len) / bin_len;
        for piece in 0..full {
            let end = (piece + 1) * bin_len;
            let continues = end < u64::from(row.len);
            let start = row.start + piece * bin_len;
            bins.push(vec![Part { start, len: bin_len as u32, continues }]);
        }
        let rest = (u64::from(row.len) % bin_len) as u32;
        if rest > 0 {
            parts.push(Part { start: row.start + full * bin_len, len: rest, continues: false });
        }
    }
    parts.sort_by_key(|part| (std::cmp::Reverse(part.len), part.start));
    // Open bins by the room they have left, the oldest of equals first.
    let mut open = std::collections::BTreeSet::new();
    for part in parts {
        let found = open.range((u64::from(part.len), 0)..).next().copied();
        let (room, bin) = match found {
            Some(entry) => {
                open.remove(&entry);
                entry
            }
            None => {
                bins.push(Vec::new());
                (bin_len, bins.len() - 1)
            }
        };
        bins[bin].push(part);
        let room = room - u64::from(part.len);
        if room > 0 {
            open.insert((room, bin));
        }
    }
    bins
}

/// A run of tokens of one document in a sample.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// The tokens.
    pub ids: &'a [i32],
    /// The token after them, where the document goes on.
    pub next: Option<i32>,
}

/// How rows are filled.
#[derive(Clone, Copy, Debug)]
pub struct Filling {
    /// Whether attention is masked across documents: positions restart at each, and the last
    /// token of one has no target.
    pub document_mask: bool,
    /// Id of the padding that best-fit packing leaves at the end.
    pub pad_id: i32,
}

/// The rows of a micro-batch, to which the next one is appended.
#[derive(Debug)]
pub struct RowSink<'a> {
    /// Tokens of a row.
    pub len: usize,
    /// Token ids.
    pub tokens: &'a mut Vec<i32>,
    /// Target ids or [`NO_TARGET`].
    pub targets: &'a mut Vec<i32>,
    /// Positions for the rotary embedding.
    pub positions: &'a mut Vec<i32>,
    /// Document of each token, from 0.
    pub documents: &'a mut Vec<i32>,
}

impl Filling {
    /// Appends a row with the tokens from `offset` on of a sample made of `segments`; `after` is
    /// the token that follows the sample in the stream. Returns the number of targets.
    pub fn fill(
        &self,
        segments: &[Segment<'_>],
        offset: usize,
        after: Option<i32>,
        row: &mut RowSink<'_>,
    ) -> u64 {
        let len = row.len;
        let (mut at, mut skipped, mut document, mut missing) = (0, 0, 0, 0);
        for (index, segment) in segments.iter().enumerate() {
            let from = (offset - skipped).min(segment.ids.len());
            skipped += from;
            let take = (segment.ids.len() - from).min(len - at);
            if take == 0 {
                continue;
            }
            let (end, stop) = (from + take, at + take);
            row.tokens.extend_from_slice(&segment.ids[from..end]);
            row.targets.extend_from_slice(&segment.ids[from + 1..end]);
            let following = segments.get(index + 1).and_then(|next| next.ids.first().copied());
            let last = match segment.ids.get(end).copied().or(segment.next) {
                Some(id) => id,
                None if self.document_mask => NO_TARGET,
                None => following.or(after).unwrap_or(NO_TARGET),
            };
            row.targets.push(last);
            missing += u64::from(last == NO_TARGET);
            self.number(row, at..stop, document);
            document += 1;
            at = stop;
            if at == len {
                break;
            }
        }
        row.tokens.extend(std::iter::repeat_n(self.pad_id, len - at));
        row.targets.extend(std::iter::repeat_n(NO_TARGET, len - at));
        self.number(row, at..len, document);
        at as u64 - missing
    }

    /// Numbers the positions at `places` of the row, which belong to one document.
    fn number(&self, row: &mut RowSink<'_>, places: Range<usize>, document: i32) {
        let (first, document) =
            if self.document_mask { (0, document) } else { (places.start as i32, 0) };
        let count = places.len();
        row.positions.extend(first..first + count as i32);
        row.documents.extend(std::iter::repeat_n(document, count));
    }
}
