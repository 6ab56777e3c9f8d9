//! What the NVIDIA driver says of this machine's GPUs. Never yet run on a GPU: tested against a
//! library that plays the driver's.

use super::nvml::{LIBRARY, Nvml};
use super::{Found, xid};
use std::path::Path;

/// Errors of memory that could not be mended, and GPUs that are lost. A machine without a GPU is
/// well.
pub fn check() -> Found {
    // The driver's library knows nothing of what CUDA is let see.
    let installed = rank_protocol::gpus::installed(Path::new("/"));
    check_with(Path::new(LIBRARY), installed, xid::recent())
}

/// Bytes of the GPU of this machine that has least memory; `None` where the driver does not say.
pub fn least_memory() -> Option<u64> {
    least_memory_with(Path::new(LIBRARY))
}

fn least_memory_with(library: &Path) -> Option<u64> {
    let nvml = Nvml::open(library).ok().flatten()?;
    let memory = (0..nvml.count().ok()?).map(|index| nvml.memory(index).ok());
    memory.collect::<Option<Vec<u64>>>()?.into_iter().min()
}

fn check_with(
    library: &Path,
    expected: usize,
    xids: Option<std::collections::BTreeSet<u32>>,
) -> Found {
    if expected == 0 {
        return Ok(String::new());
    }
    if let Some(fatal) = xids.as_ref().and_then(|xids| xids.first()) {
        return Err(format!("the driver wrote Xid {fatal} within the last hour"));
    }
    let Some(nvml) = Nvml::open(library)? else {
        return Ok(format!("{expected} GPUs, and no {LIBRARY} to ask"));
    };
    let count = nvml.count()?;
    if usize::try_from(count) != Ok(expected) {
        return Err(format!("the driver lists {expected} GPUs, and {count} answer"));
    }
    for index in 0..count {
        let gpu = nvml.gpu(index).map_err(|error| format!("GPU {index}: {error}"))?;
        if gpu.uncorrected > 0 {
            let count = gpu.uncorrected;
            return Err(format!("GPU {index} has {count} uncorrected ECC errors: reset it"));
        }
        if gpu.remap_failed {
            return Err(format!("GPU {index} has no spare row for a bad one of its memory"));
        }
    }
    let log = if xids.is_some() { "no fatal Xid" } else { "the kernel's log may not be read" };
    Ok(format!("{count} GPUs without errors, {log}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::process::Command;

    /// A library that plays NVML: two GPUs, of which the second has what `defines` say.
    fn fake(folder: &Path, name: &str, defines: &[&str]) -> std::path::PathBuf {
        let path = folder.join(format!("{name}.so"));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/health/fake_nvml.c");
        let mut command = Command::new("cc");
        command.args(["-shared", "-fPIC", "-o"]).arg(&path).arg(source).args(defines);
        assert!(command.status().unwrap().success());
        path
    }

    #[test]
    fn what_the_driver_says_is_heeded() {
        let folder = tempfile::tempdir().unwrap();
        let check = |name: &str, defines: &[&str], expected: Result<&str, &str>| {
            let found = check_with(&fake(folder.path(), name, defines), 2, Some(BTreeSet::new()));
            match (&found, expected) {
                (Ok(note), Ok(expected)) | (Err(note), Err(expected)) => {
                    assert!(note.contains(expected), "{name}: {note}");
                }
                _ => panic!("{name}: {found:?}"),
            }
        };
        check("well", &[], Ok("2 GPUs without errors, no fatal Xid"));
        check("ecc", &["-DECC_ERRORS=3"], Err("GPU 1 has 3 uncorrected ECC errors"));
        check("rows", &["-DREMAP_FAILURE=1"], Err("GPU 1 has no spare row"));
        check("lost", &["-DHANDLE_CODE=15"], Err("GPU 1: its handle: NVML error 15"));
        check("fewer", &["-DCOUNT=1"], Err("the driver lists 2 GPUs, and 1 answer"));
        check("dead", &["-DINIT_CODE=9"], Err("NVML does not start: error 9"));
        check("old", &["-DNO_REMAPPED_ROWS"], Ok("2 GPUs"));
        check("no ecc", &["-DECC_CODE=3"], Ok("2 GPUs"));
    }

    #[test]
    fn the_gpu_with_least_memory_counts() {
        let folder = tempfile::tempdir().unwrap();
        let of = |name: &str, defines: &[&str]| {
            least_memory_with(&fake(folder.path(), name, defines)).map(|bytes| bytes >> 30)
        };
        assert_eq!(of("two", &[]), Some(40));
        assert_eq!(of("first", &["-DCOUNT=1"]), Some(80));
        assert_eq!(of("silent", &["-DMEMORY_CODE=3"]), None);
        assert_eq!(least_memory_with(Path::new("/nowhere/libnvidia-ml.so.1")), None);
    }

    #[test]
    fn a_machine_without_gpus_or_library_is_well() {
        let absent = Path::new("/nowhere/libnvidia-ml.so.1");
        assert_eq!(check_with(absent, 0, None), Ok(String::new()));
        assert!(check_with(absent, 8, None).unwrap().contains("no libnvidia-ml.so.1"));
        let fatal = Some([79].into());
        assert!(check_with(absent, 8, fatal).unwrap_err().contains("Xid 79"));
    }
}
