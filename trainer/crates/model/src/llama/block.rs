//! One transformer block: attention and feed-forward, each behind a norm and added to the stream.

use super::attention::Attention;
use super::feed_forward::FeedForward;
use super::rope::RopeFactors;
use crate::builder::{LayerBuilder, LinearRole, Recompute};
use crate::cache::LayerCache;
use crate::error::{Result, bad_input};
use crate::inputs::Inputs;
use crate::recompute::recomputed;
use crate::residual::Residual;
use crate::weights::find;
use model_spec::names;
use run_config::ModelConfig;
use std::sync::Arc;
use torch_shim::autograd;
use torch_shim::params::{Parameter, ParameterSet};
use torch_shim::tch::Tensor;

/// What every layer of a forward pass may look at.
pub struct Forward {
    /// Builds each layer's graph.
    pub builder: Arc<dyn LayerBuilder>,
    /// Tokens, positions, documents.
    pub inputs: Inputs,
    /// Rotary factors of each token.
    pub rope: RopeFactors,
    /// Added to the mean square in norms.
    pub norm_eps: f64,
    /// The last linear of what is computed again in the backward pass: its output is not read
    /// then.
    pub last: Option<LinearRole>,
}

impl Forward {
    /// Another owner of the same.
    fn share(&self) -> Self {
        Self {
            builder: self.builder.clone(),
            inputs: self.inputs.share(),
            rope: self.rope.share(),
            norm_eps: self.norm_eps,
            last: self.last,
        }
    }

    /// The same for a part of the graph that ends with `last`, and is computed again.
    fn again(&self, last: LinearRole) -> Self {
        Self { last: Some(last), ..self.share() }
    }

    /// A linear layer.
    ///
    /// # Errors
    /// Where libtorch or a collective fails.
    pub fn linear(&self, x: &Tensor, weight: &Parameter, role: LinearRole) -> Result<Tensor> {
        // The first time, the part's graph is not recorded.
        if self.last == Some(role) && autograd::is_recording() {
            return self.builder.linear_graph(x, weight, role);
        }
        self.builder.linear(x, weight, role)
    }

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
        let stream = match forward.builder.recompute() {
            Recompute::Block if cache.is_none() => self.recomputed(forward, stream)?,
            _ => self.compute(forward, stream, cache)?,
        };
        forward.builder.leave_block(self.layer, stream)
    }

    fn compute(
        &self,
        forward: &Forward,
        stream: Residual,
        cache: Option<&mut LayerCache>,
    ) -> Result<Residual> {
        let (stream_BSD, normed_BSD) = forward.norm(stream, &self.attention_norm)?;
        let branch_BSD = match forward.builder.recompute() {
            Recompute::Attention if cache.is_none() => {
                let attention = self.attention.share();
                let shared = forward.again(LinearRole::AttentionOutput);
                let body = move |x: &[Tensor]| Ok(vec![attention.forward(&shared, &x[0], None)?]);
                recomputed(&[&normed_BSD], 1, Box::new(body))?.remove(0)
            }
            _ => self.attention.forward(forward, &normed_BSD, cache)?,
        };
        let stream = Residual::with_branch(stream_BSD, branch_BSD);
        let (stream_BSD, normed_BSD) = forward.norm(stream, &self.feed_forward_norm)?;
        let branch_BSD = self.feed_forward.forward(forward, &normed_BSD)?;
        Ok(Residual::with_branch(stream_BSD, branch_BSD))
    }

    /// As [`Block::compute`], keeping only the input.
    fn recomputed(&self, forward: &Forward, stream: Residual) -> Result<Residual> {
        let (block, shared) = (self.share(), forward.again(LinearRole::Down));
        let Residual { stream_BSD, branch_BSD } = stream;
        let body = move |x: &[Tensor]| {
            let branch_BSD = x.get(1).map(Tensor::shallow_clone);
            let stream = Residual { stream_BSD: x[0].shallow_clone(), branch_BSD };
            let Residual { stream_BSD, branch_BSD } = block.compute(&shared, stream, None)?;
            Ok([Some(stream_BSD), branch_BSD].into_iter().flatten().collect())
        };
        let inputs: Vec<&Tensor> =
            [Some(&stream_BSD), branch_BSD.as_ref()].into_iter().flatten().collect();
        let mut outputs = recomputed(&inputs, 2, Box::new(body))?.into_iter();
        match (outputs.next(), outputs.next()) {
            (Some(stream_BSD), branch_BSD) => Ok(Residual { stream_BSD, branch_BSD }),
            (None, _) => Err(bad_input("outputs of a block", 0, "2")),
        }
    }

    /// Another owner of the same weights.
    fn share(&self) -> Self {
        Self {
            layer: self.layer,
            attention_norm: self.attention_norm.shallow_clone(),
            attention: self.attention.share(),
            feed_forward_norm: self.feed_forward_norm.shallow_clone(),
            feed_forward: self.feed_forward.share(),
        }
    }
}
