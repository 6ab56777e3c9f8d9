//! Lets tests find libtorch without a variable being set.
include!("../../../ops/torch_rpath.rs");
