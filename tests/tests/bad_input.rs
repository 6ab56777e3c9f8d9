//! Bad input to the real launcher and trainer: one clear error with the contract's exit code, soon,
//! and nothing lost.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use arrow_array::types::Int32Type;
use arrow_array::{ArrayRef, Int32Array, ListArray, RecordBatch};
use end_to_end::sandbox::Sandbox;
use parquet::arrow::ArrowWriter;
use run_config::RunConfig;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

fn sandbox() -> Sandbox {
    Sandbox::real(env!("CARGO_BIN_EXE_phalanx-under-test"))
}

/// These arguments end soon, with `code` and one message that holds all of `expected`.
#[track_caller]
fn check_ends(sandbox: &Sandbox, code: i32, args: &[&str], expected: &[&str]) -> String {
    let start = Instant::now();
    let (stdout, stderr) = sandbox.expect(code, args);
    assert!(start.elapsed() < Duration::from_secs(10), "{args:?}: {:?}", start.elapsed());
    assert_eq!(stdout, "", "{args:?}");
    for expected in expected {
        assert!(stderr.contains(expected), "{args:?}: {stderr} lacks {expected:?}");
    }
    for unwanted in ["panicked", "backtrace", "internal error"] {
        assert!(!stderr.contains(unwanted), "{args:?}: {stderr}");
    }
    sandbox.assert_nothing_left();
    stderr
}

/// `run` of the config with these `--set`s is refused before anything is made.
#[track_caller]
fn check_refused(sandbox: &Sandbox, sets: &[&str], expected: &[&str]) {
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    let stderr = check_ends(sandbox, 64, &[&["run", "config.yaml"], &sets[..]].concat(), expected);
    assert_eq!(stderr.matches("error: ").count(), 1, "one error: {stderr}");
    assert!(!sandbox.run_dir().root().exists(), "a refused run must leave nothing");
}

#[test]
fn keys_values_and_degrees() {
    let sandbox = sandbox();
    let check = |set: &str, expected: &[&str]| check_refused(&sandbox, &[set], expected);
    check("trainig.steps=3", &["trainig", "did you mean `training`"]);
    check("training.stesp=3", &["training.stesp", "did you mean `steps`"]);
    check("training.steps=many", &["training.steps", "\"many\"", "wrong type", "an integer"]);
    check("training.steps=0", &["training.steps", "0", "from 1"]);
    check("parallelism.replicate=3", &["3 are not the 2 ranks"]);
    check("parallelism.tensor=3", &["parallelism.tensor", "3 ranks do not divide model.heads 4"]);
    check("training.global_batch=7", &["training.global_batch", "7"]);
    check("model.kv_heads=3", &["model.kv_heads", "3 does not divide the 4 heads"]);
    check("model.dim=30", &["model.heads", "4 heads do not divide dim 30"]);
}

/// On a machine that has none.
#[test]
fn a_gpu_where_there_is_none() {
    if rank_protocol::gpus::usable() > 0 {
        return;
    }
    let expected = ["cluster.device is cuda", "no GPU", "--set cluster.device=cpu"];
    check_refused(&sandbox(), &["cluster.device=cuda"], &expected);
}

/// The real trainer.
fn trainer() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_phalanx-under-test")).with_file_name("phalanx-trainer")
}

/// Writes a trainer that is `real`, but on rank 1 what `of_rank_1` starts.
fn write_chooser(path: &Path, of_rank_1: &str) {
    let real = trainer();
    let real = real.display();
    let script =
        format!("#!/bin/sh\n[ \"$PHALANX_RANK\" = 1 ] && {of_rank_1} \"$@\"\nexec {real} \"$@\"\n");
    std::fs::write(path, script).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// A node that was forgotten when Phalanx was updated.
#[test]
fn a_rank_of_another_build() {
    let own = sandbox();
    let (other, chooser) = (own.path().join("other"), own.path().join("chooser"));
    // It differs in a text that it holds, and not in what it does.
    let (mut program, text) =
        (std::fs::read(trainer()).unwrap(), b"hint: give every node the same");
    let at = program.windows(text.len()).position(|window| window == text).unwrap();
    program[at + 6] = b'G';
    std::fs::write(&other, program).unwrap();
    std::fs::set_permissions(&other, std::fs::Permissions::from_mode(0o755)).unwrap();
    write_chooser(&chooser, &format!("exec {}", other.display()));
    let trainer = chooser.to_string_lossy();
    let sandbox = Sandbox::new(env!("CARGO_BIN_EXE_phalanx-under-test"), &trainer);
    let expected =
        ["rank 1 has another build of phalanx-trainer than rank 0", "hint: Give every node"];
    check_ends(&sandbox, 64, &["run", "config.yaml"], &expected);
    assert!(!sandbox.run_dir().metrics().exists(), "no step was made");
}

/// Opens another file where a program asks for a run's config, as on a node whose copy of the run's
/// directory is not that of the others.
const OTHER_CONFIG: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
int open64(const char *path, int flags, int mode) {
  int (*next)(const char *, int, int) = (int (*)(const char *, int, int))dlsym(RTLD_NEXT, "open64");
  const char *name = strrchr(path, '/');
  return next(name && !strcmp(name, "/config.yaml") ? getenv("OTHER_CONFIG") : path, flags, mode);
}
"#;

/// A node that sees another copy of the run's directory, in which one value is another.
#[test]
fn a_rank_of_another_config() {
    let own = sandbox();
    let at = |name: &str| own.path().join(name);
    std::fs::write(at("other.c"), OTHER_CONFIG).unwrap();
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-o"]).arg(at("other.so")).arg(at("other.c")).arg("-ldl");
    assert!(cc.status().unwrap().success());
    let chooser = at("chooser");
    let sandbox =
        Sandbox::new(env!("CARGO_BIN_EXE_phalanx-under-test"), &chooser.to_string_lossy());
    let (config, other) = (sandbox.run_dir().config(), at("other.yaml"));
    let (config, of_rank_1) = (config.display(), other.display());
    let change = format!("sed 's/warmup_steps: 2$/warmup_steps: 3/' {config} > {of_rank_1}");
    let exec = format!(
        "exec env OTHER_CONFIG={of_rank_1} LD_PRELOAD={} {}",
        at("other.so").display(),
        trainer().display()
    );
    write_chooser(&chooser, &format!("{change} && {exec}"));
    let expected = ["rank 1 has another config than rank 0", "hint: give every node"];
    let stderr = check_ends(&sandbox, 64, &["run", "config.yaml"], &expected);
    // Both by their hashes.
    let load = |path: &Path| RunConfig::load(path, &[]).unwrap().config;
    let (first, second) = (load(&sandbox.run_dir().config()), load(&other));
    assert_eq!([first.schedule.warmup_steps, second.schedule.warmup_steps], [2, 3]);
    let hashes = format!("{} and {}", second.hash(), first.hash());
    assert!(stderr.contains(&hashes), "{stderr} lacks {hashes}");
    assert!(!sandbox.run_dir().metrics().exists(), "no step was made");
}

#[test]
fn every_mistake_of_a_file_is_named_with_its_line() {
    let sandbox = sandbox();
    let path = sandbox.path().join("config.yaml");
    let text = std::fs::read_to_string(&path).unwrap();
    let text = text.replace("heads: 4", "heads: four").replace("schedule:", "shedule:");
    std::fs::write(&path, text).unwrap();
    check_refused(&sandbox, &[], &["config.yaml:2:", "\"four\"", "shedule", "`schedule`"]);
}

#[test]
fn files_that_are_no_config() {
    let sandbox = sandbox();
    let check = |name: &str, bytes: &[u8], expected: &[&str]| {
        std::fs::write(sandbox.path().join(name), bytes).unwrap();
        check_ends(&sandbox, 64, &["run", name], expected);
        check_ends(&sandbox, 64, &["check", name], expected);
    };
    check("empty.yaml", b"", &["empty.yaml", "empty"]);
    check("binary.yaml", &[0xff, 0xfe, 0, 1, 2], &["binary.yaml", "no text"]);
    check("zeros.yaml", &[0; 4096], &["zeros.yaml"]);
    let large = "# a comment\n".repeat((100 << 20) / 12);
    check("large.yaml", large.as_bytes(), &["large.yaml", "1048576"]);
    check("list.yaml", b"- 1\n- 2\n", &["list.yaml"]);
    check_ends(&sandbox, 64, &["run", "shards"], &["shards", "folder"]);
    assert!(!sandbox.path().join("runs").exists());
}

/// The one shard of the sandbox.
fn shard(sandbox: &Sandbox) -> PathBuf {
    let mut shards = std::fs::read_dir(sandbox.path().join("shards")).unwrap();
    let is_shard = |path: &PathBuf| path.extension().is_some_and(|e| e == "parquet");
    shards.find_map(|entry| Some(entry.unwrap().path()).filter(is_shard)).unwrap()
}

/// A shard as another program may write it, without a word about its tokenizer.
fn write_foreign_shard(path: &Path, documents: Vec<Vec<i32>>) {
    let rows = documents.into_iter().map(|ids| Some(ids.into_iter().map(Some)));
    let ids = ListArray::from_iter_primitive::<Int32Type, _, _>(rows);
    let batch = RecordBatch::try_from_iter([("input_ids", Arc::new(ids) as ArrayRef)]).unwrap();
    let file = std::fs::File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

#[test]
fn data_that_is_absent_or_of_another_tokenizer() {
    let sandbox = sandbox();
    let source = "data.sources=[{name: web, path: absent/*.parquet}]";
    check_refused(&sandbox, &[source], &["source `web`", "absent", "does not exist", "tokenize"]);
    let source = "data.sources=[{name: web, path: shards/no-*.parquet}]";
    check_refused(&sandbox, &[source], &["no-*.parquet"]);
    check_refused(&sandbox, &["data.tokenizer=absent.json"], &["absent.json", "does not exist"]);
    let vocab = ["shard-", "vocabulary of 512", "has 500", "`model.vocab_size`"];
    check_refused(&sandbox, &["model.vocab_size=500"], &vocab);
    let long = "data.sequence_length=65536";
    check_refused(&sandbox, &[long], &["source `text`", "fewer than one sequence", "65537"]);
    let tokenizer = sandbox.path().join("tokenizer.json");
    let text = std::fs::read_to_string(&tokenizer).unwrap();
    std::fs::write(&tokenizer, text + "\n").unwrap();
    check_refused(&sandbox, &[], &["shard-", "tokenizer.json", "sha256", "tokenize again"]);
}

#[test]
fn shards_that_are_damaged_or_empty() {
    let sandbox = sandbox();
    let path = shard(&sandbox);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let name = path.file_name().unwrap().to_str().unwrap().to_owned();
    check_refused(&sandbox, &[], &[&name, "damaged or not parquet", "tokenize"]);
    std::fs::write(&path, b"").unwrap();
    check_refused(&sandbox, &[], &[&name, "0 bytes"]);
    write_foreign_shard(&path, Vec::new());
    check_refused(&sandbox, &[], &[&name, "is empty", "0 tokens"]);
    let numbers = Arc::new(Int32Array::from(vec![1, 2, 3])) as ArrayRef;
    let batch = RecordBatch::try_from_iter([("price", numbers)]).unwrap();
    let file = std::fs::File::create(&path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    check_refused(&sandbox, &[], &[&name, "no usable column", "price", "input_ids"]);
}

#[test]
fn a_token_id_over_the_vocabulary_of_another_programs_shard() {
    let sandbox = sandbox();
    let path = shard(&sandbox);
    let mut documents: Vec<Vec<i32>> =
        (0..200).map(|i| (0..60).map(|j| (i + j) % 512).collect()).collect();
    documents[17][3] = 512;
    write_foreign_shard(&path, documents);
    let expected = ["row 17, position 3: token id 512 is outside the vocabulary of 512"];
    check_refused(&sandbox, &[], &expected);
}

#[test]
fn a_damaged_page_is_found_while_training() {
    let sandbox = sandbox();
    let path = shard(&sandbox);
    let mut bytes = std::fs::read(&path).unwrap();
    let middle_of_the_ids = bytes.len() / 4;
    bytes[middle_of_the_ids] ^= 0x10;
    std::fs::write(&path, bytes).unwrap();
    let name = path.file_name().unwrap().to_str().unwrap().to_owned();
    check_ends(&sandbox, 64, &["run", "config.yaml"], &[&name, "row group 0", "of no use"]);
    assert_eq!(sandbox.events_of("generation_started").len(), 1, "no restart");
    let why = sandbox.expect(0, &["why", "test"]).0;
    assert!(why.contains(&name), "{why}");
}

#[test]
fn a_checkpoint_of_another_model_or_another_order_of_data() {
    let sandbox = sandbox();
    sandbox.train("test", &["training.steps=5"]);
    let config = std::fs::read(sandbox.run_dir().config()).unwrap();
    let check = |set: &str, expected: &[&str]| {
        let args = ["resume", "test", "--set", "training.steps=10", "--set", set];
        check_ends(&sandbox, 64, &args, expected);
        assert_eq!(std::fs::read(sandbox.run_dir().config()).unwrap(), config, "{set}");
    };
    check("model.ffn_dim=128", &["step-0000005", "another model", "[64, 32]", "[128, 32]"]);
    check("seed=3", &["cannot resume", "`seed` was 0", "3 now", "set it back"]);
    check("training.global_batch=16", &["cannot resume", "tokens read", "global_batch"]);
    check("data.shuffle=false", &["cannot resume", "data.shuffle"]);
    // Nothing is lost by all these mistakes.
    sandbox.expect(0, &["resume", "test", "--set", "training.steps=10"]);
}

#[test]
fn initial_weights_that_are_absent_or_of_another_model() {
    let sandbox = sandbox();
    sandbox.train("wide", &["training.steps=1", "model.ffn_dim=128"]);
    let check = |source: &str, expected: &[&str]| {
        check_refused(&sandbox, &[&format!("model.init_from={source}")], expected);
    };
    check("run:wide", &["another model", "gate_proj", "[128, 32]", "[64, 32]"]);
    check("run:wide@7", &["a checkpoint of step 7", "steps 1"]);
    check("run:absent", &["model.init_from", "there is no run \"absent\""]);
    check("hf:absent", &["model.init_from", "absent"]);
    check("meta:absent", &["model.init_from", "absent"]);
    check("gguf:x", &["model.init_from", "gguf:x"]);
}

#[test]
fn a_libtorch_of_another_version() {
    let sandbox = sandbox();
    // Of another release, by what it says.
    let other = sandbox.path().join("other");
    std::fs::create_dir_all(other.join("lib")).unwrap();
    std::fs::write(other.join("lib/libtorch_cpu.so"), b"no library\n").unwrap();
    std::fs::write(other.join("version.py"), "__version__ = '2.10.0+cpu'\n").unwrap();
    let sandbox = sandbox.env("PHALANX_LIBTORCH", other.display());
    check_refused(&sandbox, &[], &["2.10.0+cpu", "2.11", "PHALANX_LIBTORCH"]);
    // One that does not say, and cannot be loaded.
    std::fs::remove_file(other.join("version.py")).unwrap();
    let expected = ["could not be loaded", "libtorch_cpu.so", "2.11", "PHALANX_LIBTORCH"];
    check_ends(&sandbox, 64, &["run", "config.yaml"], &expected);
    assert_eq!(sandbox.events_of("generation_started").len(), 1, "no restart");
}
