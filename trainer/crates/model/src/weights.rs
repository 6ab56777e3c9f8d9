//! From what a model states to memory that holds it.

use crate::error::{ModelError, Result};
use model_spec::LocalParameter;
use run_config::ComputeDtype;
use torch_shim::params::{Parameter, ParameterSet, ParameterSpec as Allocation, Sharding};
use torch_shim::tch::{Device, Kind};

/// Memory for `held` parameters, all zero. Master weights and gradients are FP64 for FP64 compute,
/// FP32 otherwise.
///
/// # Errors
/// Where memory runs out.
pub fn allocate(
    held: &[LocalParameter],
    decay_norms: bool,
    compute: ComputeDtype,
    device: Device,
) -> Result<ParameterSet> {
    allocate_sharded(held, decay_norms, compute, device, Sharding::NONE)
}

/// As [`allocate`], with master weights and state cut over ranks in units: the embedding, each
/// block, and the head.
///
/// # Errors
/// Where memory runs out.
pub fn allocate_sharded(
    held: &[LocalParameter],
    decay_norms: bool,
    compute: ComputeDtype,
    device: Device,
    sharding: Sharding,
) -> Result<ParameterSet> {
    let kinds = match compute {
        ComputeDtype::Fp32 => (Kind::Float, Kind::Float),
        ComputeDtype::Bf16 => (Kind::BFloat16, Kind::Float),
        ComputeDtype::Fp64 => (Kind::Double, Kind::Double),
    };
    let allocation = |local: &LocalParameter| Allocation {
        name: local.spec.name.clone(),
        shape: local.shape.iter().map(|&size| size as i64).collect(),
        decay: local.spec.decays(decay_norms),
    };
    let units = held.chunk_by(|a, b| a.spec.place == b.spec.place);
    let units = units.map(|unit| unit.iter().map(allocation).collect()).collect();
    Ok(ParameterSet::sharded(units, kinds, device, sharding)?)
}

/// The parameter of a canonical name, for a layer to keep: it shares the set's memory.
pub(crate) fn find(parameters: &ParameterSet, name: &str) -> Result<Parameter> {
    let found = parameters.get(name).map(Parameter::shallow_clone);
    found.ok_or_else(|| ModelError::MissingParameter { name: name.to_owned() })
}
