//! Keys and values of the tokens seen so far, for generation.
//!
//! Shapes: `B` batch, `T` capacity or tokens so far, `S` new tokens, `H` query heads, `K` key and
//! value heads, `E` head_dim.

use crate::builder::Qkv;
use crate::error::{Result, bad_input};
use torch_shim::tch::{Kind, Tensor};

/// The cache of all layers of a stage.
#[derive(Debug)]
pub struct KvCache {
    first_layer: usize,
    layers: Vec<LayerCache>,
}

/// The cache of one layer.
#[derive(Debug)]
pub struct LayerCache {
    /// Keys and values `[B, K, T, E]`, made at the first use.
    stored: Option<(Tensor, Tensor)>,
    length: i64,
    capacity: i64,
}

impl KvCache {
    /// An empty cache for `num_layers` layers from `first_layer`, of at most `capacity` tokens.
    /// Memory is taken at the first use, when shapes and device are known.
    pub fn new(first_layer: usize, num_layers: usize, capacity: usize) -> Self {
        let layer = || LayerCache { stored: None, length: 0, capacity: capacity as i64 };
        Self { first_layer, layers: (0..num_layers).map(|_| layer()).collect() }
    }

    /// Number of tokens held.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, |layer| layer.length as usize)
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The cache of the layer of a global number.
    pub(crate) fn layer(&mut self, layer: usize) -> Result<&mut LayerCache> {
        let end = self.first_layer + self.layers.len();
        let expected = format!("from {} to below {end}", self.first_layer);
        layer
            .checked_sub(self.first_layer)
            .and_then(|index| self.layers.get_mut(index))
            .ok_or_else(|| bad_input("layer of the cache", layer, expected))
    }
}

impl LayerCache {
    /// Appends the new keys and values and attends from the new queries to all of them, causally:
    /// `[B, S, H * E]`. The rows of the batch are one document each. No gradient.
    pub(crate) fn attend(&mut self, qkv: &Qkv) -> Result<Tensor> {
        let [batch, heads, sequence, head_dim] = dims(&qkv.query_BHSE)?;
        let (past, total) = (self.length, self.length + sequence);
        if total > self.capacity {
            return Err(bad_input("tokens in the cache", total, format!("<= {}", self.capacity)));
        }
        let (key_BKTE, value_BKTE) = self.append(qkv, total)?;
        let mask = if past == 0 || sequence == 1 {
            None
        } else {
            let options = (Kind::Bool, qkv.query_BHSE.device());
            Some(Tensor::f_ones([sequence, total], options)?.f_tril(past)?)
        };
        let mixed_BHSE = Tensor::f_scaled_dot_product_attention(
            &qkv.query_BHSE,
            &key_BKTE,
            &value_BKTE,
            mask.as_ref(),
            0.0,
            past == 0 && sequence > 1,
            None,
            true,
        )?;
        Ok(mixed_BHSE.f_transpose(1, 2)?.f_reshape([batch, sequence, heads * head_dim])?)
    }

    /// Stores the new keys and values; returns all of them so far.
    fn append(&mut self, qkv: &Qkv, total: i64) -> Result<(Tensor, Tensor)> {
        let [batch, kv_heads, sequence, head_dim] = dims(&qkv.key_BKSE)?;
        let (keys, values) = match &self.stored {
            Some((keys, values)) => (keys, values),
            None => {
                let shape = [batch, kv_heads, self.capacity, head_dim];
                let options = (qkv.key_BKSE.kind(), qkv.key_BKSE.device());
                let empty = || Tensor::f_zeros(shape, options);
                let stored = self.stored.insert((empty()?, empty()?));
                (&stored.0, &stored.1)
            }
        };
        let store = |all: &Tensor, new: &Tensor| -> Result<Tensor> {
            let mut place = all.f_narrow(2, self.length, sequence)?;
            place.f_copy_(new)?;
            Ok(all.f_narrow(2, 0, total)?)
        };
        let all = (store(keys, &qkv.key_BKSE)?, store(values, &qkv.value_BKSE)?);
        self.length = total;
        Ok(all)
    }
}

fn dims(x: &Tensor) -> Result<[i64; 4]> {
    let size = x.size();
    <[i64; 4]>::try_from(size).map_err(|size| bad_input("shape of heads", size, "4 dimensions"))
}
