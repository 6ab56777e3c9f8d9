//! Kernels on a GPU: compiled when first wanted, kept on disk, launched on libtorch's stream.

use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use torch_shim::cuda;
use torch_shim::tch::Device;

use crate::cache::{Cache, Key};
use crate::driver::{self, Driver, Function, Module};
use crate::error::Result;
use crate::launch::{Argument, Executor, Kernels, Launch};
use crate::library::Search;
use crate::nvrtc::Nvrtc;
use crate::program::{Storage, Variant};

/// How kernels are had.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Where to look for NVRTC and the driver.
    pub search: Search,
    /// The folder of compiled kernels; without one they are compiled anew by each process.
    pub cache: Option<PathBuf>,
}

type VariantId = (&'static str, Storage, u32);

/// What has been loaded so far.
#[derive(Default)]
struct Loaded {
    modules: HashMap<VariantId, Module>,
    functions: HashMap<(VariantId, &'static str), Function>,
}

/// Carries launches out on a GPU.
pub struct Gpu {
    index: usize,
    gpu: driver::Gpu,
    nvrtc: Nvrtc,
    architecture: i32,
    cache: Cache,
    loaded: Mutex<Loaded>,
}

impl Kernels {
    /// The kernels of a GPU, by libtorch's number. libtorch's CUDA part must be loaded, and the GPU
    /// be this process's current one.
    ///
    /// # Errors
    /// Where NVRTC or the driver cannot be loaded, or do not fit the GPU.
    pub fn open(index: usize, options: &Options) -> Result<Kernels> {
        Ok(Kernels::new(Arc::new(Gpu::open(index, options)?)))
    }
}

impl Gpu {
    /// As [`Kernels::open`].
    ///
    /// # Errors
    /// As [`Kernels::open`].
    pub fn open(index: usize, options: &Options) -> Result<Gpu> {
        let nvrtc = Nvrtc::load(&options.search)?;
        let gpu = Driver::load(&options.search)?.gpu(index)?;
        let architecture = nvrtc.architecture(gpu.capability)?;
        tracing::info!("kernels for sm_{architecture} by {nvrtc:?}");
        let cache = Cache::new(options.cache.clone());
        Ok(Gpu { index, gpu, nvrtc, architecture, cache, loaded: Mutex::default() })
    }

    /// A kernel, compiled and loaded if it has not been.
    fn function(&self, variant: &Variant, kernel: &'static str) -> Result<Function> {
        let id = variant.id();
        // Held while one thread compiles: another that wants the same waits for it.
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&function) = loaded.functions.get(&(id, kernel)) {
            return Ok(function);
        }
        let module = match loaded.modules.get(&id) {
            Some(&module) => module,
            None => {
                let module = self.gpu.load(&self.machine_code(variant)?)?;
                loaded.modules.insert(id, module);
                module
            }
        };
        let function = self.gpu.function(module, kernel)?;
        loaded.functions.insert((id, kernel), function);
        Ok(function)
    }

    fn machine_code(&self, variant: &Variant) -> Result<Vec<u8>> {
        let options = variant.options(self.architecture).join(" ");
        let key = Key::of(&[&variant.text(), &options, &self.nvrtc.version()]);
        self.cache.get(&key, || {
            let started = std::time::Instant::now();
            let compiled = self.nvrtc.compile(variant, self.architecture)?;
            tracing::info!("{variant} compiled in {} ms", started.elapsed().as_millis());
            Ok(compiled.cubin)
        })
    }
}

/// An argument's bytes, which outlive the call.
#[derive(Clone, Copy)]
union Value {
    address: *mut c_void,
    i32: i32,
    i64: i64,
    f32: f32,
    f64: f64,
}

impl Value {
    fn of(argument: &Argument<'_>) -> Value {
        match *argument {
            Argument::Tensor(tensor, _) => Value { address: tensor.data_ptr() },
            Argument::Null => Value { address: std::ptr::null_mut() },
            Argument::I32(value) => Value { i32: value },
            Argument::I64(value) => Value { i64: value },
            Argument::F32(value) => Value { f32: value },
            Argument::F64(value) => Value { f64: value },
        }
    }
}

impl Executor for Gpu {
    fn device(&self) -> Device {
        Device::Cuda(self.index)
    }

    fn sharing_blocks(&self, each: u32) -> u32 {
        self.gpu.multiprocessors.saturating_mul(each)
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        let function = self.function(&launch.variant, launch.kernel)?;
        let stream = cuda::current_stream(self.index)?;
        let mut values: Vec<Value> = launch.arguments.iter().map(Value::of).collect();
        let mut pointers: Vec<*mut c_void> =
            values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
        // SAFETY: the values have the parameters' types, by the caller's promise, and live through
        // the call; the tensors' memory is libtorch's, which gives it to nobody else before this
        // stream has passed; the stream is this GPU's.
        unsafe { self.gpu.launch(function, launch.grid, stream, &mut pointers) }
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GPU {} (sm_{}, {:?})", self.index, self.architecture, self.nvrtc)
    }
}
