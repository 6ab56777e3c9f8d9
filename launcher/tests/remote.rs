//! Checkpoints in an object store, here a folder: there and back bit for bit, in parts where files
//! are large; what is torn, damaged or another run's is never taken for one.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use checkpoint_format::{Checkpoint, Dtype, Piece, Save, TensorBox, TrainState};
use launcher::remote::access::RemoteError;
use launcher::remote::store::{Remote, Stored};
use launcher::remote::transfer::Width;
use launcher::remote::uploads::Target;
use launcher::remote::{Place, list};
use std::future::Future;
use std::path::{Path, PathBuf};

/// Two parts and a bit.
const ELEMENTS: u64 = (20 << 20) / 8;

fn wait<T>(work: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    runtime.worker_threads(2).enable_all().build().unwrap().block_on(work)
}

struct Folders {
    _folder: tempfile::TempDir,
    here: PathBuf,
    there: PathBuf,
    place: Place,
}

fn folders() -> Folders {
    let folder = tempfile::tempdir().unwrap();
    let (here, there) = (folder.path().join("here"), folder.path().join("there"));
    let url = format!("file://{}", there.display());
    let place = Place { url, name: "run".into(), run_id: Some("run-1".into()) };
    Folders { _folder: folder, here, there, place }
}

fn save(dir: &Path, step: u64, generation: u64) -> PathBuf {
    let data: Vec<u8> = (0..ELEMENTS).flat_map(|i| (i * 31 + step).to_le_bytes()).collect();
    let save = Save::new(dir, step, generation);
    save.begin(0).unwrap();
    let region = TensorBox::whole(&[ELEMENTS]);
    let (name, dtype, shape) = ("x".into(), Dtype::I64, vec![ELEMENTS]);
    save.write_rank(0, &[Piece { name, dtype, shape, region, data: &data }]).unwrap();
    let state = TrainState { generation, ..TrainState::at(step) };
    save.commit(1, &state).unwrap();
    save.folder()
}

/// Its bytes; `None`: it was there.
fn upload(
    place: &Place,
    from: &Path,
    step: u64,
    generation: u64,
) -> Result<Option<u64>, RemoteError> {
    let target = Target { generation, step };
    wait(async { Remote::open(place)?.upload(from, target, Width::FULL).await })
}

fn fetch(place: &Place, target: Target, to: &Path) -> Result<u64, RemoteError> {
    launcher::remote::fetch(place, target, to, Width::FULL)
}

fn listed(place: &Place) -> Vec<(u64, u64)> {
    let steps = |stored: &Stored| (stored.target.generation, stored.target.step);
    list(place).unwrap().iter().map(steps).collect()
}

#[test]
fn there_and_back() {
    let Folders { here, there, place, .. } = &folders();
    let from = save(here, 3, 1);
    let bytes = upload(place, &from, 3, 1).unwrap().unwrap();
    assert!(bytes > 20 << 20);
    let stored = list(place).unwrap();
    assert_eq!(stored.len(), 1);
    assert!(stored[0].is_complete && stored[0].bytes > bytes);
    let back = there.with_file_name("back");
    assert_eq!(fetch(place, stored[0].target, &back).unwrap(), bytes);
    for entry in std::fs::read_dir(&from).unwrap() {
        let path = entry.unwrap().path();
        let other = back.join("step-0000003").join(path.file_name().unwrap());
        assert!(std::fs::read(&path).unwrap() == std::fs::read(other).unwrap(), "{path:?}");
    }
    Checkpoint::open(&back.join("step-0000003")).unwrap().verify().unwrap();
}

#[test]
fn what_is_there_is_not_sent_again_and_nothing_is_a_checkpoint_before_its_commit() {
    let Folders { here, there, place, .. } = &folders();
    let from = save(here, 3, 1);
    upload(place, &from, 3, 1).unwrap();
    let folder = there.join("run/step-0000003.g0001");
    std::fs::remove_file(folder.join("COMMIT")).unwrap();
    std::fs::remove_file(folder.join("index.json")).unwrap();
    assert_eq!(listed(place), []);
    let tensors = folder.join("rank-00000-000.safetensors");
    let written = std::fs::metadata(&tensors).unwrap().modified().unwrap();
    assert!(upload(place, &from, 3, 1).unwrap().is_some());
    assert_eq!(upload(place, &from, 3, 1), Ok(None));
    assert_eq!(listed(place), [(1, 3)]);
    assert_eq!(std::fs::metadata(&tensors).unwrap().modified().unwrap(), written);
}

#[test]
fn what_is_damaged_here_is_not_committed_there() {
    let Folders { here, there, place, .. } = &folders();
    let from = save(here, 3, 1);
    let tensors = from.join("rank-00000-000.safetensors");
    let mut bytes = std::fs::read(&tensors).unwrap();
    bytes[15 << 20] ^= 1;
    std::fs::write(&tensors, bytes).unwrap();
    let error = upload(place, &from, 3, 1).unwrap_err();
    assert!(matches!(&error, RemoteError::Local(why) if why.contains("checksum")), "{error}");
    assert!(!there.join("run/step-0000003.g0001/rank-00000-000.safetensors").exists());
    assert_eq!(listed(place), []);
}

#[test]
fn what_is_no_longer_here_is_no_damage() {
    let Folders { here, place, .. } = &folders();
    // The step was done again by a later generation.
    let error = upload(place, &save(here, 4, 2), 4, 1).unwrap_err();
    assert!(matches!(&error, RemoteError::Gone(why) if why.contains("by now")), "{error}");
    let error = upload(place, &here.join("step-0000003"), 3, 1).unwrap_err();
    assert!(matches!(&error, RemoteError::Gone(_)), "{error}");
    assert_eq!(listed(place), []);
}

#[test]
fn a_step_that_is_done_again_does_not_get_into_its_copy() {
    let Folders { here, there, place, .. } = &folders();
    let from = save(here, 3, 1);
    let checkpoint = Checkpoint::open(&from).unwrap();
    save(here, 3, 2);
    // What was opened is what it was, although another has its name.
    let (_, manifest) = checkpoint.seal().unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    assert_eq!(manifest["generation"], 1);
    drop(checkpoint);
    upload(place, &from, 3, 2).unwrap();
    assert_eq!(listed(place), [(2, 3)]);
    fetch(place, Target { generation: 2, step: 3 }, &there.with_file_name("back")).unwrap();
}

#[test]
fn a_copy_that_lacks_a_file_is_not_taken() {
    let Folders { here, there, place, .. } = &folders();
    let from = save(here, 3, 1);
    upload(place, &from, 3, 1).unwrap();
    let folder = there.join("run/step-0000003.g0001");
    std::fs::remove_file(folder.join("state.json")).unwrap();
    let error = fetch(place, Target { generation: 1, step: 3 }, &there.with_file_name("back"));
    let error = error.unwrap_err();
    assert!(matches!(&error, RemoteError::Damaged(why) if why.contains("state.json is missing")));
}

/// A checkpoint of step 3 there whose manifest is changed, and sealed again.
fn check_hostile(change: impl Fn(&mut serde_json::Value), words: &str) {
    let Folders { here, there, place, .. } = &folders();
    upload(place, &save(here, 3, 1), 3, 1).unwrap();
    let folder = there.join("run/step-0000003.g0001");
    let manifest = std::fs::read(folder.join("MANIFEST.json")).unwrap();
    let mut manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    change(&mut manifest);
    let manifest = manifest.to_string();
    let commit = checkpoint_format::checksum::sha256_hex(manifest.as_bytes());
    std::fs::write(folder.join("MANIFEST.json"), manifest).unwrap();
    std::fs::write(folder.join("COMMIT"), format!("{commit}\n")).unwrap();
    let back = there.with_file_name("back");
    let error = fetch(place, Target { generation: 1, step: 3 }, &back).unwrap_err();
    assert!(matches!(&error, RemoteError::Damaged(why) if why.contains(words)), "{error:?}");
    assert!(!back.exists(), "nothing was begun");
}

#[test]
fn hostile_manifests_are_refused_before_anything_is_made() {
    let file = || serde_json::json!({ "size": 1, "checksum": "00000000" });
    for name in ["../evil", "/etc/evil", "a/b"] {
        let add = |manifest: &mut serde_json::Value| {
            let of_another = manifest["files"]["state.json"].clone();
            manifest["files"][name] = of_another;
        };
        check_hostile(add, "is not a file name");
    }
    check_hostile(|manifest| manifest["files"]["more"] = file(), "");
    check_hostile(|manifest| manifest["files"]["state.json"]["size"] = u64::MAX.into(), "recorded");
    check_hostile(|manifest| manifest["generation"] = u64::MAX.into(), "generation");
    check_hostile(|manifest| manifest["step"] = 4.into(), "is of step 4");
    check_hostile(|manifest| *manifest = "nonsense".into(), "");
}

#[test]
fn what_a_killed_launcher_left_of_a_file_is_removed() {
    let Folders { there, place, .. } = &folders();
    let folder = there.join("run/step-0000003.g0001");
    std::fs::create_dir_all(&folder).unwrap();
    for name in ["rank-00000-000.safetensors#1", "index.json#12", "kept#", "kept#x1"] {
        std::fs::write(folder.join(name), "half").unwrap();
    }
    wait(async { Remote::open(place)?.own().await }).unwrap();
    let mut left: Vec<_> =
        std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["kept#", "kept#x1"]);
}

#[test]
fn what_is_damaged_there_is_not_taken() {
    let Folders { here, there, place, .. } = &folders();
    upload(place, &save(here, 3, 1), 3, 1).unwrap();
    let stored = list(place).unwrap().remove(0);
    let folder = there.join("run/step-0000003.g0001");
    let back = there.with_file_name("back");
    let check = |name: &str, change: fn(&mut Vec<u8>), words: &str| {
        let path = folder.join(name);
        let good = std::fs::read(&path).unwrap();
        let mut bad = good.clone();
        change(&mut bad);
        std::fs::write(&path, bad).unwrap();
        let error = fetch(place, stored.target, &back).unwrap_err();
        let is_as_expected = matches!(&error, RemoteError::Damaged(why) if why.contains(words));
        assert!(is_as_expected, "{name}: {error:?}");
        let left = std::fs::read_dir(&back).into_iter().flatten().flatten();
        assert_eq!(left.filter(|e| e.file_name().to_string_lossy().contains("step")).count(), 0);
        std::fs::write(&path, good).unwrap();
    };
    let tensors = "rank-00000-000.safetensors";
    check(tensors, |bytes| bytes[9 << 20] ^= 1, "checksum");
    check(tensors, |bytes| bytes.truncate(bytes.len() - 1), "recorded are");
    check("MANIFEST.json", |bytes| bytes[40] ^= 1, "COMMIT is not the SHA-256");
    check("COMMIT", |bytes| bytes.resize(1 << 20, b'x'), "over the limit");
    std::fs::remove_file(folder.join("state.json")).unwrap();
    assert!(fetch(place, stored.target, &back).unwrap_err().to_string().contains("state.json"));
}

#[test]
fn one_runs_folder_is_no_other_runs() {
    let Folders { here, place, .. } = &folders();
    wait(async { Remote::open(place)?.own().await }).unwrap();
    wait(async { Remote::open(place)?.own().await }).unwrap();
    upload(place, &save(here, 3, 1), 3, 1).unwrap();
    let other = Place { run_id: Some("run-2".into()), ..place.clone() };
    let error = wait(async { Remote::open(&other)?.own().await }).unwrap_err();
    assert!(matches!(&error, RemoteError::Foreign(why) if why.contains("run-1")), "{error}");
    assert!(list(&other).unwrap_err().to_string().contains("another run"));
}

#[test]
fn a_removed_one_is_gone() {
    let Folders { here, there, place, .. } = &folders();
    for (step, generation) in [(3, 1), (4, 1), (3, 2)] {
        upload(place, &save(here, step, generation), step, generation).unwrap();
    }
    assert_eq!(listed(place), [(1, 3), (1, 4), (2, 3)]);
    let target = Target { generation: 1, step: 3 };
    wait(async { Remote::open(place)?.remove(target).await }).unwrap();
    wait(async { Remote::open(place)?.remove(target).await }).unwrap();
    assert_eq!(listed(place), [(1, 4), (2, 3)]);
    assert!(!there.join("run/step-0000003.g0001").exists());
}
