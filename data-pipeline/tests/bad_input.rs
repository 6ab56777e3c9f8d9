//! Bad data: one clear error that names the file, the value, the limit and what to do.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed test may panic")]

mod common;

use arrow_array::types::{Int32Type, Int64Type, UInt32Type};
use arrow_array::{
    ArrayRef, BinaryArray, FixedSizeListArray, Int64Array, LargeListArray, ListArray, RecordBatch,
    UInt32Array,
};
use arrow_schema::{DataType, Field};
use common::{VOCAB, config, corpus, info, options, read};
use data_pipeline::prefetch::{LocalFiles, RetryPolicy, Storage};
use data_pipeline::prepare::inspect;
use data_pipeline::shards::ShardWriter;
use data_pipeline::{DataError, Loader, LoaderTuning, preflight};
use futures::future::BoxFuture;
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use run_config::RunConfig;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

fn check(config: &RunConfig, expected: &[&str]) {
    let error = preflight(config).expect_err("bad data must be refused");
    assert!(error.is_bad_input());
    let error = error.to_string();
    for part in expected {
        assert!(error.contains(part), "`{part}` is missing in: {error}");
    }
}

/// The error that reading all of the data leads to.
fn read_error(config: &RunConfig, tuning: LoaderTuning) -> String {
    let mut loader = Loader::open_with(config, options(1, 1000), tuning).unwrap();
    loop {
        match loader.next() {
            Ok(Some(_)) => {}
            Ok(None) => panic!("no error"),
            Err(error) => return error.to_string(),
        }
    }
}

fn write(path: &Path, columns: Vec<(&str, ArrayRef)>) {
    write_with(path, columns, None);
}

fn write_with(path: &Path, columns: Vec<(&str, ArrayRef)>, properties: Option<WriterProperties>) {
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let file = std::fs::File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), properties).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

#[test]
fn missing_folders_files_and_matches() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let hint = "phalanx data tokenize";
    check(&config(&[(folder.path(), 1.0)], &[]), &["holds no `*.parquet`", "source `s0`", hint]);
    let source = |path: &Path| {
        let mut config = config(&[(folder.path(), 1.0)], &[]);
        config.data.sources[0].path = path.display().to_string();
        config
    };
    check(&source(&at("absent/*.parquet")), &["absent` does not exist", hint]);
    check(&source(&at("x-*.parquet")), &["no file has such a name", hint]);
    check(&source(&at("x.parquet")), &["the file does not exist", hint]);
}

#[test]
fn empty_truncated_and_foreign_files() {
    let corpus = corpus(2, 100, 60, 0.1);
    let config = corpus.config(&[]);
    let path = corpus.folder.path().join("part-1.parquet");
    let whole = std::fs::read(&path).unwrap();
    let is = |bytes: &[u8], expected: &[&str]| {
        std::fs::write(&path, bytes).unwrap();
        check(&config, &[expected, &["part-1.parquet"]].concat());
    };
    is(b"", &["0 bytes", "copy it again"]);
    is(&whole[..whole.len() / 2], &["its end is missing", "copy it again"]);
    is(b"not parquet, but long enough", &["PAR1"]);
    let mut torn = whole.clone();
    let at = torn.len() - 40;
    torn[at..at + 8].fill(0xff);
    is(&torn, &["damaged or not parquet"]);
    std::fs::remove_file(&path).unwrap();
    ShardWriter::create(&path, &info(VOCAB), 500).unwrap().finish().unwrap();
    check(&config, &["part-1.parquet` is empty (0 rows, 0 tokens)", "delete it"]);
    write(&path, vec![("text", Arc::new(Int64Array::from(vec![1])))]);
    check(&config, &["its columns are [\"text\"]", "`input_ids`"]);
}

#[test]
fn damage_inside_a_shard_is_named_and_ends_the_run() {
    let corpus = corpus(1, 2000, 60, 0.1);
    let config = corpus.config(&[]);
    preflight(&config).unwrap();
    let path = corpus.folder.path().join("part-0.parquet");
    let mut bytes = std::fs::read(&path).unwrap();
    for at in bytes.len() / 3..bytes.len() / 3 + 64 {
        bytes[at] ^= 0x55;
    }
    let modified = std::fs::metadata(&path).unwrap().modified().unwrap();
    std::fs::write(&path, &bytes).unwrap();
    std::fs::File::open(&path).unwrap().set_modified(modified).unwrap();
    let error = read_error(&config, LoaderTuning::default());
    assert!(error.contains("part-0.parquet"), "{error}");
    assert!(error.contains("row group") && error.contains("copy it again"), "{error}");
}

#[test]
fn ids_over_the_vocabulary_and_other_tokenizers() {
    let corpus = corpus(1, 100, 60, 0.1);
    let path = corpus.folder.path().join("part-0.parquet");
    let mut writer = ShardWriter::create(&path, &info(1000), 500).unwrap();
    writer.push([1, 2, 3].into_iter()).unwrap();
    writer.push((0..200).chain([4096]).collect::<Vec<u32>>().into_iter()).unwrap();
    writer.finish().unwrap();
    let small = corpus.config(&["model.vocab_size=4096", "data.validation_fraction=0"]);
    let error = read_error(&small, LoaderTuning::default());
    let expected =
        "row 1, position 200: token id 4096 is outside the vocabulary of 4096 (0 to 4095)";
    assert!(error.contains(expected), "{error}");
    check(
        &corpus.config(&["model.vocab_size=999"]),
        &["vocabulary of 1000 ids, the model has 999", "set `model.vocab_size`"],
    );
    let config = corpus.config(&[]);
    std::fs::write(&config.data.tokenizer, "{\"another\": 1}").unwrap();
    check(
        &config,
        &["part-0.parquet` was made with the tokenizer of sha256 44136fa3", "has sha256"],
    );
    std::fs::remove_file(&config.data.tokenizer).unwrap();
    check(&config, &["the tokenizer", "does not exist"]);
}

#[test]
fn too_little_data_and_settings_that_cannot_be() {
    let corpus = corpus(1, 3, 30, 0.0);
    check(&corpus.config(&["data.validation_fraction=0"]), &["fewer than one sequence", "(65)"]);
    let corpus = common::corpus(1, 300, 60, 0.001);
    check(
        &corpus.config(&["data.validation_fraction=0.001", "validation.every_steps=5"]),
        &["for validation", "raise `data.validation_fraction`"],
    );
    let refuse = |dp_rank, dp_size, expected: &str| {
        let options = data_pipeline::LoaderOptions { dp_rank, dp_size, ..options(1, 1) };
        let error = Loader::open(&corpus.config(&[]), options).err().unwrap().to_string();
        assert!(error.contains(expected), "{error}");
    };
    refuse(0, 3, "8 sequences do not divide over 3 data-parallel ranks");
    refuse(2, 2, "rank 2 of 2");
}

#[test]
fn other_layouts_give_the_same_tokens() {
    let documents: Vec<Vec<u32>> = (0..40).map(|d| (d * 50..d * 50 + 50).collect()).collect();
    let wide = || documents.iter().map(|d| Some(d.iter().map(|&id| Some(i64::from(id)))));
    let ints = || documents.iter().map(|d| Some(d.iter().map(|&id| Some(id as i32))));
    let bytes: Vec<Vec<u8>> =
        documents.iter().map(|d| d.iter().flat_map(|id| id.to_le_bytes()).collect()).collect();
    let flat = Arc::new(UInt32Array::from(documents.concat()));
    let field = Arc::new(Field::new("item", DataType::UInt32, false));
    let layouts: Vec<(&str, ArrayRef)> = vec![
        ("input_ids", Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>(ints()))),
        ("tokens", Arc::new(ListArray::from_iter_primitive::<Int64Type, _, _>(wide()))),
        (
            "token_ids",
            Arc::new(LargeListArray::from_iter_primitive::<UInt32Type, _, _>(
                documents.iter().map(|d| Some(d.iter().map(|&id| Some(id)))),
            )),
        ),
        ("tokens", Arc::new(FixedSizeListArray::new(field, 50, flat, None))),
        ("input_ids", Arc::new(BinaryArray::from_iter_values(bytes))),
    ];
    for (name, column) in layouts {
        let folder = tempfile::tempdir().unwrap();
        write(&folder.path().join("x.parquet"), vec![(name, column)]);
        let overrides = ["data.shuffle=false", "data.validation_fraction=0"];
        let batches = read(&config(&[(folder.path(), 1.0)], &overrides), options(1, 3));
        let tokens: Vec<i32> =
            batches.into_iter().flat_map(|batch| batch.tokens.to_vec()).collect();
        assert_eq!(tokens, (0..24 * 64).collect::<Vec<i32>>(), "{name}");
    }
    let folder = tempfile::tempdir().unwrap();
    let negative = ListArray::from_iter_primitive::<Int64Type, _, _>([Some(vec![Some(-1); 200])]);
    write(&folder.path().join("x.parquet"), vec![("tokens", Arc::new(negative))]);
    let config = config(&[(folder.path(), 1.0)], &["data.validation_fraction=0"]);
    check(&config, &["token id -1 is outside the vocabulary of 1048576 (0 to 1048575)"]);
    let wide = ListArray::from_iter_primitive::<Int64Type, _, _>([Some([7, 1 << 40].map(Some))]);
    write(&folder.path().join("x.parquet"), vec![("tokens", Arc::new(wide))]);
    check(&config, &["position 1: token id 1099511627776 is outside the vocabulary of 1048576"]);
    let error = inspect::inspect(&folder.path().display().to_string()).unwrap_err().to_string();
    assert!(error.contains("position 1: 1099511627776 is no token id"), "{error}");
}

#[test]
fn shards_of_every_compression_are_read() {
    use parquet::basic::{BrotliLevel, Compression, GzipLevel};
    let rows = (0..40).map(|d| Some((d * 50..d * 50 + 50).map(Some)));
    let column: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>(rows));
    for compression in [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(GzipLevel::default()),
        Compression::BROTLI(BrotliLevel::default()),
        Compression::LZ4_RAW,
    ] {
        let folder = tempfile::tempdir().unwrap();
        let properties = WriterProperties::builder().set_compression(compression).build();
        let columns = vec![("tokens", column.clone())];
        write_with(&folder.path().join("x.parquet"), columns, Some(properties));
        let overrides = ["data.shuffle=false", "data.validation_fraction=0"];
        let batches = read(&config(&[(folder.path(), 1.0)], &overrides), options(1, 3));
        let tokens: Vec<i32> =
            batches.into_iter().flat_map(|batch| batch.tokens.to_vec()).collect();
        assert_eq!(tokens, (0..24 * 64).collect::<Vec<i32>>(), "{compression}");
    }
}

#[test]
fn lengths_that_are_not_those_of_the_lists_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.parquet");
    let verified = |lengths: ArrayRef| {
        let rows = [3, 2].map(|count| Some((0..count).map(Some)));
        let lists = ListArray::from_iter_primitive::<Int32Type, _, _>(rows);
        write(&path, vec![("input_ids", Arc::new(lists)), ("n_tokens", lengths)]);
        let shards = inspect::verify(&path.display().to_string(), None, None).unwrap();
        shards.into_iter().next().unwrap().outcome.map(|report| report.tokens)
    };
    assert_eq!(verified(Arc::new(Int64Array::from(vec![3, 2]))).unwrap(), 5);
    for (lengths, wrong) in [
        (vec![Some(3), Some(-1)], "row 1 holds 2 tokens, but its `n_tokens` is -1"),
        (vec![Some(2), Some(3)], "row 0 holds 3 tokens, but its `n_tokens` is 2"),
        (vec![None, Some(2)], "row 0 holds 3 tokens, but its `n_tokens` is null"),
    ] {
        let error = verified(Arc::new(Int64Array::from(lengths))).unwrap_err().to_string();
        assert!(error.contains(wrong), "{error}");
    }
    let error = verified(Arc::new(UInt32Array::from(vec![3, 2]))).unwrap_err().to_string();
    assert!(error.contains("`n_tokens` has type UInt32, not int32"), "{error}");
}

/// A store that is slow, and fails at some requests.
struct Faulty {
    delay: Duration,
    fail_every: u64,
    requests: AtomicU64,
}

impl Storage for Faulty {
    fn read(
        &self,
        path: &Path,
        range: Range<u64>,
    ) -> BoxFuture<'static, std::io::Result<bytes::Bytes>> {
        let (delay, request) = (self.delay, self.requests.fetch_add(1, Ordering::Relaxed) + 1);
        let fails = self.fail_every > 0 && request.is_multiple_of(self.fail_every);
        let read = LocalFiles::default().read(path, range);
        Box::pin(async move {
            tokio::time::sleep(delay).await;
            if fails { Err(std::io::Error::other("injected")) } else { read.await }
        })
    }
}

fn tuning(delay_ms: u64, fail_every: u64, timeout_ms: u64, attempts: u32) -> LoaderTuning {
    let delay = Duration::from_millis(delay_ms);
    LoaderTuning {
        storage: Arc::new(Faulty { delay, fail_every, requests: AtomicU64::new(0) }),
        retry: RetryPolicy {
            timeout: Duration::from_millis(timeout_ms),
            attempts,
            backoff: Duration::from_millis(1),
        },
        next_timeout: Duration::from_secs(20),
    }
}

#[test]
fn failing_requests_are_tried_again_and_change_nothing() {
    let corpus = corpus(1, 2000, 60, 0.1);
    let config = corpus.config(&[]);
    let mut loader = Loader::open_with(&config, options(1, 80), tuning(2, 3, 5000, 4)).unwrap();
    let mut batches = Vec::new();
    while let Some(mut batch) = loader.next().unwrap() {
        batch.wait_s = 0.0;
        batches.push(batch);
    }
    assert!(batches == read(&config, options(1, 80)));
}

#[test]
fn a_store_that_hangs_is_an_error_that_names_the_shard() {
    let corpus = corpus(1, 200, 60, 0.1);
    let error = read_error(&corpus.config(&[]), tuning(60_000, 0, 20, 2));
    assert!(error.contains("part-0.parquet") && error.contains("attempt 2 of 2"), "{error}");
    let mut patient = tuning(60_000, 0, 60_000, 1);
    patient.next_timeout = Duration::from_millis(50);
    let mut loader = Loader::open_with(&corpus.config(&[]), options(1, 1), patient).unwrap();
    let error = loader.next().unwrap_err();
    assert!(matches!(error, DataError::Timeout { .. }), "{error}");
    assert!(error.to_string().contains(" of shard `"), "{error}");
}

#[test]
fn a_store_that_always_fails_is_an_error() {
    let corpus = corpus(1, 200, 60, 0.1);
    let error = read_error(&corpus.config(&[]), tuning(0, 1, 1000, 3));
    assert!(error.contains("part-0.parquet") && error.contains("injected"), "{error}");
}
