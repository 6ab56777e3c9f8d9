//! SwiGLU feed-forward: `down(silu(gate(x)) * up(x))`, gate and up in one product.
//!
//! Shapes: `B` batch, `S` sequence, `D` dim, `I` inner width.

use super::block::Forward;
use crate::builder::LinearRole;
use crate::error::Result;
use crate::weights::find;
use model_spec::names;
use torch_shim::params::{Parameter, ParameterSet};
use torch_shim::tch::Tensor;

/// The feed-forward of one block.
#[derive(Debug)]
pub struct FeedForward {
    gate_up: Parameter,
    down: Parameter,
}

impl FeedForward {
    /// The feed-forward of block `layer`.
    ///
    /// # Errors
    /// Where one of its parameters is missing.
    pub fn new(parameters: &ParameterSet, layer: usize) -> Result<Self> {
        let find = |name| find(parameters, &names::in_block(layer, name));
        Ok(Self { gate_up: find(names::GATE_UP)?, down: find(names::DOWN)? })
    }

    /// Another owner of the same weights.
    pub fn share(&self) -> Self {
        Self { gate_up: self.gate_up.shallow_clone(), down: self.down.shallow_clone() }
    }

    /// `[B, S, D]` to `[B, S, D]`.
    ///
    /// # Errors
    /// Where libtorch or a collective fails.
    pub fn forward(&self, forward: &Forward, x_BSD: &Tensor) -> Result<Tensor> {
        let gate_up_BS2I = forward.linear(x_BSD, &self.gate_up, LinearRole::GateUp)?;
        let inner_BSI = forward.builder.swiglu(&gate_up_BS2I)?;
        forward.linear(&inner_BSI, &self.down, LinearRole::Down)
    }
}
