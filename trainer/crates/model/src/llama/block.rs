//! One transformer block: attention and feed-forward, each behind a norm and added to the stream.

use super::attention::Attention;
use super::feed_forward::FeedForward;
use super::rope::RopeFactors;
use crate::builder::LayerBuilder;
use crate::cache::LayerCache;
use crate::error::Result;
use crate::inputs::Inputs;
use crate::residual::Residual;
use crate::weights::find;
use model_spec::names;
use run_config::ModelConfig;
use torch_shim::params::{Parameter, ParameterSet};
use torch_shim::tch::Tensor;

/// What every layer of a forward pass may look at.
pub struct Forward<'a> {
    /// Builds each layer's graph.
    pub builder: &'a dyn LayerBuilder,
    /// Tokens, positions, documents.
    pub inputs: &'a Inputs,
    /// Rotary factors of each token.
    pub rope: RopeFactors,
    /// Added to the mean square in norms.
    pub norm_eps: f64,
}

impl Forward<'_> {
    /// Completes the stream's pending addition and norms it: (stream, normed stream).
    ///
    /// # Errors
    /// Where libtorch or a collective fails.
    pub fn norm(&self, stream: Residual, weight: &Parameter) -> Result<(Tensor, Tensor)> {
        let Residual { stream_BSD, branch_BSD } = stream;
        let eps = self.norm_eps;
        match branch_BSD {
            None => {
                let normed_BSD = self.builder.norm(&stream_BSD, weight, eps)?;
                Ok((stream_BSD, normed_BSD))
            }
            Some(branch_BSD) => self.builder.add_norm(&stream_BSD, &branch_BSD, weight, eps),
        }
    }
}

/// One transformer block.
#[derive(Debug)]
pub struct Block {
    layer: usize,
    attention_norm: Parameter,
    attention: Attention,
    feed_forward_norm: Parameter,
    feed_forward: FeedForward,
}

impl Block {
    /// The block of global number `layer`.
    ///
    /// # Errors
    /// Where one of its parameters is missing.
    pub fn new(
        config: &ModelConfig,
        parameters: &ParameterSet,
        layer: usize,
        builder: &dyn LayerBuilder,
    ) -> Result<Self> {
        let find = |name| find(parameters, &names::in_block(layer, name));
        Ok(Self {
            layer,
            attention_norm: find(names::ATTENTION_NORM)?,
            attention: Attention::new(config, parameters, layer, builder)?,
            feed_forward_norm: find(names::FEED_FORWARD_NORM)?,
            feed_forward: FeedForward::new(parameters, layer)?,
        })
    }

    /// Runs the block; with a `cache`, over the tokens that follow those in it.
    ///
    /// # Errors
    /// Where libtorch or a collective fails.
    pub fn forward(
        &self,
        forward: &Forward,
        stream: Residual,
        cache: Option<&mut LayerCache>,
    ) -> Result<Residual> {
        let stream = forward.builder.enter_block(self.layer, stream)?;
        let (stream_BSD, normed_BSD) = forward.norm(stream, &self.attention_norm)?;
        let branch_BSD = self.attention.forward(forward, &normed_BSD, cache)?;
        let stream = Residual::with_branch(stream_BSD, branch_BSD);
        let (stream_BSD, normed_BSD) = forward.norm(stream, &self.feed_forward_norm)?;
        let branch_BSD = self.feed_forward.forward(forward, &normed_BSD)?;
        forward.builder.leave_block(self.layer, Residual::with_branch(stream_BSD, branch_BSD))
    }
}
