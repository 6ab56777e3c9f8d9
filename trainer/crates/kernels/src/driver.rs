//! CUDA's driver: loaded at run time; devices, machine code, launches.
//!
//! Source of every signature and code: the public header `cuda.h` of CUDA 13.0.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::path::{Path, PathBuf};
use std::ptr::null_mut;
use std::sync::Arc;

use crate::error::{KernelError, Result};
use crate::launch::Grid;
use crate::library::{Search, Wanted, functions};

const WANTED: Wanted = Wanted {
    name: "CUDA driver (libcuda)",
    files: &["libcuda.so.1"],
    wheels: &[],
    system: &["/usr/local/nvidia/lib64", "/usr/local/nvidia/lib"],
    hint: "it comes with NVIDIA's kernel driver; in a container, with its runtime",
};

/// `CUresult`.
type Code = c_int;
const SUCCESS: Code = 0;
/// `CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT`.
const MULTIPROCESSORS: c_int = 16;
/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR`.
const CAPABILITY_MAJOR: c_int = 75;
/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR`.
const CAPABILITY_MINOR: c_int = 76;

/// Pointers of `CUcontext`, `CUmodule`, `CUfunction` and `CUstream`.
type Raw = *mut c_void;

functions! {
    init = "cuInit": fn(c_uint) -> Code;
    error_name = "cuGetErrorName": fn(Code, *mut *const c_char) -> Code;
    error_string = "cuGetErrorString": fn(Code, *mut *const c_char) -> Code;
    driver_version = "cuDriverGetVersion": fn(*mut c_int) -> Code;
    device = "cuDeviceGet": fn(*mut c_int, c_int) -> Code;
    attribute = "cuDeviceGetAttribute": fn(*mut c_int, c_int, c_int) -> Code;
    retain = "cuDevicePrimaryCtxRetain": fn(*mut Raw, c_int) -> Code;
    current = "cuCtxGetCurrent": fn(*mut Raw) -> Code;
    make_current = "cuCtxSetCurrent": fn(Raw) -> Code;
    load = "cuModuleLoadData": fn(*mut Raw, *const c_void) -> Code;
    function = "cuModuleGetFunction": fn(*mut Raw, Raw, *const c_char) -> Code;
    launch = "cuLaunchKernel":
        fn(Raw, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Raw, *mut *mut c_void,
           *mut *mut c_void) -> Code;
}

/// The driver, loaded until the process ends.
pub struct Driver {
    functions: Functions,
    path: PathBuf,
}

/// A GPU, with its primary context: the one that libtorch uses.
pub struct Gpu {
    driver: Arc<Driver>,
    context: Handle,
    /// Major and minor number.
    pub capability: (i32, i32),
    /// Blocks run on these side by side.
    pub multiprocessors: u32,
}

/// Machine code on a GPU; never unloaded.
#[derive(Clone, Copy)]
pub struct Module(Handle);

/// A kernel on a GPU.
#[derive(Clone, Copy)]
pub struct Function(Handle);

#[derive(Clone, Copy)]
struct Handle(Raw);

// SAFETY: it is a name that the driver gave; the driver may be called from any thread.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Driver {
    /// Loads and starts the driver.
    ///
    /// # Errors
    /// Where there is none (the error names every place), it lacks a function, or it finds no GPU.
    pub fn load(search: &Search) -> Result<Arc<Driver>> {
        let (library, path) = search.open(&WANTED)?;
        // SAFETY: the library says by its name that it is the driver, and is never unloaded.
        let functions = unsafe { Functions::find(&library) }.map_err(|symbol| {
            KernelError::MissingSymbol { path: path.clone(), name: WANTED.name, symbol }
        })?;
        std::mem::forget(library);
        let driver = Driver { functions, path };
        // SAFETY: no other call comes before it.
        driver.check("cuInit", unsafe { (driver.functions.init)(0) })?;
        Ok(Arc::new(driver))
    }

    /// The newest CUDA that the driver serves, as 13000 for 13.0.
    ///
    /// # Errors
    /// Where the driver refuses.
    pub fn version(&self) -> Result<i32> {
        let mut version = 0;
        // SAFETY: the place for the answer lives through the call.
        self.check("cuDriverGetVersion", unsafe { (self.functions.driver_version)(&mut version) })?;
        Ok(version)
    }

    /// What the library was loaded by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A GPU by libtorch's number.
    ///
    /// # Errors
    /// Where there is no such GPU, or it cannot be used.
    pub fn gpu(self: &Arc<Self>, index: usize) -> Result<Gpu> {
        let ordinal = c_int::try_from(index).unwrap_or(c_int::MAX);
        let mut device = 0;
        let mut context = null_mut();
        // SAFETY: the places for the answers live through the calls.
        unsafe {
            self.check("cuDeviceGet", (self.functions.device)(&mut device, ordinal))?;
            let code = (self.functions.retain)(&mut context, device);
            self.check("cuDevicePrimaryCtxRetain", code)?;
        }
        let attribute = |which| -> Result<i32> {
            let mut value = 0;
            // SAFETY: as above.
            let code = unsafe { (self.functions.attribute)(&mut value, which, device) };
            self.check("cuDeviceGetAttribute", code)?;
            Ok(value)
        };
        Ok(Gpu {
            driver: self.clone(),
            context: Handle(context),
            capability: (attribute(CAPABILITY_MAJOR)?, attribute(CAPABILITY_MINOR)?),
            multiprocessors: u32::try_from(attribute(MULTIPROCESSORS)?).unwrap_or(1),
        })
    }

    fn check(&self, function: &'static str, code: Code) -> Result<()> {
        if code == SUCCESS {
            return Ok(());
        }
        let text = |get: unsafe extern "C" fn(Code, *mut *const c_char) -> Code| {
            let mut text = std::ptr::null();
            // SAFETY: the place for the answer lives through the call; the text is null, or lives
            // as long as the library.
            unsafe {
                get(code, &mut text);
                match text.is_null() {
                    true => "unknown".to_string(),
                    false => CStr::from_ptr(text).to_string_lossy().into_owned(),
                }
            }
        };
        let detail = format!(": {}", text(self.functions.error_string));
        Err(KernelError::Call { function, code, meaning: text(self.functions.error_name), detail })
    }
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CUDA driver ({})", self.path.display())
    }
}

impl Gpu {
    /// Makes the GPU's context this thread's.
    fn enter(&self) -> Result<()> {
        let functions = &self.driver.functions;
        let mut now = null_mut();
        // SAFETY: the place for the answer lives through the call.
        self.driver.check("cuCtxGetCurrent", unsafe { (functions.current)(&mut now) })?;
        if now == self.context.0 {
            return Ok(());
        }
        // SAFETY: the context is retained as long as the process lives.
        self.driver.check("cuCtxSetCurrent", unsafe { (functions.make_current)(self.context.0) })
    }

    /// Loads machine code.
    ///
    /// # Errors
    /// Where it is of another architecture, damaged, or memory is short.
    pub fn load(&self, cubin: &[u8]) -> Result<Module> {
        self.enter()?;
        let mut module = null_mut();
        // SAFETY: the code is read through the call; where it is no machine code, the driver says
        // so: NVRTC made it, and its hash was looked at.
        let code = unsafe { (self.driver.functions.load)(&mut module, cubin.as_ptr().cast()) };
        self.driver.check("cuModuleLoadData", code)?;
        Ok(Module(Handle(module)))
    }

    /// A kernel of loaded code.
    ///
    /// # Errors
    /// Where there is none of this name.
    pub fn function(&self, module: Module, name: &'static str) -> Result<Function> {
        self.enter()?;
        let mut function = null_mut();
        let text = CString::new(name).unwrap_or_default();
        // SAFETY: the module is never unloaded; the name and the place for the answer live through
        // the call.
        let code =
            unsafe { (self.driver.functions.function)(&mut function, module.0.0, text.as_ptr()) };
        self.driver.check("cuModuleGetFunction", code)?;
        Ok(Function(Handle(function)))
    }

    /// Puts a kernel on a stream of this GPU; the host does not wait.
    ///
    /// # Errors
    /// Where the driver refuses; what fails on the GPU shows in a later call.
    ///
    /// # Safety
    /// `values` point to the kernel's parameters, in number and types. The memory that the kernel
    /// reaches through them is alive, large enough and free for this use when the launch comes up
    /// on the stream. The stream is of this GPU.
    pub unsafe fn launch(
        &self,
        function: Function,
        grid: Grid,
        stream: *mut c_void,
        values: &mut [*mut c_void],
    ) -> Result<()> {
        self.enter()?;
        let Grid { blocks: (x, y), threads } = grid;
        // SAFETY: the function is never unloaded; the driver copies the values in the call. The
        // rest is the caller's promise.
        let code = unsafe {
            let values = values.as_mut_ptr();
            let launch = self.driver.functions.launch;
            launch(function.0.0, x, y, 1, threads, 1, 1, 0, stream, values, null_mut())
        };
        self.driver.check("cuLaunchKernel", code)
    }
}
