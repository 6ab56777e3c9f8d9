//! Tokenizes text held in memory on one thread and prints MB/s and a hash of the ids as JSON.
//!
//! usage: tokenize_bench TOKENIZER TEXT.jsonl [PASSES]
//!
//! The hash is SHA-256 over the ids of all documents as little-endian uint32, the figure that of
//! the first pass, with cold caches, as the other side has them; that of the best of
//! PASSES (3 without a number) is given too.

use data_pipeline::prepare::Tokenizer;
use data_pipeline::prepare::documents::{DocumentOptions, open};
use sha2::{Digest, Sha256};
use std::path::Path;
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [tokenizer, text, rest @ ..] = arguments.as_slice() else {
        return Err("usage: tokenize_bench TOKENIZER TEXT.jsonl [PASSES]".into());
    };
    let passes: usize = rest.first().map_or(Ok(3), |passes| passes.parse())?;
    let tokenizer = Tokenizer::load(Path::new(tokenizer))?;
    let documents = open(Path::new(text), &DocumentOptions::default())?;
    let texts = documents.collect::<data_pipeline::Result<Vec<String>>>()?;
    let bytes: usize = texts.iter().map(String::len).sum();
    if let Some(first) = texts.first() {
        tokenizer.encode(first)?;
    }
    let (mut best_s, mut ids, mut first_s) = (f64::INFINITY, Vec::new(), None);
    for _ in 0..passes.max(1) {
        let started = Instant::now();
        ids.clear();
        for text in &texts {
            tokenizer.encode_into(text, &mut ids)?;
        }
        let elapsed_s = started.elapsed().as_secs_f64();
        first_s.get_or_insert(elapsed_s);
        best_s = best_s.min(elapsed_s);
    }
    let mut digest = Sha256::new();
    for id in &ids {
        digest.update(id.id().to_le_bytes());
    }
    let sha256: String = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    let rate = |seconds: f64| bytes as f64 / 1e6 / seconds;
    let report = serde_json::json!({
        "mb_per_s": rate(first_s.unwrap_or(best_s)),
        "mb_per_s_best_pass": rate(best_s),
        "bytes": bytes,
        "tokens": ids.len(),
        "sha256": sha256,
    });
    println!("{report}");
    Ok(())
}
