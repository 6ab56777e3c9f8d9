// Included by the build.rs of every crate whose tests or binaries link libtorch: they find it
// without LD_LIBRARY_PATH, which still wins over it (RUNPATH), so that another libtorch 2.11 can be
// chosen at run time.
fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let Ok(libtorch) = std::env::var("LIBTORCH") else { return };
    let lib = std::path::Path::new(&libtorch).join("lib");
    let lib = std::fs::canonicalize(&lib).unwrap_or(lib);
    println!("cargo:rustc-link-arg=-Wl,--enable-new-dtags,-rpath,{}", lib.display());
}
