//! What makes a tokenizer a Llama 3 tokenizer: the pre-tokenizer's pattern, the special tokens, and
//! the file that says so.

use serde_json::{Map, Value, json};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// The pattern that cuts text in words, as published with Llama 3.
pub const PATTERN: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// The token that begins a document.
pub const BOS: &str = "<|begin_of_text|>";

/// Special tokens of Llama 3.1 that have a meaning, in the order of their ids.
pub const SPECIAL_TOKENS: [&str; 8] = [
    BOS,
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
];

/// Name of a special token without a meaning yet.
pub fn reserved(index: usize) -> String {
    format!("<|reserved_special_token_{index}|>")
}

/// The 256 special tokens that follow the ranks of Meta's `tokenizer.model`, in Llama 3.1's order.
pub fn meta_special_tokens() -> Vec<String> {
    let mut numbers = 0..;
    let mut next_reserved = || reserved(numbers.next().unwrap_or(0));
    let mut names: Vec<String> = Vec::with_capacity(256);
    names.extend(SPECIAL_TOKENS[..2].iter().map(|name| name.to_string()));
    names.extend([next_reserved(), next_reserved(), SPECIAL_TOKENS[2].to_string()]);
    names.push(next_reserved());
    names.extend(SPECIAL_TOKENS[3..].iter().map(|name| name.to_string()));
    while names.len() < 256 {
        names.push(next_reserved());
    }
    names
}

/// A `tokenizer.json` out of the tokens as bytes with their ids, the merges in the order of their
/// rank, and the special tokens with their ids.
pub fn tokenizer_json<'t>(
    tokens: impl Iterator<Item = (&'t [u8], u32)>,
    merges: impl Iterator<Item = (&'t [u8], &'t [u8])>,
    specials: impl Iterator<Item = (String, u32)>,
) -> Value {
    let alphabet = ByteLevel::alphabet();
    let spell = |bytes: &[u8]| -> String {
        bytes.iter().map(|&byte| alphabet[usize::from(byte)]).collect()
    };
    let vocab: Map<String, Value> =
        tokens.map(|(token, id)| (spell(token), Value::from(id))).collect();
    let merges: Vec<Value> =
        merges.map(|(left, right)| json!([spell(left), spell(right)])).collect();
    file(vocab, merges, specials)
}

/// A `tokenizer.json` out of a vocabulary and merges that are spelled already.
pub fn file(
    vocab: Map<String, Value>,
    merges: Vec<Value>,
    specials: impl Iterator<Item = (String, u32)>,
) -> Value {
    let specials: Vec<(String, u32)> = specials.collect();
    let added: Vec<Value> = specials
        .iter()
        .map(|(content, id)| {
            json!({
                "id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true,
            })
        })
        .collect();
    let bos_id = specials.iter().find(|(name, _)| name == BOS).map(|(_, id)| *id);
    let bos = json!({"SpecialToken": {"id": BOS, "type_id": 0}});
    let (a, b) = (
        json!({"Sequence": {"id": "A", "type_id": 0}}),
        json!({"Sequence": {"id": "B", "type_id": 1}}),
    );
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated",
             "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
             "use_regex": false},
        ]},
        "post_processor": {"type": "Sequence", "processors": [
            {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false,
             "use_regex": true},
            {"type": "TemplateProcessing",
             "single": [bos, a],
             "pair": [bos, a, {"SpecialToken": {"id": BOS, "type_id": 1}}, b],
             "special_tokens": {BOS: {"id": BOS, "ids": [bos_id], "tokens": [BOS]}}},
        ]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
                    "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
                  "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
                  "vocab": vocab, "merges": merges},
    })
}
