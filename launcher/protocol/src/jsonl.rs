//! JSON lines that survive a crash: one `O_APPEND` write a line, a torn tail cut on restart.

use crate::message::StepReport;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Longest line that is read; a longer one is damage.
const MAX_LINE_BYTES: u64 = 16 << 20;

/// Why a file of JSON lines could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum JsonlError {
    /// The file system failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// File.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// A line could not be written as JSON, or is not what it should be.
    #[error("{} line {line}: {source}", path.display())]
    Line {
        /// File.
        path: PathBuf,
        /// 1-based line; 0 when writing.
        line: usize,
        /// Cause.
        source: serde_json::Error,
    },
}

/// A file to which JSON lines are appended.
#[derive(Debug)]
pub struct Appender {
    file: File,
    path: PathBuf,
}

impl Appender {
    /// Opens or makes the file and cuts a torn last line, which only a crash leaves behind.
    pub fn open(path: &Path) -> Result<Self, JsonlError> {
        let wrap = |source| JsonlError::Io { path: path.to_owned(), source };
        let file =
            OpenOptions::new().create(true).read(true).append(true).open(path).map_err(wrap)?;
        cut_torn_tail(&file).map_err(wrap)?;
        Ok(Self { file, path: path.to_owned() })
    }

    /// Appends one line with one write, so that no reader and no crash sees two lines mixed.
    pub fn append<T: Serialize>(&mut self, value: &T) -> Result<(), JsonlError> {
        let mut line = serde_json::to_vec(value).map_err(|source| JsonlError::Line {
            path: self.path.clone(),
            line: 0,
            source,
        })?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(|source| {
            // A disk that is full takes a part of a line: the next must not be added to it.
            let _ = cut_torn_tail(&self.file);
            JsonlError::Io { path: self.path.clone(), source }
        })
    }
}

/// Cuts what follows the last line end; returns how many bytes that were.
fn cut_torn_tail(mut file: &File) -> std::io::Result<u64> {
    const BLOCK: u64 = 4096;
    let length = file.metadata()?.len();
    let mut end = length;
    while end > 0 {
        let start = end.saturating_sub(BLOCK);
        let mut block = Vec::new();
        file.seek(SeekFrom::Start(start))?;
        file.take(end - start).read_to_end(&mut block)?;
        if let Some(index) = block.iter().rposition(|byte| *byte == b'\n') {
            end = start + index as u64 + 1;
            break;
        }
        end = start;
    }
    if end < length {
        file.set_len(end)?;
    }
    Ok(length - end)
}

/// All whole lines of a file; an absent file has none, and a torn tail is left out.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, JsonlError> {
    let wrap = |source| JsonlError::Io { path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(wrap(error)),
    };
    let mut reader = BufReader::new(file);
    let mut values = Vec::new();
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let count =
            (&mut reader).take(MAX_LINE_BYTES).read_until(b'\n', &mut line).map_err(wrap)?;
        if count == 0 || line.last() != Some(&b'\n') {
            break;
        }
        values.push(serde_json::from_slice(&line).map_err(|source| JsonlError::Line {
            path: path.to_owned(),
            line: number,
            source,
        })?);
    }
    Ok(values)
}

/// The steps of `metrics.jsonl` in order, keeping the last generation of a repeated step, and no
/// step beyond one that a later generation went back to.
pub fn read_metrics(path: &Path) -> Result<Vec<StepReport>, JsonlError> {
    let mut steps: BTreeMap<u64, StepReport> = BTreeMap::new();
    let mut generation = 0;
    for report in read::<StepReport>(path)? {
        if report.generation > generation {
            generation = report.generation;
            steps.split_off(&report.step);
        }
        if report.generation == generation {
            steps.insert(report.step, report);
        }
    }
    Ok(steps.into_values().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_tail(content: &[u8], expected: &[u8]) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lines");
        std::fs::write(&path, content).unwrap();
        Appender::open(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), expected);
    }

    #[test]
    fn a_torn_tail_is_cut() {
        check_tail(b"", b"");
        check_tail(b"{\"a\":1}\n", b"{\"a\":1}\n");
        check_tail(b"{\"a\":1}\n{\"a\":", b"{\"a\":1}\n");
        check_tail(b"{\"a\"", b"");
        let long = [b"1\n".to_vec(), vec![b'x'; 10_000]].concat();
        check_tail(&long, b"1\n");
        let long_before = [vec![b'x'; 9_000], b"\nyy".to_vec()].concat();
        check_tail(&long_before, &long_before[..9_001]);
    }

    #[test]
    fn numbers_read_back_exactly() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let losses = [0.1 + 0.2, f64::MIN_POSITIVE, 1.0 / 3.0, 1e300, 5e-324];
        let mut appender = Appender::open(&path).unwrap();
        for (step, loss) in (1..).zip(losses) {
            let report = StepReport { step, loss, generation: 1, ..StepReport::default() };
            appender.append(&report).unwrap();
        }
        let not_finite =
            StepReport { step: 6, loss: f64::NAN, generation: 1, ..Default::default() };
        appender.append(&not_finite).unwrap();
        let read = read_metrics(&path).unwrap();
        for (report, loss) in read.iter().zip(losses) {
            assert_eq!(report.loss.to_bits(), loss.to_bits());
        }
        assert_eq!(read.len(), 6);
        assert!(read[5].loss.is_nan());
    }

    #[test]
    fn the_last_generation_of_a_step_counts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut appender = Appender::open(&path).unwrap();
        for (step, generation) in [(1, 1), (2, 1), (3, 1), (4, 1), (3, 2)] {
            let report = StepReport { step, generation, ..StepReport::default() };
            appender.append(&report).unwrap();
        }
        let kept: Vec<_> =
            read_metrics(&path).unwrap().iter().map(|r| (r.step, r.generation)).collect();
        assert_eq!(kept, [(1, 1), (2, 1), (3, 2)]);
    }

    #[test]
    fn damage_names_file_and_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        std::fs::write(&path, "{}\nnonsense\n").unwrap();
        let error = read::<serde_json::Value>(&path).unwrap_err().to_string();
        assert!(error.contains("metrics.jsonl line 2"), "{error}");
        assert!(read::<serde_json::Value>(&folder.path().join("absent")).unwrap().is_empty());
    }
}
