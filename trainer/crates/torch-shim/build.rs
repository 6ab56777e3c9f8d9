//! Compiles the C++ shim against the headers of the libtorch that `LIBTORCH` names, and emits the
//! rpath of the tests.

use std::path::{Path, PathBuf};

mod rpath {
    include!("../../../ops/torch_rpath.rs");

    pub fn emit() {
        main();
    }
}

const AVX512: &[&str] = &["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"];

/// Kernels that are compiled for an instruction set, and chosen at run time.
const KERNELS: &[(&str, &[&str])] = &[
    ("kernels_avx512", AVX512),
    ("kernels_avx2", &["-mavx2", "-mfma"]),
    ("kernels_baseline", &[]),
    ("pack_avx512", AVX512),
    ("random_avx512", &["-mavx512f", "-mavx512vl", "-mavx512dq", EXACT[0], EXACT[1]]),
    ("random_avx2", &["-mavx2", EXACT[0], EXACT[1]]),
    ("random_baseline", EXACT),
];

/// The same bits with every instruction set: no product and sum become one.
const EXACT: &[&str] = &["-ffp-contract=off", "-fno-math-errno"];

const SOURCES: &[&str] = &[
    "csrc/autograd.cpp",
    "csrc/ops.cpp",
    "csrc/parameter.cpp",
    "csrc/fused_linear.cpp",
    "csrc/scaled.cpp",
    "csrc/fused_norm.cpp",
    "csrc/fused_block.cpp",
    "csrc/fused_attention.cpp",
    "csrc/fused_head.cpp",
    "csrc/flash.cpp",
    "csrc/gloo.cpp",
    "csrc/kernels.cpp",
    "csrc/matmul.cpp",
    "csrc/random.cpp",
    "csrc/reduce.cpp",
    "csrc/cpu_memory.cpp",
    "csrc/cuda.cpp",
    "csrc/cuda_driver.cpp",
    "csrc/profiler.cpp",
];

fn main() {
    rpath::emit();
    println!("cargo:rerun-if-changed=csrc");
    let root = prefix();
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .pic(true)
        .warnings(false)
        // The kernels must be fast in debug builds too: tests train with them.
        .opt_level(3)
        .debug(false)
        .include(root.join("include"))
        .include(root.join("include/torch/csrc/api/include"))
        .include("csrc")
        .include("csrc/gloo_stub")
        // Without it, libtorch's parallel_for runs its body on the calling thread alone.
        .flag("-fopenmp")
        .define("USE_DISTRIBUTED", None)
        .define("USE_C10D_GLOO", None)
        .files(SOURCES);
    build.compile("phalanx_torch_shim");
    for (source, flags) in KERNELS {
        let mut build = cc::Build::new();
        // GCC 12 warns of its own headers.
        build.cpp(true).std("c++17").pic(true).warnings(false).opt_level(3).debug(false);
        for flag in *flags {
            build.flag(flag);
        }
        build.file(format!("csrc/{source}.cpp")).compile(&format!("phalanx_{source}"));
    }
    println!("cargo:rustc-link-search=native={}", root.join("lib").display());
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
    // The one that libtorch brings: both have the same name.
    println!("cargo:rustc-link-lib=gomp");
}

/// The libtorch prefix: `LIBTORCH`, or else what torch-sys was built against.
fn prefix() -> PathBuf {
    if let Ok(root) = std::env::var("LIBTORCH") {
        return PathBuf::from(root);
    }
    if let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB")
        && let Some(root) = Path::new(&lib).parent()
    {
        return root.to_path_buf();
    }
    println!("cargo:error=LIBTORCH is not set: run ops/setup, or point it at a libtorch 2.11");
    std::process::exit(1);
}
