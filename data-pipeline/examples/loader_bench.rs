//! Streams shards through the loader and prints million tokens per second and per core as JSON.
//!
//! usage: loader_bench --data FOLDER [--as-is] [--sequence-length N] [--batch N] [--tokens N]
//!     [--json]
//!
//! Shards of other programs are first written in Phalanx's own layout (`list<int32 not null>` with
//! `n_tokens`, BYTE_STREAM_SPLIT, zstd 1) into a temporary folder, outside of the measurement;
//! `--as-is` reads them as they are. A core is a second of this process's CPU time, of all its
//! threads.

use data_pipeline::shards::ShardWriter;
use data_pipeline::shards::decode::{DecodeRequest, GroupLayout};
use data_pipeline::shards::footer::{Footer, LAYOUT_VERSION, ShardInfo};
use data_pipeline::shards::scan::{find_files, read_range};
use data_pipeline::{Loader, LoaderOptions, Split};
use run_config::RunConfig;
use std::path::{Path, PathBuf};
use std::time::Instant;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Ids allowed: more than any tokenizer's.
const VOCAB: usize = 1 << 20;
/// Tokens of a row group of the shards that are written.
const GROUP_TOKENS: usize = 1 << 20;

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1).cloned()
    };
    let number = |name: &str, default: u64| -> Outcome<u64> {
        Ok(value(name).map_or(Ok(default), |text| text.parse())?)
    };
    let data = value("--data").ok_or("usage: loader_bench --data FOLDER [--as-is] [--json]")?;
    let (sequence, batch) = (number("--sequence-length", 2048)?, number("--batch", 8)?);
    let as_is = arguments.iter().any(|argument| argument == "--as-is");
    let scratch = tempfile::tempdir()?;
    let folder = if as_is { PathBuf::from(&data) } else { rewrite(&data, scratch.path())? };
    let (total, file_bytes, decode) = decode_all(&folder)?;
    let tokens = number("--tokens", total.saturating_mul(6))?;
    let steps = (tokens / (sequence * batch)).max(1);
    let sequential = stream(&folder, sequence, batch, steps, false)?;
    let shuffled = stream(&folder, sequence, batch, steps, true)?;
    let report = serde_json::json!({
        "tokens_per_s": shuffled.tokens_per_s,
        "tokens_per_cpu_s": shuffled.tokens_per_cpu_s,
        "shuffled_packed_mtok_per_s_per_core": shuffled.tokens_per_cpu_s / 1e6,
        "sequential_mtok_per_s_per_core": sequential.tokens_per_cpu_s / 1e6,
        "decode_mtok_per_s": decode / 1e6,
        "first_batch_s": shuffled.first_batch_s,
        "wait_s": shuffled.wait_s,
        "tokens": steps * sequence * batch,
        "bits_per_token": file_bytes as f64 * 8.0 / total as f64,
        "layout": if as_is { "as is" } else { "list<int32 not null>, BYTE_STREAM_SPLIT, zstd 1" },
    });
    println!("{report}");
    Ok(())
}

struct Measured {
    tokens_per_s: f64,
    tokens_per_cpu_s: f64,
    first_batch_s: f64,
    wait_s: f64,
}

fn stream(
    folder: &Path,
    sequence: u64,
    batch: u64,
    steps: u64,
    shuffle: bool,
) -> Outcome<Measured> {
    let yaml = format!(
        "name: bench\nmodel: {{dim: 16, layers: 1, heads: 2, ffn_dim: 16, vocab_size: {VOCAB}}}\n\
         data: {{tokenizer: none.json, sources: [{{name: bench, path: \"{}\"}}], sequence_length: \
         {sequence}, shuffle: {shuffle}, validation_fraction: 0.0}}\ntraining: \
         {{steps: {steps}, global_batch: {batch}, micro_batch: {batch}}}\nschedule: \
         {{warmup_steps: 0}}\n",
        folder.display()
    );
    let config = RunConfig::from_yaml_str(&yaml, folder, &[])?.config;
    let options =
        LoaderOptions { split: Split::Train, dp_rank: 0, dp_size: 1, first_step: 1, steps };
    data_pipeline::prefetch::Dataset::open(&config, Split::Train)?;
    let (started, cpu) = (Instant::now(), cpu_s()?);
    let mut loader = Loader::open(&config, options)?;
    let (mut tokens, mut sum, mut first_batch_s) = (0u64, 0i64, None);
    while let Some(batch) = loader.next()? {
        first_batch_s.get_or_insert_with(|| started.elapsed().as_secs_f64());
        tokens += batch.tokens.len() as u64;
        sum += i64::from(batch.tokens[0]);
    }
    let (wall_s, cpu_s) = (started.elapsed().as_secs_f64(), cpu_s()? - cpu);
    if sum == i64::MIN || tokens == 0 {
        return Err("nothing was read".into());
    }
    Ok(Measured {
        tokens_per_s: tokens as f64 / wall_s,
        tokens_per_cpu_s: tokens as f64 / cpu_s,
        first_batch_s: first_batch_s.unwrap_or(wall_s),
        wait_s: loader.wait_s(),
    })
}

/// Calls `see` with the documents of every row group.
fn each_group(
    folder: &Path,
    mut see: impl FnMut(data_pipeline::shards::DecodedGroup) -> Outcome<()>,
) -> Outcome<u64> {
    let mut file_bytes = 0;
    for path in find_files("bench", &folder.display().to_string())? {
        let footer = Footer::read(&path)?;
        file_bytes += footer.file_bytes;
        for group in 0..footer.metadata.num_row_groups() {
            let bytes = GroupLayout::of(&path, &footer, group)?.byte_range(&footer.metadata, group);
            let range = read_range(&path, bytes, footer.file_bytes)?;
            let request = DecodeRequest {
                path: &path,
                footer: &footer,
                group,
                first_row: 0,
                vocab_size: VOCAB,
            };
            see(request.decode(&range)?)?;
        }
    }
    Ok(file_bytes)
}

/// Decodes all shards on this thread: tokens, bytes of the files, tokens per second.
fn decode_all(folder: &Path) -> Outcome<(u64, u64, f64)> {
    let (mut tokens, started) = (0, Instant::now());
    let file_bytes = each_group(folder, |group| {
        tokens += group.ids.len() as u64;
        Ok(())
    })?;
    Ok((tokens, file_bytes, tokens as f64 / started.elapsed().as_secs_f64()))
}

fn rewrite(data: &str, scratch: &Path) -> Outcome<PathBuf> {
    let info = ShardInfo {
        layout: LAYOUT_VERSION,
        writer: "loader_bench".into(),
        tokenizer_sha256: data_pipeline::prepare::sha256_of(&tokenizer(scratch)?)?,
        vocab_size: VOCAB,
        bos_id: None,
        eos_id: None,
        packing: "document".into(),
    };
    let mut writer = ShardWriter::create(&scratch.join("all.parquet"), &info, GROUP_TOKENS)?;
    each_group(Path::new(data), |group| {
        let mut start = 0;
        for &length in &group.lengths {
            let end = start + length as usize;
            writer.push(group.ids[start..end].iter().map(|&id| id as u32))?;
            start = end;
        }
        Ok(())
    })?;
    writer.finish()?;
    Ok(scratch.to_path_buf())
}

fn tokenizer(scratch: &Path) -> Outcome<PathBuf> {
    let path = scratch.join("none.json");
    std::fs::write(&path, "{}")?;
    Ok(path)
}

/// CPU seconds of all threads of this process so far.
fn cpu_s() -> Outcome<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit_once(')').ok_or("no stat")?.1.split_whitespace().collect();
    let ticks: f64 = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
    Ok(ticks / 100.0)
}
