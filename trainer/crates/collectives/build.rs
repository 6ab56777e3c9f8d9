include!("../../../ops/torch_rpath.rs");
