//! A checkpoint for the ranks of this node, of what is here and what other nodes give. Of what is
//! elsewhere only that is fetched which the ranks read; the rest is left a hole.

use super::link::Link;
use super::{Shelf, Wanted, id_of, needs};
use checkpoint_format::bundle::{Assembly, Bundle, BundleManifest};
use checkpoint_format::checksum::Checksum;
use checkpoint_format::index::StoredBox;
use checkpoint_format::names;
use futures::stream::{self, StreamExt, TryStreamExt};
use rank_protocol::bundle::{BundleId, Door, MAX_RANGES};
use run_config::RunConfig;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Error, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Nodes that are asked at once.
const AT_ONCE: usize = 8;
/// Largest index or state that is fetched.
const MAX_SMALL: u64 = 512 << 20;

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
    There(Box<Link>),
}

/// Puts it together; the folder of checkpoints that it is in.
///
/// # Errors
/// What is missing or damaged, and where.
pub(super) async fn assemble(shelf: &Shelf, wanted: &Wanted) -> Result<PathBuf, String> {
    let resume = &wanted.resume;
    shelf.forget_resume();
    let places = resume.holders.len();
    let find = |place: usize| {
        let (generation, step) = (resume.generation, resume.step);
        find(shelf, BundleId { generation, step, place, places }, &resume.holders[place])
    };
    let parts: Vec<Part> =
        stream::iter(0..places).map(find).buffered(AT_ONCE).try_collect().await?;
    let text = |part: &Part| (part.manifest.clone(), part.index.clone());
    let texts: Vec<_> = parts.iter().map(text).collect();
    let state = parts.first().map(|part| part.state.clone()).unwrap_or_default();
    let (dir, run, wanted) = (shelf.resume.clone(), shelf.run.config(), wanted.clone());
    // A large index takes long to read, and others wait for this thread.
    let begun = tokio::task::spawn_blocking(move || begin(&dir, &run, texts, &state, &wanted));
    let (assembly, needed) = begun.await.map_err(|error| error.to_string())??;
    let fill = |part: Part| {
        let (assembly, needed) = (&assembly, &needed);
        async move {
            let place = part.id.place;
            let filled = fill(part, assembly, needed).await;
            filled.map_err(|error| format!("of place {place}: {error}"))
        }
    };
    stream::iter(parts.into_iter().map(Ok::<_, String>))
        .try_for_each_concurrent(AT_ONCE, fill)
        .await?;
    assembly.finish().map_err(|error| error.to_string())?;
    Ok(shelf.resume.clone())
}

type Needed = BTreeMap<String, Vec<StoredBox>>;

/// All that needs no other node any more, but for the tensors.
fn begin(
    dir: &Path,
    config: &Path,
    texts: Vec<(BundleManifest, Vec<u8>)>,
    state: &[u8],
    wanted: &Wanted,
) -> Result<(Assembly, Needed), String> {
    let config = RunConfig::load(config, &[]).map_err(|errors| errors.to_string())?.config;
    let ranks = (&wanted.ranks[..], wanted.world_size);
    let held = needs::held(&config, ranks, wanted.replicas)?;
    let parsed = |(manifest, text): (BundleManifest, Vec<u8>)| {
        let index = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
        Ok((manifest, index))
    };
    let bundles = texts.into_iter().map(parsed).collect::<Result<Vec<_>, String>>()?;
    let assembly = Assembly::begin(dir, bundles, state).map_err(|error| error.to_string())?;
    let needed = needs::needed(assembly.index(), &held);
    Ok((assembly, needed))
}

/// A bundle that is here, or that one of its holders gives.
async fn find(shelf: &Shelf, id: BundleId, holders: &[Door]) -> Result<Part, String> {
    let what = format!("step {} of generation {}, place {}", id.step, id.generation, id.place);
    let mut reasons = Vec::new();
    if shelf.has(id) {
        match here(&shelf.path(id), id) {
            Ok(part) => return Ok(part),
            Err(error) => reasons.push(format!("here: {error}")),
        }
    }
    for door in holders {
        match there(shelf, id, door).await {
            Ok(part) => return Ok(part),
            Err(error) => reasons.push(format!("{door:?}: {error}")),
        }
    }
    Err(format!("{what} is nowhere: {}", reasons.join("; ")))
}

fn here(path: &Path, id: BundleId) -> io::Result<Part> {
    let bundle = Bundle::open(path).map_err(Error::other)?;
    let manifest = bundle.manifest().clone();
    check(&manifest, id)?;
    let index = bundle.read(names::INDEX).map_err(Error::other)?;
    let state = match id.place {
        0 => bundle.read(names::STATE).map_err(Error::other)?,
        _ => Vec::new(),
    };
    Ok(Part { id, manifest, index, state, source: Source::Here(path.to_path_buf()) })
}

async fn there(shelf: &Shelf, id: BundleId, door: &Door) -> io::Result<Part> {
    let mut link = Link::open(&shelf.run, door).await?;
    let (commit, manifest) = link.seal(id).await?;
    let path = PathBuf::from(format!("{door:?}"));
    let manifest = BundleManifest::sealed(&path, commit.as_bytes(), manifest.as_bytes())
        .map_err(Error::other)?;
    check(&manifest, id)?;
    let index = whole(&mut link, &manifest, names::INDEX).await?;
    let state = match id.place {
        0 => whole(&mut link, &manifest, names::STATE).await?,
        _ => Vec::new(),
    };
    Ok(Part { id, manifest, index, state, source: Source::There(Box::new(link)) })
}

fn check(manifest: &BundleManifest, id: BundleId) -> io::Result<()> {
    let found = id_of(manifest);
    match found == id {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::InvalidData, format!("it is {found:?}"))),
    }
}

/// A small file of a bundle, with its checksum.
async fn whole(link: &mut Link, manifest: &BundleManifest, name: &str) -> io::Result<Vec<u8>> {
    let size = manifest.files.get(name).map_or(0, |entry| entry.size);
    if size > MAX_SMALL {
        return Err(Error::new(ErrorKind::InvalidData, format!("{name} is of {size} bytes")));
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

/// Brings the tensor files of a bundle into the checkpoint, as far as they are needed.
async fn fill(part: Part, assembly: &Assembly, needed: &Needed) -> io::Result<()> {
    let Part { id, manifest, mut source, .. } = part;
    let names = manifest.files.keys().filter(|name| names::parse_tensor_file(name).is_some());
    for name in names {
        match &mut source {
            Source::Here(path) => {
                assembly.link(name, &path.join(name)).map_err(Error::other)?;
            }
            Source::There(link) => {
                let file = assembly.create(name).map_err(Error::other)?;
                let boxes = needed.get(name).map(Vec::as_slice).unwrap_or_default();
                for boxes in boxes.chunks(MAX_RANGES) {
                    fetch(link, (id, name), &file, boxes).await?;
                }
            }
        }
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
                return Err(Error::new(ErrorKind::InvalidData, "more came than was asked for"));
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
                return Err(Error::new(ErrorKind::InvalidData, what));
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
