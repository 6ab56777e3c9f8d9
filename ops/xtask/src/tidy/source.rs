//! One Rust file as the rules see it: the code without comments and strings, its functions, and
//! which lines are tests.

/// A file of Rust.
pub struct Source {
    pub path: String,
    pub text: String,
    /// The text with comments, strings and characters blanked out; bytes and lines keep their
    /// places.
    pub code: String,
    /// For each line, whether it belongs to a test.
    pub is_test: Vec<bool>,
}

/// A function with a body.
#[derive(Debug, PartialEq, Eq)]
pub struct Function {
    pub name: String,
    /// The line of its `fn`, from 1.
    pub line: usize,
    pub num_lines: usize,
}

impl Source {
    pub fn new(path: &str, text: &str) -> Self {
        let code = without_comments_and_strings(text);
        let is_test = test_lines(path, &code);
        Self { path: path.to_owned(), text: text.to_owned(), code, is_test }
    }

    /// The lines of code outside tests, with their numbers.
    pub fn code_outside_tests(&self) -> impl Iterator<Item = (usize, &str)> {
        let lines = self.code.lines().zip(&self.is_test).enumerate();
        lines.filter(|(_, (_, is_test))| !**is_test).map(|(index, (line, _))| (index + 1, line))
    }

    /// The functions with a body that are no tests.
    pub fn functions(&self) -> Vec<Function> {
        let code = self.code.as_bytes();
        let mut functions = Vec::new();
        for at in words(&self.code, "fn") {
            let name: String = self.code[at + 2..]
                .trim_start()
                .chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect();
            let line = line_of(code, at);
            if name.is_empty() || self.is_test.get(line - 1) == Some(&true) {
                continue; // a function pointer's type has no name
            }
            if let Some(end) = end_of_item(code, at).filter(|end| code[*end] == b'}') {
                let num_lines = line_of(code, end) - line + 1;
                functions.push(Function { name, line, num_lines });
            }
        }
        functions
    }
}

/// The places at which `word` stands by itself.
pub fn words(code: &str, word: &str) -> Vec<usize> {
    let is_part = |byte: Option<&u8>| byte.is_some_and(|b| b.is_ascii_alphanumeric() || *b == b'_');
    let bytes = code.as_bytes();
    let matches = code.match_indices(word).map(|(at, _)| at);
    matches
        .filter(|at| !is_part(at.checked_sub(1).and_then(|i| bytes.get(i))))
        .filter(|at| !is_part(bytes.get(at + word.len())))
        .collect()
}

fn line_of(code: &[u8], at: usize) -> usize {
    code[..at].iter().filter(|b| **b == b'\n').count() + 1
}

/// The last byte of the item that starts at `start`: its closing brace, or its semicolon.
fn end_of_item(code: &[u8], start: usize) -> Option<usize> {
    let (mut brackets, mut braces) = (0_i32, 0_i32);
    for (at, byte) in code.iter().enumerate().skip(start) {
        match byte {
            b'(' | b'[' => brackets += 1,
            b')' | b']' => brackets -= 1,
            b'{' => braces += 1,
            b'}' => {
                braces -= 1;
                if braces == 0 && brackets == 0 {
                    return Some(at);
                }
            }
            b';' if braces == 0 && brackets == 0 => return Some(at),
            _ => {}
        }
    }
    None
}

fn test_lines(path: &str, code: &str) -> Vec<bool> {
    let is_test_file = path.split('/').any(|part| part == "tests" || part == "tests.rs")
        || code.contains("#![cfg(test)]");
    let mut is_test = vec![is_test_file; code.lines().count()];
    let bytes = code.as_bytes();
    for attribute in ["#[cfg(test)]", "#[test]"] {
        for (at, _) in code.match_indices(attribute) {
            let end = end_of_item(bytes, at).unwrap_or(bytes.len() - 1);
            let last = line_of(bytes, end).min(is_test.len());
            is_test[line_of(bytes, at) - 1..last].fill(true);
        }
    }
    is_test
}

/// Blanks out comments, strings and characters.
fn without_comments_and_strings(text: &str) -> String {
    let mut bytes = text.as_bytes().to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = match end_of_non_code(&bytes, at) {
            Some(end) => end.min(bytes.len()),
            None => {
                at += 1;
                continue;
            }
        };
        for byte in &mut bytes[at..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Where the comment, string or character that starts at `at` ends; none where code stands.
fn end_of_non_code(bytes: &[u8], at: usize) -> Option<usize> {
    let rest = &bytes[at..];
    let starts_word = at == 0 || !(bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_');
    match rest {
        [b'/', b'/', ..] => Some(at + find(rest, b"\n").unwrap_or(rest.len())),
        [b'/', b'*', ..] => Some(at + end_of_block_comment(rest)),
        [b'"', ..] => Some(at + end_of_quoted(rest, b'"')),
        [b'\'', b'\\', ..] => Some(at + end_of_quoted(rest, b'\'')),
        [b'\'', ..] => end_of_plain_character(rest).map(|length| at + length),
        [b'r', ..] if starts_word => raw_string_length(&rest[1..]).map(|length| at + 1 + length),
        [b'b' | b'c', b'r', ..] if starts_word => {
            raw_string_length(&rest[2..]).map(|length| at + 2 + length)
        }
        _ => None,
    }
}

fn end_of_block_comment(rest: &[u8]) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < rest.len() {
        match rest.get(at..at + 2) {
            Some(b"/*") => (depth, at) = (depth + 1, at + 2),
            Some(b"*/") => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

fn end_of_quoted(rest: &[u8], quote: u8) -> usize {
    let mut at = 1;
    while at < rest.len() && rest[at] != quote {
        at += if rest[at] == b'\\' { 2 } else { 1 };
    }
    at + 1
}

/// The length of a character such as 'x'; none for a lifetime.
fn end_of_plain_character(rest: &[u8]) -> Option<usize> {
    let text = std::str::from_utf8(&rest[..rest.len().min(6)])
        .or_else(|error| std::str::from_utf8(&rest[..error.valid_up_to()]));
    let character = text.ok()?.chars().nth(1)?;
    let end = 1 + character.len_utf8();
    (rest.get(end) == Some(&b'\'')).then_some(end + 1)
}

/// The length of `#"…"#` with any number of hashes.
fn raw_string_length(rest: &[u8]) -> Option<usize> {
    let hashes = rest.iter().take_while(|b| **b == b'#').count();
    if rest.get(hashes) != Some(&b'"') {
        return None;
    }
    let mut closing = vec![b'"'];
    closing.resize(hashes + 1, b'#');
    let length = find(&rest[hashes + 1..], &closing).map(|at| hashes + 1 + at + closing.len());
    Some(length.unwrap_or(rest.len()))
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_code(text: &str, expected: &str) {
        assert_eq!(without_comments_and_strings(text), expected);
    }

    #[test]
    fn comments_and_strings_are_blanked_out() {
        check_code("a // b\nc", "a     \nc");
        check_code("a /* b /* c */ d */ e", "a                   e");
        check_code(r#"f("x\"y", 'z')"#, "f(      ,    )");
        check_code(r##"f(r#"a"b"#)"##, "f(        )");
        check_code("fn f<'a>(x: &'a str)", "fn f<'a>(x: &'a str)");
        check_code(r"match c { '\'' => 1 }", "match c {      => 1 }");
        check_code("'é' 'a", "     'a");
        check_code("\"over\nlines\"", "     \n      ");
    }

    #[test]
    fn functions_are_measured_and_tests_left_out() {
        let text = "pub fn a() -> [u8; 2] {\n    x()\n}\ntrait T {\n    fn b();\n}\n\
                    #[cfg(test)]\nmod tests {\n    fn c() {\n    }\n}\n";
        let functions = Source::new("src/x.rs", text).functions();
        assert_eq!(functions, [Function { name: "a".to_owned(), line: 1, num_lines: 3 }]);
    }

    #[test]
    fn lines_of_tests_are_known() {
        let text = "fn a() {}\n#[cfg(test)]\nmod tests {\n    fn b() {}\n}\nfn c() {}\n";
        let source = Source::new("src/x.rs", text);
        assert_eq!(source.is_test, [false, true, true, true, true, false]);
        assert!(Source::new("tests/x.rs", "fn a() {}\n").is_test[0]);
        assert!(Source::new("src/tests.rs", "fn a() {}\n").is_test[0]);
    }
}
