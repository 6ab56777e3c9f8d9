//! Text to shards: tokenizers, documents, interruption.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed test may panic")]

use data_pipeline::prepare::documents::{DocumentOptions, open};
use data_pipeline::prepare::record::{Plan, Record};
use data_pipeline::prepare::{
    TokenizeOptions, TokenizeSummary, Tokenizer, TrainOptions, chunk, inspect, tokenize,
    train_tokenizer,
};
use data_pipeline::{DataError, Result};
use std::io::Write;
use std::path::{Path, PathBuf};

/// A few hundred distinct documents of English-like text.
fn documents() -> Vec<String> {
    let words = "the people of these states shall not be denied a just and lasting peace in 1865, \
                 nor liberty; we'll hold that government, of the people, won't perish"
        .split(' ')
        .collect::<Vec<_>>();
    let document = |d: usize| -> String {
        let text: Vec<&str> =
            (0..30 + d % 50).map(|w| words[(w * w + d * 7) % words.len()]).collect();
        format!("Document {d}: {}.\n\nÜber — {d}!", text.join(" "))
    };
    (0..300).map(document).collect()
}

fn jsonl(folder: &Path, name: &str, documents: &[String]) -> PathBuf {
    let path = folder.join(name);
    let mut text = String::new();
    for document in documents {
        text += &serde_json::json!({"id": 1, "text": document, "meta": {"a": [1, 2]}}).to_string();
        text.push('\n');
    }
    std::fs::write(&path, text).unwrap();
    path
}

fn train(folder: &Path, vocab_size: usize, name: &str) -> PathBuf {
    let output = folder.join(name);
    let made = train_tokenizer(&TrainOptions {
        inputs: vec![jsonl(folder, "train.jsonl", &documents()).display().to_string()],
        documents: DocumentOptions::default(),
        output: output.clone(),
        vocab_size,
        min_frequency: 2,
        max_bytes: None,
    })
    .unwrap();
    assert_eq!((made.vocab_size, made.documents), (vocab_size, 300));
    output
}

fn options(tokenizer: &Path, output: &Path, inputs: &[&Path]) -> TokenizeOptions {
    TokenizeOptions {
        inputs: inputs.iter().map(|path| path.display().to_string()).collect(),
        documents: DocumentOptions::default(),
        tokenizer: tokenizer.to_path_buf(),
        output: output.to_path_buf(),
        shard_tokens: 1 << 30,
        row_group_tokens: Some(2000),
        bos: true,
        eos: true,
        threads: Some(2),
        overwrite: false,
    }
}

/// Texts of all documents in the shards of a folder.
fn texts(folder: &Path, tokenizer: &Path) -> Vec<String> {
    let tokenizer = Tokenizer::load(tokenizer).unwrap();
    let pattern = folder.display().to_string();
    let views = inspect::first_documents(&pattern, Some(&tokenizer), usize::MAX, usize::MAX);
    views.unwrap().into_iter().map(|view| view.text.unwrap()).collect()
}

#[test]
fn encodes_as_the_python_package_does() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let tokenizer = Tokenizer::load(&folder.join("tokenizer.json")).unwrap();
    assert_eq!((tokenizer.bos_id, tokenizer.eos_id), (Some(504), Some(505)));
    let cases = std::fs::read_to_string(folder.join("encodings.json")).unwrap();
    let cases: Vec<serde_json::Value> = serde_json::from_str(&cases).unwrap();
    assert!(cases.len() > 10);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(tokenizer.encode(text).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    }
}

#[test]
fn training_fills_the_vocabulary_and_is_repeatable() {
    let folder = tempfile::tempdir().unwrap();
    let a = train(folder.path(), 320, "a.json");
    let b = train(folder.path(), 320, "b.json");
    assert_eq!(std::fs::read(&a).unwrap(), std::fs::read(b).unwrap());
    assert_eq!(Tokenizer::load(&a).unwrap().vocab_size, 320);
    let padded = train(folder.path(), 8000, "c.json");
    assert_eq!(Tokenizer::load(&padded).unwrap().vocab_size, 8000);
    assert!(std::fs::read_to_string(&padded).unwrap().contains("<|reserved_special_token_7|>"));
}

#[test]
fn vocabularies_that_the_text_cannot_fill_are_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let input = jsonl(folder.path(), "two.jsonl", &documents()[..2]);
    let train = |vocab_size: usize, output: PathBuf| {
        let inputs = vec![input.display().to_string()];
        let (documents, min_frequency, max_bytes) = (DocumentOptions::default(), 2, None);
        train_tokenizer(&TrainOptions {
            inputs,
            documents,
            output,
            vocab_size,
            min_frequency,
            max_bytes,
        })
    };
    for (vocab_size, expected) in [
        (100_000_000, "100000000 is too large: a model has at most 16777216"),
        (5_000_000, "the text only has "),
        (100, "100 is too small"),
    ] {
        let error = train(vocab_size, folder.path().join("t.json")).unwrap_err();
        assert!(error.is_bad_input() && error.to_string().contains(expected), "{error}");
    }
    // A folder of that name cannot be replaced: what was written beside it goes.
    std::fs::create_dir(folder.path().join("taken.json")).unwrap();
    train(400, folder.path().join("taken.json")).unwrap_err();
    assert!(!folder.path().join("taken.json.partial").exists());
}

#[test]
fn shards_hold_the_documents_with_begin_and_end() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = train(folder.path(), 320, "tokenizer.json");
    let (input, output) = (folder.path().join("train.jsonl"), folder.path().join("shards"));
    let made = tokenize(&options(&tokenizer, &output, &[&input])).unwrap();
    assert_eq!((made.documents, made.shards), (300, 1));
    let wanted: Vec<String> =
        documents().iter().map(|text| format!("<|begin_of_text|>{text}<|end_of_text|>")).collect();
    assert!(texts(&output, &tokenizer) == wanted);
    let report = &inspect::inspect(&output.display().to_string()).unwrap()[0];
    assert_eq!((report.tokens, report.documents), (made.tokens, 300));
    assert!(report.row_groups > 3);
    let loaded = Tokenizer::load(&tokenizer).unwrap();
    let verified = inspect::verify(&output.display().to_string(), Some(&loaded), None).unwrap();
    assert!(verified.iter().all(|shard| shard.outcome.is_ok()));
    let verified = inspect::verify(&output.display().to_string(), None, Some(300)).unwrap();
    assert!(matches!(verified[0].outcome, Err(DataError::TokenOutOfRange { .. })));
}

#[test]
fn an_interrupted_command_goes_on_and_ends_with_the_same_shards() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = train(folder.path(), 320, "tokenizer.json");
    let documents: Vec<String> = (0..40).flat_map(|_| documents()).collect();
    let (a, b) = documents.split_at(9000);
    let (a, b) = (jsonl(folder.path(), "a.jsonl", a), jsonl(folder.path(), "b.jsonl", b));
    let run = |output: &Path| -> Result<TokenizeSummary> {
        let options = options(&tokenizer, output, &[&a, &b]);
        tokenize(&TokenizeOptions { shard_tokens: 100_000, ..options })
    };
    let (whole, broken) = (folder.path().join("whole"), folder.path().join("broken"));
    let expected = run(&whole).unwrap();
    // A bad line behind the first shards stops the second one half way.
    let good = std::fs::read(&b).unwrap();
    let times = std::fs::metadata(&b).unwrap().modified().unwrap();
    let mut bad = good.clone();
    let at = bad.len() - 5;
    bad[at] = b'\n';
    std::fs::write(&b, &bad).unwrap();
    let error = run(&broken).unwrap_err().to_string();
    assert!(error.contains("b.jsonl`, line 3000: is not a JSON object"), "{error}");
    std::fs::write(&b, &good).unwrap();
    std::fs::File::open(&b).unwrap().set_modified(times).unwrap();
    std::fs::write(broken.join("shard-00000-001.parquet.partial"), "torn").unwrap();
    let resumed = run(&broken).unwrap();
    assert!(resumed.shards_from_before > 0);
    assert_eq!((resumed.documents, resumed.tokens), (expected.documents, expected.tokens));
    assert!(!broken.join("shard-00000-001.parquet.partial").exists());
    assert_eq!(run(&broken).unwrap().shards_from_before, expected.shards, "nothing left to do");
    assert!(texts(&whole, &tokenizer) == texts(&broken, &tokenizer));
}

#[test]
fn no_shard_is_longer_than_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = train(folder.path(), 320, "tokenizer.json");
    let (input, output) = (folder.path().join("train.jsonl"), folder.path().join("shards"));
    let asked = options(&tokenizer, &output, &[&input]);
    let made = tokenize(&TokenizeOptions { shard_tokens: 1000, ..asked }).unwrap();
    let shards = inspect::inspect(&output.display().to_string()).unwrap();
    let longest = shards.iter().map(|shard| shard.longest_document).max().unwrap();
    let (last, whole) = shards.split_last().unwrap();
    assert!(last.tokens <= 1000 && longest < 1000 && whole.len() > 20);
    for shard in whole {
        assert!((1001 - longest..=1000).contains(&shard.tokens), "{shard:?}");
    }
    assert_eq!(shards.iter().map(|shard| shard.documents).sum::<u64>(), made.documents);
}

#[test]
fn two_commands_do_not_write_into_one_folder() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = train(folder.path(), 320, "tokenizer.json");
    let (input, output) = (folder.path().join("train.jsonl"), folder.path().join("shards"));
    let plan = Plan {
        writer: "test".into(),
        tokenizer_sha256: String::new(),
        inputs: Vec::new(),
        settings: String::new(),
    };
    let first = Record::open(&output, &plan, false).unwrap();
    let second = TokenizeOptions { overwrite: true, ..options(&tokenizer, &output, &[&input]) };
    let error = tokenize(&second).unwrap_err();
    assert!(error.is_bad_input());
    let (error, pid) = (error.to_string(), std::process::id());
    assert!(error.contains("shards`: process ") && error.contains(&pid.to_string()), "{error}");
    drop(first);
    tokenize(&second).unwrap();
}

#[test]
fn another_command_does_not_touch_the_shards() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = train(folder.path(), 320, "tokenizer.json");
    let (input, output) = (folder.path().join("train.jsonl"), folder.path().join("shards"));
    let asked = options(&tokenizer, &output, &[&input]);
    tokenize(&asked).unwrap();
    let other = TokenizeOptions { bos: false, ..asked };
    let error = tokenize(&other).unwrap_err().to_string();
    assert!(error.contains("(other options)") && error.contains("--overwrite"), "{error}");
    tokenize(&TokenizeOptions { overwrite: true, ..other.clone() }).unwrap();
    assert!(texts(&output, &tokenizer)[0].starts_with("Document 0"));
    let missing = TokenizeOptions { tokenizer: folder.path().join("no.json"), ..other };
    let error = tokenize(&missing).unwrap_err().to_string();
    assert!(error.contains("no.json` does not exist"), "{error}");
}

#[test]
fn documents_of_every_kind_of_file() {
    let folder = tempfile::tempdir().unwrap();
    let read = |name: &str, bytes: &[u8], split_on: Option<&str>| -> Result<Vec<String>> {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let options =
            DocumentOptions { split_on: split_on.map(String::from), ..DocumentOptions::default() };
        open(&path, &options)?.collect()
    };
    let compress = |bytes: &[u8]| zstd::encode_all(bytes, 3).unwrap();
    assert_eq!(read("a.txt", b"\none\n\ntwo\n", None).unwrap(), ["one\n\ntwo"]);
    assert_eq!(read("a.txt", b"one\n\n\n\n\ntwo\n\n", Some("\n\n")).unwrap(), ["one", "two"]);
    assert_eq!(read("a.txt.zst", &compress(b"one"), None).unwrap(), ["one"]);
    let lines =
        b"{\"text\": \"one\"}\n\n{\"x\": {\"text\": 1}, \"text\": \"tw\\u00f6\"}\n{\"text\": \"\"}";
    assert_eq!(read("a.jsonl", lines, None).unwrap(), ["one", "tw\u{f6}"]);
    assert_eq!(read("a.jsonl.zst", &compress(lines), None).unwrap(), ["one", "tw\u{f6}"]);
    let error = |name, bytes: &[u8]| read(name, bytes, None).unwrap_err().to_string();
    let missing = error("a.jsonl", b"{\"text\": \"one\"}\n{\"body\": \"two\"}\n");
    assert!(
        missing.contains("line 2: has no field `text`; name it with --text-field"),
        "{missing}"
    );
    assert!(error("a.txt", b"ab\xff").contains("not UTF-8 at byte 2"));
    assert!(error("a.parquet", b"no").contains("damaged or not parquet"));
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    assert_eq!(read("a.jsonl.gz", &gzip(lines), None).unwrap(), ["one", "tw\u{f6}"]);
    let members = [gzip(b"one "), gzip(b"two")].concat();
    assert_eq!(read("a.txt.gz", &members, None).unwrap(), ["one two"]);
    let text: Vec<u8> = (0..100_000u32).flat_map(|n| n.to_string().into_bytes()).collect();
    for (name, whole) in [("b.txt.zst", compress(&text)), ("b.txt.gz", gzip(&text))] {
        let cut = read(name, &whole[..whole.len() / 2], None).unwrap_err();
        assert!(cut.is_bad_input());
        let cut = cut.to_string();
        assert!(cut.contains(name) && cut.contains("cut short or damaged: copy it again"), "{cut}");
        assert!(error(name, b"").contains("is empty (0 bytes)"));
    }
    for name in ["a.txt.bz2", "a.tar", "a.tar.gz", "a.jsonl.xz"] {
        assert!(error(name, b"x").contains("may be compressed as .zst or .gz"), "{name}");
    }
    let parquet = error("a.parquet", b"no");
    assert!(parquet.contains("input `") && !parquet.contains("tokenize"), "{parquet}");
}

#[test]
fn reads_text_from_parquet() {
    use arrow_array::{ArrayRef, RecordBatch, StringArray};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let column: ArrayRef =
        std::sync::Arc::new(StringArray::from(vec![Some("one"), None, Some("two")]));
    let batch = RecordBatch::try_from_iter([("body", column)]).unwrap();
    let file = std::fs::File::create(&path).unwrap();
    let mut writer = parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    let options = |field: &str| DocumentOptions { text_field: field.into(), split_on: None };
    let texts: Result<Vec<String>> = open(&path, &options("body")).unwrap().collect();
    assert_eq!(texts.unwrap(), ["one", "two"]);
    let error = open(&path, &options("text")).err().unwrap().to_string();
    assert!(error.contains("the columns are [\"body\"]; name one with --text-field"), "{error}");
}

/// Llama 3's reference, character by character.
fn chunks_by_the_reference(text: &str) -> Vec<String> {
    let characters: Vec<char> = text.chars().collect();
    let mut chunks = Vec::new();
    for part in characters.chunks(400_000) {
        let (mut start, mut run, mut space) = (0, 0, part[0].is_whitespace());
        for (at, character) in part.iter().enumerate() {
            if character.is_whitespace() == space {
                run += 1;
                if run > 25_000 {
                    chunks.push(part[start..at].iter().collect());
                    (start, run) = (at, 1);
                }
            } else {
                (run, space) = (1, character.is_whitespace());
            }
        }
        chunks.push(part[start..].iter().collect());
    }
    chunks
}

#[test]
fn long_texts_are_cut_as_llama_3_cuts_them() {
    let run = |character: &str, count: usize| character.repeat(count);
    for text in [
        "short".to_string(),
        run("ü ", 500_000),
        run("x", 60_001),
        format!("{} {}{}", run("a", 25_000), run("b", 25_001), run("c ", 10)),
        format!("{}x{}", run(" ", 30_000), run("é", 24_999)),
        run("word and ", 90_000) + &run("z", 70_000),
        run("y", 30_000) + &run("two parts ", 80_000),
    ] {
        let chunks: Vec<&str> = chunk::chunks(&text).collect();
        assert!(chunks == chunks_by_the_reference(&text), "{} bytes", text.len());
        assert_eq!(chunks.concat(), text);
    }
}

#[test]
fn a_tokenizer_with_an_absurd_id_is_refused_before_room_is_made_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = train(folder.path(), 400, "tokenizer.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
    for id in [1_u64 << 24, u64::from(u32::MAX), u64::MAX] {
        value["model"]["vocab"]["a"] = id.into();
        std::fs::write(&path, value.to_string()).unwrap();
        let error = Tokenizer::load(&path).err().unwrap().to_string();
        assert!(error.contains("has an id of") && error.contains("16777215"), "{error}");
    }
}

#[test]
fn metas_format_encodes_as_the_tokenizer_it_was_made_from() {
    let folder = tempfile::tempdir().unwrap();
    let json = train(folder.path(), 400, "tokenizer.json");
    let trained = Tokenizer::load(&json).unwrap();
    let model = folder.path().join("tokenizer.model");
    let value: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let specials = value["added_tokens"].as_array().unwrap().len() as u32;
    let mut file = std::fs::File::create(&model).unwrap();
    for id in 0..400 - specials {
        let bytes = token_bytes(&value, id);
        writeln!(file, "{} {id}", base64(&bytes)).unwrap();
    }
    let meta = Tokenizer::load(&model).unwrap();
    assert_eq!(meta.vocab_size, (400 - specials) as usize + 256);
    assert_eq!(meta.bos_id, Some(400 - specials));
    for text in documents() {
        assert_eq!(meta.encode(&text).unwrap(), trained.encode(&text).unwrap());
    }
    std::fs::write(&model, "aGk= 0\nnot-base64! 1\n").unwrap();
    let error = Tokenizer::load(&model).err().unwrap().to_string();
    assert!(error.contains("line 2: is not base64"), "{error}");
}

fn token_bytes(tokenizer: &serde_json::Value, id: u32) -> Vec<u8> {
    let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
    let token = vocab.iter().find(|(_, value)| **value == id).unwrap().0;
    let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
    token.chars().map(|c| alphabet.iter().position(|a| *a == c).unwrap() as u8).collect()
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let word =
            group.iter().fold(0u32, |word, &b| word << 8 | u32::from(b)) << (8 * (3 - group.len()));
        for digit in 0..4 {
            let value = (word >> (18 - 6 * digit)) & 63;
            text.push(if digit <= group.len() { DIGITS[value as usize] as char } else { '=' });
        }
    }
    text
}
