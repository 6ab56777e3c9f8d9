//! Any damage to any file is found, reported, and the checkpoint before is used; hostile input is
//! an error, never a panic.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use checkpoint_format::Checkpoint;
use checkpoint_format::checksum::{Checksum, sha256_hex};
use checkpoint_format::scan::{newest_verified, scan};
use common::{How, assert_holds, entries, save, save_all, tensors};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Steps 1 (good) and 2 (to be damaged), by two ranks.
fn two_checkpoints() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    for (step, seed) in [(1, 1), (2, 2)] {
        let how = How { world_size: 2, ..How::default() };
        for report in save_all(folder.path(), step, &tensors(seed), &how) {
            report.unwrap();
        }
    }
    let newest = folder.path().join("step-0000002");
    (folder, newest)
}

/// The newest is found bad, for a reason that has these words, and the one before is used.
#[track_caller]
fn check_falls_back(folder: &Path, reason: &str) {
    let newest = newest_verified(folder).unwrap();
    assert_eq!(newest.passed_over.len(), 1, "{newest:?}");
    assert_eq!(newest.passed_over[0].step, 2);
    assert!(newest.passed_over[0].reason.contains(reason), "{}", newest.passed_over[0].reason);
    let found = newest.found.unwrap();
    assert_eq!(found.step, 1);
    assert_holds(&Checkpoint::open(&found.path).unwrap(), &tensors(1));
}

#[test]
fn every_file_that_is_deleted_is_missed() {
    let names = entries(&two_checkpoints().1);
    assert_eq!(names.len(), 6);
    for name in names {
        let (folder, newest) = two_checkpoints();
        std::fs::remove_file(newest.join(&name)).unwrap();
        let reason = if name == "COMMIT" { "no COMMIT" } else { &name };
        check_falls_back(folder.path(), reason);
    }
}

proptest! {
    #![proptest_config(common::cases(48))]
    #[test]
    fn one_flipped_bit_or_a_cut_is_found(
        file in 0usize..6, place in 0.0..1.0f64, bit in 0u8..8, cut: bool
    ) {
        let (folder, newest) = two_checkpoints();
        let path = newest.join(&entries(&newest)[file]);
        let mut bytes = std::fs::read(&path).unwrap();
        let at = ((bytes.len() - 1) as f64 * place) as usize;
        if cut {
            bytes.truncate(at);
        } else {
            bytes[at] ^= 1 << bit;
        }
        std::fs::write(&path, bytes).unwrap();
        check_falls_back(folder.path(), "");
    }
}

#[test]
fn damage_in_a_tensor_is_found_when_it_is_read() {
    let (_folder, newest) = two_checkpoints();
    let file = newest.join("rank-00001-000.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let checkpoint = Checkpoint::open(&newest).unwrap();
    let errors: Vec<String> = checkpoint
        .tensors()
        .iter()
        .filter_map(|(name, entry)| {
            let region = checkpoint_format::TensorBox::whole(&entry.shape);
            let mut bytes = vec![0; entry.num_bytes().unwrap() as usize];
            checkpoint.read_box(name, &region, &mut bytes).err().map(|error| error.to_string())
        })
        .collect();
    assert_eq!(errors.len(), 1);
    assert!(errors[0].contains("rank-00001-000.safetensors"), "{}", errors[0]);
    assert!(errors[0].contains("has checksum crc32c:"), "{}", errors[0]);
}

#[test]
fn links_are_not_followed() {
    let (folder, newest) = two_checkpoints();
    let name = "rank-00000-000.safetensors";
    std::fs::rename(newest.join(name), folder.path().join("outside")).unwrap();
    std::os::unix::fs::symlink("../outside", newest.join(name)).unwrap();
    check_falls_back(folder.path(), "symbolic link");
    // A checkpoint that is itself a link.
    std::fs::rename(&newest, folder.path().join("elsewhere")).unwrap();
    std::os::unix::fs::symlink("elsewhere", &newest).unwrap();
    check_falls_back(folder.path(), "symbolic link");
    assert!(scan(folder.path()).unwrap().damaged[0].is_link);
}

#[test]
fn a_fifo_does_not_hang_the_reader() {
    let (folder, newest) = two_checkpoints();
    let path = newest.join("state.json");
    std::fs::remove_file(&path).unwrap();
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, mode).unwrap();
    check_falls_back(folder.path(), "not a regular file");
}

/// Rewrites index and manifest with valid hashes after a change, as an attacker would.
fn forge(newest: &Path, change: impl Fn(&mut Value, &mut Value)) {
    let read = |name: &str| -> Value {
        serde_json::from_slice(&std::fs::read(newest.join(name)).unwrap()).unwrap()
    };
    let (mut index, mut manifest) = (read("index.json"), read("MANIFEST.json"));
    change(&mut index, &mut manifest);
    let index = serde_json::to_vec(&index).unwrap();
    manifest["files"]["index.json"] =
        json!({ "size": index.len(), "checksum": Checksum::of(&index).to_string() });
    std::fs::write(newest.join("index.json"), index).unwrap();
    let manifest = serde_json::to_vec(&manifest).unwrap();
    std::fs::write(newest.join("COMMIT"), format!("{}\n", sha256_hex(&manifest))).unwrap();
    std::fs::write(newest.join("MANIFEST.json"), manifest).unwrap();
}

#[track_caller]
fn check_forged(reason: &str, change: impl Fn(&mut Value, &mut Value)) {
    let (folder, newest) = two_checkpoints();
    forge(&newest, change);
    check_falls_back(folder.path(), reason);
}

#[test]
fn forged_indexes_are_refused() {
    fn odd(index: &mut Value) -> &mut Value {
        &mut index["tensors"]["odd"]
    }
    check_forged("not a file name", |index, _| {
        odd(index)["boxes"][0]["file"] = json!("../../etc/passwd")
    });
    check_forged("not a file name", |index, _| {
        odd(index)["boxes"][0]["file"] = json!("/etc/passwd")
    });
    check_forged("not in the manifest", |index, _| odd(index)["boxes"][0]["file"] = json!("other"));
    check_forged("not a file name", |_, manifest| {
        manifest["files"]["../step-0000001/state.json"] = manifest["files"]["state.json"].clone();
    });
    check_forged("too large", |index, _| odd(index)["shape"] = json!([u64::MAX, u64::MAX, 2]));
    check_forged("9 dimensions", |index, _| {
        odd(index)["shape"] = json!([1, 1, 1, 1, 1, 1, 1, 1, 1])
    });
    check_forged("lies outside", |index, _| {
        odd(index)["boxes"][0]["offsets"] = json!([u64::MAX, 0, 0])
    });
    check_forged("are in no box", |index, _| odd(index)["boxes"] = json!([]));
    check_forged("overlap", |index, _| {
        let again = odd(index)["boxes"][0].clone();
        odd(index)["boxes"].as_array_mut().unwrap().push(again);
    });
    check_forged("has 105 bytes", |index, _| {
        let start = odd(index)["boxes"][0]["range"][0].as_u64().unwrap();
        odd(index)["boxes"][0]["range"][1] = json!(start + 105);
    });
    check_forged("are not in", |index, _| {
        odd(index)["boxes"][0]["range"] = json!([1u64 << 40, (1u64 << 40) + 840])
    });
    check_forged("are not in", |index, _| odd(index)["boxes"][0]["range"] = json!([840, 0]));
    check_forged("share byte", |index, _| {
        let range = index["tensors"]["scalar"]["boxes"][0]["range"][0].as_u64().unwrap();
        let file = index["tensors"]["scalar"]["boxes"][0]["file"].clone();
        odd(index)["boxes"][0]["range"] = json!([range, range + 840]);
        odd(index)["boxes"][0]["file"] = file;
    });
    check_forged("coverage is not", |_, manifest| manifest["coverage"]["boxes"] = json!(1));
    check_forged("checksum", |index, _| {
        odd(index)["boxes"][0]["checksum"] = json!("crc32c:0badf00d")
    });
    check_forged("of step 3", |_, manifest| manifest["step"] = json!(3));
    check_forged("unknown variant", |index, _| odd(index)["dtype"] = json!("C128"));
    check_forged("version 9", |_, manifest| manifest["version"] = json!(9));
}

#[test]
fn a_header_that_disagrees_with_the_index_is_refused() {
    let (folder, newest) = two_checkpoints();
    // A tensor renamed in the index alone; all hashes are right.
    forge(&newest, |index, _| {
        let tensors = index["tensors"].as_object_mut().unwrap();
        let entry = tensors.remove("odd").unwrap();
        tensors.insert("even".to_string(), entry);
    });
    check_falls_back(folder.path(), "header does not say of even");
}

#[test]
fn a_header_bomb_is_refused() {
    let (folder, newest) = two_checkpoints();
    let name = "rank-00000-000.safetensors";
    let path = newest.join(name);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(&path, &bytes).unwrap();
    let checksum = Checksum::of(&bytes).to_string();
    forge(&newest, |_, manifest| manifest["files"][name]["checksum"] = json!(checksum));
    check_falls_back(folder.path(), "header is wrong");
}

#[test]
fn deeply_nested_json_is_refused() {
    let (folder, newest) = two_checkpoints();
    let manifest = vec![b'['; 10 << 20];
    std::fs::write(newest.join("COMMIT"), format!("{}\n", sha256_hex(&manifest))).unwrap();
    std::fs::write(newest.join("MANIFEST.json"), manifest).unwrap();
    check_falls_back(folder.path(), "MANIFEST.json");
}

#[test]
fn an_empty_folder_and_no_folder_hold_no_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(newest_verified(folder.path()).unwrap(), Default::default());
    assert_eq!(newest_verified(&folder.path().join("none")).unwrap(), Default::default());
    save(folder.path(), 1, &tensors(1));
    std::fs::create_dir(folder.path().join("step-0000002")).unwrap();
    let newest = newest_verified(folder.path()).unwrap();
    assert_eq!(newest.found.unwrap().step, 1);
    assert!(newest.passed_over[0].reason.contains("no COMMIT"));
}
