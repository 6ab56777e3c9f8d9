//! How Llama 3 cuts long texts before it tokenizes them: at most 400,000 characters at a time, and
//! in those, runs of more than 25,000 characters of one kind (space or not) are cut as well.

/// Where texts are cut.
#[derive(Clone, Copy)]
struct Limits {
    /// Characters that are tokenized at a time.
    chunk_chars: usize,
    /// Consecutive characters of one kind that are kept together.
    run_chars: usize,
}

const LIMITS: Limits = Limits { chunk_chars: 400_000, run_chars: 25_000 };

/// The chunks of `text`, which put together are the text.
pub fn chunks(text: &str) -> impl Iterator<Item = &str> {
    chunks_within(text, LIMITS)
}

fn chunks_within(text: &str, limits: Limits) -> impl Iterator<Item = &str> {
    pieces(text, move |rest| offset_of_char(rest, limits.chunk_chars))
        .flat_map(move |part| pieces(part, move |rest| first_long_run(rest, limits.run_chars)))
}

/// The pieces of `text`, each as long as `length` says of what is left.
fn pieces(text: &str, length: impl Fn(&str) -> usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let (piece, tail) = rest.split_at(length(rest));
        rest = tail;
        (!piece.is_empty()).then_some(piece)
    })
}

/// Byte offset at which the first run grows longer than `limit`; the text's length where none does.
/// Mostly that is known from a look at a few bytes of each block; character by character is gone
/// through only where it is not.
fn first_long_run(text: &str, limit: usize) -> usize {
    if runs_are_short(text.as_bytes(), limit) {
        return text.len();
    }
    let (mut run, mut run_is_space) = (0, None);
    for (at, character) in text.char_indices() {
        let is_space = Some(is_space(character));
        run = if is_space == run_is_space { run + 1 } else { 1 };
        run_is_space = is_space;
        if run > limit {
            return at;
        }
    }
    text.len()
}

/// Byte offset of a character by its number; the text's length where it has no more than that.
fn offset_of_char(text: &str, number: usize) -> usize {
    const PIECE: usize = 4096;
    if text.len() <= number {
        return text.len();
    }
    let begins_char = |byte: &u8| (*byte as i8) >= -0x40;
    let (mut before, mut at) = (0, 0);
    for piece in text.as_bytes().chunks(PIECE) {
        let chars = piece.iter().filter(|byte| begins_char(byte)).count();
        if before + chars > number {
            let mut starts = (at..).zip(piece).filter(|(_, byte)| begins_char(byte));
            return starts.nth(number - before).map_or(text.len(), |(offset, _)| offset);
        }
        (before, at) = (before + chars, at + piece.len());
    }
    text.len()
}

/// Whether it is plain that no run is longer than `limit`: a run that holds none of the blocks of
/// half that many bytes whole is shorter, and none holds a block in which there are both kinds.
fn runs_are_short(text: &[u8], limit: usize) -> bool {
    let has = |block: &[u8], kind: bool| {
        block.iter().any(|byte| byte.is_ascii() && is_space(char::from(*byte)) == kind)
    };
    text.chunks_exact((limit / 2).max(1)).all(|block| has(block, true) && has(block, false))
}

/// Python's `str.isspace`, by which the reference tells the kinds apart.
fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As the rule reads: parts of so many characters, and those cut where a run is too long.
    fn plainly(text: &str, limits: Limits) -> Vec<String> {
        let mut chunks = Vec::new();
        let characters: Vec<char> = text.chars().collect();
        for part in characters.chunks(limits.chunk_chars) {
            let (mut start, mut run) = (0, 0);
            for at in 0..part.len() {
                let same = at > 0 && is_space(part[at - 1]) == is_space(part[at]);
                run = if same { run + 1 } else { 1 };
                if run > limits.run_chars {
                    chunks.push(part[start..at].iter().collect());
                    (start, run) = (at, 1);
                }
            }
            chunks.push(part[start..].iter().collect());
        }
        chunks
    }

    /// One character: of one to four bytes, space or not.
    const PIECE: &str = "[ a\u{e9}\u{3000}\u{1c}\u{65e5}\u{1f600}]";

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn chunks_are_those_of_the_rule(
            pieces in prop::collection::vec((PIECE, 1..12_usize), 0..40),
            chunk_chars in 1..60_usize,
            run_chars in 1..14_usize,
        ) {
            let text: String = pieces.iter().map(|(piece, times)| piece.repeat(*times)).collect();
            let limits = Limits { chunk_chars, run_chars };
            let found: Vec<String> = chunks_within(&text, limits).map(String::from).collect();
            prop_assert_eq!(found, plainly(&text, limits));
        }
    }

    #[test]
    fn a_character_is_found_beyond_the_first_pieces() {
        let text = "a\u{e9}\u{65e5}".repeat(5000);
        for number in [0, 1, 4095, 4096, 9000, 14_999, 15_000, 20_000] {
            let expected = text.char_indices().nth(number).map_or(text.len(), |(at, _)| at);
            assert_eq!(offset_of_char(&text, number), expected, "character {number}");
        }
    }
}
