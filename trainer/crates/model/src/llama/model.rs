//! The whole model, or the piece of it that one pipeline stage holds.
//!
//! Shapes: `B` batch, `S` sequence, `D` dim, `V` vocabulary.

use super::block::{Block, Forward};
use super::rope::RopeTables;
use crate::builder::LayerBuilder;
use crate::cache::KvCache;
use crate::error::{ModelError, Result, bad_input};
use crate::inputs::Inputs;
use crate::residual::Residual;
use crate::weights::find;
use model_spec::{ParameterSpec, Place, names, parameters};
use run_config::ModelConfig;
use std::ops::Range;
use std::sync::Arc;
use torch_shim::params::{Parameter, ParameterSet};
use torch_shim::tch::{Device, Kind, Tensor, no_grad};

/// Which piece of the model is held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    /// Whether tokens enter here.
    pub embedding: bool,
    /// Global numbers of the blocks.
    pub blocks: Range<usize>,
    /// Whether the loss is computed here.
    pub head: bool,
}

impl Stage {
    /// The whole model.
    pub fn whole(config: &ModelConfig) -> Self {
        Self { embedding: true, blocks: 0..config.layers, head: true }
    }

    /// The parameters of this stage, in the order of the forward pass. A tied embedding belongs to
    /// the first stage and the last.
    pub fn parameters(&self, config: &ModelConfig) -> Vec<ParameterSpec> {
        let tied_head = self.head && config.tied_embeddings;
        let held = |spec: &ParameterSpec| match spec.place {
            Place::Embedding => self.embedding || tied_head,
            Place::Block(layer) => self.blocks.contains(&layer),
            Place::Head => self.head,
        };
        parameters(config).into_iter().filter(held).collect()
    }
}

#[derive(Debug)]
struct Head {
    norm: Parameter,
    output: Parameter,
}

/// A Llama, or a stage of one. Its weights are views of the parameter set that it was built over.
pub struct Llama {
    config: ModelConfig,
    stage: Stage,
    builder: Arc<dyn LayerBuilder>,
    rope: RopeTables,
    embedding: Option<Parameter>,
    blocks: Vec<Block>,
    head: Option<Head>,
}

impl Llama {
    /// The model `config` states, over `parameters` that hold at least those of `stage`, for
    /// positions below `num_positions`.
    ///
    /// # Errors
    /// Where a parameter is missing or the builder refuses.
    pub fn new(
        config: &ModelConfig,
        stage: Stage,
        parameters: &ParameterSet,
        builder: Arc<dyn LayerBuilder>,
        num_positions: usize,
    ) -> Result<Self> {
        let find = |name| find(parameters, name);
        let (kind, device) = compute_of(parameters)?;
        let output = if config.tied_embeddings { names::EMBEDDING } else { names::HEAD };
        let head = stage.head.then(|| -> Result<Head> {
            Ok(Head { norm: find(names::FINAL_NORM)?, output: find(output)? })
        });
        let block = |layer| Block::new(config, parameters, layer, builder.as_ref());
        Ok(Self {
            embedding: stage.embedding.then(|| find(names::EMBEDDING)).transpose()?,
            blocks: stage.blocks.clone().map(block).collect::<Result<_>>()?,
            head: head.transpose()?,
            rope: RopeTables::new(&config.rope, config.head_dim, num_positions, kind, device)?,
            config: config.clone(),
            stage,
            builder,
        })
    }

    /// The model's config.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The piece that is held.
    pub fn stage(&self) -> &Stage {
        &self.stage
    }

    /// Number of positions the model was built for.
    pub fn num_positions(&self) -> usize {
        self.rope.num_positions()
    }

    /// Tokens to the residual stream.
    ///
    /// # Errors
    /// Where a token or position id is out of range, this stage has no embedding, or libtorch or a
    /// collective fails; the latter two so for all methods.
    pub fn embed(&self, inputs: &Inputs) -> Result<Residual> {
        inputs.check(self.config.vocab_size, self.num_positions())?;
        let weight = self.embedding.as_ref().ok_or_else(|| missing("the embedding"))?;
        let x_BSD = self.builder.embedding(&inputs.tokens_BS, weight)?;
        Ok(Residual::new(x_BSD))
    }

    /// Runs the blocks of global numbers `range`. With a `cache`, the tokens follow those in it.
    ///
    /// # Errors
    /// Also where a block is not on this stage or the cache is full.
    pub fn blocks(
        &self,
        range: Range<usize>,
        mut stream: Residual,
        inputs: &Inputs,
        mut cache: Option<&mut KvCache>,
    ) -> Result<Residual> {
        let forward = self.forward(inputs)?;
        for layer in range {
            let block = layer
                .checked_sub(self.stage.blocks.start)
                .and_then(|index| self.blocks.get(index))
                .ok_or_else(|| missing(&format!("block {layer}")))?;
            let layer_cache = match &mut cache {
                None => None,
                Some(cache) => Some(cache.layer(layer)?),
            };
            stream = block.forward(&forward, stream, layer_cache)?;
        }
        Ok(stream)
    }

    /// The final norm: what the output head multiplies, `[B, S, D]`.
    ///
    /// # Errors
    /// Where this stage has no head.
    pub fn final_norm(&self, stream: Residual, inputs: &Inputs) -> Result<Tensor> {
        let (_, normed_BSD) = self.forward(inputs)?.norm(stream, &self.head()?.norm)?;
        Ok(normed_BSD)
    }

    /// Logits `[B, S, V]` from the output of [`Llama::final_norm`].
    ///
    /// # Errors
    /// Where this stage has no head.
    pub fn logits(&self, normed_BSD: &Tensor) -> Result<Tensor> {
        self.builder.logits(normed_BSD, &self.head()?.output)
    }

    /// The head of the training pass: final norm, logits and `scale` times the summed
    /// cross-entropy over the targets that are not -100.
    ///
    /// # Errors
    /// Where this stage has no head or the targets have another shape than the tokens.
    pub fn loss(
        &self,
        stream: Residual,
        inputs: &Inputs,
        targets_BS: &Tensor,
        scale: f64,
    ) -> Result<Tensor> {
        if targets_BS.size() != inputs.tokens_BS.size() {
            let expected = format!("{:?}", inputs.tokens_BS.size());
            return Err(bad_input("shape of targets", targets_BS.size(), expected));
        }
        let normed_BSD = self.final_norm(stream, inputs)?;
        let weight = &self.head()?.output;
        self.builder.loss(&normed_BSD, weight, targets_BS, scale)
    }

    /// The whole forward pass to the loss, where all of the model is held.
    ///
    /// # Errors
    /// As [`Llama::embed`], [`Llama::blocks`] and [`Llama::loss`].
    pub fn forward_loss(&self, inputs: &Inputs, targets_BS: &Tensor, scale: f64) -> Result<Tensor> {
        let stream = self.embed(inputs)?;
        let stream = self.blocks(self.stage.blocks.clone(), stream, inputs, None)?;
        self.loss(stream, inputs, targets_BS, scale)
    }

    /// The whole forward pass to all logits, without a graph.
    ///
    /// # Errors
    /// As [`Llama::embed`], [`Llama::blocks`] and [`Llama::logits`].
    pub fn forward_logits(&self, inputs: &Inputs, cache: Option<&mut KvCache>) -> Result<Tensor> {
        no_grad(|| {
            let stream = self.embed(inputs)?;
            let range = self.stage.blocks.clone();
            let stream = self.blocks(range, stream, inputs, cache)?;
            let normed_BSD = self.final_norm(stream, inputs)?;
            self.logits(&normed_BSD)
        })
    }

    /// The logits `[B, V]` of the token after the last, without a graph: the vocabulary is
    /// multiplied for one position only.
    ///
    /// # Errors
    /// As [`Llama::forward_logits`].
    pub fn next_logits(&self, inputs: &Inputs, cache: Option<&mut KvCache>) -> Result<Tensor> {
        no_grad(|| {
            let stream = self.embed(inputs)?;
            let range = self.stage.blocks.clone();
            let stream = self.blocks(range, stream, inputs, cache)?;
            let last_B1D = stream.sum()?.f_narrow(1, inputs.sequence() - 1, 1)?;
            let normed_B1D = self.final_norm(Residual::new(last_B1D), inputs)?;
            Ok(self.logits(&normed_B1D)?.f_squeeze_dim(1)?)
        })
    }

    fn forward(&self, inputs: &Inputs) -> Result<Forward> {
        inputs.check(self.config.vocab_size, self.num_positions())?;
        Ok(Forward {
            builder: self.builder.clone(),
            inputs: inputs.share(),
            rope: self.rope.factors(inputs)?,
            norm_eps: self.config.norm_eps,
            last: None,
        })
    }

    fn head(&self) -> Result<&Head> {
        self.head.as_ref().ok_or_else(|| missing("the output head"))
    }
}

fn missing(piece: &str) -> ModelError {
    ModelError::NotOnThisStage { piece: piece.to_owned() }
}

/// Kind and device of the weights used in compute.
fn compute_of(parameters: &ParameterSet) -> Result<(Kind, Device)> {
    let first: Option<&Parameter> = parameters.iter().next();
    let first = first.ok_or_else(|| missing("any parameter"))?;
    Ok((first.compute.kind(), first.compute.device()))
}
