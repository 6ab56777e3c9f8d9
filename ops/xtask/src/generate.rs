//! Files made from code: the JSON schema of the run config and its reference page.

use std::fs;
use std::path::Path;

/// Whether the files are written, or only compared with what would be written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Write,
    Check,
}

pub fn run(root: &Path, mode: Mode) -> Result<String, String> {
    let files = [
        ("configs/schema.json", run_config::reference::schema_json()),
        ("configs/REFERENCE.md", run_config::reference::reference_md()),
    ];
    let mut changed = Vec::new();
    for (path, text) in files {
        if bring_up_to_date(&root.join(path), &text, mode)? {
            changed.push(path);
        }
    }
    match (mode, changed.is_empty()) {
        (_, true) => Ok("generate: all files are up to date".to_owned()),
        (Mode::Write, false) => Ok(format!("generate: wrote {}", changed.join(", "))),
        (Mode::Check, false) => Err(format!(
            "generate: out of date: {}; run `cargo xtask generate`",
            changed.join(", ")
        )),
    }
}

/// Returns whether the file differs from `text`, and makes it equal when asked to.
fn bring_up_to_date(path: &Path, text: &str, mode: Mode) -> Result<bool, String> {
    let text = format!("{}\n", text.trim_end());
    if fs::read_to_string(path).is_ok_and(|found| found == text) {
        return Ok(false);
    }
    if mode == Mode::Write {
        fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_drifted_is_found_and_mended() {
        let path = std::env::temp_dir().join(format!("phalanx-generate-{}", std::process::id()));
        fs::write(&path, "old\n").unwrap();
        assert_eq!(bring_up_to_date(&path, "new", Mode::Check), Ok(true));
        assert_eq!(fs::read_to_string(&path).unwrap(), "old\n");
        assert_eq!(bring_up_to_date(&path, "new", Mode::Write), Ok(true));
        assert_eq!(bring_up_to_date(&path, "new", Mode::Check), Ok(false));
        fs::remove_file(&path).unwrap();
    }
}
