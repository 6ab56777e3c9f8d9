//! The rules for single files.

use super::source::{Source, words};
use super::{Violation, exceptions};

const MAX_FILE_LINES: usize = 600;
pub const MAX_FUNCTION_LINES: usize = 70;
const MAX_COLUMNS: usize = 100;

/// Files that are included into others or run by cargo, and need no `//!`.
const NO_MODULE_DOC: &[&str] = &["build.rs", "torch_rpath.rs"];
/// What must not stand in code outside tests, and what to do instead.
const FORBIDDEN: &[(&str, &str)] = &[
    (".unwrap()", "return an error, or show by the types that it cannot fail"),
    (".expect(", "return an error, or show by the types that it cannot fail"),
    ("panic!(", "return an error"),
    ("todo!(", "write it, or leave it out"),
    ("unimplemented!(", "write it, or leave it out"),
    ("dbg!(", "use tracing"),
];

/// The rules for every text file.
pub fn check_text(path: &str, text: &str, violations: &mut Vec<Violation>) {
    // Put together here, so that this file does not break its own rule.
    let homes = [["/ho", "me/"].concat(), ["/ro", "ot/"].concat(), ["/Us", "ers/"].concat()];
    for (index, line) in text.lines().enumerate() {
        for home in &homes {
            let Some(at) = line.find(home.as_str()) else { continue };
            if at == 0 || !line.as_bytes()[at - 1].is_ascii_alphanumeric() {
                report(violations, path, index + 1, format!("{home}… is a path of one machine"));
            }
        }
    }
}

/// The rules for every Rust file.
pub fn check_rust(source: &Source, violations: &mut Vec<Violation>) {
    check_layout(source, violations);
    check_functions(source, violations);
    check_forbidden(source, violations);
    check_unsafe(source, violations);
    check_attributes(source, violations);
}

fn report(violations: &mut Vec<Violation>, path: &str, line: usize, message: impl Into<String>) {
    violations.push(Violation { path: path.to_owned(), line, message: message.into() });
}

fn check_layout(source: &Source, violations: &mut Vec<Violation>) {
    let name = source.path.rsplit('/').next().unwrap_or_default();
    if !NO_MODULE_DOC.contains(&name) && !source.text.starts_with("//! ") {
        report(
            violations,
            &source.path,
            1,
            "the file does not begin with `//!` that says what it is for",
        );
    }
    let num_lines = source.text.lines().count();
    if num_lines > MAX_FILE_LINES {
        let message = format!("{num_lines} lines, the limit is {MAX_FILE_LINES}: split the file");
        report(violations, &source.path, 0, message);
    }
    for (index, line) in source.text.lines().enumerate() {
        let columns = line.chars().count();
        if columns > MAX_COLUMNS {
            let message = format!("{columns} columns, the limit is {MAX_COLUMNS}");
            report(violations, &source.path, index + 1, message);
        }
    }
}

fn check_functions(source: &Source, violations: &mut Vec<Violation>) {
    for function in source.functions() {
        let is_long = function.num_lines > MAX_FUNCTION_LINES;
        if is_long && !exceptions::allows_long_function(&source.path, &function.name) {
            let message = format!(
                "{} has {} lines, the limit is {MAX_FUNCTION_LINES}: split it",
                function.name, function.num_lines
            );
            report(violations, &source.path, function.line, message);
        }
    }
}

fn check_forbidden(source: &Source, violations: &mut Vec<Violation>) {
    for (number, line) in source.code_outside_tests() {
        for (pattern, instead) in FORBIDDEN {
            let is_word = pattern.starts_with('.');
            let found = line.match_indices(pattern).any(|(at, _)| {
                is_word || at == 0 || !line.as_bytes()[at - 1].is_ascii_alphanumeric()
            });
            if found {
                let message = format!("`{pattern}` outside tests: {instead}");
                report(violations, &source.path, number, message);
            }
        }
    }
}

fn check_unsafe(source: &Source, violations: &mut Vec<Violation>) {
    if exceptions::allows_unsafe(&source.path) {
        return;
    }
    for (index, line) in source.code.lines().enumerate() {
        if !words(line, "unsafe").is_empty() {
            report(violations, &source.path, index + 1, "`unsafe` outside the fence crates");
        }
    }
}

/// A lint or a test is switched off only with a reason that stands beside it.
fn check_attributes(source: &Source, violations: &mut Vec<Violation>) {
    for pattern in ["[allow(", "[expect("] {
        for (at, _) in source.code.match_indices(pattern) {
            let end = source.code[at..].find(']').map_or(source.code.len(), |length| at + length);
            if words(&source.code[at..end], "reason").is_empty() {
                let line = source.code[..at].matches('\n').count() + 1;
                let message =
                    format!("`#{pattern}…)]` without a reason: #[expect(…, reason = \"…\")]");
                report(violations, &source.path, line, message);
            }
        }
    }
    for (index, line) in source.code.lines().enumerate() {
        if line.contains("#[ignore]") {
            report(violations, &source.path, index + 1, "`#[ignore]` without a reason");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The violations of a file, as "line message", which must each begin with the expected text.
    fn check(path: &str, text: &str, expected: &[&str]) {
        let mut violations = Vec::new();
        check_text(path, text, &mut violations);
        check_rust(&Source::new(path, text), &mut violations);
        let found: Vec<String> =
            violations.iter().map(|v| format!("{} {}", v.line, v.message)).collect();
        assert_eq!(found.len(), expected.len(), "{found:#?}");
        for (found, expected) in found.iter().zip(expected) {
            assert!(found.starts_with(expected), "{found:?} does not begin with {expected:?}");
        }
    }

    #[test]
    fn a_tidy_file_passes() {
        check("src/a.rs", "//! Doc.\n\nfn f(x: Option<u8>) -> u8 {\n    x.unwrap_or(0)\n}\n", &[]);
        check("crate/build.rs", "fn main() {}\n", &[]);
    }

    #[test]
    fn a_missing_module_doc_is_found() {
        check("src/a.rs", "fn f() {}\n", &["1 the file does not begin"]);
    }

    #[test]
    fn sizes_are_limited() {
        let body = "    x();\n".repeat(MAX_FUNCTION_LINES);
        check("src/a.rs", &format!("//! D.\nfn f() {{\n{body}}}\n"), &["2 f has 72 lines"]);
        check("tests/a.rs", &format!("//! D.\nfn f() {{\n{body}}}\n"), &[]);
        check("src/a.rs", &"//! D.\n".repeat(MAX_FILE_LINES + 1), &["0 601 lines"]);
        check("src/a.rs", &format!("//! {}\n", "é".repeat(MAX_COLUMNS - 4)), &[]);
        check("src/a.rs", &format!("//! {}\n", "é".repeat(MAX_COLUMNS - 3)), &["1 101 columns"]);
    }

    #[test]
    fn what_may_panic_is_found_outside_tests_only() {
        check("src/a.rs", "//! D.\nfn f() { a.unwrap(); }\n", &["2 `.unwrap()`"]);
        check(
            "src/a.rs",
            "//! D.\nfn f() {\n    a\n        .expect(\"x\");\n}\n",
            &["4 `.expect(`"],
        );
        check("src/a.rs", "//! D.\nfn f() { todo!() }\n", &["2 `todo!(`"]);
        check("src/a.rs", "//! D.\nfn f() { std::panic!(\"x\") }\n", &["2 `panic!(`"]);
        check("src/a.rs", "//! D.\n// a.unwrap()\nconst A: &str = \".unwrap()\";\n", &[]);
        check("src/a.rs", "//! D.\n#[cfg(test)]\nmod tests {\n    fn f() { a.unwrap() }\n}\n", &[]);
    }

    #[test]
    fn unsafe_stands_in_the_fence_crates_only() {
        check("src/a.rs", "//! D.\nfn f() { unsafe { g() } }\n", &["2 `unsafe`"]);
        check("src/a.rs", "//! D.\n#[deny(unsafe_code)]\nfn f() {}\n", &[]);
        check("trainer/crates/torch-shim/src/a.rs", "//! D.\nunsafe fn f() {}\n", &[]);
    }

    #[test]
    fn exceptions_carry_their_reason() {
        check("src/a.rs", "//! D.\n#[allow(dead_code)]\nfn f() {}\n", &["2 `#[allow("]);
        check("src/a.rs", "//! D.\n#[expect(dead_code, reason = \"x\")]\nfn f() {}\n", &[]);
        check("tests/a.rs", "//! D.\n#[test]\n#[ignore]\nfn f() {}\n", &["3 `#[ignore]`"]);
    }

    #[test]
    fn paths_of_one_machine_are_found() {
        let path = ["/ho", "me/someone/x"].concat();
        check("src/a.rs", &format!("//! D.\n// {path}\n"), &["2 /ho"]);
        check("src/a.rs", &format!("//! D.\n// https://example.org{path}\n"), &[]);
    }
}
