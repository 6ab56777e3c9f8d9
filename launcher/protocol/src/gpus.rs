//! The GPUs of a machine: those that NVIDIA's driver has made files for, and those of them that
//! CUDA is let see. Nothing is loaded for it.

use crate::env;
use std::collections::BTreeSet;
use std::path::Path;

/// GPUs that programs of this environment may use.
pub fn usable() -> usize {
    let allowed = std::env::var(env::CUDA_VISIBLE).ok();
    visible(installed(Path::new("/")), allowed.as_deref())
}

/// GPUs of the machine whose files are under `root`. A container may see the device files of some
/// and the driver's list of all; a machine that has never used its GPUs has the list alone.
pub fn installed(root: &Path) -> usize {
    let names = |folder: &str| {
        let entries = std::fs::read_dir(root.join(folder)).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect::<Vec<String>>()
    };
    let is_gpu = |name: &String| {
        let number = name.strip_prefix("nvidia").unwrap_or_default();
        !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
    };
    match names("dev").iter().filter(|name| is_gpu(name)).count() {
        0 => names("proc/driver/nvidia/gpus").len(),
        devices => devices,
    }
}

/// Of so many, those that a value of [`env::CUDA_VISIBLE`] leaves: a list of numbers, or of ids
/// (`GPU-…`, `MIG-…`). As CUDA reads it, the first that is none ends the list, and a list that
/// names one twice is empty. An id counts as that of a GPU which is there.
pub fn visible(installed: usize, allowed: Option<&str>) -> usize {
    let Some(allowed) = allowed else { return installed };
    let mut seen = BTreeSet::new();
    for entry in allowed.split(',').map(str::trim) {
        let is_id = entry.starts_with("GPU-") || entry.starts_with("MIG-");
        let is_number = entry.parse::<usize>().is_ok_and(|index| index < installed);
        if !(is_id || is_number) {
            break;
        }
        if !seen.insert(entry) {
            return 0;
        }
    }
    seen.len().min(installed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_files_count_before_the_drivers_list() {
        let folder = tempfile::tempdir().unwrap();
        let make = |path: &str| std::fs::create_dir_all(folder.path().join(path)).unwrap();
        assert_eq!(installed(folder.path()), 0);
        make("proc/driver/nvidia/gpus/0000:18:00.0");
        make("proc/driver/nvidia/gpus/0000:2a:00.0");
        assert_eq!(installed(folder.path()), 2);
        for name in ["nvidia0", "nvidiactl", "nvidia-uvm", "nvidia", "nvidia-caps", "null"] {
            make(&format!("dev/{name}"));
        }
        assert_eq!(installed(folder.path()), 1, "a container that sees one of two");
        make("dev/nvidia12");
        assert_eq!(installed(folder.path()), 2);
    }

    #[test]
    fn the_variable_is_read_as_cuda_does() {
        let check = |allowed, expected| assert_eq!(visible(4, allowed), expected, "{allowed:?}");
        check(None, 4);
        check(Some(""), 0);
        check(Some("-1"), 0);
        check(Some("0"), 1);
        check(Some("3, 1"), 2);
        check(Some("0,1,-1,2"), 2);
        check(Some("0,7,1"), 1);
        check(Some("1,1"), 0);
        check(Some("GPU-8932f937,GPU-1f2e"), 2);
        check(Some("NoDevFiles"), 0);
        assert_eq!(visible(0, Some("0")), 0);
    }
}
