//! The kernels on a GPU, each against its plain form; `ops/gpu-check` runs them, one at a time.
//! Each prints how much of its tolerance was used, and how fast it was.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "gpu/speed.rs"]
mod speed;
mod suite;

use std::path::PathBuf;

use kernels::{Kernels, Options, Search};
use suite::Extent;
use tempfile::TempDir;
use torch_shim::cuda;

/// The kernels of the first GPU, and the folder where what was compiled is kept for the test.
fn open() -> (Kernels, TempDir) {
    cuda::load().unwrap();
    assert!(cuda::start().unwrap() > 0, "libtorch finds no GPU");
    cuda::set_device(0).unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let libtorch = maps.lines().find(|line| line.ends_with("/libtorch_cuda.so")).unwrap();
    let libtorch = PathBuf::from(&libtorch[libtorch.find('/').unwrap()..]);
    let search = Search { folder: None, libtorch_lib: libtorch.parent().map(PathBuf::from) };
    let folder = TempDir::new().unwrap();
    let options = Options { search, cache: Some(folder.path().to_owned()) };
    (Kernels::open(0, &options).unwrap(), folder)
}

fn report(kernels: &Kernels, name: &str, worst: f64) {
    cuda::synchronize(0).unwrap();
    assert!(worst <= 1.0);
    println!("FIGURE {worst:.2} of the tolerance; {}", speed::of(kernels, name));
}

/// What is read from disk is what was compiled: a second opening runs it too.
#[test]
#[ignore = "needs a GPU"]
fn compiled_kernels_are_kept() {
    let (kernels, folder) = open();
    suite::accumulate::check(&kernels, Extent::Small);
    let count = || std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(count(), 3);
    let options = Options { search: Search::default(), cache: Some(folder.path().to_owned()) };
    suite::accumulate::check(&Kernels::open(0, &options).unwrap(), Extent::Small);
    assert_eq!(count(), 3);
    println!("FIGURE 3 files");
}

/// What has no tolerance.
const EXACT: f64 = 0.0;

#[test]
#[ignore = "needs a GPU"]
fn rms_norm() {
    let (kernels, _folder) = open();
    report(&kernels, "rms_norm", suite::rms_norm::check(&kernels, Extent::Full));
}

#[test]
#[ignore = "needs a GPU"]
fn rope() {
    let (kernels, _folder) = open();
    report(&kernels, "rope", suite::rope::check(&kernels, Extent::Full));
}

#[test]
#[ignore = "needs a GPU"]
fn swiglu() {
    let (kernels, _folder) = open();
    report(&kernels, "swiglu", suite::swiglu::check(&kernels, Extent::Full));
}

#[test]
#[ignore = "needs a GPU"]
fn cross_entropy() {
    let (kernels, _folder) = open();
    report(&kernels, "cross_entropy", suite::cross_entropy::check(&kernels, Extent::Full));
}

#[test]
#[ignore = "needs a GPU"]
fn embedding() {
    let (kernels, _folder) = open();
    report(&kernels, "embedding", suite::embedding::check(&kernels, Extent::Full));
}

#[test]
#[ignore = "needs a GPU"]
fn adamw() {
    let (kernels, _folder) = open();
    report(&kernels, "adamw", suite::optimizer::check_adamw(&kernels, Extent::Full));
}

#[test]
#[ignore = "needs a GPU"]
fn gradient_norm() {
    let (kernels, _folder) = open();
    report(&kernels, "gradient_norm", suite::optimizer::check_norm(&kernels, Extent::Full));
}

#[test]
#[ignore = "needs a GPU"]
fn fp8() {
    let (kernels, _folder) = open();
    suite::fp8::check(&kernels, Extent::Full);
    report(&kernels, "fp8", EXACT);
}

/// Tensor cores align the products of an instruction (32 of FP8) and the sum so far, and keep 13
/// bits behind the point of the largest (DeepSeek-V3, section 3.3.2: "around 14 bits"): each of 33
/// addends loses less than 2^-13 of it. Every 128 products, four instructions, the sum goes on in
/// FP32, so that of the magnitudes of all terms at most 4 x 33 x 2^-13 is lost.
#[test]
#[ignore = "needs a GPU"]
fn fp8_products() {
    let (kernels, _folder) = open();
    let unit = |summed: i64| 4.0 * 33.0 / 8192.0 + summed as f64 / f64::from(1 << 24);
    let worst = suite::fp8::products(&kernels, Extent::Full, unit);
    cuda::synchronize(0).unwrap();
    println!("FIGURE {worst:.2} of the tolerance; {}", speed::of_fp8_products(&kernels));
}

#[test]
#[ignore = "needs a GPU"]
fn accumulate() {
    let (kernels, _folder) = open();
    suite::accumulate::check(&kernels, Extent::Full);
    report(&kernels, "accumulate", EXACT);
}

#[test]
#[ignore = "needs a GPU"]
fn autograd_functions() {
    let (kernels, _folder) = open();
    suite::graph::check(&kernels);
    println!("FIGURE equal to the bit");
}
