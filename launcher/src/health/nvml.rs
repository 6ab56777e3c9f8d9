//! NVIDIA's management library, found and loaded at run time: the fence around its C interface.
//!
//! Source of the names, codes and signatures: the public header `nvml.h` (CUDA 12 and 13). The
//! library comes with the driver, so that a machine without a GPU has none.
#![expect(unsafe_code, reason = "the library is called through its C interface")]

use libloading::os::unix::Library;
use std::ffi::{c_int, c_uint, c_ulonglong, c_void};
use std::path::Path;
use std::ptr::null_mut;

/// The name under which the driver installs it.
pub const LIBRARY: &str = "libnvidia-ml.so.1";

/// `nvmlReturn_t`.
type Code = c_int;
/// `nvmlDevice_t`.
type Device = *mut c_void;

const SUCCESS: Code = 0;
/// `NVML_ERROR_NOT_SUPPORTED`: a GPU without ECC, say.
const NOT_SUPPORTED: Code = 3;
/// `NVML_MEMORY_ERROR_TYPE_UNCORRECTED`.
const UNCORRECTED: c_uint = 1;
/// `NVML_VOLATILE_ECC`: since the driver was loaded.
const VOLATILE: c_uint = 0;

type Init = unsafe extern "C" fn() -> Code;
type GetCount = unsafe extern "C" fn(*mut c_uint) -> Code;
type GetHandle = unsafe extern "C" fn(c_uint, *mut Device) -> Code;
type GetMemoryInfo = unsafe extern "C" fn(Device, *mut MemoryInfo) -> Code;
type GetEccErrors = unsafe extern "C" fn(Device, c_uint, c_uint, *mut c_ulonglong) -> Code;
type GetRemappedRows =
    unsafe extern "C" fn(Device, *mut c_uint, *mut c_uint, *mut c_uint, *mut c_uint) -> Code;

/// `nvmlMemory_t`, in bytes.
#[repr(C)]
#[derive(Default)]
struct MemoryInfo {
    total: c_ulonglong,
    free: c_ulonglong,
    used: c_ulonglong,
}

/// The library, started.
pub struct Nvml {
    get_count: GetCount,
    get_handle: GetHandle,
    get_memory_info: GetMemoryInfo,
    get_ecc_errors: GetEccErrors,
    /// Absent in drivers before 450.
    get_remapped_rows: Option<GetRemappedRows>,
    shutdown: Init,
    /// What the functions are in; dropped last.
    _library: Library,
}

/// What the driver knows of a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gpu {
    /// Errors of its memory that were found and not mended, since the driver was loaded.
    pub uncorrected: u64,
    /// Whether a bad row of its memory could not be replaced by a spare one.
    pub remap_failed: bool,
}

impl Nvml {
    /// `Ok(None)`: there is no such library.
    ///
    /// # Errors
    /// Where it is there and does not work.
    pub fn open(path: &Path) -> Result<Option<Self>, String> {
        // SAFETY: the caller names NVML, whose initializers have no conditions.
        let Ok(library) = (unsafe { Library::new(path) }) else { return Ok(None) };
        // SAFETY: the types are those of the public header, and the library stays loaded as long as
        // the functions, beside which it is kept.
        unsafe {
            let missing = |error: libloading::Error| format!("{}: {error}", path.display());
            let init: Init = *library.get("nvmlInit_v2").map_err(missing)?;
            let nvml = Self {
                get_count: *library.get("nvmlDeviceGetCount_v2").map_err(missing)?,
                get_handle: *library.get("nvmlDeviceGetHandleByIndex_v2").map_err(missing)?,
                get_memory_info: *library.get("nvmlDeviceGetMemoryInfo").map_err(missing)?,
                get_ecc_errors: *library.get("nvmlDeviceGetTotalEccErrors").map_err(missing)?,
                get_remapped_rows: library
                    .get("nvmlDeviceGetRemappedRows")
                    .ok()
                    .map(|symbol| *symbol),
                shutdown: *library.get("nvmlShutdown").map_err(missing)?,
                _library: library,
            };
            match init() {
                SUCCESS => Ok(Some(nvml)),
                code => {
                    // What did not start is not shut down.
                    std::mem::forget(nvml);
                    Err(format!("NVML does not start: error {code}"))
                }
            }
        }
    }

    /// GPUs that the driver knows.
    ///
    /// # Errors
    /// The call that failed.
    pub fn count(&self) -> Result<u32, String> {
        let mut count = 0;
        // SAFETY: NVML was started, and writes one number.
        checked("the number of GPUs", unsafe { (self.get_count)(&raw mut count) })?;
        Ok(count)
    }

    fn handle(&self, index: u32) -> Result<Device, String> {
        let mut device: Device = null_mut();
        // SAFETY: NVML was started, and writes one handle.
        checked("its handle", unsafe { (self.get_handle)(index, &raw mut device) })?;
        Ok(device)
    }

    /// Bytes of memory of one.
    ///
    /// # Errors
    /// The call that failed.
    pub fn memory(&self, index: u32) -> Result<u64, String> {
        let (device, mut info) = (self.handle(index)?, MemoryInfo::default());
        // SAFETY: the handle is NVML's own; it writes one struct, laid out as in its header.
        checked("its memory", unsafe { (self.get_memory_info)(device, &raw mut info) })?;
        Ok(info.total)
    }

    /// What the driver says of one; what it does not support counts as well.
    ///
    /// # Errors
    /// The call that failed: the GPU may be lost.
    pub fn gpu(&self, index: u32) -> Result<Gpu, String> {
        let device = self.handle(index)?;
        let mut uncorrected = 0;
        // SAFETY: the handle is NVML's own; it writes one number of 64 bits.
        let code =
            unsafe { (self.get_ecc_errors)(device, UNCORRECTED, VOLATILE, &raw mut uncorrected) };
        if code != NOT_SUPPORTED {
            checked("its ECC errors", code)?;
        }
        let [mut corrected, mut failed_rows, mut pending, mut failure] = [0; 4];
        if let Some(get) = self.get_remapped_rows {
            // SAFETY: the handle is NVML's own; it writes four numbers.
            let code = unsafe {
                let (a, b) = (&raw mut corrected, &raw mut failed_rows);
                get(device, a, b, &raw mut pending, &raw mut failure)
            };
            if code != NOT_SUPPORTED {
                checked("its remapped rows", code)?;
            }
        }
        Ok(Gpu { uncorrected, remap_failed: failure != 0 })
    }
}

impl Drop for Nvml {
    fn drop(&mut self) {
        // SAFETY: it was started, and no call is under way.
        unsafe { (self.shutdown)() };
    }
}

fn checked(what: &str, code: Code) -> Result<(), String> {
    if code == SUCCESS { Ok(()) } else { Err(format!("{what}: NVML error {code}")) }
}
