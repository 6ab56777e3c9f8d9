//! Who may depend on whom: the table of ARCHITECTURE.md, compared with what cargo says.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use super::{Violation, output_of};

const PAGE: &str = "ARCHITECTURE.md";
const TABLE_HEAD: &str = "| crate | may depend on, of ours |";
/// The crates that reach libtorch, and the only one of ours that may name them.
const TORCH: [&str; 2] = ["tch", "torch-sys"];
const TORCH_FENCE: &str = "torch-shim";

/// For each crate, the crates it depends on or may depend on.
type Table = BTreeMap<String, BTreeSet<String>>;

pub fn check(root: &Path) -> Result<Vec<Violation>, String> {
    let page = std::fs::read_to_string(root.join(PAGE)).map_err(|e| format!("{PAGE}: {e}"))?;
    let arguments = ["metadata", "--no-deps", "--format-version=1"];
    let metadata = output_of(Command::new("cargo").args(arguments).current_dir(root))?;
    Ok(compare(&allowed(&page)?, &found(&metadata)?))
}

/// Reads the table: `| a, b | c, d |` lets a and b depend on c and d; "none" means none.
fn allowed(page: &str) -> Result<Table, String> {
    let rows = page.lines().skip_while(|line| *line != TABLE_HEAD).skip(2);
    let mut table = Table::new();
    for row in rows.take_while(|line| line.starts_with('|')) {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [crates, targets] = cells.as_slice() else {
            return Err(format!("{PAGE}: not two columns: {row}"));
        };
        let names = |cell: &str| -> BTreeSet<String> {
            let names = cell.split(',').map(str::trim);
            names.filter(|name| *name != "none").map(str::to_owned).collect()
        };
        for name in names(crates) {
            table.insert(name, names(targets));
        }
    }
    if table.is_empty() {
        return Err(format!("{PAGE} holds no table that begins with `{TABLE_HEAD}`"));
    }
    Ok(table)
}

/// What the manifests say, out of `cargo metadata`. Tests may depend on more than the code they
/// test.
fn found(metadata: &str) -> Result<Table, String> {
    let metadata: serde_json::Value =
        serde_json::from_str(metadata).map_err(|error| format!("cargo metadata: {error}"))?;
    let list = |value: &serde_json::Value| value.as_array().cloned().unwrap_or_default();
    let name = |value: &serde_json::Value| value["name"].as_str().unwrap_or_default().to_owned();
    let mut table = Table::new();
    for package in list(&metadata["packages"]) {
        let dependencies = list(&package["dependencies"]);
        let counted = dependencies.iter().filter(|d| d["kind"].as_str() != Some("dev"));
        table.insert(name(&package), counted.map(name).collect());
    }
    Ok(table)
}

fn compare(allowed: &Table, found: &Table) -> Vec<Violation> {
    let violation = |message| Violation { path: PAGE.to_owned(), line: 0, message };
    let mut violations = Vec::new();
    let none = BTreeSet::new();
    for (name, dependencies) in found {
        if !allowed.contains_key(name) {
            violations.push(violation(format!("the table of dependencies leaves out {name}")));
        }
        let may = allowed.get(name).unwrap_or(&none);
        for dependency in dependencies {
            let is_ours = found.contains_key(dependency);
            if is_ours && !may.contains(dependency) {
                let message =
                    format!("{name} must not depend on {dependency} (table of dependencies)");
                violations.push(violation(message));
            }
            if TORCH.contains(&dependency.as_str()) && name != TORCH_FENCE {
                let message = format!("{name} depends on {dependency}: only {TORCH_FENCE} may");
                violations.push(violation(message));
            }
        }
    }
    for name in allowed.iter().flat_map(|(name, may)| may.iter().chain([name])) {
        if !found.contains_key(name) {
            violations
                .push(violation(format!("the table of dependencies names {name}: no such crate")));
        }
    }
    violations
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(page: &str, manifests: &[(&str, &[&str])], expected: &[&str]) {
        let packages: Vec<_> = manifests
            .iter()
            .map(|(name, dependencies)| {
                let list: Vec<_> = dependencies
                    .iter()
                    .map(|d| match d.strip_prefix("dev:") {
                        Some(d) => serde_json::json!({"name": d, "kind": "dev"}),
                        None => serde_json::json!({"name": d, "kind": null}),
                    })
                    .collect();
                serde_json::json!({"name": name, "dependencies": list})
            })
            .collect();
        let metadata = serde_json::json!({ "packages": packages }).to_string();
        let violations = compare(&allowed(page).unwrap(), &found(&metadata).unwrap());
        let found: Vec<String> = violations.into_iter().map(|v| v.message).collect();
        assert_eq!(found.len(), expected.len(), "{found:#?}");
        for (found, expected) in found.iter().zip(expected) {
            assert!(found.contains(expected), "{found:?} does not hold {expected:?}");
        }
    }

    const TABLE: &str = "# Page\n\n| crate | may depend on, of ours |\n|---|---|\n\
                         | base, torch-shim | none |\n| top | base |\n\nText.\n";

    #[test]
    fn what_the_table_allows_passes() {
        let manifests: &[(&str, &[&str])] = &[
            ("base", &["serde"]),
            ("torch-shim", &["tch"]),
            ("top", &["base", "serde", "dev:torch-shim"]),
        ];
        check(TABLE, manifests, &[]);
    }

    #[test]
    fn what_the_table_forbids_is_found() {
        let manifests: &[(&str, &[&str])] =
            &[("base", &["top"]), ("torch-shim", &[]), ("top", &["tch"]), ("new", &[])];
        let expected = ["base must not depend on top", "leaves out new", "top depends on tch"];
        check(TABLE, manifests, &expected);
        check(TABLE, &[("base", &[]), ("top", &[])], &["names torch-shim: no such crate"]);
    }

    #[test]
    fn a_page_without_the_table_is_an_error() {
        assert!(allowed("# Page\n").unwrap_err().contains("holds no table"));
    }
}
