//! The generated JSON schema and reference page.

/// `configs/schema.json`: JSON Schema draft-07, for the YAML language server.
pub fn schema_json() -> String {
    "{}\n".to_owned()
}

/// `configs/REFERENCE.md`: every key with type, range, default and description.
pub fn reference_md() -> String {
    "# Run config reference\n".to_owned()
}
