//! Which libtorch the trainer needs, and which one a folder holds.

use std::path::Path;

/// The release that the trainer is built against, as major and minor: its C++ interface is not the
/// same in another.
pub const RELEASE: &str = "2.11";

/// The version of the libtorch in `prefix` (the folder that holds `lib/`): of a wheel or of a
/// libtorch archive. `None` where it does not say.
pub fn version_in(prefix: &Path) -> Option<String> {
    if let Ok(text) = std::fs::read_to_string(prefix.join("version.py")) {
        let line = text.lines().find_map(|line| line.strip_prefix("__version__"))?;
        let quoted = line.split_once('=')?.1.trim();
        return Some(quoted.trim_matches(['"', '\'']).to_owned());
    }
    let text = std::fs::read_to_string(prefix.join("build-version")).ok()?;
    Some(text.trim().to_owned())
}

/// Refuses a libtorch that says it is of another release than [`RELEASE`].
///
/// # Errors
/// A message with both versions and what to do.
pub fn check(prefix: &Path) -> Result<(), String> {
    match version_in(prefix) {
        Some(version) if !is_release(&version) => Err(format!(
            "the libtorch in {} is version {version}, and the trainer was built for {RELEASE}; \
             hint: set {} to a libtorch {RELEASE}, or unset it",
            prefix.display(),
            crate::env::LIBTORCH
        )),
        _ => Ok(()),
    }
}

fn is_release(version: &str) -> bool {
    let rest = version.strip_prefix(RELEASE);
    rest.is_some_and(|rest| !rest.starts_with(|next: char| next.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_version(file: &str, text: &str, expected: Option<&str>, fits: bool) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(file), text).unwrap();
        assert_eq!(version_in(folder.path()).as_deref(), expected);
        let outcome = check(folder.path());
        assert_eq!(outcome.is_ok(), fits, "{outcome:?}");
        if let (Err(error), Some(version)) = (outcome, expected) {
            assert!(error.contains(version) && error.contains(RELEASE), "{error}");
        }
    }

    #[test]
    fn another_release_is_refused_with_both_versions() {
        let wheel = "debug = False\n__version__ = '2.11.0+cu130'\n";
        check_version("version.py", wheel, Some("2.11.0+cu130"), true);
        check_version("version.py", "__version__ = \"2.10.0\"\n", Some("2.10.0"), false);
        check_version("build-version", "2.11.1\n", Some("2.11.1"), true);
        check_version("build-version", "2.1.0\n", Some("2.1.0"), false);
        check_version("build-version", "2.110.0\n", Some("2.110.0"), false);
        check_version("README", "2.10.0\n", None, true);
    }
}
