//! All ranks run one build on one config: what differs trains something else, or hangs.

use crate::error::{Result, TrainError};
use rank_protocol::client::RankClient;
use run_config::RunConfig;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Read};
use std::sync::OnceLock;
use std::time::Duration;
use xxhash_rust::xxh3::Xxh3;

/// Longest wait for rank 0 to say what it runs, but where ranks wait longer for one another.
const TIMEOUT: Duration = Duration::from_secs(60);

/// What a rank runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    version: String,
    /// Hash of what is loaded of the program's file.
    build: String,
    /// Hash of the resolved config.
    config: String,
}

impl Identity {
    /// What differs from rank 0's.
    fn compare(&self, rank: usize, first: &Identity) -> Result<()> {
        let named = |what, ours, theirs| {
            Err(TrainError::Config(format!(
                "rank {rank} has another {what} than rank 0: {ours} and {theirs}; hint: give every \
                 node the same phalanx-trainer and the same run directory"
            )))
        };
        if self.version != first.version {
            return named("version of Phalanx", &self.version, &first.version);
        }
        if self.build != first.build {
            return named("build of phalanx-trainer", &self.build, &first.build);
        }
        if self.config != first.config {
            return named("config", &self.config, &first.config);
        }
        Ok(())
    }
}

/// Refuses to go on where this rank runs something else than rank 0.
///
/// # Errors
/// [`TrainError::Config`] with both hashes; where the store or the program's file cannot be read.
pub fn agree(client: &RankClient, config: &RunConfig) -> Result<()> {
    let place = client.assignment();
    if place.world_size == 1 {
        return Ok(());
    }
    let build = own_build()
        .map_err(|error| TrainError::Config(format!("cannot read phalanx-trainer: {error}")))?;
    let version = env!("CARGO_PKG_VERSION").to_string();
    let own = Identity { version, build, config: config.hash() };
    let plain = |error: &dyn std::fmt::Display| TrainError::Config(format!("identity: {error}"));
    let key = format!("{}/generation-{}/identity", place.run_id, place.generation);
    let store = client.store();
    if place.rank == 0 {
        let text = serde_json::to_vec(&own).map_err(|error| plain(&error))?;
        return store.set(&key, &text).map_err(|error| plain(&error));
    }
    let timeout = TIMEOUT.max(Duration::from_secs(config.cluster.timeout_s));
    let text = store.get(&key, timeout).map_err(|error| plain(&error))?;
    let first: Identity = serde_json::from_slice(&text).map_err(|error| plain(&error))?;
    own.compare(place.rank, &first)
}

/// [`build_hash`], computed once: what this process runs does not change.
///
/// # Errors
/// Where the program's file cannot be read.
pub fn own_build() -> io::Result<String> {
    static BUILD: OnceLock<String> = OnceLock::new();
    if let Some(build) = BUILD.get() {
        return Ok(build.clone());
    }
    let build = build_hash()?;
    Ok(BUILD.get_or_init(|| build).clone())
}

/// Hash of what this process runs: of its file what is loaded, without debug information.
fn build_hash() -> io::Result<String> {
    let file = File::open("/proc/self/exe")?;
    let mut head = Vec::new();
    (&file).take(4096).read_to_end(&mut head)?;
    let mut rest = (&file).take(loaded_bytes(&head).saturating_sub(head.len() as u64));
    let mut hash = Xxh3::new();
    hash.update(&head);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match rest.read(&mut buffer)? {
            0 => return Ok(format!("{:016x}", hash.digest())),
            length => hash.update(&buffer[..length]),
        }
    }
}

/// How many bytes of a 64-bit ELF file there are up to the end of its last loaded segment, from
/// its first bytes (System V ABI: ELF header, program header); all, where it is another file.
fn loaded_bytes(head: &[u8]) -> u64 {
    let number = |at: usize, length: usize| -> Option<u64> {
        let bytes = head.get(at..at.checked_add(length)?)?;
        Some(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    };
    let end_of_segment = |header: usize| -> Option<u64> {
        const LOADED: u64 = 1;
        let (kind, offset, size) =
            (number(header, 4)?, number(header + 8, 8)?, number(header + 32, 8)?);
        Some(if kind == LOADED { offset.saturating_add(size) } else { 0 })
    };
    let ends = || -> Option<Vec<u64>> {
        const ELF_64_LITTLE_ENDIAN: &[u8] = b"\x7fELF\x02\x01";
        head.starts_with(ELF_64_LITTLE_ENDIAN).then_some(())?;
        let first = usize::try_from(number(32, 8)?).ok().filter(|first| *first < head.len())?;
        let (size, count) = (number(54, 2)? as usize, number(56, 2)? as usize);
        (0..count).map(|index| end_of_segment(first + index * size)).collect()
    };
    ends().and_then(|ends| ends.into_iter().max()).filter(|end| *end > 0).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_difference_is_named() {
        let text = |text: &str| text.to_string();
        let first = Identity { version: text("1"), build: text("b"), config: text("c") };
        assert!(first.compare(1, &first).is_ok());
        let check = |other: Identity, expected: &str| {
            let error = other.compare(3, &first).unwrap_err().to_string();
            assert!(error.contains("rank 3") && error.contains(expected), "{error}");
        };
        check(Identity { version: text("2"), ..first.clone() }, "version of Phalanx");
        check(Identity { build: text("x"), ..first.clone() }, "build of phalanx-trainer");
        check(Identity { config: text("x"), ..first.clone() }, "another config");
        assert_eq!(build_hash().unwrap().len(), 16);
    }

    #[test]
    fn what_is_loaded_of_a_program_is_a_part_of_its_file() {
        let file = std::fs::read("/proc/self/exe").unwrap();
        let loaded = loaded_bytes(&file[..4096]);
        assert!(loaded > 100_000 && loaded < file.len() as u64, "{loaded} of {}", file.len());
        let text = b"hint: give every node the same phalanx-trainer";
        let held = |bytes: &[u8]| bytes.windows(text.len()).any(|window| window == text);
        assert!(held(&file[..loaded as usize]), "constants are loaded");
        for other in
            [&b""[..], b"#!/bin/sh", &file[..60], &[b"\x7fELF\x02\x01", &[255; 90][..]].concat()]
        {
            assert_eq!(loaded_bytes(other), u64::MAX);
        }
    }
}
