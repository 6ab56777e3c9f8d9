//! Every kernel compiles, for each generation of GPUs that we name; and what the compiler makes of
//! them: 16-byte accesses, no spills. NVRTC needs no GPU; `ops/setup --kernels` brings it.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

use kernels::nvrtc::Nvrtc;
use kernels::ops::PROGRAMS;
use kernels::{Program, Search, Storage, Variant};

/// The folder that `ops/setup --kernels` links; none where it has not run.
fn folder() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../..");
    let folder = root.join(".nvrtc/nvidia/cu13/lib");
    if folder.is_dir() {
        return Some(folder.canonicalize().unwrap());
    }
    eprintln!("NOT RUN: no {}: ops/setup --kernels brings NVRTC", folder.display());
    None
}

fn nvrtc() -> Option<Nvrtc> {
    let folder = folder()?;
    let nvrtc = Nvrtc::load(&Search { folder: Some(folder.clone()), libtorch_lib: None }).unwrap();
    assert_eq!(nvrtc.path(), folder.join("libnvrtc.so.13"));
    Some(nvrtc)
}

/// All variants, for one architecture.
fn check_all(architecture: i32) {
    let Some(nvrtc) = nvrtc() else { return };
    assert_eq!(nvrtc.version(), "13.0");
    let mut compiled = 0;
    for variant in PROGRAMS.into_iter().flat_map(Variant::all) {
        let made = nvrtc.compile(&variant, architecture).unwrap();
        assert!(made.cubin.starts_with(b"\x7fELF"), "{variant}");
        let ptx = String::from_utf8(made.ptx).unwrap();
        assert!(ptx.contains(&format!(".target sm_{architecture}")), "{variant}");
        for kernel in variant.program.kernels {
            check_accesses(&variant, kernel, body(&ptx, kernel));
        }
        compiled += 1;
    }
    // 6 programs of three formats, two of two, and one of three formats and numbers of items.
    assert_eq!(compiled, 6 * 3 + 2 * 2 + 3 * 3);
}

#[test]
fn all_compile_for_the_a100() {
    check_all(80);
}

#[test]
fn all_compile_for_the_h100_and_h200() {
    check_all(90);
}

#[test]
fn all_compile_for_the_b200() {
    check_all(100);
}

/// The body of a kernel in PTX.
fn body<'a>(ptx: &'a str, kernel: &str) -> &'a str {
    let from = ptx.find(&format!(".visible .entry {kernel}("));
    let from = &ptx[from.unwrap_or_else(|| panic!("no {kernel}"))..];
    &from[..from.find("\n}").unwrap()]
}

/// What a thread reads and writes at a time decides how much of the memory's speed is reached:
/// tensors are read and written 16 bytes at a time.
fn check_accesses(variant: &Variant, kernel: &str, body: &str) {
    let wide = |operation: &str| {
        let has_16_bytes = |line: &&str| {
            let whole = [".v4.f32", ".v4.u32", ".v4.b32", ".v2.f64", ".v2.u64", ".v2.b64"];
            line.contains(operation) && whole.iter().any(|how| line.contains(how))
        };
        body.lines().filter(has_16_bytes).count()
    };
    // Those that read and write partial sums, or single numbers.
    let small = [
        "rms_norm_weight_gradient",
        "sum_of_squares",
        "clip_coefficient",
        "column_scales",
        "cut_rescale",
    ];
    // Those whose results are few, or a byte for each element.
    let reduces = ["squares_of_chunks", "column_maxima", "quantise_rows", "cut_gauge"];
    if !small.contains(&kernel) {
        assert!(wide("ld.global") > 0, "{kernel} of {variant} reads less at a time");
        if !reduces.contains(&kernel) {
            assert!(wide("st.global") > 0, "{kernel} of {variant} writes less at a time");
        }
    }
}

static BROKEN: Program = Program {
    name: "broken",
    source: "extern \"C\" __global__ void broken(T* x) {\n  x[0] = nothing;\n}\n",
    kernels: &["broken"],
    storages: Storage::ALL,
    items: &[],
};

#[test]
fn an_error_names_the_line() {
    let Some(nvrtc) = nvrtc() else { return };
    let variant = Variant { program: &BROKEN, storage: Storage::Fp32, items: 0 };
    let error = nvrtc.compile(&variant, 90).unwrap_err().to_string();
    for part in [
        "NVRTC 13.0 does not compile broken (Fp32) for sm_90: broken.cu(2): error:",
        "identifier \"nothing\" is undefined",
    ] {
        assert!(error.contains(part), "{error:?} does not say {part:?}");
    }
    assert_eq!(error.lines().count(), 1);
}

#[test]
fn a_device_gets_its_own_architecture_or_one_that_it_runs() {
    let Some(nvrtc) = nvrtc() else { return };
    let check =
        |capability, expected| assert_eq!(nvrtc.architecture(capability).unwrap(), expected);
    check((9, 0), 90);
    check((8, 6), 86);
    check((10, 0), 100);
    // One that came later runs the machine code of its generation.
    check((9, 7), 90);
    for capability in [(7, 0), (99, 0)] {
        let error = nvrtc.architecture(capability).unwrap_err().to_string();
        assert!(error.contains("it knows sm_75") && error.contains("hint:"), "{error}");
    }
}
