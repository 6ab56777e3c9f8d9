//! A window of row groups in memory: its documents in the order of the stream, or its bins.

use super::dataset::Dataset;
use super::storage::RangeReader;
use crate::error::{DataError, Result};
use crate::order::feistel::Feistel;
use crate::order::{EpochOrder, SampleUnit};
use crate::packing::{self, Part, Segment};
use crate::shards::decode::DecodeRequest;
use crate::shards::footer::{FileRange, Footer, damaged};
use crate::shards::manifest::Manifest;
use crate::shards::split::HoldOut;
use crate::shards::{DecodedGroup, RowGroup};
use futures::StreamExt;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

/// Row groups of a window that are read at a time.
const READS_AT_A_TIME: usize = 2;

/// Tokens between those of which the document is noted: a lookup then takes one memory access more
/// than the document itself, whatever the number of documents.
const MARK: u64 = 1024;

/// A document, or a part of one, in a window.
#[derive(Clone, Copy, Debug)]
struct Piece {
    group: u32,
    part: Part,
}

/// The documents of a window.
#[derive(Debug, Default)]
pub struct Window {
    groups: Vec<DecodedGroup>,
    pieces: Vec<Piece>,
    /// One past the last unit of each document, or index past the last piece of each bin, from
    /// the start of the window.
    ends: Vec<u64>,
    /// Index of the document that holds every [`MARK`]-th token, from the first on.
    marks: Vec<u32>,
}

impl Window {
    /// Tokens of the stream from `start` (from the beginning of the window) on, up to `len`.
    /// Appends to `segments`; returns how many tokens there were.
    pub fn stream<'w>(&'w self, start: u64, len: u64, segments: &mut Vec<Segment<'w>>) -> u64 {
        let mut at = start;
        let mark =
            self.marks.get((start / MARK) as usize).map_or(self.ends.len(), |&at| at as usize);
        let first = mark + self.ends[mark..].iter().take_while(|&&end| end <= start).count();
        for (piece, &end) in self.pieces[first..].iter().zip(&self.ends[first..]) {
            if at >= start + len {
                break;
            }
            let piece_start = end - u64::from(piece.part.len);
            let stop = end.min(start + len);
            let (from, to) = ((at - piece_start) as usize, (stop - piece_start) as usize);
            let ids = self.ids(piece);
            segments.push(Segment { ids: &ids[from..to], next: ids.get(to).copied() });
            at = stop;
        }
        at - start
    }

    /// The parts of one bin, counted from the start of the window.
    pub fn bin<'w>(&'w self, bin: u64, segments: &mut Vec<Segment<'w>>) {
        let bin = bin as usize;
        let start = bin.checked_sub(1).map_or(0, |before| self.ends[before]) as usize;
        for piece in &self.pieces[start..self.ends[bin] as usize] {
            let end = (piece.part.start + u64::from(piece.part.len)) as usize;
            let group = &self.groups[piece.group as usize];
            let next = piece.part.continues.then(|| group.ids[end]);
            segments.push(Segment { ids: self.ids(piece), next });
        }
    }

    fn ids(&self, piece: &Piece) -> &[i32] {
        let start = piece.part.start as usize;
        &self.groups[piece.group as usize].ids[start..start + piece.part.len as usize]
    }

    fn new(
        dataset: &Dataset,
        manifest: &Manifest,
        groups: Vec<(RowGroup, DecodedGroup)>,
        unit: SampleUnit,
        key: Option<u64>,
    ) -> Self {
        let mut window = Window::default();
        for (at, (group, decoded)) in groups.into_iter().enumerate() {
            let path = &manifest.files[group.file as usize].path;
            let hold_out = HoldOut::new(path, dataset.validation_fraction);
            let rows =
                packing::split_rows(&decoded.lengths, group.first_row, &hold_out, dataset.split);
            let at = at as u32;
            match unit {
                SampleUnit::Tokens(_) => window.pieces.extend(rows.iter().map(|row| {
                    let part = Part { start: row.start, len: row.len, continues: false };
                    Piece { group: at, part }
                })),
                SampleUnit::Bins => {
                    for bin in packing::best_fit(&rows, dataset.sample_len) {
                        window.pieces.extend(bin.iter().map(|&part| Piece { group: at, part }));
                        window.ends.push(window.pieces.len() as u64);
                    }
                }
            }
            window.groups.push(decoded);
        }
        if let SampleUnit::Tokens(_) = unit {
            window.order_documents(key);
        }
        window
    }

    /// Shuffles the documents and adds up where each ends.
    fn order_documents(&mut self, key: Option<u64>) {
        if let Some(key) = key {
            let feistel = Feistel::new(self.pieces.len() as u64, key);
            let order = (0..self.pieces.len() as u64).map(|at| feistel.map(at) as usize);
            self.pieces = order.map(|at| self.pieces[at]).collect();
        }
        let mut end = 0;
        for (at, piece) in self.pieces.iter().enumerate() {
            end += u64::from(piece.part.len);
            self.ends.push(end);
            self.marks.resize(end.div_ceil(MARK) as usize, at as u32);
        }
    }
}

/// Reads and decodes a window of an epoch of a source.
pub async fn load(
    dataset: Arc<Dataset>,
    source: usize,
    order: Arc<EpochOrder>,
    window: usize,
    reader: RangeReader,
) -> Result<Window> {
    let manifest = dataset.sources[source].manifest.clone();
    let span = order.windows[window];
    let mut groups = Vec::with_capacity(span.end_group - span.first_group);
    let indices = &order.groups[span.first_group..span.end_group];
    let wanted: Vec<RowGroup> =
        indices.iter().map(|&index| manifest.groups[index as usize]).collect();
    let footers = load_footers(manifest.clone(), wanted.clone()).await?;
    let reads: Vec<_> = wanted
        .into_iter()
        .map(|group| {
            let footer = footers[&group.file].clone();
            load_group(manifest.clone(), group, footer, dataset.vocab_size, reader.clone())
        })
        .collect();
    let mut reads = futures::stream::iter(reads).buffered(READS_AT_A_TIME);
    while let Some(group) = reads.next().await {
        groups.push(group?);
    }
    let (unit, key) = (dataset.sources[source].params.unit, order.document_key(window));
    off_thread(move || Ok(Window::new(&dataset, &manifest, groups, unit, key))).await
}

/// Footers of the shards that a window's row groups lie in, each read once.
async fn load_footers(
    manifest: Arc<Manifest>,
    groups: Vec<RowGroup>,
) -> Result<HashMap<u32, Arc<Footer>>> {
    off_thread(move || {
        let mut footers = HashMap::new();
        for group in groups {
            let Entry::Vacant(place) = footers.entry(group.file) else { continue };
            let file = &manifest.files[group.file as usize];
            let footer = Footer::read(&file.path)?;
            if footer.hash != file.footer_hash || footer.file_bytes != file.bytes {
                let detail = "it changed after the run had read its footer".to_string();
                return Err(damaged(&file.path, footer.file_bytes, detail));
            }
            place.insert(Arc::new(footer));
        }
        Ok(footers)
    })
    .await
}

async fn load_group(
    manifest: Arc<Manifest>,
    group: RowGroup,
    footer: Arc<Footer>,
    vocab_size: usize,
    reader: RangeReader,
) -> Result<(RowGroup, DecodedGroup)> {
    let path = manifest.files[group.file as usize].path.clone();
    let what = format!("row group {}", group.index);
    let range = group.offset..group.offset + group.bytes;
    let bytes = reader.read(&path, range, &what).await?;
    let ids = reader.decoded.lend(group.tokens as usize);
    off_thread(move || {
        let range = FileRange { offset: group.offset, bytes, file_bytes: footer.file_bytes };
        let request = DecodeRequest {
            path: &path,
            footer: &footer,
            group: group.index as usize,
            first_row: group.first_row,
            vocab_size,
        };
        Ok((group, request.decode_into(&range, ids)?))
    })
    .await
}

/// Runs work on a thread for blocking work.
async fn off_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| DataError::Stopped { detail: error.to_string() })?
}
