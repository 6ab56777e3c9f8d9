//! From what a model states to memory that holds it.

use crate::error::{ModelError, Result};
use model_spec::ParameterSpec;
use run_config::ComputeDtype;
use torch_shim::params::{Parameter, ParameterSet, ParameterSpec as Allocation, Part};
use torch_shim::tch::{Device, Kind};

/// Memory for the parameters `specs` state, all zero: the fused tensors with their unfused parts.
/// Master weights and gradients are FP64 for FP64 compute, FP32 otherwise.
///
/// # Errors
/// Where memory runs out.
pub fn allocate(
    specs: &[ParameterSpec],
    decay_norms: bool,
    compute: ComputeDtype,
    device: Device,
) -> Result<ParameterSet> {
    let (compute, master) = match compute {
        ComputeDtype::Fp32 => (Kind::Float, Kind::Float),
        ComputeDtype::Bf16 => (Kind::BFloat16, Kind::Float),
        ComputeDtype::Fp64 => (Kind::Double, Kind::Double),
    };
    let allocation = |spec: &ParameterSpec| Allocation {
        name: spec.name.clone(),
        shape: spec.shape.iter().map(|&size| size as i64).collect(),
        parts: spec.parts.iter().map(part).collect(),
        decay: spec.decays(decay_norms),
    };
    let allocations = specs.iter().map(allocation).collect();
    Ok(ParameterSet::new(allocations, compute, master, device)?)
}

fn part(part: &model_spec::Part) -> Part {
    Part {
        hf_name: part.hf_name.clone(),
        row_start: part.row_start as i64,
        row_count: part.row_count as i64,
    }
}

/// The parameter of a canonical name, for a layer to keep: it shares the set's memory.
pub(crate) fn find(parameters: &ParameterSet, name: &str) -> Result<Parameter> {
    let found = parameters.get(name).map(Parameter::shallow_clone);
    found.ok_or_else(|| ModelError::MissingParameter { name: name.to_owned() })
}
