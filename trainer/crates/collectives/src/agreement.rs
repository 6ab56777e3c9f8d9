//! Do the ranks issue the same operation? Compared through the store, so that a mismatch is an
//! error and not a hang.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use torch_shim::gloo::Store;

use crate::error::{CommError, Result};

/// The longest wait for the store before the group's own state is looked at.
const SLICE: Duration = Duration::from_millis(100);

/// Which operations the ranks compare before they start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Check {
    /// The first use of each operation, dtype and shape.
    #[default]
    FirstUse,
    /// Every operation: slow, for debugging.
    All,
    /// None.
    Off,
}

/// Compares what the ranks of one group are about to do.
pub(crate) struct Agreement {
    pub(crate) store: Store,
    pub(crate) check: Check,
    pub(crate) group: String,
    pub(crate) rank: usize,
    pub(crate) size: usize,
    pub(crate) timeout: Duration,
    pub(crate) seen: HashSet<String>,
}

impl Agreement {
    /// Announces operation `sequence` and compares it with what the other ranks announce.
    ///
    /// `alive` says whether a rank can still announce anything; it is asked all along, so that a
    /// dead peer or an abort ends the wait.
    pub(crate) fn compare(
        &mut self,
        sequence: u64,
        operation: &str,
        alive: &dyn Fn(usize) -> Result<()>,
    ) -> Result<()> {
        let known = !self.seen.insert(operation.to_string());
        if self.size == 1 || self.check == Check::Off || (known && self.check == Check::FirstUse) {
            return Ok(());
        }
        let key = |rank: usize| format!("agree/{sequence}/{rank}");
        self.store.set(&key(self.rank), operation.as_bytes())?;
        let mut differing = Vec::new();
        for rank in (0..self.size).filter(|&rank| rank != self.rank) {
            let theirs = self.announced(&key(rank), sequence, operation, rank, alive)?;
            if theirs != operation.as_bytes() {
                differing.push(format!("rank {rank} issues {}", String::from_utf8_lossy(&theirs)));
            }
        }
        if differing.is_empty() {
            return Ok(());
        }
        let detail = format!("rank {} issues {operation}, {}", self.rank, differing.join(", "));
        Err(self.mismatch(sequence, detail))
    }

    /// What `rank` announces, waited for in slices.
    fn announced(
        &self,
        key: &str,
        sequence: u64,
        operation: &str,
        rank: usize,
        alive: &dyn Fn(usize) -> Result<()>,
    ) -> Result<Vec<u8>> {
        let start = Instant::now();
        loop {
            let error = match self.store.get(key, SLICE) {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            alive(rank)?;
            if start.elapsed() >= self.timeout {
                let own = self.rank;
                let detail = format!(
                    "rank {own} issues {operation}, rank {rank} announced nothing ({error})"
                );
                return Err(self.mismatch(sequence, detail));
            }
            // A store that fails at once must not be asked in a tight loop.
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn mismatch(&self, sequence: u64, detail: String) -> CommError {
        CommError::Mismatch { group: self.group.clone(), sequence, detail }
    }
}
