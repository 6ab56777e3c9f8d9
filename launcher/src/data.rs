//! `phalanx data`: text to shards, and a look at them.

use crate::print::{err, out};
use clap::{Args, Subcommand};
use data_pipeline::prepare::inspect::{self, ShardReport};
use data_pipeline::prepare::{self, DocumentOptions, TokenizeOptions, Tokenizer, TrainOptions};
use data_pipeline::{DataError, Result};
use rank_protocol::exit_code;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// What can be done with data.
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Train a byte-level BPE tokenizer with Llama 3's pattern and special tokens.
    TrainTokenizer(TrainArgs),
    /// Tokenize text, JSON lines or parquet into shards; goes on where it was interrupted.
    Tokenize(TokenizeArgs),
    /// Show what shards hold.
    Inspect(InspectArgs),
    /// Read every token of shards, and check it.
    Verify(VerifyArgs),
}

/// Where documents come from.
#[derive(Debug, Args)]
pub struct InputArgs {
    /// Files, folders or quoted globs: .txt, .jsonl, .parquet; text and JSON lines also as .zst or
    /// .gz.
    #[arg(required = true)]
    inputs: Vec<String>,
    /// Field of a JSON object, or column of a parquet file, that holds the text.
    #[arg(long, default_value = "text", value_name = "NAME")]
    text_field: String,
    /// String between the documents of a text file, as in '\n\n\n' or '\f'; without it a file is
    /// one document.
    #[arg(long, value_name = "STRING")]
    split_on: Option<String>,
}

impl InputArgs {
    fn documents(&self) -> DocumentOptions {
        DocumentOptions {
            text_field: self.text_field.clone(),
            split_on: self.split_on.as_deref().map(unescape),
        }
    }
}

/// Arguments of `train-tokenizer`.
#[derive(Debug, Args)]
pub struct TrainArgs {
    #[command(flatten)]
    input: InputArgs,
    /// The tokenizer.json to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Number of ids, the special tokens included.
    #[arg(long, value_name = "N")]
    vocab_size: usize,
    /// Pairs seen less often are not merged.
    #[arg(long, default_value_t = 2, value_name = "N")]
    min_frequency: u64,
    /// Bytes of text after which there is enough to learn from.
    #[arg(long, value_name = "N")]
    max_bytes: Option<u64>,
    /// Write what was made to standard output as JSON.
    #[arg(long)]
    json: bool,
}

/// Arguments of `tokenize`.
#[derive(Debug, Args)]
pub struct TokenizeArgs {
    #[command(flatten)]
    input: InputArgs,
    /// tokenizer.json, or Meta's tokenizer.model.
    #[arg(long, value_name = "FILE")]
    tokenizer: PathBuf,
    /// Folder of the shards.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Most tokens of a shard.
    #[arg(long, default_value_t = 512 << 20, value_name = "N",
          value_parser = clap::value_parser!(u64).range(1..))]
    shard_tokens: u64,
    /// Tokens of a row group, about: the unit of reading and of the coarse shuffle. Without it, by
    /// the size of the inputs: 32,768 to 4,194,304.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    row_group_tokens: Option<u64>,
    /// Do not begin documents with the tokenizer's begin token.
    #[arg(long)]
    no_bos: bool,
    /// Do not end documents with the tokenizer's end token.
    #[arg(long)]
    no_eos: bool,
    /// Threads; without it, one per core.
    #[arg(long, value_name = "N", value_parser = num_threads)]
    threads: Option<usize>,
    /// Delete the shards in the output folder first.
    #[arg(long)]
    overwrite: bool,
    /// Write what was made to standard output as JSON.
    #[arg(long)]
    json: bool,
}

/// Arguments of `inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A shard, a folder of shards, or a quoted glob.
    shards: String,
    /// Show the first documents as text too, with this tokenizer.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Number of documents to show.
    #[arg(long, default_value_t = 3, value_name = "N")]
    documents: usize,
    /// Tokens of each document to show.
    #[arg(long, default_value_t = 40, value_name = "N")]
    tokens: usize,
    /// Write it to standard output as JSON.
    #[arg(long)]
    json: bool,
}

/// Arguments of `verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// A shard, a folder of shards, or a quoted glob.
    shards: String,
    /// The tokenizer that the shards must have been made with.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Number of ids that a model has; without it, the tokenizer's.
    #[arg(long, value_name = "N")]
    vocab_size: Option<usize>,
    /// Write the outcome to standard output as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs a command; returns the exit code.
pub fn run(command: DataCommand) -> i32 {
    let outcome = match command {
        DataCommand::TrainTokenizer(args) => train(args),
        DataCommand::Tokenize(args) => tokenize(args),
        DataCommand::Inspect(args) => show(args),
        DataCommand::Verify(args) => verify(args),
    };
    outcome.unwrap_or_else(|error| {
        err!("error: {error}");
        exit_code_of(&error)
    })
}

/// Exit code that an error in the data leads to.
pub fn exit_code_of(error: &DataError) -> i32 {
    if error.is_bad_input() { exit_code::CONFIG } else { exit_code::FAILED }
}

fn train(args: TrainArgs) -> Result<i32> {
    let made = prepare::train_tokenizer(&TrainOptions {
        documents: args.input.documents(),
        inputs: args.input.inputs,
        output: args.out,
        vocab_size: args.vocab_size,
        min_frequency: args.min_frequency,
        max_bytes: args.max_bytes,
    })?;
    if args.json {
        return print_json(&made);
    }
    err!(
        "{}: {} ids ({} merges), learned from {} documents of {:.1} MiB",
        made.tokenizer.display(),
        made.vocab_size,
        made.merges,
        made.documents,
        mebibytes(made.bytes)
    );
    if made.reserved > 0 {
        err!(
            "warning: the text gave too few merges; {} reserved special tokens fill the vocabulary",
            made.reserved
        );
    }
    Ok(exit_code::DONE)
}

/// A number of threads that a machine can have.
fn num_threads(text: &str) -> std::result::Result<usize, String> {
    const MOST: usize = 1024;
    let number = text.parse().ok().filter(|number| (1..=MOST).contains(number));
    number.ok_or_else(|| format!("a number of threads is from 1 to {MOST}"))
}

fn tokenize(args: TokenizeArgs) -> Result<i32> {
    let made = prepare::tokenize(&TokenizeOptions {
        documents: args.input.documents(),
        inputs: args.input.inputs,
        tokenizer: args.tokenizer,
        output: args.out,
        shard_tokens: args.shard_tokens,
        row_group_tokens: args.row_group_tokens,
        bos: !args.no_bos,
        eos: !args.no_eos,
        threads: args.threads,
        overwrite: args.overwrite,
    })?;
    if args.json {
        return print_json(&made);
    }
    let before = match made.shards_from_before {
        0 => String::new(),
        count => format!(", {count} of them from before"),
    };
    err!(
        "{}: {} documents, {} tokens in {} shards{before}, {:.1} MiB, {:.1} s",
        made.output.display(),
        made.documents,
        made.tokens,
        made.shards,
        mebibytes(made.bytes),
        made.seconds
    );
    Ok(exit_code::DONE)
}

fn show(args: InspectArgs) -> Result<i32> {
    let tokenizer = load_tokenizer(args.tokenizer.as_deref())?;
    let shards = inspect::inspect(&args.shards)?;
    let documents =
        inspect::first_documents(&args.shards, tokenizer.as_ref(), args.documents, args.tokens)?;
    if args.json {
        return print_json(&serde_json::json!({"shards": shards, "documents": documents}));
    }
    for shard in &shards {
        print_shard(shard);
    }
    let documents_total: u64 = shards.iter().map(|shard| shard.documents).sum();
    let tokens: u64 = shards.iter().map(|shard| shard.tokens).sum();
    out!("{} shards, {documents_total} documents, {tokens} tokens", shards.len());
    for view in documents {
        out!("\nrow {} of {}: {} tokens", view.row, view.path.display(), view.tokens);
        match view.text {
            Some(text) => out!("{text}"),
            None => out!("{:?}", view.ids),
        }
    }
    Ok(exit_code::DONE)
}

fn print_shard(shard: &ShardReport) {
    out!(
        "{}: {} documents (longest {} tokens), {} tokens in {} row groups, {:.2} bits a token",
        shard.path.display(),
        shard.documents,
        shard.longest_document,
        shard.tokens,
        shard.row_groups,
        shard.bits_per_token
    );
    let unknown = || "unknown".to_string();
    out!(
        "  writer {}, vocabulary {}, largest id {}, tokenizer sha256 {}",
        shard.writer.clone().unwrap_or_else(unknown),
        shard.vocab_size.map_or_else(unknown, |size| size.to_string()),
        shard.largest_id.map_or_else(unknown, |id| id.to_string()),
        shard.tokenizer_sha256.clone().unwrap_or_else(unknown)
    );
}

fn verify(args: VerifyArgs) -> Result<i32> {
    let tokenizer = load_tokenizer(args.tokenizer.as_deref())?;
    let verified = inspect::verify(&args.shards, tokenizer.as_ref(), args.vocab_size)?;
    let bad = verified.iter().filter(|shard| shard.outcome.is_err()).count();
    if args.json {
        let shards: Vec<_> = verified
            .iter()
            .map(|shard| match &shard.outcome {
                Ok(report) => serde_json::json!({"path": shard.path, "ok": true, "report": report}),
                Err(error) => {
                    serde_json::json!({"path": shard.path, "ok": false, "error": error.to_string()})
                }
            })
            .collect();
        print_json(&serde_json::json!({"bad": bad, "shards": shards}))?;
    } else {
        for shard in &verified {
            match &shard.outcome {
                Ok(report) => out!("ok  {}: {} tokens", shard.path.display(), report.tokens),
                Err(error) => out!("BAD {}: {error}", shard.path.display()),
            }
        }
        out!("{} shards, {bad} bad", verified.len());
    }
    Ok(if bad == 0 { exit_code::DONE } else { exit_code::FAILED })
}

fn load_tokenizer(path: Option<&Path>) -> Result<Option<Tokenizer>> {
    path.map(Tokenizer::load).transpose()
}

fn print_json(value: &impl Serialize) -> Result<i32> {
    let json = serde_json::to_string(value)
        .map_err(|error| DataError::Stopped { detail: error.to_string() })?;
    out!("{json}");
    Ok(exit_code::DONE)
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / 1024.0 / 1024.0
}

/// Replaces `\n`, `\r`, `\t`, `\f` and `\\`, which shells make hard to type.
fn unescape(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        let replaced = match (character, characters.clone().next()) {
            ('\\', Some('n')) => '\n',
            ('\\', Some('r')) => '\r',
            ('\\', Some('t')) => '\t',
            ('\\', Some('f')) => '\u{c}',
            ('\\', Some('\\')) => '\\',
            _ => {
                plain.push(character);
                continue;
            }
        };
        plain.push(replaced);
        characters.next();
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::unescape;

    #[test]
    fn escapes_are_read_as_in_c() {
        for (typed, meant) in
            [("a", "a"), (r"\n\n", "\n\n"), (r"\f", "\u{c}"), (r"\\n", r"\n"), (r"\x\", r"\x\")]
        {
            assert_eq!(unescape(typed), meant);
        }
    }
}
