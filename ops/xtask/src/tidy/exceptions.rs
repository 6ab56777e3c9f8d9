//! Where a rule does not hold, and why. An exception that nothing needs any more is a problem too.

use super::Violation;
use super::rules::MAX_FUNCTION_LINES;
use super::source::{Source, words};

/// Files and folders (ending in '/') in which `unsafe` may stand.
const UNSAFE_ALLOWED: &[(&str, &str)] = &[
    ("trainer/crates/torch-shim/src/", "the one crate that calls libtorch"),
    ("trainer/crates/nccl-rs/src/", "the one crate that calls NCCL"),
    ("trainer/crates/nccl-rs/tests/nccl/fake.rs", "addresses that a fake NCCL writes down"),
    ("trainer/crates/kernels/src/", "the one crate that calls CUDA's driver and NVRTC"),
    ("trainer/crates/kernels/tests/driver.rs", "addresses that a fake driver writes down"),
    ("trainer/crates/kernels/tests/emulator/mod.rs", "kernels as a host compiler made them"),
    ("trainer/crates/collectives/src/mpi/raw.rs", "memory that MPI writes to between its calls"),
    (
        "trainer/crates/collectives/src/nccl/native.rs",
        "addresses of tensors and streams, which NCCL takes",
    ),
    ("launcher/src/supervisor/unix.rs", "what a child does between fork and exec"),
    ("launcher/src/health/nvml.rs", "NVIDIA's management library, loaded at run time"),
    ("trainer/crates/checkpoint-format/src/mapped.rs", "memory maps of read-only files"),
];

/// Functions that may be longer than the limit.
const LONG_FUNCTIONS: &[(&str, &str, &str)] = &[];

pub fn allows_unsafe(path: &str) -> bool {
    UNSAFE_ALLOWED.iter().any(|(place, _)| covers(place, path))
}

pub fn allows_long_function(path: &str, name: &str) -> bool {
    LONG_FUNCTIONS.iter().any(|(file, function, _)| *file == path && *function == name)
}

fn covers(place: &str, path: &str) -> bool {
    place == path || (place.ends_with('/') && path.starts_with(place))
}

/// Every exception must have a use.
pub fn check_used(sources: &[Source], violations: &mut Vec<Violation>) {
    let mut unused = |what: String| {
        let message = format!("the exception for {what} is not needed any more: remove it");
        let path = "ops/xtask/src/tidy/exceptions.rs".to_owned();
        violations.push(Violation { path, line: 0, message });
    };
    for (place, _) in UNSAFE_ALLOWED {
        let holds_unsafe =
            |s: &&Source| covers(place, &s.path) && !words(&s.code, "unsafe").is_empty();
        if !sources.iter().any(|source| holds_unsafe(&source)) {
            unused(format!("unsafe code in {place}"));
        }
    }
    for (file, name, _) in LONG_FUNCTIONS {
        let source = sources.iter().find(|source| source.path == *file);
        let functions = source.map(Source::functions).unwrap_or_default();
        if !functions.iter().any(|f| f.name == *name && f.num_lines > MAX_FUNCTION_LINES) {
            unused(format!("the long function {name} of {file}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exception_without_a_use_is_found() {
        let mut violations = Vec::new();
        check_used(&[], &mut violations);
        assert_eq!(violations.len(), UNSAFE_ALLOWED.len() + LONG_FUNCTIONS.len());
        let used = Source::new("trainer/crates/torch-shim/src/sys.rs", "unsafe fn f() {}\n");
        let mut fewer = Vec::new();
        check_used(&[used], &mut fewer);
        assert_eq!(fewer.len(), violations.len() - 1);
    }
}
