//! Finding the library, and refusing what is none.

use std::path::Path;
use std::process::Command;
use std::{env, fs, os::unix::fs::symlink};

use nccl_rs::{Nccl, NcclError, Search};
use tempfile::TempDir;

use crate::fake::{Fake, says};

#[test]
fn a_library_that_is_nowhere_names_every_place() {
    let search = Search {
        path: Some("/nowhere/given.so".into()),
        name: "libnccl-of-no-machine.so.2".to_string(),
        libtorch_lib: Some("/nowhere/torch/lib".into()),
    };
    let error = Nccl::load(&search).unwrap_err();
    let NcclError::Absent { tried, .. } = &error else { panic!("{error}") };
    assert_eq!(tried.len(), 3);
    says(
        &error,
        &[
            "no libnccl-of-no-machine.so.2",
            "/nowhere/given.so (",
            "; libnccl-of-no-machine.so.2 (",
            "; /nowhere/torch/lib/../../nvidia/nccl/lib/libnccl-of-no-machine.so.2 (",
            "given.so (cannot open shared object file",
            "hint: install the wheel",
        ],
    );
    assert_eq!(error.to_string().lines().count(), 1);
}

#[test]
fn a_path_may_be_the_library_or_its_folder() {
    let fake = Fake::new();
    for path in [fake.path(), fake.folder().to_path_buf()] {
        let nccl = Nccl::load(&Search { path: Some(path), ..Search::default() }).unwrap();
        assert_eq!(nccl.path(), fake.path());
        assert_eq!(nccl.version().to_string(), "2.28.9");
    }
}

#[test]
fn a_wheel_is_found_beside_libtorch_through_a_link() {
    let fake = Fake::new();
    let site = TempDir::new().unwrap();
    let at = |path: &str| site.path().join(path);
    fs::create_dir_all(at("packages/torch/lib")).unwrap();
    fs::create_dir_all(at("packages/nvidia/nccl/lib")).unwrap();
    let name = "libnccl-of-the-wheel.so.2";
    fs::copy(fake.path(), at("packages/nvidia/nccl/lib").join(name)).unwrap();
    symlink(at("packages/torch"), at("libtorch")).unwrap();
    let libtorch_lib = Some(at("libtorch/lib"));
    let search = Search { path: None, name: name.to_string(), libtorch_lib };
    assert!(Nccl::load(&search).unwrap().path().ends_with(Path::new("nvidia/nccl/lib").join(name)));
}

/// Run by the next test in a process of its own; by itself it only shows what this machine has.
#[test]
fn what_the_linker_finds() {
    match Nccl::load(&Search::default()) {
        Ok(nccl) => println!("found {nccl:?}"),
        Err(error) => println!("{error}"),
    }
}

#[test]
fn the_linker_is_asked_for_the_name() {
    let fake = Fake::new();
    fake.tell(&[("version", 23_107)]);
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", "library::what_the_linker_finds", "--nocapture"])
        .env("LD_LIBRARY_PATH", fake.folder())
        .output()
        .unwrap();
    let output = String::from_utf8(output.stdout).unwrap();
    assert!(output.contains("found NCCL 2.31.7 (libnccl.so.2)"), "{output}");
}

#[test]
fn a_missing_function_is_named_with_the_version() {
    let fake = Fake::compiled_with(&["-DWITHOUT_SPLIT"]);
    let error = Nccl::load(&fake.search()).unwrap_err();
    let path = fake.path();
    says(&error, &[path.to_str().unwrap(), "(version 2.28.9) has no ncclCommSplit"]);
}

#[test]
fn another_library_is_no_nccl() {
    let fake = Fake::compiled_with(&["-DncclGetVersion=renamed"]);
    says(&Nccl::load(&fake.search()).unwrap_err(), &["(version unknown) has no ncclGetVersion"]);
}

#[test]
fn an_old_library_is_refused() {
    let fake = Fake::new();
    fake.tell(&[("version", 21_805)]);
    let error = Nccl::load(&fake.search()).unwrap_err();
    says(&error, &["is NCCL 2.18.5, but 2.19.0 or later is wanted"]);
}

#[test]
fn an_id_comes_whole_and_a_failure_with_nccls_words() {
    let fake = Fake::new();
    let nccl = fake.load();
    let bytes: Vec<u8> = (0..128u32).map(|index| (3 * index + 1) as u8).collect();
    assert_eq!(nccl.unique_id().unwrap().to_bytes().to_vec(), bytes);

    fake.tell(&[("return:ncclGetUniqueId", 2)]);
    let parts = [
        "ncclGetUniqueId failed with code 2 (meaning of 2)",
        "fake ncclGetUniqueId was told to fail",
        "hint: a system call failed",
    ];
    says(&nccl.unique_id().unwrap_err(), &parts);
}
