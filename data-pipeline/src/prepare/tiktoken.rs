//! Meta's `tokenizer.model`: lines of a token in base64 and its rank, rewritten as a
//! `tokenizer.json`.
//!
//! The file has no merges. That of a token is found by merging its bytes with all lower ranks until
//! two parts are left: those are the last merge that makes it.

use super::llama3;
use crate::error::{DataError, Result};
use rayon::prelude::*;
use std::collections::HashMap;
use std::path::Path;

/// Token bytes to rank.
type Ranks = HashMap<Vec<u8>, u32>;

/// The `tokenizer.json` that encodes as the `tokenizer.model` at `path`.
pub fn to_tokenizer_json(path: &Path) -> Result<String> {
    let text = std::fs::read_to_string(path).map_err(|error| DataError::Tokenizer {
        path: path.to_path_buf(),
        detail: format!(
            "is not Meta's tiktoken format (base64 and rank, line by line): {error}; SentencePiece \
             models, as of Llama 2, are not supported"
        ),
    })?;
    let ranks = parse(path, &text)?;
    let mut tokens: Vec<(&[u8], u32)> =
        ranks.iter().map(|(token, &rank)| (token.as_slice(), rank)).collect();
    tokens.sort_unstable_by_key(|&(_, rank)| rank);
    let merges: Vec<Option<(&[u8], &[u8])>> = tokens
        .par_iter()
        .filter(|(token, _)| token.len() > 1)
        .map(|&(token, rank)| last_merge(token, rank, &ranks))
        .collect();
    let merges = merges.into_iter().flatten();
    let names = llama3::meta_special_tokens();
    let first = tokens.last().map_or(0, |&(_, rank)| rank + 1);
    let specials = names.into_iter().zip(first..);
    Ok(llama3::tokenizer_json(tokens.iter().copied(), merges, specials).to_string())
}

fn parse(path: &Path, text: &str) -> Result<Ranks> {
    let mut ranks = Ranks::new();
    for (line, content) in text.lines().enumerate() {
        let fail = |detail: &str| DataError::Tokenizer {
            path: path.to_path_buf(),
            detail: format!("line {}: {detail}", line + 1),
        };
        if content.trim().is_empty() {
            continue;
        }
        let (token, rank) = content.split_once(' ').ok_or_else(|| fail("has no rank"))?;
        let token = base64(token).ok_or_else(|| fail("is not base64"))?;
        let rank = rank.trim().parse().map_err(|_| fail("its rank is not a number"))?;
        if ranks.insert(token, rank).is_some() {
            return Err(fail("the token stands in an earlier line too"));
        }
    }
    if let Some(byte) = (0..=255u8).find(|byte| !ranks.contains_key(&[*byte][..])) {
        return Err(DataError::Tokenizer {
            path: path.to_path_buf(),
            detail: format!("has no token for the byte {byte}; every single byte needs one"),
        });
    }
    Ok(ranks)
}

/// The two parts that `token` is merged from, by the ranks below its own.
fn last_merge<'t>(token: &'t [u8], rank: u32, ranks: &Ranks) -> Option<(&'t [u8], &'t [u8])> {
    let mut ends: Vec<usize> = (0..=token.len()).collect();
    while ends.len() > 3 {
        let pair = |at: usize| ranks.get(&token[ends[at]..ends[at + 2]]).copied();
        let best = (0..ends.len() - 2)
            .filter_map(|at| pair(at).filter(|found| *found < rank).map(|found| (found, at)))
            .min()?;
        ends.remove(best.1 + 1);
    }
    Some((&token[..ends[1]], &token[ends[1]..]))
}

/// Decodes base64 with padding (RFC 4648).
fn base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() * 3 / 4);
    let (mut bits, mut count) = (0u32, 0);
    for digit in text.trim_end_matches('=').bytes() {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6) | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_the_standard() {
        for (text, bytes) in [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9vYmFy", "foobar")] {
            assert_eq!(base64(text).unwrap(), bytes.as_bytes());
        }
        assert_eq!(base64("Zg*="), None);
    }

    #[test]
    fn the_last_merge_is_found_by_the_lower_ranks() {
        let ranks: Ranks = [("a", 0), ("b", 1), ("c", 2), ("ab", 3), ("bc", 4), ("abc", 5)]
            .map(|(token, rank)| (token.as_bytes().to_vec(), rank))
            .into();
        assert_eq!(last_merge(b"abc", 5, &ranks), Some((&b"ab"[..], &b"c"[..])));
        assert_eq!(last_merge(b"ab", 3, &ranks), Some((&b"a"[..], &b"b"[..])));
    }
}
