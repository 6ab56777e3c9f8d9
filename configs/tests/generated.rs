//! The generated files are those that the library makes now.

use run_config::RunConfig;
use run_config::reference::{reference_md, schema_json};
use std::path::Path;

fn check(name: &str, expected: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(found == expected, "configs/{name} is out of date: run `cargo xtask generate`");
}

#[test]
fn the_schema_is_up_to_date() {
    check("schema.json", &schema_json());
}

#[test]
fn the_reference_is_up_to_date() {
    check("REFERENCE.md", &reference_md());
}

/// Every word of every choice in the schema is one that the types know.
#[test]
fn every_choice_is_taken() {
    let schema: serde_json::Value = serde_json::from_str(&schema_json()).unwrap();
    let mut num_words = 0;
    let mut open = vec![(String::new(), &schema)];
    while let Some((path, node)) = open.pop() {
        let properties = node["properties"].as_object();
        for (name, property) in properties.into_iter().flatten() {
            let dot = if path.is_empty() { "" } else { "." };
            open.push((format!("{path}{dot}{name}"), property));
        }
        let direct = node["enum"].as_array();
        for word in direct.into_iter().flatten().filter_map(|word| word.as_str()) {
            num_words += 1;
            let text = include_str!("../runs/quickstart.yaml");
            let sets = [format!("{path}={word}")];
            if let Err(errors) = RunConfig::from_yaml_str(text, Path::new("/"), &sets) {
                let text = errors.to_string();
                assert!(text.contains("not yet supported"), "{path}={word}: {text}");
                assert!(!text.contains("internal"), "{path}={word}: {text}");
            }
        }
    }
    assert!(num_words > 25, "{num_words}");
}
