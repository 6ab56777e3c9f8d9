//! Finding CUDA's libraries.

use std::error::Error;
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::error::{KernelError, Result};

/// Where to look, before and after the places that the dynamic linker knows.
#[derive(Clone, Debug, Default)]
pub struct Search {
    /// A folder that comes first.
    pub folder: Option<PathBuf>,
    /// libtorch's `lib` folder: wheels of CUDA's libraries lie beside, in `../../nvidia`.
    pub libtorch_lib: Option<PathBuf>,
}

/// One library: what it is called, and where it may lie.
pub(crate) struct Wanted {
    /// For messages.
    pub(crate) name: &'static str,
    /// File names, the best first.
    pub(crate) files: &'static [&'static str],
    /// Folders of wheels, beside libtorch's.
    pub(crate) wheels: &'static [&'static str],
    /// Folders of the system that the dynamic linker may not know.
    pub(crate) system: &'static [&'static str],
    /// What brings it.
    pub(crate) hint: &'static str,
}

impl Search {
    /// The places, the best first. Where libtorch's CUDA part is loaded, a plain name gives the
    /// copy that it brought.
    pub(crate) fn places(&self, wanted: &Wanted) -> Vec<PathBuf> {
        let in_folder = |folder: &Path| wanted.files.iter().map(|f| folder.join(f)).collect();
        let given: Vec<PathBuf> = self.folder.as_deref().map_or_else(Vec::new, in_folder);
        let linker = wanted.files.iter().map(PathBuf::from);
        let beside = self.libtorch_lib.iter().flat_map(|lib| {
            // Links are followed first: `..` of a link's target is meant.
            let lib = lib.canonicalize().unwrap_or_else(|_| lib.clone());
            let folders = wanted.wheels.iter().map(move |wheel| lib.join("../..").join(wheel));
            folders.flat_map(|folder| in_folder(&folder)).collect::<Vec<_>>()
        });
        let system = wanted.system.iter().flat_map(|folder| in_folder(Path::new(folder)));
        given.into_iter().chain(linker).chain(beside).chain(system).collect()
    }

    /// The first of the places that holds the library, and which that was.
    ///
    /// # Errors
    /// Where none does; the error names every place.
    pub(crate) fn open(&self, wanted: &Wanted) -> Result<(Library, PathBuf)> {
        let mut tried = Vec::new();
        for place in self.places(wanted) {
            // SAFETY: loading runs the library's initializers; those of CUDA's libraries touch
            // nothing of ours. A path that leads to another library is the caller's mistake.
            match unsafe { Library::open(Some(&place), RTLD_NOW | RTLD_LOCAL) } {
                Ok(library) => return Ok((library, place)),
                Err(error) => tried.push(failure(&place, &error)),
            }
        }
        Err(KernelError::Absent { name: wanted.name, tried, hint: wanted.hint })
    }
}

/// The place and the linker's words, which mostly begin with the place.
fn failure(place: &Path, error: &libloading::Error) -> String {
    let words = error.source().map_or_else(|| error.to_string(), ToString::to_string);
    let place = place.display().to_string();
    let place_and_colon = format!("{place}: ");
    format!("{place} ({})", words.strip_prefix(&place_and_colon).unwrap_or(&words))
}

/// Declares a table of functions, and how it is filled from a library.
macro_rules! functions {
    ($($field:ident = $symbol:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions of a loaded library.
        pub(crate) struct Functions {
            $($field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Functions {
            /// Looks all functions up; the error is the name of the first that is missing.
            ///
            /// # Safety
            /// The library is what it is called, and stays loaded as long as functions are called.
            pub(crate) unsafe fn find(
                library: &libloading::os::unix::Library,
            ) -> std::result::Result<Functions, &'static str> {
                Ok(Functions {
                    // SAFETY: the types are those of the public headers.
                    $($field: *unsafe { library.get($symbol) }.map_err(|_| $symbol)?,)*
                })
            }
        }
    };
}
pub(crate) use functions;

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: Wanted = Wanted {
        name: "libexample",
        files: &["libexample-of-no-machine.so.2", "libexample-of-no-machine.so.1"],
        wheels: &["nvidia/example/lib"],
        system: &["/nowhere/system"],
        hint: "write one",
    };

    #[test]
    fn places_come_in_their_order() {
        let search = Search {
            folder: Some("/given".into()),
            libtorch_lib: Some("/nowhere/torch/lib".into()),
        };
        let folders =
            ["/given/", "", "/nowhere/torch/lib/../../nvidia/example/lib/", "/nowhere/system/"];
        let expected: Vec<PathBuf> = folders
            .iter()
            .flat_map(|folder| {
                WANTED.files.iter().map(move |file| format!("{folder}{file}").into())
            })
            .collect();
        assert_eq!(search.places(&WANTED), expected);
        assert_eq!(Search::default().places(&WANTED).len(), 4);
    }

    #[test]
    fn a_library_that_is_nowhere_names_every_place() {
        let search = Search { folder: Some("/given".into()), libtorch_lib: None };
        let error = search.open(&WANTED).err().unwrap().to_string();
        for part in [
            "no libexample could be loaded; tried /given/libexample-of-no-machine.so.2 (",
            "; libexample-of-no-machine.so.1 (",
            "; /nowhere/system/libexample-of-no-machine.so.1 (",
            "cannot open shared object file",
            "; hint: write one",
        ] {
            assert!(error.contains(part), "{error:?} does not say {part:?}");
        }
        assert_eq!(error.lines().count(), 1);
    }
}
