//! A checkpoint that comes from another place has its name only once every byte is there and right.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use checkpoint_format::scan::{newest_verified, scan};
use checkpoint_format::{Arrival, Checkpoint, fence};
use common::{How, assert_holds, entries, save, save_all, tensors};
use std::io::Write;
use std::path::{Path, PathBuf};

/// A checkpoint of step 7, by two ranks of generation 3, in a folder of its own.
fn source() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let how = How { world_size: 2, generation: 3, ..How::default() };
    for report in save_all(folder.path(), 7, &tensors(1), &how) {
        report.unwrap();
    }
    let step = folder.path().join("step-0000007");
    (folder, step)
}

fn begin(from: &Path, to: &Path) -> checkpoint_format::Result<Arrival> {
    let read = |name: &str| std::fs::read(from.join(name)).unwrap();
    Arrival::begin(to, &read("COMMIT"), &read("MANIFEST.json"))
}

/// Copies the files, with a change to one of them.
fn copy(from: &Path, arrival: &Arrival, change: impl Fn(&str, &mut Vec<u8>)) {
    for name in arrival.files().keys() {
        let mut bytes = std::fs::read(from.join(name)).unwrap();
        change(name, &mut bytes);
        arrival.create(name).unwrap().write_all(&bytes).unwrap();
    }
}

#[test]
fn it_comes_whole() {
    let (_source, from) = source();
    let to = tempfile::tempdir().unwrap();
    let dir = to.path().join("checkpoints");
    let arrival = begin(&from, &dir).unwrap();
    assert_eq!(arrival.step(), 7);
    copy(&from, &arrival, |_, _| {});
    assert!(scan(&dir).unwrap().committed.is_empty(), "it has no name yet");
    arrival.finish().unwrap();
    assert_holds(&Checkpoint::open(&dir.join("step-0000007")).unwrap(), &tensors(1));
    assert_eq!(fence::newest_generation(&dir).unwrap(), 3);
    assert_eq!(entries(&dir), [".generation", ".lock", "step-0000007"]);
}

#[test]
fn it_takes_the_place_of_a_damaged_one() {
    let (_source, from) = source();
    let to = tempfile::tempdir().unwrap();
    save(to.path(), 7, &tensors(2));
    std::fs::write(to.path().join("step-0000007/state.json"), "{}").unwrap();
    let arrival = begin(&from, to.path()).unwrap();
    copy(&from, &arrival, |_, _| {});
    arrival.finish().unwrap();
    let found = newest_verified(to.path()).unwrap().found.unwrap();
    assert_eq!((found.step, found.generation), (7, 3));
    assert_holds(&Checkpoint::open(&found.path).unwrap(), &tensors(1));
    assert_eq!(entries(to.path()), [".generation", ".lock", "step-0000007"]);
}

/// Nothing stays of it, and what was there is as it was.
fn check_refused(change: impl Fn(&str, &mut Vec<u8>), words: &str) {
    let (_source, from) = source();
    let to = tempfile::tempdir().unwrap();
    save(to.path(), 6, &tensors(2));
    let arrival = begin(&from, to.path()).unwrap();
    copy(&from, &arrival, change);
    let error = arrival.finish().unwrap_err().to_string();
    assert!(error.contains(words), "{error}");
    assert_eq!(entries(to.path()), [".generation", ".lock", "step-0000006"]);
    assert_eq!(newest_verified(to.path()).unwrap().found.unwrap().step, 6);
}

#[test]
fn damage_on_the_way_is_found() {
    let of = |wanted: &'static str, change: fn(&mut Vec<u8>)| {
        move |name: &str, bytes: &mut Vec<u8>| {
            if name == wanted {
                change(bytes);
            }
        }
    };
    let flip = |bytes: &mut Vec<u8>| *bytes.last_mut().unwrap() ^= 1;
    check_refused(of("rank-00001-000.safetensors", flip), "checksum");
    check_refused(of("index.json", flip), "checksum");
    // The file has its size from the start: what does not come is zeros.
    check_refused(of("rank-00000-000.safetensors", |bytes| bytes.truncate(100)), "checksum");
    check_refused(of("state.json", |bytes| bytes.push(b' ')), "bytes, recorded are");
}

#[test]
fn what_is_not_finished_leaves_nothing() {
    let (_source, from) = source();
    let to = tempfile::tempdir().unwrap();
    let arrival = begin(&from, to.path()).unwrap();
    copy(&from, &arrival, |_, _| {});
    drop(arrival);
    assert!(entries(to.path()).is_empty(), "{:?}", entries(to.path()));
}

#[test]
fn a_commit_of_another_manifest_and_hostile_names_are_refused() {
    let (_source, from) = source();
    let to = tempfile::tempdir().unwrap();
    let manifest = std::fs::read_to_string(from.join("MANIFEST.json")).unwrap();
    let begin = |manifest: &str| {
        let commit = checkpoint_format::checksum::sha256_hex(manifest.as_bytes());
        Arrival::begin(to.path(), format!("{commit}\n").as_bytes(), manifest.as_bytes())
    };
    let error = Arrival::begin(to.path(), b"0\n", manifest.as_bytes()).unwrap_err().to_string();
    assert!(error.contains("COMMIT is not the SHA-256"), "{error}");
    for name in ["../../evil", "/etc/passwd", "a/b", ".."] {
        let error = begin(&manifest.replace("state.json", name)).unwrap_err().to_string();
        assert!(error.contains("is not a file name"), "{error}");
    }
    let mut huge: serde_json::Value = serde_json::from_str(&manifest).unwrap();
    for file in huge["files"].as_object_mut().unwrap().values_mut() {
        file["size"] = u64::MAX.into();
    }
    let error = begin(&huge.to_string()).unwrap_err().to_string();
    assert!(error.contains("no space for a checkpoint"), "{error}");
    assert!(begin("{}").is_err() && begin("").is_err());
    let arrival = begin(&manifest).unwrap();
    let error = arrival.create("COMMIT").unwrap_err().to_string();
    assert!(error.contains("is no file of the checkpoint"), "{error}");
}
