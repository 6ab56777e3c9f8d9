//! What the CUDA driver says of itself and its GPUs. It is asked directly, so that it can be said
//! what does not fit where libtorch's CUDA part does not start.

use std::ffi::{CStr, CString};
use std::path::Path;

use crate::error::{Result, ShimError};
use crate::result::check;
use crate::sys::{self, RawCard};

/// The name under which the driver installs it.
pub const LIBRARY: &str = "libcuda.so.1";

/// GPUs that are described, at the most.
const ROOM: usize = 64;

/// A driver's answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Driver {
    /// The newest CUDA that it serves, as major and minor; 0.0 where it does not say.
    pub version: (u32, u32),
    /// CUDA's number of what is wrong, where it does not start or a GPU does not answer.
    pub error: Option<i32>,
    /// Its GPUs, in CUDA's order; those that CUDA is not let see are not among them.
    pub cards: Vec<Card>,
}

/// A GPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Card {
    /// Its name, as `NVIDIA H200`.
    pub name: String,
    /// Compute capability, as major and minor.
    pub capability: (u32, u32),
    /// Bytes of its memory.
    pub bytes: u64,
}

/// Asks the driver's library at `path`; [`LIBRARY`] is where the dynamic linker finds it.
///
/// # Errors
/// When there is no such library, or it is none of CUDA's.
pub fn look(path: &Path) -> Result<Driver> {
    let text = path.to_str().ok_or_else(|| ShimError::Invalid(format!("no path: {path:?}")))?;
    let path = CString::new(text)?;
    let (mut code, mut raw_version, mut count) = (0, 0, 0);
    let mut cards = vec![RawCard { name: [0; 128], major: 0, minor: 0, bytes: 0 }; ROOM];
    // SAFETY: the text lives through the call, as do the numbers and the array of `ROOM` places.
    check(unsafe {
        sys::phx_driver_look(
            path.as_ptr(),
            &raw mut code,
            &raw mut raw_version,
            cards.as_mut_ptr(),
            ROOM,
            &raw mut count,
        )
    })?;
    cards.truncate(if code == 0 { count } else { 0 });
    let error = (code != 0).then_some(code);
    let cards = cards.iter().map(card).collect();
    Ok(Driver { version: version(raw_version), error, cards })
}

fn card(raw: &RawCard) -> Card {
    // SAFETY: the shim leaves a zero at the end of the name.
    let name = unsafe { CStr::from_ptr(raw.name.as_ptr()) };
    let number = |number: i32| u32::try_from(number).unwrap_or(0);
    Card {
        name: name.to_string_lossy().into_owned(),
        capability: (number(raw.major), number(raw.minor)),
        bytes: raw.bytes,
    }
}

/// 12080, as CUDA writes its versions, is 12.8.
pub(super) fn version(number: i32) -> (u32, u32) {
    let number = u32::try_from(number).unwrap_or(0);
    (number / 1000, number % 1000 / 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use std::process::Command;

    /// A library that plays the driver's, compiled with `defines`.
    fn fake(folder: &Path, name: &str, defines: &[&str]) -> PathBuf {
        let path = folder.join(format!("{name}.so"));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake/driver.c");
        let mut command = Command::new("cc");
        command.args(["-shared", "-fPIC", "-o"]).arg(&path).arg(source).args(defines);
        assert!(command.status().unwrap().success());
        path
    }

    #[test]
    fn what_the_driver_says_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let look = |name: &str, defines: &[&str]| look(&fake(folder.path(), name, defines));
        let well = look("well", &[]).unwrap();
        assert_eq!((well.version, well.error, well.cards.len()), ((13, 0), None, 2));
        let second = Card { name: "NVIDIA H200".into(), capability: (9, 0), bytes: 141 << 30 };
        assert_eq!(well.cards[1], second);
        let old = look("old", &["-DVERSION=12080"]).unwrap();
        assert_eq!(old.version, (12, 8));
        let none = look("none", &["-DINIT_CODE=100"]).unwrap();
        assert_eq!((none.version, none.error, none.cards.len()), ((13, 0), Some(100), 0));
        let lost = look("lost", &["-DNAME_CODE=999"]).unwrap();
        assert_eq!((lost.error, lost.cards.len()), (Some(999), 0));
    }

    #[test]
    fn what_is_no_driver_is_an_error() {
        let absent = look(Path::new("/nowhere/libcuda.so.1")).unwrap_err().to_string();
        assert!(absent.contains("/nowhere/libcuda.so.1"), "{absent}");
        let folder = tempfile::tempdir().unwrap();
        let other = look(&fake(folder.path(), "other", &["-DNO_NAME"])).unwrap_err().to_string();
        assert!(other.contains("has no cuDeviceGetName"), "{other}");
    }
}
