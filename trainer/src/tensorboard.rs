//! Writes TensorBoard event files: scalars only.
//!
//! A file is a sequence of records, each `length (u64 LE), masked CRC32C of the length, data,
//! masked CRC32C of the data`, and each data is a protobuf `Event`. The messages below state the
//! few fields used here, with the numbers of TensorFlow's `event.proto` and `summary.proto`. Every
//! start of a run adds a file of its own to the folder; a session start tells readers which steps
//! of the files before it were lost with a crash.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

/// `SessionLog.SessionStatus.START`.
const SESSION_START: i32 = 1;
/// How many files of one second, host and process may stand side by side.
const MAX_FILES_PER_SECOND: u32 = 1000;

#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    /// A member of a oneof in TensorFlow's schema: written even when it is zero.
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// An event file that is being written. What was not flushed is lost when it is dropped by a crash.
#[derive(Debug)]
pub struct TensorboardWriter {
    file: BufWriter<File>,
    path: PathBuf,
}

impl TensorboardWriter {
    /// Starts a new event file in `dir`, which is made if need be. Files of earlier starts stay.
    ///
    /// # Errors
    /// When the folder or the file cannot be made or written.
    pub fn create(dir: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let (file, path) = create_file(dir)?;
        let mut writer = Self { file: BufWriter::new(file), path };
        writer.event(0, What::FileVersion("brain.Event:2".to_owned()))?;
        writer.flush()?;
        Ok(writer)
    }

    /// The file that is written.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Says that training starts at `first_step`: readers drop that step and later ones from the
    /// files before this one.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn session_start(&mut self, first_step: u64) -> io::Result<()> {
        self.event(first_step, What::SessionLog(SessionLog { status: SESSION_START }))
    }

    /// Adds one value. TensorBoard holds values as 32-bit floats.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn scalar(&mut self, tag: &str, step: u64, value: f64) -> io::Result<()> {
        let value = Value { tag: tag.to_owned(), simple_value: Some(value as f32) };
        self.event(step, What::Summary(Summary { value: vec![value] }))
    }

    /// Hands everything written so far to the operating system: call it once a step.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }

    fn event(&mut self, step: u64, what: What) -> io::Result<()> {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let step = i64::try_from(step).unwrap_or(i64::MAX);
        let event = Event { wall_time: since_epoch.as_secs_f64(), step, what: Some(what) };
        write_record(&mut self.file, &event.encode_to_vec())
    }
}

/// Makes a file that did not exist. Readers take the files of a folder in the order of their names:
/// seconds come first.
fn create_file(dir: &Path) -> io::Result<(File, PathBuf)> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let host = rustix::system::uname().nodename().to_string_lossy().replace(['/', '.'], "-");
    let process = std::process::id();
    for number in 0..MAX_FILES_PER_SECOND {
        let name = format!("events.out.tfevents.{seconds:010}.{host}.{process}.{number:03}");
        let path = dir.join(name);
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((file, path)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    let message = format!("{} holds {MAX_FILES_PER_SECOND} files of this second", dir.display());
    Err(io::Error::new(io::ErrorKind::AlreadyExists, message))
}

/// The framing of TFRecord.
fn write_record(out: &mut impl Write, data: &[u8]) -> io::Result<()> {
    let length = (data.len() as u64).to_le_bytes();
    out.write_all(&length)?;
    out.write_all(&masked_crc32c(&length).to_le_bytes())?;
    out.write_all(data)?;
    out.write_all(&masked_crc32c(data).to_le_bytes())
}

/// TFRecord masks its checksums, because the CRC of data that holds CRCs is weak.
fn masked_crc32c(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// Reads a folder as TensorBoard's server does and prints what it would show.
    const READER: &str = r#"
import json, math, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1]).Reload()
tags = events.Tags()["scalars"]
number = lambda value: value if math.isfinite(value) else repr(value)
print(json.dumps({t: [[e.step, number(e.value)] for e in events.Scalars(t)] for t in tags}))
"#;

    /// What the real `tensorboard` package finds in `dir`.
    fn read_with_tensorboard(dir: &Path) -> serde_json::Value {
        let packages = concat!(env!("CARGO_MANIFEST_DIR"), "/../.python-tests");
        assert!(Path::new(packages).is_dir(), "{packages} is missing: ops/setup --python-tests");
        let output = Command::new("python3")
            .args(["-c", READER])
            .arg(dir)
            .env("PYTHONPATH", packages)
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{errors}");
        assert!(!errors.contains("Error"), "{errors}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    #[test]
    fn tensorboard_reads_what_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = TensorboardWriter::create(dir.path()).unwrap();
        writer.session_start(1).unwrap();
        for step in 1..=3 {
            writer.scalar("train/loss", step, 8.0 / step as f64).unwrap();
            writer.scalar("train/skipped", step, 0.0).unwrap();
        }
        writer.flush().unwrap();
        let expected = serde_json::json!({
            "train/loss": [[1, 8.0], [2, 4.0], [3, f64::from(8.0f32 / 3.0)]],
            "train/skipped": [[1, 0.0], [2, 0.0], [3, 0.0]],
        });
        assert_eq!(read_with_tensorboard(dir.path()), expected);
    }

    #[test]
    fn steps_lost_with_a_crash_are_replaced_by_those_of_the_next_start() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = TensorboardWriter::create(dir.path()).unwrap();
        for step in 1..=4 {
            first.scalar("loss", step, 1.0).unwrap();
        }
        first.flush().unwrap();
        let mut second = TensorboardWriter::create(dir.path()).unwrap();
        assert_ne!(first.path(), second.path());
        second.session_start(3).unwrap();
        second.scalar("loss", 3, 0.5).unwrap();
        second.flush().unwrap();
        let expected = serde_json::json!({"loss": [[1, 1.0], [2, 1.0], [3, 0.5]]});
        assert_eq!(read_with_tensorboard(dir.path()), expected);
    }

    #[test]
    fn values_that_are_not_finite_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = TensorboardWriter::create(dir.path()).unwrap();
        writer.scalar("loss", 1, f64::NAN).unwrap();
        writer.scalar("loss", 2, 2.0).unwrap();
        writer.flush().unwrap();
        let expected = serde_json::json!({"loss": [[1, "nan"], [2, 2.0]]});
        assert_eq!(read_with_tensorboard(dir.path()), expected);
    }

    #[test]
    fn the_mask_agrees_with_published_values() {
        // CRC32C of "123456789" is 0xe3069283 (RFC 3720); rotated by 15 and offset.
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(masked_crc32c(b"123456789"), 0xc78a_b0e5);
    }

    #[test]
    fn a_scalar_is_encoded_as_tensorflow_does() {
        let value = Value { tag: "a".to_owned(), simple_value: Some(0.0) };
        let what = Some(What::Summary(Summary { value: vec![value] }));
        let event = Event { wall_time: 1.0, step: 2, what };
        let expected = [
            0x09, 0, 0, 0, 0, 0, 0, 0xf0, 0x3f, // 1: double 1.0
            0x10, 2, // 2: varint 2
            0x2a, 10, 0x0a, 8, 0x0a, 1, b'a', 0x15, 0, 0, 0, 0, // 5: {1: {1: "a", 2: 0.0f}}
        ];
        assert_eq!(event.encode_to_vec(), expected);
    }
}
