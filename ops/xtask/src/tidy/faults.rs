//! The fault table of `ops/faults.md`: every row is there, and every test that it names exists.

use super::Violation;
use std::collections::BTreeSet;

const PAGE: &str = "ops/faults.md";
const NUM_ROWS: usize = 20;

/// Compares the table with the tests; `text_of` gives a tracked file's text.
pub fn check(text_of: impl Fn(&str) -> Option<String>, violations: &mut Vec<Violation>) {
    let Some(page) = text_of(PAGE) else {
        let message = "the fault table is absent".to_owned();
        return violations.push(Violation { path: PAGE.to_owned(), line: 0, message });
    };
    let mut report = |line: usize, message: String| {
        violations.push(Violation { path: PAGE.to_owned(), line, message });
    };
    let mut rows = BTreeSet::new();
    for (index, line) in page.lines().enumerate() {
        let number = line.trim_start_matches('|').split('|').next().map(str::trim);
        rows.extend(number.and_then(|number| number.parse::<usize>().ok()));
        for quoted in line.split('`').skip(1).step_by(2) {
            let Some((file, name)) = quoted.split_once(".rs::") else { continue };
            let file = format!("{file}.rs");
            let head = format!("fn {name}(");
            match text_of(&file) {
                None => report(index + 1, format!("{file} does not exist")),
                Some(text) if !is_test(&text, &head) => {
                    report(index + 1, format!("{file} has no test {name}"));
                }
                Some(_) => {}
            }
        }
    }
    for row in (1..=NUM_ROWS).filter(|row| !rows.contains(row)) {
        report(0, format!("row {row} is left out"));
    }
}

/// Whether a function of this head stands under `#[test]`, or among properties.
fn is_test(text: &str, head: &str) -> bool {
    let Some(at) = text.find(head) else { return false };
    let before = text[..at].trim_end();
    let attributes = before.lines().rev().take_while(|line| {
        let line = line.trim_start();
        line.starts_with("#[") || line.starts_with("//")
    });
    attributes.into_iter().any(|line| line.trim() == "#[test]")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(page: &str) -> Vec<String> {
        let rows: String = (2..=NUM_ROWS).map(|row| format!("| {row} | x |\n")).collect();
        let page = format!("{page}\n{rows}");
        let text_of = |path: &str| match path {
            PAGE => Some(page.clone()),
            "a.rs" => Some("#[test]\n#[ignore = \"long\"]\nfn good() {}\nfn helper() {}\n".into()),
            _ => None,
        };
        let mut violations = Vec::new();
        check(text_of, &mut violations);
        violations.into_iter().map(|violation| violation.message).collect()
    }

    #[test]
    fn a_test_that_does_not_exist_is_found() {
        assert_eq!(problems("| 1 | `a.rs::good` |"), [] as [&str; 0]);
        assert_eq!(problems("| 1 | `a.rs::bad` |"), ["a.rs has no test bad"]);
        assert_eq!(problems("| 1 | `a.rs::helper` |"), ["a.rs has no test helper"]);
        assert_eq!(problems("| 1 | `b.rs::good` |"), ["b.rs does not exist"]);
        assert_eq!(problems("no row"), ["row 1 is left out"]);
    }
}
