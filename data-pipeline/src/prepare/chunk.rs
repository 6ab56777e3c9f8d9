//! How Llama 3 cuts long texts before it tokenizes them: at most 400,000 characters at a time, and
//! in those, runs of more than 25,000 characters of one kind (space or not) are cut as well.

/// Characters that are tokenized at a time.
const MAX_CHUNK_CHARS: usize = 400_000;
/// Consecutive characters of one kind that are kept together.
const MAX_RUN_CHARS: usize = 25_000;

/// The chunks of `text`, which put together are the text. A text no longer than one run is one
/// chunk, found without a look at its characters.
pub fn chunks(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest.take()?;
        if text.len() <= MAX_RUN_CHARS {
            return (!text.is_empty()).then_some(text);
        }
        let (chunk, tail) = text.split_at(first_cut(text));
        rest = Some(tail);
        Some(chunk)
    })
}

/// Byte offset of the first cut.
fn first_cut(text: &str) -> usize {
    let (mut run, mut run_is_space) = (0, None);
    for (count, (at, character)) in text.char_indices().enumerate() {
        let is_space = Some(is_space(character));
        run = if is_space == run_is_space { run + 1 } else { 1 };
        run_is_space = is_space;
        if count == MAX_CHUNK_CHARS || run > MAX_RUN_CHARS {
            return at;
        }
    }
    text.len()
}

/// Python's `str.isspace`, by which the reference tells the kinds apart.
fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}
