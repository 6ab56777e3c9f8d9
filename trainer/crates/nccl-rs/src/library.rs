//! Finding NCCL's library, and what needs no communicator.

use std::error::Error;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::error::{NcclError, Result};
use crate::result::{self, Api};
use crate::sys::{Functions, GET_VERSION};
use crate::types::UniqueId;

/// Where to look for the library, in the order of the fields.
#[derive(Clone, Debug)]
pub struct Search {
    /// The library itself, or the folder that holds it.
    pub path: Option<PathBuf>,
    /// The name that the dynamic linker is asked for. In a process that has loaded libtorch's CUDA
    /// part, it gives the copy that libtorch brought.
    pub name: String,
    /// libtorch's `lib` folder: a wheel of NCCL lies beside, in `../../nvidia/nccl/lib`.
    pub libtorch_lib: Option<PathBuf>,
}

impl Default for Search {
    fn default() -> Self {
        Search { path: None, name: "libnccl.so.2".to_string(), libtorch_lib: None }
    }
}

impl Search {
    /// The places, each once.
    fn places(&self) -> Vec<PathBuf> {
        let file = |folder: &Path| folder.join(&self.name);
        let given =
            self.path.iter().map(|path| if path.is_dir() { file(path) } else { path.clone() });
        let linker = [PathBuf::from(&self.name)];
        let beside = self.libtorch_lib.iter().map(|lib| {
            // Links are followed first: `..` of a link's target is meant.
            let lib = lib.canonicalize().unwrap_or_else(|_| lib.clone());
            file(&lib.join("../../nvidia/nccl/lib"))
        });
        given.chain(linker).chain(beside).collect()
    }
}

/// A version of NCCL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 2 for all that this crate knows.
    pub major: u32,
    /// The feature release.
    pub minor: u32,
    /// The fix release.
    pub patch: u32,
}

impl Version {
    /// The oldest that will do: 2.18 brought split, 2.19 the abort from another thread.
    pub const OLDEST: Version = Version { major: 2, minor: 19, patch: 0 };

    /// `NCCL_VERSION` read backwards: 2.8 and older have one digit for the minor version.
    pub(crate) fn from_code(code: u32) -> Version {
        let major_unit = if code < 10_000 { 1_000 } else { 10_000 };
        let (major, rest) = (code / major_unit, code % major_unit);
        Version { major, minor: rest / 100, patch: rest % 100 }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// NCCL, loaded. It stays so until the process ends: its threads may outlive every communicator.
#[derive(Clone)]
pub struct Nccl {
    pub(crate) api: Arc<Api>,
}

impl Nccl {
    /// Loads the first library that the search finds.
    ///
    /// # Errors
    /// When there is none (the error names every place), or the first one found lacks a function
    /// or is too old.
    pub fn load(search: &Search) -> Result<Nccl> {
        let mut tried = Vec::new();
        for place in search.places() {
            match open(&place) {
                Ok(library) => {
                    if search.path.is_some() && !tried.is_empty() {
                        let (tried, place) = (tried.join("; "), place.display());
                        tracing::warn!("NCCL is {place}, not the one that was asked for: {tried}");
                    }
                    return adopt(library, &place);
                }
                Err(error) => tried.push(failure(&place, &error)),
            }
        }
        Err(NcclError::Absent { name: search.name.clone(), tried })
    }

    /// The library's version.
    pub fn version(&self) -> Version {
        self.api.version
    }

    /// What the library was loaded by: a path, or a name that the dynamic linker found.
    pub fn path(&self) -> &Path {
        &self.api.path
    }

    /// Makes the id of a new communicator; one rank does, and tells the others. Its process takes
    /// part in the others' rendezvous, and must live until all are connected.
    ///
    /// # Errors
    /// When NCCL finds no network interface, or no driver.
    pub fn unique_id(&self) -> Result<UniqueId> {
        self.api.unique_id()
    }
}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NCCL {} ({})", self.version(), self.path().display())
    }
}

fn open(place: &Path) -> Result<Library, libloading::Error> {
    // SAFETY: loading runs the library's initializers; those of NCCL touch nothing of ours. A name
    // or path that leads to another library is the caller's mistake, as with LD_PRELOAD.
    unsafe { Library::open(Some(place), RTLD_NOW | RTLD_LOCAL) }
}

/// The place and the linker's words, which mostly begin with the place.
fn failure(place: &Path, error: &libloading::Error) -> String {
    let words = error.source().map_or_else(|| error.to_string(), ToString::to_string);
    let place = place.display().to_string();
    let place_and_colon = format!("{place}: ");
    format!("{place} ({})", words.strip_prefix(&place_and_colon).unwrap_or(&words))
}

fn adopt(library: Library, place: &Path) -> Result<Nccl> {
    let path = place.to_path_buf();
    let version = result::version(&library);
    let missing = |symbol: &str| {
        let (path, symbol) = (path.clone(), symbol.to_string());
        NcclError::MissingSymbol { path, version, symbol }
    };
    // SAFETY: the library says that it is NCCL by its name; it is never unloaded, see below.
    let functions = unsafe { Functions::find(&library) }.map_err(missing)?;
    let version = version.ok_or_else(|| missing(GET_VERSION))?;
    if version < Version::OLDEST {
        return Err(NcclError::TooOld { path, version });
    }
    // Functions are called, and NCCL's own threads run, as long as the process lives.
    std::mem::forget(library);
    tracing::info!("NCCL {version} from {}", path.display());
    Ok(Nccl { api: Arc::new(Api { functions, version, path }) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_the_header_writes_them() {
        let check =
            |code, expected: &str| assert_eq!(Version::from_code(code).to_string(), expected);
        check(22_809, "2.28.9");
        check(21_903, "2.19.3");
        check(20_906, "2.9.6");
        check(2_804, "2.8.4");
        assert!(Version::from_code(23_203) > Version::OLDEST);
        assert!(Version::from_code(21_805) < Version::OLDEST);
    }

    #[test]
    fn places_come_in_their_order() {
        let search = Search {
            path: Some("/given/libnccl.so.2".into()),
            libtorch_lib: Some("/site/torch/lib".into()),
            ..Search::default()
        };
        let places = search.places();
        let expected = [
            "/given/libnccl.so.2",
            "libnccl.so.2",
            "/site/torch/lib/../../nvidia/nccl/lib/libnccl.so.2",
        ];
        assert_eq!(places, expected.map(PathBuf::from));
        assert_eq!(Search::default().places(), [PathBuf::from("libnccl.so.2")]);
    }
}
