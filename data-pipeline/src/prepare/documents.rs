//! Documents out of text, JSON lines, and parquet files.
//!
//! - `.txt`, `.md` and files without a known ending: the file is one document, or, with `split_on`,
//!   one at each occurrence of a string. Line ends around a document are not part of it.
//! - `.jsonl`, `.ndjson`, `.json` (one object a line): the string in the text field.
//! - `.parquet`: the rows of the text column.
//!
//! Text and JSON lines may be compressed with zstd (`.zst`) or gzip (`.gz`). Documents without text
//! are left out.

use crate::error::{DataError, Result};
use arrow_array::Array;
use arrow_array::cast::AsArray;
use arrow_schema::DataType;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// The longest document, in bytes; a longer one is most likely a file that should be split.
const MAX_DOCUMENT_BYTES: usize = 1 << 30;
/// Buffer of a file that is read.
const BUFFER_BYTES: usize = 1 << 20;

/// How documents are found in files.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DocumentOptions {
    /// Field of a JSON object, and column of a parquet file, that holds the text.
    pub text_field: String,
    /// String between documents of a plain text file; `None`: a file is a document.
    pub split_on: Option<String>,
}

impl Default for DocumentOptions {
    fn default() -> Self {
        DocumentOptions { text_field: "text".into(), split_on: None }
    }
}

/// One file of documents.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct InputFile {
    /// Its path.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
}

impl InputFile {
    /// About how many bytes of text it holds, before decompression.
    pub fn text_bytes(&self) -> u64 {
        match kind(&self.path) {
            (Kind::Parquet, _) => self.bytes * 3,
            (_, Some(_)) => self.bytes * 3,
            _ => self.bytes,
        }
    }
}

/// The files that `patterns` name, sorted: files, folders (all files in them, not deeper), globs.
pub fn find_inputs(patterns: &[String]) -> Result<Vec<InputFile>> {
    let mut files = Vec::new();
    for pattern in patterns {
        let none = |why: String| DataError::Input {
            path: pattern.into(),
            place: "as given".into(),
            detail: why,
        };
        let is_folder = Path::new(pattern).is_dir();
        let glob_pattern = match is_folder {
            true => format!("{}/*", glob::Pattern::escape(pattern.trim_end_matches('/'))),
            false => pattern.clone(),
        };
        let before = files.len();
        let exact = Path::new(pattern).is_file().then(|| PathBuf::from(pattern));
        let paths = glob::glob(&glob_pattern)
            .map_err(|error| none(format!("no file, and no pattern: {error}")))?;
        let paths = paths.filter_map(|path| path.ok());
        for path in exact.into_iter().chain(paths.filter(|path| path.as_os_str() != &**pattern)) {
            let hidden = path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
            if path.is_file() && !hidden {
                let facts = path.metadata().map_err(|error| DataError::io("read", &path, error))?;
                files.push(InputFile { path, bytes: facts.len() });
            }
        }
        if files.len() == before {
            return Err(none(if is_folder {
                "the folder holds no files".into()
            } else {
                "no such file; give a file, a folder or a quoted glob".into()
            }));
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    files.dedup();
    Ok(files)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Text,
    JsonLines,
    Parquet,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compression {
    Zstd,
    Gzip,
}

/// Endings of files that hold text in a form that is not read.
const UNSUPPORTED: [&str; 9] = ["bz2", "xz", "lz4", "br", "zip", "7z", "tar", "tgz", "rar"];

/// Kind of a file by its name, and how it is compressed.
fn kind(path: &Path) -> (Kind, Option<Compression>) {
    let name = path.to_string_lossy().to_ascii_lowercase();
    let (name, compressed) = match name.rsplit_once('.') {
        Some((name, "zst")) => (name.to_string(), Some(Compression::Zstd)),
        Some((name, "gz")) => (name.to_string(), Some(Compression::Gzip)),
        _ => (name, None),
    };
    let kind = match name.rsplit_once('.').map_or("", |(_, end)| end) {
        "jsonl" | "ndjson" | "json" => Kind::JsonLines,
        "parquet" => Kind::Parquet,
        _ => Kind::Text,
    };
    (kind, compressed)
}

/// A stream of documents, none of them empty.
pub type Documents = Box<dyn Iterator<Item = Result<String>> + Send>;

/// Opens a file of documents.
pub fn open(path: &Path, options: &DocumentOptions) -> Result<Documents> {
    let (kind, compressed) = kind(path);
    refuse_unsupported(path, kind, compressed)?;
    if kind == Kind::Parquet {
        return Ok(Box::new(ParquetRows::open(path, options)?));
    }
    let file = File::open(path).map_err(|error| DataError::io("open", path, error))?;
    let reader: Box<dyn Read + Send> = match compressed {
        Some(Compression::Zstd) => {
            let decoder = zstd::stream::read::Decoder::new(file)
                .map_err(|error| DataError::io("decompress", path, error))?;
            Box::new(decoder)
        }
        Some(Compression::Gzip) => Box::new(flate2::read::MultiGzDecoder::new(file)),
        None => Box::new(file),
    };
    let reader = Box::new(BufReader::with_capacity(BUFFER_BYTES, reader));
    let (path, reader) = (path.to_path_buf(), reader);
    Ok(match kind {
        Kind::JsonLines => {
            let field = options.text_field.clone();
            Box::new(JsonLines { path, reader, field, line: 0, buffer: Vec::new() })
        }
        _ => {
            let split_on = options.split_on.clone().filter(|split_on| !split_on.is_empty());
            let split_on = split_on.map(String::into_bytes);
            Box::new(TextParts { path, reader, split_on, number: 0, done: false })
        }
    })
}

/// Refuses archives and compressions that would be read as text, and a compressed file of no bytes,
/// which no compressor makes.
fn refuse_unsupported(path: &Path, kind: Kind, compressed: Option<Compression>) -> Result<()> {
    let fail = |detail: String| {
        Err(DataError::Input { path: path.to_path_buf(), place: "whole file".into(), detail })
    };
    let outer = if compressed.is_some() { path.with_extension("") } else { path.to_path_buf() };
    let end = outer.extension().map(|end| end.to_string_lossy().to_ascii_lowercase());
    if let Some(end) = end.filter(|end| UNSUPPORTED.contains(&end.as_str())) {
        return fail(format!(
            "`.{end}` is not supported; text and JSON lines may be compressed as .zst or .gz: \
             unpack it first"
        ));
    }
    if compressed.is_none() {
        return Ok(());
    }
    if kind == Kind::Parquet {
        return fail("a parquet file is compressed inside: unpack it first".into());
    }
    let facts = path.metadata().map_err(|error| DataError::io("read", path, error))?;
    if facts.len() == 0 {
        return fail("is empty (0 bytes), not compressed text; copy it again, or delete it".into());
    }
    Ok(())
}

/// What reading a file failed with: the system's reason, or that of a decompressor, which has no
/// number of the system.
fn read_error(path: &Path, place: String, error: std::io::Error) -> DataError {
    if kind(path).1.is_none() || error.raw_os_error().is_some() {
        return DataError::io("read", path, error);
    }
    let detail = format!(
        "cannot be decompressed: {error}; it is cut short or damaged: \
                          copy it again, or compress it again"
    );
    DataError::Input { path: path.to_path_buf(), place, detail }
}

/// Reads up to and with `delimiter` (all that is left without one), within the bound of a document.
fn read_until(
    reader: &mut dyn BufRead,
    delimiter: Option<&[u8]>,
    path: &Path,
    place: &dyn Fn() -> String,
) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let failed = |error| read_error(path, place(), error);
    loop {
        let count = match delimiter.and_then(|delimiter| delimiter.last()) {
            Some(&last) => reader.take(MAX_DOCUMENT_BYTES as u64).read_until(last, &mut bytes),
            None => reader.take(MAX_DOCUMENT_BYTES as u64 + 1).read_to_end(&mut bytes),
        };
        let count = count.map_err(failed)?;
        if bytes.len() > MAX_DOCUMENT_BYTES {
            return Err(DataError::Input {
                path: path.to_path_buf(),
                place: place(),
                detail: format!(
                    "the document is longer than {MAX_DOCUMENT_BYTES} bytes; split it with \
                     --split-on"
                ),
            });
        }
        if count == 0 || delimiter.is_some_and(|delimiter| bytes.ends_with(delimiter)) {
            return Ok(bytes);
        }
    }
}

fn to_text(bytes: Vec<u8>, path: &Path, place: String) -> Result<String> {
    String::from_utf8(bytes).map_err(|error| DataError::Input {
        path: path.to_path_buf(),
        place,
        detail: format!(
            "is not UTF-8 at byte {}; convert it first",
            error.utf8_error().valid_up_to()
        ),
    })
}

struct TextParts {
    path: PathBuf,
    reader: Box<dyn BufRead + Send>,
    split_on: Option<Vec<u8>>,
    number: u64,
    done: bool,
}

impl TextParts {
    fn read(&mut self) -> Result<Option<String>> {
        while !self.done {
            self.number += 1;
            let number = self.number;
            let place = || format!("document {number}");
            let delimiter = self.split_on.as_deref();
            let mut bytes = read_until(&mut self.reader, delimiter, &self.path, &place)?;
            match delimiter {
                Some(delimiter) if bytes.ends_with(delimiter) => {
                    bytes.truncate(bytes.len() - delimiter.len());
                }
                _ => self.done = true,
            }
            let text = to_text(bytes, &self.path, place())?;
            let text = text.trim_matches(['\n', '\r']);
            if !text.is_empty() {
                return Ok(Some(text.to_string()));
            }
        }
        Ok(None)
    }
}

impl Iterator for TextParts {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Result<String>> {
        let read = self.read();
        self.done |= read.is_err();
        read.transpose()
    }
}

struct JsonLines {
    path: PathBuf,
    reader: Box<dyn BufRead + Send>,
    field: String,
    line: u64,
    buffer: Vec<u8>,
}

impl JsonLines {
    fn read(&mut self) -> Result<Option<String>> {
        loop {
            self.line += 1;
            let line = self.line;
            let place = || format!("line {line}");
            self.buffer = read_until(&mut self.reader, Some(b"\n"), &self.path, &place)?;
            if self.buffer.is_empty() {
                return Ok(None);
            }
            if self.buffer.trim_ascii().is_empty() {
                continue;
            }
            let fail =
                |detail| DataError::Input { path: self.path.clone(), place: place(), detail };
            let mut json = serde_json::Deserializer::from_slice(&self.buffer);
            let text = TextField(&self.field)
                .deserialize(&mut json)
                .and_then(|text| json.end().map(|()| text))
                .map_err(|error| fail(format!("is not a JSON object with text: {error}")))?;
            match text {
                Some(text) if text.is_empty() => {}
                Some(text) => return Ok(Some(text)),
                None => {
                    let detail =
                        format!("has no field `{}`; name it with --text-field", self.field);
                    return Err(fail(detail));
                }
            }
        }
    }
}

impl Iterator for JsonLines {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Result<String>> {
        self.read().transpose()
    }
}

/// Reads one field of an object and skips the others without building them.
struct TextField<'f>(&'f str);

impl<'de> DeserializeSeed<'de> for TextField<'_> {
    type Value = Option<String>;

    fn deserialize<D: serde::Deserializer<'de>>(self, json: D) -> Result<Option<String>, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TextField<'_> {
    type Value = Option<String>;

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "an object with the string `{}`", self.0)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Option<String>, A::Error> {
        let mut text = None;
        while let Some(key) = map.next_key::<std::borrow::Cow<'de, str>>()? {
            if key == self.0 {
                text = map.next_value::<Option<String>>()?.or(Some(String::new()));
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(text)
    }
}

/// What is wrong with a shard, said of an input, which nothing here made.
fn input_error(error: DataError) -> DataError {
    match error {
        DataError::Damaged { path, bytes, detail } => DataError::Input {
            path,
            place: format!("{bytes} bytes"),
            detail: format!("is damaged or not parquet: {detail}; copy it again"),
        },
        other => other,
    }
}

struct ParquetRows {
    path: PathBuf,
    batches: ParquetRecordBatchReader,
    texts: std::vec::IntoIter<String>,
}

impl ParquetRows {
    fn open(path: &Path, options: &DocumentOptions) -> Result<Self> {
        let footer = crate::shards::Footer::read(path).map_err(input_error)?;
        let field = &options.text_field;
        let fail = |detail: String| DataError::Input {
            path: path.to_path_buf(),
            place: format!("column `{field}`"),
            detail,
        };
        let schema = footer.metadata.file_metadata().schema_descr_ptr();
        let fields = schema.root_schema().get_fields();
        let root = fields.iter().position(|column| column.name() == field).ok_or_else(|| {
            let names: Vec<_> = fields.iter().map(|column| column.name()).collect();
            fail(format!("does not exist; the columns are {names:?}; name one with --text-field"))
        })?;
        let file = File::open(path).map_err(|error| DataError::io("open", path, error))?;
        let batches = ParquetRecordBatchReaderBuilder::try_new(file)
            .map(|builder| builder.with_projection(ProjectionMask::roots(&schema, [root])))
            .and_then(|builder| builder.build())
            .map_err(|error| fail(error.to_string()))?;
        Ok(ParquetRows { path: path.to_path_buf(), batches, texts: Vec::new().into_iter() })
    }

    fn read(&mut self) -> Result<Option<String>> {
        loop {
            if let Some(text) = self.texts.find(|text| !text.is_empty()) {
                return Ok(Some(text));
            }
            let Some(batch) = self.batches.next() else { return Ok(None) };
            let fail = |detail: String| DataError::Input {
                path: self.path.clone(),
                place: "text column".into(),
                detail,
            };
            let batch = batch.map_err(|error| {
                fail(format!("cannot be read: {error}; the file may be damaged: copy it again"))
            })?;
            let column = batch.column(0);
            let collect = |texts: &mut dyn Iterator<Item = Option<&str>>| -> Vec<String> {
                texts.flatten().map(str::to_string).collect()
            };
            self.texts = match column.data_type() {
                DataType::Utf8 => collect(&mut column.as_string::<i32>().iter()),
                DataType::LargeUtf8 => collect(&mut column.as_string::<i64>().iter()),
                DataType::Utf8View => collect(&mut column.as_string_view().iter()),
                other => return Err(fail(format!("has type {other}, text is needed"))),
            }
            .into_iter();
        }
    }
}

impl Iterator for ParquetRows {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Result<String>> {
        self.read().transpose()
    }
}
