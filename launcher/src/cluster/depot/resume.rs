//! A checkpoint for the ranks of this node, of what is here and what other nodes give. Of what is
//! elsewhere only that is fetched which the ranks read; the rest is left a hole.
//!
//! A holder that fails, or is silent, is asked again after the others. Only that is damaged whose
//! checksum does not fit; what merely does not come may come at the next try.

use super::link::Link;
use super::{NotResumed, Shelf, Wanted, id_of, needs};
use checkpoint_format::bundle::{Assembly, Bundle, BundleManifest};
use checkpoint_format::checksum::Checksum;
use checkpoint_format::index::StoredBox;
use checkpoint_format::{FormatError, names};
use futures::stream::{self, StreamExt, TryStreamExt};
use rank_protocol::bundle::{BundleId, Door, MAX_RANGES};
use run_config::RunConfig;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io::{self, Error, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Nodes that are asked at once.
const AT_ONCE: usize = 8;
/// Largest index or state that is fetched.
const MAX_SMALL: u64 = 512 << 20;
/// How often each holder of a bundle is asked for what is lacking.
const ROUNDS: usize = 3;
/// Time between two rounds: a node that many ask at once has room again.
const PAUSE: Duration = Duration::from_millis(500);

/// The bundle of a place.
struct Part {
    id: BundleId,
    manifest: BundleManifest,
    index: Vec<u8>,
    /// Of the first place alone.
    state: Vec<u8>,
    source: Source,
}

/// Where its other files are.
enum Source {
    Here(PathBuf),
    /// First at the holder of this number. Its link is not kept: a node with a link to each of a
    /// thousand others would take a place at all of their doors.
    There(usize),
}

/// That what came is not what it should be, whoever gave it.
#[derive(Debug)]
struct Damaged(String);

impl std::fmt::Display for Damaged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Damaged {}

fn damaged(what: impl ToString) -> Error {
    Error::new(ErrorKind::InvalidData, Damaged(what.to_string()))
}

/// Whether an error says that something is damaged; else that it does not come.
fn is_damage(error: &Error) -> bool {
    let Some(inner) = error.get_ref() else { return false };
    let is_of_format = |error: &FormatError| {
        matches!(error, FormatError::Damaged { .. } | FormatError::Refused { .. })
    };
    inner.is::<Damaged>() || inner.downcast_ref::<FormatError>().is_some_and(is_of_format)
}

/// What was tried in vain.
#[derive(Default)]
struct Failures {
    reasons: BTreeSet<String>,
    num: usize,
    num_damaged: usize,
}

impl Failures {
    fn add(&mut self, place: &dyn std::fmt::Debug, error: &Error) {
        self.num += 1;
        self.num_damaged += usize::from(is_damage(error));
        self.reasons.insert(format!("{place:?}: {error}"));
    }

    /// Damage is what all say; otherwise another try may do better.
    fn told(self, what: &str) -> NotResumed {
        let is_damaged = self.num > 0 && self.num_damaged == self.num;
        let reasons: Vec<String> = self.reasons.into_iter().collect();
        NotResumed { is_damaged, why: format!("{what}: {}", reasons.join("; ")) }
    }
}

fn not_resumed(error: &Error) -> NotResumed {
    NotResumed { is_damaged: is_damage(error), why: error.to_string() }
}

/// Puts it together, in a folder of this generation's own: an earlier one may still be at work on
/// its. The folder of checkpoints that it is in.
///
/// # Errors
/// What is missing or damaged, and where.
pub(super) async fn assemble(shelf: &Shelf, wanted: &Wanted) -> Result<PathBuf, NotResumed> {
    let resume = &wanted.resume;
    shelf.forget_resume();
    let places = resume.holders.len();
    let find = |place: usize| {
        let (generation, step) = (resume.generation, resume.step);
        let id = BundleId { generation, step, place, places };
        find(shelf, wanted, id, &resume.holders[place])
    };
    // All nodes begin at once, and not all with the same one.
    let own = wanted.ranks.first().copied().unwrap_or(0);
    let own = (places * own / wanted.world_size.max(1)).min(places.saturating_sub(1));
    let order = (0..places).map(|place| (own + place) % places);
    let mut parts: Vec<Part> =
        stream::iter(order).map(find).buffer_unordered(AT_ONCE).try_collect().await?;
    parts.sort_by_key(|part| part.id.place);
    let text = |part: &Part| (part.manifest.clone(), part.index.clone());
    let texts: Vec<_> = parts.iter().map(text).collect();
    let state = parts.first().map(|part| part.state.clone()).unwrap_or_default();
    let dir = shelf.resume.join(format!("g{:04}", wanted.generation));
    let (folder, run, wished) = (dir.clone(), shelf.run.config(), wanted.clone());
    // A large index takes long to read, and others wait for this thread.
    let begun =
        tokio::task::spawn_blocking(move || begin(&folder, &run, texts, &state, &wished)).await;
    let begun = begun.unwrap_or_else(|error| Err(Error::other(error.to_string())));
    let (assembly, needed) = begun.map_err(|error| not_resumed(&error))?;
    // Parts are in the order of their places; each node begins with its own here too.
    parts.rotate_left(own);
    let fill = |part: Part| {
        let holders = &resume.holders[part.id.place];
        fill(shelf, part, holders, (&assembly, &needed))
    };
    stream::iter(parts.into_iter().map(Ok::<_, NotResumed>))
        .try_for_each_concurrent(AT_ONCE, fill)
        .await?;
    assembly.finish().map_err(|error| not_resumed(&Error::other(error)))?;
    Ok(dir)
}

type Needed = BTreeMap<String, Vec<StoredBox>>;

/// All that needs no other node any more, but for the tensors.
fn begin(
    dir: &Path,
    config: &Path,
    texts: Vec<(BundleManifest, Vec<u8>)>,
    state: &[u8],
    wanted: &Wanted,
) -> io::Result<(Assembly, Needed)> {
    let loaded = RunConfig::load(config, &[]);
    let config = loaded.map_err(|errors| Error::other(errors.to_string()))?.config;
    let ranks = (&wanted.ranks[..], wanted.world_size);
    let held = needs::held(&config, ranks, wanted.replicas).map_err(Error::other)?;
    let parsed = |(manifest, text): (BundleManifest, Vec<u8>)| {
        let index = serde_json::from_slice(&text).map_err(damaged)?;
        Ok((manifest, index))
    };
    let bundles = texts.into_iter().map(parsed).collect::<io::Result<Vec<_>>>()?;
    let assembly = Assembly::begin(dir, bundles, state).map_err(Error::other)?;
    let needed = needs::needed(assembly.index(), &held);
    Ok((assembly, needed))
}

/// A bundle that is here, or that one of its holders gives.
async fn find(
    shelf: &Shelf,
    wanted: &Wanted,
    id: BundleId,
    holders: &[Door],
) -> Result<Part, NotResumed> {
    let mut failures = Failures::default();
    if shelf.has(id) {
        match here(&shelf.path(id), &wanted.run, id) {
            Ok(part) => return Ok(part),
            Err(error) => failures.add(&format_args!("here"), &error),
        }
    }
    for round in 0..ROUNDS {
        if round > 0 {
            tokio::time::sleep(PAUSE).await;
        }
        for (number, door) in holders.iter().enumerate() {
            match there(shelf, &wanted.run, id, (number, door)).await {
                Ok(part) => return Ok(part),
                Err(error) => failures.add(door, &error),
            }
        }
    }
    let BundleId { generation, step, place, .. } = id;
    let what = format!("step {step} of generation {generation}, place {place} is nowhere");
    Err(failures.told(&what))
}

fn here(path: &Path, run: &str, id: BundleId) -> io::Result<Part> {
    let bundle = Bundle::open(path).map_err(Error::other)?;
    let manifest = bundle.manifest().clone();
    check(&manifest, run, id)?;
    let index = bundle.read(names::INDEX).map_err(Error::other)?;
    let state = match id.place {
        0 => bundle.read(names::STATE).map_err(Error::other)?,
        _ => Vec::new(),
    };
    Ok(Part { id, manifest, index, state, source: Source::Here(path.to_path_buf()) })
}

async fn there(
    shelf: &Shelf,
    run: &str,
    id: BundleId,
    (number, door): (usize, &Door),
) -> io::Result<Part> {
    let mut link = shelf.open(door).await?;
    let (commit, manifest) = link.seal(id).await?;
    let path = PathBuf::from(format!("{door:?}"));
    let manifest = BundleManifest::sealed(&path, commit.as_bytes(), manifest.as_bytes())
        .map_err(Error::other)?;
    check(&manifest, run, id)?;
    let index = whole(&mut link, &manifest, names::INDEX).await?;
    let state = match id.place {
        0 => whole(&mut link, &manifest, names::STATE).await?,
        _ => Vec::new(),
    };
    Ok(Part { id, manifest, index, state, source: Source::There(number) })
}

fn check(manifest: &BundleManifest, run: &str, id: BundleId) -> io::Result<()> {
    let found = id_of(manifest);
    match found == id && manifest.run == run {
        true => Ok(()),
        false => Err(damaged(format!("it is {found:?} of run {}", manifest.run))),
    }
}

/// A small file of a bundle, with its checksum.
async fn whole(link: &mut Link, manifest: &BundleManifest, name: &str) -> io::Result<Vec<u8>> {
    let size = manifest.files.get(name).map_or(0, |entry| entry.size);
    if size > MAX_SMALL {
        return Err(damaged(format!("{name} is of {size} bytes")));
    }
    let mut bytes = Vec::new();
    let take = |piece: &[u8]| {
        bytes.extend_from_slice(piece);
        Ok(())
    };
    link.read((id_of(manifest), name), Vec::new(), size, take).await?;
    manifest.check(Path::new("another node"), name, &bytes).map_err(Error::other)?;
    Ok(bytes)
}

/// Brings the tensor files of a bundle into the checkpoint, as far as they are needed. Where a
/// holder fails, the others are asked for what is lacking.
async fn fill(
    shelf: &Shelf,
    part: Part,
    holders: &[Door],
    (assembly, needed): (&Assembly, &Needed),
) -> Result<(), NotResumed> {
    let Part { id, manifest, source, .. } = part;
    let what = format!("what is needed of place {} does not come", id.place);
    let names = manifest.files.keys().filter(|name| names::parse_tensor_file(name).is_some());
    let first = match source {
        Source::There(first) => first,
        Source::Here(path) => {
            let linked = names.map(|name| assembly.link(name, &path.join(name)));
            let linked = linked.collect::<Result<(), FormatError>>();
            return linked.map_err(|error| not_resumed(&Error::other(error)));
        }
    };
    let made = names.map(|name| Ok((name.as_str(), assembly.create(name)?)));
    let made = made.collect::<Result<VecDeque<_>, FormatError>>();
    let mut lacking = made.map_err(|error| not_resumed(&Error::other(error)))?;
    lacking.retain(|(name, _)| needed.contains_key(*name));
    let mut failures = Failures::default();
    for round in 0..ROUNDS {
        if round > 0 {
            tokio::time::sleep(PAUSE).await;
        }
        let order = (0..holders.len()).map(|number| &holders[(first + number) % holders.len()]);
        for door in order {
            match fetch_all(shelf, door, id, (&mut lacking, needed)).await {
                Ok(()) => return Ok(()),
                Err(error) => failures.add(door, &error),
            }
        }
    }
    Err(failures.told(&what))
}

/// Fetches what is lacking from one holder, file by file.
async fn fetch_all(
    shelf: &Shelf,
    door: &Door,
    id: BundleId,
    (lacking, needed): (&mut VecDeque<(&str, File)>, &Needed),
) -> io::Result<()> {
    if lacking.is_empty() {
        return Ok(());
    }
    let mut link = shelf.open(door).await?;
    while let Some((name, file)) = lacking.front() {
        let boxes = needed.get(*name).map(Vec::as_slice).unwrap_or_default();
        for boxes in boxes.chunks(MAX_RANGES) {
            fetch(&mut link, (id, name), file, boxes).await?;
        }
        lacking.pop_front();
    }
    Ok(())
}

/// Writes boxes of a file to where they are in it, each with its checksum.
async fn fetch(
    link: &mut Link,
    what: (BundleId, &str),
    file: &File,
    boxes: &[StoredBox],
) -> io::Result<()> {
    let ranges: Vec<[u64; 2]> =
        boxes.iter().map(|stored| stored.range).filter(|[start, end]| start < end).collect();
    if ranges.is_empty() {
        // No ranges at all would be the whole file.
        return Ok(());
    }
    let expected = ranges.iter().map(|[start, end]| end - start).sum();
    let mut filler = Filler::new(boxes);
    link.read(what, ranges, expected, |bytes| filler.take(file, bytes)).await
}

/// Takes in the bytes of some boxes, one after another.
struct Filler<'a> {
    boxes: std::slice::Iter<'a, StoredBox>,
    /// The one that comes, with what of it is there.
    now: Option<(&'a StoredBox, u64, Checksum)>,
}

impl<'a> Filler<'a> {
    fn new(boxes: &'a [StoredBox]) -> Self {
        let mut filler = Filler { boxes: boxes.iter(), now: None };
        filler.advance();
        filler
    }

    fn advance(&mut self) {
        let next = self.boxes.find(|stored| stored.range[0] < stored.range[1]);
        self.now = next.map(|stored| (stored, stored.range[0], Checksum::default()));
    }

    fn take(&mut self, file: &File, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let Some((stored, at, checksum)) = &mut self.now else {
                return Err(damaged("more came than was asked for"));
            };
            let left = usize::try_from(stored.range[1] - *at).unwrap_or(usize::MAX);
            let (own, rest) = bytes.split_at(left.min(bytes.len()));
            file.write_all_at(own, *at)?;
            (*at, *checksum) = (*at + own.len() as u64, checksum.append(own));
            bytes = rest;
            if *at < stored.range[1] {
                continue;
            }
            if *checksum != stored.checksum {
                let what = format!("{} at {} has another checksum", stored.file, stored.range[0]);
                return Err(damaged(what));
            }
            self.advance();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use checkpoint_format::TensorBox;

    fn boxes(bytes: &[u8], ranges: &[[u64; 2]]) -> Vec<StoredBox> {
        let stored = |range: &[u64; 2]| StoredBox {
            region: TensorBox { offsets: Vec::new(), lengths: Vec::new() },
            file: "x".into(),
            range: *range,
            checksum: Checksum::of(&bytes[range[0] as usize..range[1] as usize]),
        };
        ranges.iter().map(stored).collect()
    }

    /// What comes in pieces of any size is written where it belongs.
    #[test]
    fn boxes_are_filled_piece_by_piece() {
        let bytes: Vec<u8> = (0..100).collect();
        let boxes = boxes(&bytes, &[[3, 10], [10, 10], [40, 41], [60, 95]]);
        let sent = [&bytes[3..10], &bytes[40..41], &bytes[60..95]].concat();
        for size in 1..sent.len() {
            let file = tempfile::tempfile().unwrap();
            file.set_len(100).unwrap();
            let mut filler = Filler::new(&boxes);
            sent.chunks(size).for_each(|piece| filler.take(&file, piece).unwrap());
            let mut found = vec![0; 100];
            file.read_exact_at(&mut found, 0).unwrap();
            let is_asked_for = |at: usize| matches!(at, 3..10 | 40 | 60..95);
            let expected: Vec<u8> =
                (0..100).map(|at| if is_asked_for(at) { bytes[at] } else { 0 }).collect();
            assert_eq!(found, expected);
            assert!(filler.take(&file, b"x").is_err());
        }
    }

    #[test]
    fn a_wrong_byte_is_found() {
        let bytes: Vec<u8> = (0..100).collect();
        let boxes = boxes(&bytes, &[[0, 50], [50, 100]]);
        let file = tempfile::tempfile().unwrap();
        let mut filler = Filler::new(&boxes);
        filler.take(&file, &bytes[..50]).unwrap();
        filler.take(&file, &bytes[50..98]).unwrap();
        let error = filler.take(&file, &[98, 98]).unwrap_err().to_string();
        assert!(error.contains("x at 50 has another checksum"), "{error}");
    }
}
