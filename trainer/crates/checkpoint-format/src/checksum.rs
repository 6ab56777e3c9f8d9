//! CRC32C of bytes, written as `crc32c:1a2b3c4d`, and SHA-256 of a manifest.

use crate::error::{FormatError, Result};
use serde::{Deserialize, Serialize};
use sha2::Digest;
use std::path::Path;

/// A CRC32C (Castagnoli), computed by the processor's own instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Checksum(u32);

impl Checksum {
    /// Of these bytes.
    pub fn of(bytes: &[u8]) -> Checksum {
        Checksum(crc32c::crc32c(bytes))
    }

    /// Of what `self` is of, followed by these bytes.
    #[must_use]
    pub fn append(self, bytes: &[u8]) -> Checksum {
        Checksum(crc32c::crc32c_append(self.0, bytes))
    }

    /// Of what `self` is of, followed by the `length` bytes that `next` is of.
    #[must_use]
    pub fn then(self, next: Checksum, length: u64) -> Checksum {
        Checksum(crc32c::crc32c_combine(self.0, next.0, length as usize))
    }
}

impl std::fmt::Display for Checksum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "crc32c:{:08x}", self.0)
    }
}

impl From<Checksum> for String {
    fn from(checksum: Checksum) -> String {
        checksum.to_string()
    }
}

impl TryFrom<String> for Checksum {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Checksum, String> {
        let digits = text.strip_prefix("crc32c:").filter(|digits| digits.len() == 8);
        let value = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
        let checksum = value.map(Checksum).filter(|checksum| checksum.to_string() == text);
        checksum.ok_or_else(|| format!("{text:?} is not a checksum such as crc32c:1a2b3c4d"))
    }
}

/// SHA-256 in lower-case hexadecimal.
pub fn sha256_hex(bytes: &[u8]) -> String {
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Refuses bytes whose checksum is not the expected one.
///
/// # Errors
/// [`FormatError::Damaged`], naming `path` and both checksums.
pub fn expect(path: &Path, what: &str, found: Checksum, expected: Checksum) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(FormatError::damaged(path, format!("{what} has checksum {found}, recorded is {expected}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_the_published_check_value() {
        // The check value of CRC-32C (RFC 3720's polynomial) over "123456789".
        assert_eq!(Checksum::of(b"123456789").to_string(), "crc32c:e3069283");
        assert_eq!(Checksum::of(b"1234").append(b"56789"), Checksum::of(b"123456789"));
        let combined = Checksum::of(b"1234").then(Checksum::of(b"56789"), 5);
        assert_eq!(combined, Checksum::of(b"123456789"));
    }

    #[test]
    fn only_its_own_spelling_is_read() {
        for text in ["crc32c:E3069283", "crc32c:e306928", "e3069283", "crc32c:+3069283"] {
            assert!(Checksum::try_from(text.to_string()).is_err(), "{text}");
        }
        assert!(Checksum::try_from("crc32c:e3069283".to_string()).is_ok());
    }

    #[test]
    fn sha256_of_nothing() {
        let expected = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(sha256_hex(b""), expected);
    }
}
