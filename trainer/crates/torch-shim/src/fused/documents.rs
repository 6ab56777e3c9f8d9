//! Where the documents of a packed batch lie.

use crate::error::{Result, ShimError};

/// The documents of each row of a batch; attention does not cross from one to the next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Documents {
    rows: Vec<Vec<i64>>,
}

impl Documents {
    /// Each row is one document: plain causal attention.
    pub fn causal() -> Self {
        Documents::default()
    }

    /// Rows cut into documents of these lengths, each at least 1.
    pub fn from_lengths(rows: Vec<Vec<i64>>) -> Self {
        if rows.iter().all(|row| row.len() == 1) { Documents::causal() } else { Documents { rows } }
    }

    /// Reads document ids, which change where a new document starts: `batch` rows of `sequence`
    /// ids.
    ///
    /// # Errors
    /// When the number of ids is not `batch * sequence`.
    pub fn from_ids(ids: &[i32], batch: usize, sequence: usize) -> Result<Self> {
        if ids.len() != batch * sequence || sequence == 0 {
            let text = format!("{} document ids for {batch} rows of {sequence} tokens", ids.len());
            return Err(ShimError::Invalid(text));
        }
        let lengths =
            |row: &[i32]| row.chunk_by(|a, b| a == b).map(|run| run.len() as i64).collect();
        Ok(Documents::from_lengths(ids.chunks(sequence).map(lengths).collect()))
    }

    /// Whether each row is one document.
    pub fn is_causal(&self) -> bool {
        self.rows.is_empty()
    }

    /// The lengths of each row's documents; empty where each row is one.
    pub fn rows(&self) -> &[Vec<i64>] {
        &self.rows
    }

    pub(crate) fn check(&self, batch: i64, sequence: i64) -> Result<()> {
        if self.rows.is_empty() {
            return Ok(());
        }
        if self.rows.len() as i64 != batch {
            let text = format!("documents of {} rows for a batch of {batch}", self.rows.len());
            return Err(ShimError::Invalid(text));
        }
        for (index, row) in self.rows.iter().enumerate() {
            let total: i64 = row.iter().sum();
            if total != sequence || row.iter().any(|&length| length < 1) {
                let text = format!(
                    "the documents of row {index} are {row:?} for a sequence of {sequence}"
                );
                return Err(ShimError::Invalid(text));
            }
        }
        Ok(())
    }

    pub(crate) fn flat(&self) -> (Vec<i64>, Vec<i64>) {
        let counts = self.rows.iter().map(|row| row.len() as i64).collect();
        (self.rows.concat(), counts)
    }
}
