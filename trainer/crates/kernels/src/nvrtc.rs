//! NVRTC, CUDA's compiler as a library: loaded at run time, and no GPU needed.
//!
//! Source of every signature and code: the public header `nvrtc.h` of CUDA 13.0.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt;
use std::path::{Path, PathBuf};
use std::ptr::{null, null_mut};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::error::{KernelError, Result};
use crate::library::{Search, Wanted, functions};
use crate::program::Variant;

const WANTED: Wanted = Wanted {
    name: "NVRTC (libnvrtc)",
    files: &["libnvrtc.so.13", "libnvrtc.so.12"],
    wheels: &["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"],
    system: &["/usr/local/cuda/lib64"],
    hint: "libtorch's CUDA build comes with it; or install the wheel nvidia-cuda-nvrtc beside it",
};

/// `nvrtcResult`.
type Code = c_int;
const SUCCESS: Code = 0;
/// `NVRTC_ERROR_COMPILATION`: the log says what is wrong.
const COMPILATION: Code = 6;
/// What a message shows of a compiler's log.
const LOG_LINES: usize = 12;

functions! {
    version = "nvrtcVersion": fn(*mut c_int, *mut c_int) -> Code;
    error_string = "nvrtcGetErrorString": fn(Code) -> *const c_char;
    num_architectures = "nvrtcGetNumSupportedArchs": fn(*mut c_int) -> Code;
    architectures = "nvrtcGetSupportedArchs": fn(*mut c_int) -> Code;
    create = "nvrtcCreateProgram":
        fn(*mut *mut c_void, *const c_char, *const c_char, c_int, *const *const c_char,
           *const *const c_char) -> Code;
    destroy = "nvrtcDestroyProgram": fn(*mut *mut c_void) -> Code;
    compile = "nvrtcCompileProgram": fn(*mut c_void, c_int, *const *const c_char) -> Code;
    log_size = "nvrtcGetProgramLogSize": fn(*mut c_void, *mut usize) -> Code;
    log = "nvrtcGetProgramLog": fn(*mut c_void, *mut c_char) -> Code;
    cubin_size = "nvrtcGetCUBINSize": fn(*mut c_void, *mut usize) -> Code;
    cubin = "nvrtcGetCUBIN": fn(*mut c_void, *mut c_char) -> Code;
    ptx_size = "nvrtcGetPTXSize": fn(*mut c_void, *mut usize) -> Code;
    ptx = "nvrtcGetPTX": fn(*mut c_void, *mut c_char) -> Code;
}

/// NVRTC, loaded until the process ends.
pub struct Nvrtc {
    functions: Functions,
    path: PathBuf,
    version: (i32, i32),
    /// As 90 for `sm_90`, rising.
    architectures: Vec<i32>,
}

/// What a source became.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// Machine code of one architecture.
    pub cubin: Vec<u8>,
    /// The same as text, of the virtual architecture.
    pub ptx: Vec<u8>,
}

/// A program of NVRTC's, destroyed with its owner.
struct Handle<'a> {
    raw: *mut c_void,
    nvrtc: &'a Nvrtc,
}

impl Nvrtc {
    /// Loads the first library that the search finds.
    ///
    /// # Errors
    /// Where there is none (the error names every place), or it lacks a function.
    pub fn load(search: &Search) -> Result<Nvrtc> {
        let (library, path) = search.open(&WANTED)?;
        // SAFETY: the library says by its name that it is NVRTC, and is never unloaded.
        let functions = unsafe { Functions::find(&library) }.map_err(|symbol| {
            KernelError::MissingSymbol { path: path.clone(), name: WANTED.name, symbol }
        })?;
        std::mem::forget(library);
        load_builtins();
        let mut nvrtc = Nvrtc { functions, path, version: (0, 0), architectures: Vec::new() };
        let (mut major, mut minor, mut count) = (0, 0, 0);
        // SAFETY: the places for the answers live through the calls; the list has `count` places.
        unsafe {
            nvrtc.check("nvrtcVersion", (nvrtc.functions.version)(&mut major, &mut minor))?;
            let code = (nvrtc.functions.num_architectures)(&mut count);
            nvrtc.check("nvrtcGetNumSupportedArchs", code)?;
            nvrtc.architectures = vec![0; usize::try_from(count).unwrap_or(0)];
            let code = (nvrtc.functions.architectures)(nvrtc.architectures.as_mut_ptr());
            nvrtc.check("nvrtcGetSupportedArchs", code)?;
        }
        nvrtc.architectures.sort_unstable();
        nvrtc.version = (major, minor);
        tracing::debug!("{nvrtc:?}");
        Ok(nvrtc)
    }

    /// The library's version.
    pub fn version(&self) -> String {
        format!("{}.{}", self.version.0, self.version.1)
    }

    /// What the library was loaded by: a path, or a name that the dynamic linker found.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The architecture to compile for on a device of this compute capability: its own, or the
    /// newest before it of the same generation, whose machine code it runs.
    ///
    /// # Errors
    /// Where NVRTC knows none.
    pub fn architecture(&self, (major, minor): (i32, i32)) -> Result<i32> {
        let own = 10 * major + minor;
        let fitting = self.architectures.iter().filter(|&&a| a / 10 == major && a <= own);
        fitting.max().copied().ok_or_else(|| KernelError::Architecture {
            version: self.version(),
            capability: format!("{major}.{minor}"),
            known: self
                .architectures
                .iter()
                .map(|a| format!("sm_{a}"))
                .collect::<Vec<_>>()
                .join(" "),
        })
    }

    /// Compiles a program for an architecture, as 90 for `sm_90`.
    ///
    /// # Errors
    /// Where it does not compile; the error has the beginning of the log.
    pub fn compile(&self, variant: &Variant, architecture: i32) -> Result<Compiled> {
        let text = c_text(variant.text())?;
        let name = c_text(format!("{}.cu", variant.program.name))?;
        let mut handle = Handle { raw: null_mut(), nvrtc: self };
        // SAFETY: the texts live through the call, which copies them; there are no headers.
        let code = unsafe {
            let (text, name) = (text.as_ptr(), name.as_ptr());
            (self.functions.create)(&mut handle.raw, text, name, 0, null(), null())
        };
        self.check("nvrtcCreateProgram", code)?;
        let options = variant.options(architecture).into_iter().map(c_text);
        let options = options.collect::<Result<Vec<CString>>>()?;
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: the program is alive, and so are the options; none is kept.
        let code = unsafe {
            let count = c_int::try_from(pointers.len()).unwrap_or(c_int::MAX);
            (self.functions.compile)(handle.raw, count, pointers.as_ptr())
        };
        if code == COMPILATION {
            return Err(KernelError::Compile {
                version: self.version(),
                program: variant.to_string(),
                architecture: format!("sm_{architecture}"),
                log: handle.log(),
            });
        }
        self.check("nvrtcCompileProgram", code)?;
        let Functions { cubin_size, cubin, ptx_size, ptx, .. } = &self.functions;
        let cubin = handle.bytes("nvrtcGetCUBIN", *cubin_size, *cubin)?;
        let mut ptx = handle.bytes("nvrtcGetPTX", *ptx_size, *ptx)?;
        // A C text.
        ptx.truncate(ptx.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1));
        Ok(Compiled { cubin, ptx })
    }

    fn check(&self, function: &'static str, code: Code) -> Result<()> {
        if code == SUCCESS {
            return Ok(());
        }
        // SAFETY: the answer is null or a text that lives as long as the library.
        let meaning = unsafe {
            let text = (self.functions.error_string)(code);
            if text.is_null() { "unknown".into() } else { CStr::from_ptr(text).to_string_lossy() }
        };
        let detail = format!(" in {}", self.path.display());
        Err(KernelError::Call { function, code, meaning: meaning.into_owned(), detail })
    }
}

impl Handle<'_> {
    /// What a pair of functions gives: a size, then so many bytes.
    fn bytes(
        &self,
        function: &'static str,
        size: unsafe extern "C" fn(*mut c_void, *mut usize) -> Code,
        get: unsafe extern "C" fn(*mut c_void, *mut c_char) -> Code,
    ) -> Result<Vec<u8>> {
        let mut length = 0;
        // SAFETY: the program is alive; the place for the answer lives through the call.
        self.nvrtc.check(function, unsafe { size(self.raw, &mut length) })?;
        let mut bytes = vec![0_u8; length];
        // SAFETY: as above; the buffer has as many bytes as NVRTC says that it will write.
        self.nvrtc.check(function, unsafe { get(self.raw, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }

    /// The first lines of the log, on one line.
    fn log(&self) -> String {
        let Functions { log_size, log, .. } = &self.nvrtc.functions;
        match self.bytes("nvrtcGetProgramLog", *log_size, *log) {
            Ok(bytes) => {
                let text = String::from_utf8_lossy(&bytes).replace('\0', "");
                let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
                lines.take(LOG_LINES).collect::<Vec<_>>().join(" | ")
            }
            Err(error) => format!("no log: {error}"),
        }
    }
}

impl Drop for Handle<'_> {
    fn drop(&mut self) {
        if !self.raw.is_null() {
            // SAFETY: made by `create`, destroyed once.
            unsafe { (self.nvrtc.functions.destroy)(&mut self.raw) };
        }
    }
}

impl fmt::Debug for Nvrtc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NVRTC {} ({})", self.version(), self.path.display())
    }
}

/// Loads the library that NVRTC opens when it compiles. It asks the dynamic linker for its plain
/// name, and the one in a wheel has no path to it: loaded before, it is found by that name.
fn load_builtins() {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    for file in builtins_beside(&maps) {
        // SAFETY: as for NVRTC itself, whose part it is; it is never unloaded.
        match unsafe { Library::open(Some(&file), RTLD_NOW | RTLD_LOCAL) } {
            Ok(library) => std::mem::forget(library),
            // NVRTC says what it lacks when it compiles.
            Err(error) => tracing::debug!("{}: {error}", file.display()),
        }
    }
}

/// NVRTC's other library, in the folder of the one that a list of mapped files names.
fn builtins_beside(maps: &str) -> Vec<PathBuf> {
    let mut paths = maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])));
    let starts = |path: &Path, with: &str| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(with))
    };
    let folder = paths.find(|path| starts(path, "libnvrtc.so")).and_then(Path::parent);
    let entries = folder.and_then(|folder| std::fs::read_dir(folder).ok()).into_iter().flatten();
    let files = entries.filter_map(|entry| Some(entry.ok()?.path()));
    files.filter(|file| starts(file, "libnvrtc-builtins.so.")).collect()
}

fn c_text(text: String) -> Result<CString> {
    CString::new(text).map_err(|error| KernelError::Argument {
        kernel: "nvrtc",
        what: "a text".into(),
        value: format!("one with a zero at {}", error.nul_position()),
        expected: "none in it".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_beside_is_found() {
        let folder = tempfile::TempDir::new().unwrap();
        let names =
            ["libnvrtc.so.13", "libnvrtc-builtins.so.13.0", "libnvrtc-builtins.alt.so.13.0"];
        for name in names {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let maps = format!(
            "7f0-7f1 r-xp 00000000 08:01 12  /usr/lib/libc.so.6\n\
             7f2-7f3 r-xp 00000000 08:01 13  {}/libnvrtc.so.13\n\
             7f2-7f3 r-xp 00000000 08:01 13  /nowhere/libnvrtc.so.12\n",
            folder.path().display()
        );
        assert_eq!(builtins_beside(&maps), [folder.path().join("libnvrtc-builtins.so.13.0")]);
        assert!(builtins_beside("7f0-7f1 r-xp 00000000 08:01 12  /usr/lib/libc.so.6\n").is_empty());
        assert!(builtins_beside("7f0-7f1 r-xp 0 0 0  /nowhere/libnvrtc.so.13\n").is_empty());
    }
}
