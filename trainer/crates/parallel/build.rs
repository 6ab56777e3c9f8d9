//! Lets the tests find libtorch.

include!("../../../ops/torch_rpath.rs");
