//! What a model consists of, as pure data: parameters, shapes, logical axes, counts and FLOPs.
//!
//! No torch, no IO, no parallelism. The layout decides from the logical axes which tensors are
//! split; checkpoints, import and export use the unfused names in [`Part`]; the model builds its
//! tensors from [`parameters`].

pub mod flops;
pub mod hf_config;
mod local;
pub mod meta_params;
mod parameters;
#[cfg(test)]
mod test_models;

pub use flops::{FlopConvention, flops_per_token};
pub use local::{LocalParameter, LocalPart, Rectangle};
pub use parameters::{
    Axis, HfTensor, Init, ParameterSpec, Part, Place, axis_unit, hf_tensors, names, num_parameters,
    parameters,
};
