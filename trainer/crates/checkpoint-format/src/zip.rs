//! The table of contents of a zip archive whose entries are stored without compression, as torch
//! writes them.

use std::collections::BTreeMap;

/// Most entries that are read.
const MAX_ENTRIES: u64 = 1 << 20;

/// The bytes of each entry in the archive, by name.
///
/// # Errors
/// Says why the archive is refused: no table, an entry that is compressed or lies outside of the
/// file.
pub(crate) fn entries(bytes: &[u8]) -> Result<BTreeMap<String, [usize; 2]>, String> {
    let (count, mut at) = table(bytes).ok_or("it is not a zip archive (no table of contents)")?;
    if count > MAX_ENTRIES {
        return Err(format!("the zip archive has {count} entries, the limit is {MAX_ENTRIES}"));
    }
    let mut entries = BTreeMap::new();
    for number in 0..count {
        let entry = Entry::read(bytes, at)
            .ok_or_else(|| format!("entry {number} of the zip archive is cut off"))?;
        at = entry.next;
        if entry.compressed {
            return Err(format!("{} in the zip archive is compressed", entry.name));
        }
        let range = content(bytes, &entry)
            .ok_or_else(|| format!("{} lies outside of the zip archive", entry.name))?;
        entries.insert(entry.name, range);
    }
    Ok(entries)
}

struct Entry {
    name: String,
    compressed: bool,
    size: u64,
    header: u64,
    next: usize,
}

/// Number of entries and where their list begins.
fn table(bytes: &[u8]) -> Option<(u64, usize)> {
    // The end record is at least 22 bytes, and a comment of at most 65,535 bytes may follow it.
    let last = bytes.len().checked_sub(22)?;
    let first = last.saturating_sub(65_535);
    let end = (first..=last).rev().find(|at| bytes[*at..].starts_with(b"PK\x05\x06"))?;
    let (count, start) = (u64::from(u16_at(bytes, end + 10)?), u32_at(bytes, end + 16)?);
    // Archives over 4 GiB keep the true numbers in a second record, found through a locator before
    // the first.
    let locator = end.checked_sub(20).filter(|at| bytes[*at..].starts_with(b"PK\x06\x07"));
    let Some(locator) = locator else { return Some((count, start as usize)) };
    let record = usize::try_from(u64_at(bytes, locator + 8)?).ok()?;
    if !bytes.get(record..)?.starts_with(b"PK\x06\x06") {
        return None;
    }
    let start = u64_at(bytes, record.checked_add(48)?)?;
    Some((u64_at(bytes, record + 32)?, usize::try_from(start).ok()?))
}

impl Entry {
    fn read(bytes: &[u8], at: usize) -> Option<Entry> {
        if !bytes.get(at..)?.starts_with(b"PK\x01\x02") {
            return None;
        }
        let [name, extra, comment] =
            [28, 30, 32].map(|field| u16_at(bytes, at + field).map(usize::from));
        let name_start = at + 46;
        let extra_start = name_start + name?;
        let next = extra_start + extra? + comment?;
        let text = bytes.get(name_start..extra_start)?;
        let mut entry = Entry {
            name: std::str::from_utf8(text).ok()?.to_string(),
            compressed: u16_at(bytes, at + 10)? != 0,
            size: u64::from(u32_at(bytes, at + 24)?),
            header: u64::from(u32_at(bytes, at + 42)?),
            next,
        };
        let stored = u64::from(u32_at(bytes, at + 20)?);
        entry.widen(bytes.get(extra_start..extra_start + extra?)?, stored)?;
        Some(entry)
    }

    /// Fields of 4 GiB and more are in the extra field 1, in this order, each only where the short
    /// one is full.
    fn widen(&mut self, mut extra: &[u8], stored: u64) -> Option<()> {
        const FULL: u64 = u32::MAX as u64;
        while extra.len() >= 4 {
            let length = usize::from(u16_at(extra, 2)?);
            let field = extra.get(4..4 + length)?;
            if u16_at(extra, 0)? == 1 {
                let mut at = 0;
                if self.size == FULL {
                    self.size = u64_at(field, at)?;
                    at += 8;
                }
                if stored == FULL {
                    at += 8;
                }
                if self.header == FULL {
                    self.header = u64_at(field, at)?;
                }
            }
            extra = &extra[4 + length..];
        }
        Some(())
    }
}

/// An entry's content follows its own header, whose name and extra field have sizes of their own.
fn content(bytes: &[u8], entry: &Entry) -> Option<[usize; 2]> {
    let header = usize::try_from(entry.header).ok()?;
    if !bytes.get(header..)?.starts_with(b"PK\x03\x04") {
        return None;
    }
    let name = usize::from(u16_at(bytes, header + 26)?);
    let extra = usize::from(u16_at(bytes, header + 28)?);
    let start = header + 30 + name + extra;
    let end = start.checked_add(usize::try_from(entry.size).ok()?)?;
    bytes.get(start..end).map(|_| [start, end])
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}
