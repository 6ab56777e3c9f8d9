//! What a resume changes of a run's config, and what it may not change.

use crate::error::UserError;
use run_config::RunConfig;
use serde_json::{Value, json};

/// The keys in which two configs differ, with both values.
pub fn differences(before: &RunConfig, after: &RunConfig) -> Vec<Value> {
    let flat = |config: &RunConfig| {
        let mut out = Vec::new();
        flatten("", &serde_json::to_value(config).unwrap_or_default(), &mut out);
        out
    };
    let (before, after) = (flat(before), flat(after));
    let value_in = |list: &[(String, Value)], key: &str| {
        list.iter().find(|(k, _)| k == key).map_or(Value::Null, |(_, value)| value.clone())
    };
    let mut keys: Vec<&String> = before.iter().chain(&after).map(|(key, _)| key).collect();
    keys.sort();
    keys.dedup();
    keys.into_iter()
        .map(|key| (key, value_in(&before, key), value_in(&after, key)))
        .filter(|(_, old, new)| old != new)
        .map(|(key, old, new)| json!({ "key": key, "old": old, "new": new }))
        .collect()
}

fn flatten(prefix: &str, value: &Value, out: &mut Vec<(String, Value)>) {
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                let dot = if prefix.is_empty() { "" } else { "." };
                flatten(&format!("{prefix}{dot}{key}"), value, out);
            }
        }
        other => out.push((prefix.to_owned(), other.clone())),
    }
}

/// Weights of one function are of no use to another: what changes the model's mathematics and not
/// its shapes is refused here; the shapes are compared with the checkpoint's.
///
/// # Errors
/// The first such key, with both values.
pub fn refuse_another_function(changes: &[Value]) -> Result<(), UserError> {
    const FUNCTION: [&str; 2] = ["model.norm_eps", "model.rope."];
    let key_of = |change: &Value| change["key"].as_str().unwrap_or_default().to_owned();
    let is_of_function =
        |change: &&Value| FUNCTION.iter().any(|prefix| key_of(change).starts_with(prefix));
    let Some(change) = changes.iter().find(is_of_function) else { return Ok(()) };
    let (key, old, new) = (key_of(change), &change["old"], &change["new"]);
    let message = format!(
        "{key}: {new} makes another model of it: the run's weights were trained with {old}"
    );
    let hint = "a new run with --set model.init_from=run:NAME can begin from these weights";
    Err(UserError::usage(message).hint(hint))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_changes_the_mathematics_is_refused() {
        let change = |key: &str| json!({ "key": key, "old": 1e-5, "new": 1e-3 });
        let harmless = [change("training.steps"), change("model.layers")];
        assert!(refuse_another_function(&harmless).is_ok());
        for key in ["model.norm_eps", "model.rope.theta", "model.rope.scaling.factor"] {
            let error = refuse_another_function(&[change("training.steps"), change(key)]);
            let message = error.unwrap_err().message;
            assert!(message.starts_with(&format!("{key}: 0.001 makes another")), "{message}");
            assert!(message.ends_with("trained with 0.00001"), "{message}");
        }
    }
}
