//! Tells the tests where libtorch is.
include!("../../../ops/torch_rpath.rs");
