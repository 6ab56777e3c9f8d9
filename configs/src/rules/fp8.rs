//! What FP8 products ask of the sizes that they multiply: libtorch's scaled product on a GPU takes
//! rows of multiples of 16 numbers, and each size of a linear layer is a row in one of its three
//! products. A CPU is held to the same, so that what is tried there runs on a GPU.

use super::Rules;
use super::degrees::{CONTEXT, TENSOR};
use crate::resolved::*;

const MATMUL: &str = "precision.matmul";
const COMPUTE: &str = "precision.compute";
/// Bytes of FP8 that a GPU loads at once.
const MULTIPLE: usize = 16;

/// A size that is a row somewhere.
struct Size {
    keys: &'static [&'static str],
    /// Words for it.
    name: String,
    size: usize,
}

impl Rules<'_, '_> {
    /// What `precision.matmul: fp8` does not go with.
    pub(super) fn fp8(&mut self) {
        let precision = &self.config.precision;
        if precision.matmul != Matmul::Fp8 {
            return;
        }
        if precision.compute != ComputeDtype::Bf16 {
            let message = "FP8 products make BF16 of BF16".to_owned();
            let hint = "set precision.compute to bf16, or precision.matmul to same";
            self.conflict(&[MATMUL, COMPUTE], message, "fp8 with precision.compute bf16", hint);
        }
        let mut sizes = self.widths();
        sizes.extend(self.tokens());
        sizes.retain(|size| {
            let is_known = !size.keys.iter().any(|key| self.resolver.is_bad(key));
            is_known && !size.size.is_multiple_of(MULTIPLE)
        });
        if sizes.is_empty() {
            return;
        }
        let mut keys = vec![MATMUL];
        keys.extend(sizes.iter().flat_map(|size| size.keys));
        let names: Vec<&str> = sizes.iter().map(|size| size.name.as_str()).collect();
        let message = format!("FP8 products cannot be made of {}", names.join(", "));
        let limit = format!("multiples of {MULTIPLE}");
        let hint = "change these sizes or their split, or set precision.matmul to same";
        self.conflict(&keys, message, &limit, hint);
    }

    /// Inputs and outputs of the linear layers of a rank. What tensor parallelism does not divide
    /// is told of elsewhere.
    fn widths(&self) -> Vec<Size> {
        let (m, ranks) = (&self.config.model, self.config.parallelism.tensor.max(1));
        let of = if ranks > 1 { format!(" / {ranks} ranks") } else { String::new() };
        let mut sizes =
            vec![Size { keys: &["model.dim"], name: format!("model.dim {}", m.dim), size: m.dim }];
        if m.heads.is_multiple_of(ranks) {
            let (heads, width) = (m.heads / ranks, m.head_dim);
            let kv_heads = (m.kv_heads / ranks).max(1);
            sizes.push(Size {
                keys: &["model.heads", "model.head_dim", TENSOR],
                name: format!("{} heads x {width}{of} = {}", m.heads, heads * width),
                size: heads * width,
            });
            sizes.push(Size {
                keys: &["model.heads", "model.kv_heads", "model.head_dim", TENSOR],
                name: format!(
                    "({heads} + 2 x {kv_heads}) heads x {width} = {}",
                    (heads + 2 * kv_heads) * width
                ),
                size: (heads + 2 * kv_heads) * width,
            });
        }
        if m.ffn_dim.is_multiple_of(ranks) {
            let size = m.ffn_dim / ranks;
            let name = match ranks {
                1 => format!("model.ffn_dim {size}"),
                _ => format!("model.ffn_dim {}{of} = {size}", m.ffn_dim),
            };
            sizes.push(Size { keys: &["model.ffn_dim", TENSOR], name, size });
        }
        sizes
    }

    /// Tokens of a micro-batch on a rank, of every length that there is.
    fn tokens(&self) -> Vec<Size> {
        let (t, ranks) = (&self.config.training, self.config.parallelism.context.max(1));
        let of = if ranks > 1 { format!(" / {ranks} ranks") } else { String::new() };
        let lengths = t.batch_stages.iter().map(|stage| stage.sequence_length);
        let mut lengths: Vec<usize> =
            lengths.filter(|length| length.is_multiple_of(ranks)).collect();
        lengths.sort_unstable();
        lengths.dedup();
        let size = |length| {
            let size = t.micro_batch * length / ranks;
            let name = format!("{} sequences x {length}{of} = {size} tokens", t.micro_batch);
            let keys: &[&str] =
                &["training.micro_batch", "data.sequence_length", "training.global_batch", CONTEXT];
            Size { keys, name, size }
        };
        lengths.into_iter().map(size).collect()
    }
}
