//! The parameters of a Llama-3-family model: names, shapes, logical axes, initial values.

use run_config::ModelConfig;
use serde::{Deserialize, Serialize};

/// Canonical (fused) parameter names.
pub mod names {
    /// Token embedding, and the output head too where embeddings are tied.
    pub const EMBEDDING: &str = "embedding.weight";
    /// The norm before the output head.
    pub const FINAL_NORM: &str = "norm.weight";
    /// The output head; absent where embeddings are tied.
    pub const HEAD: &str = "head.weight";
    /// Within a block: the norm before attention.
    pub const ATTENTION_NORM: &str = "attention_norm.weight";
    /// Within a block: query, key and value projections, fused by rows.
    pub const QKV: &str = "attention.qkv.weight";
    /// Within a block: the projection out of attention.
    pub const ATTENTION_OUTPUT: &str = "attention.output.weight";
    /// Within a block: the norm before the feed-forward.
    pub const FEED_FORWARD_NORM: &str = "feed_forward_norm.weight";
    /// Within a block: gate and up projections, fused by rows.
    pub const GATE_UP: &str = "feed_forward.gate_up.weight";
    /// Within a block: the projection out of the feed-forward.
    pub const DOWN: &str = "feed_forward.down.weight";

    /// The full name of a block's parameter: `in_block(3, QKV)` is `layers.3.attention.qkv.weight`.
    pub fn in_block(layer: usize, name: &str) -> String {
        format!("layers.{layer}.{name}")
    }
}

/// What a dimension of a parameter means. The layout maps each to a mesh axis, or to none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Axis {
    /// Token ids.
    Vocab,
    /// The residual stream; also the only dimension of a norm's weight.
    Embed,
    /// Query heads times `head_dim`; the attention output's input.
    Heads,
    /// Key or value heads times `head_dim`.
    KvHeads,
    /// The inner width of the feed-forward.
    Ffn,
    /// Rows of a fused parameter; each [`Part`] states the axis of its own rows.
    Fused,
}

/// Which piece of a pipeline a parameter belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// Token embedding. With tied embeddings the head reads the same parameter.
    Embedding,
    /// The block of this global layer number.
    Block(usize),
    /// The final norm and the output head.
    Head,
}

/// Initial values.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Init {
    /// Normal around 0.
    Normal {
        /// Standard deviation.
        std: f64,
    },
    /// All ones.
    Ones,
}

/// A run of rows of a parameter that is a tensor of its own outside (Hugging Face's naming).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Name in Hugging Face's files.
    pub hf_name: String,
    /// First row within the fused parameter.
    pub row_start: usize,
    /// Number of rows.
    pub row_count: usize,
    /// What the rows mean.
    pub axis: Axis,
}

/// One parameter of the model, global (unsharded).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ParameterSpec {
    /// Canonical fused name.
    pub name: String,
    /// Shape; a matrix is `[out, in]`.
    pub shape: Vec<usize>,
    /// Meaning of each dimension.
    pub axes: Vec<Axis>,
    /// Where in the model it sits.
    pub place: Place,
    /// Initial values.
    pub init: Init,
    /// Whether it is a norm's weight, which weight decay leaves alone by default.
    pub norm: bool,
    /// Its rows by unfused name, in order, without gaps; at least one.
    pub parts: Vec<Part>,
}

impl ParameterSpec {
    /// Number of elements.
    pub fn num_elements(&self) -> u64 {
        self.shape.iter().map(|&size| size as u64).product()
    }

    /// Whether weight decay applies; `decay_norms` is the optimizer's choice.
    pub fn decays(&self, decay_norms: bool) -> bool {
        decay_norms || !self.norm
    }

    /// Shape of the tensor that `part` is outside.
    pub fn part_shape(&self, part: &Part) -> Vec<usize> {
        let mut shape = self.shape.clone();
        if let Some(rows) = shape.first_mut() {
            *rows = part.row_count;
        }
        shape
    }

    fn matrix(
        name: String,
        place: Place,
        std: f64,
        parts: &[(String, usize, Axis)],
        (columns, column_axis): (usize, Axis),
    ) -> Self {
        let mut row_start = 0;
        let parts: Vec<Part> = parts
            .iter()
            .map(|(hf_name, row_count, axis)| {
                let part = Part {
                    hf_name: hf_name.clone(),
                    row_start,
                    row_count: *row_count,
                    axis: *axis,
                };
                row_start += row_count;
                part
            })
            .collect();
        let row_axis = match parts.as_slice() {
            [only] => only.axis,
            _ => Axis::Fused,
        };
        Self {
            name,
            shape: vec![row_start, columns],
            axes: vec![row_axis, column_axis],
            place,
            init: Init::Normal { std },
            norm: false,
            parts,
        }
    }

    fn norm(name: String, place: Place, hf_name: String, dim: usize) -> Self {
        Self {
            name,
            shape: vec![dim],
            axes: vec![Axis::Embed],
            place,
            init: Init::Ones,
            norm: true,
            parts: vec![Part { hf_name, row_start: 0, row_count: dim, axis: Axis::Embed }],
        }
    }
}

/// All parameters in the order of the forward pass; global shapes.
pub fn parameters(model: &ModelConfig) -> Vec<ParameterSpec> {
    let embed = (model.dim, Axis::Embed);
    let vocab = |hf_name: &str| [(hf_name.to_owned(), model.vocab_size, Axis::Vocab)];
    let mut all = vec![ParameterSpec::matrix(
        names::EMBEDDING.to_owned(),
        Place::Embedding,
        model.init_std,
        &vocab("model.embed_tokens.weight"),
        embed,
    )];
    for layer in 0..model.layers {
        all.extend(block_parameters(model, layer));
    }
    all.push(ParameterSpec::norm(
        names::FINAL_NORM.to_owned(),
        Place::Head,
        "model.norm.weight".to_owned(),
        model.dim,
    ));
    if !model.tied_embeddings {
        all.push(ParameterSpec::matrix(
            names::HEAD.to_owned(),
            Place::Head,
            model.init_std,
            &vocab("lm_head.weight"),
            embed,
        ));
    }
    all
}

fn block_parameters(model: &ModelConfig, layer: usize) -> Vec<ParameterSpec> {
    let place = Place::Block(layer);
    let std = model.init_std;
    let hf = |name: &str| format!("model.layers.{layer}.{name}.weight");
    let named = |name: &str| names::in_block(layer, name);
    let embed = (model.dim, Axis::Embed);
    let query_rows = model.heads * model.head_dim;
    let kv_rows = model.kv_heads * model.head_dim;
    let qkv = [
        (hf("self_attn.q_proj"), query_rows, Axis::Heads),
        (hf("self_attn.k_proj"), kv_rows, Axis::KvHeads),
        (hf("self_attn.v_proj"), kv_rows, Axis::KvHeads),
    ];
    let output = [(hf("self_attn.o_proj"), model.dim, Axis::Embed)];
    let gate_up = [
        (hf("mlp.gate_proj"), model.ffn_dim, Axis::Ffn),
        (hf("mlp.up_proj"), model.ffn_dim, Axis::Ffn),
    ];
    let down = [(hf("mlp.down_proj"), model.dim, Axis::Embed)];
    let matrix =
        |name, parts: &[_], columns| ParameterSpec::matrix(named(name), place, std, parts, columns);
    let norm = |name, hf_name| ParameterSpec::norm(named(name), place, hf(hf_name), model.dim);
    vec![
        norm(names::ATTENTION_NORM, "input_layernorm"),
        matrix(names::QKV, &qkv, embed),
        matrix(names::ATTENTION_OUTPUT, &output, (query_rows, Axis::Heads)),
        norm(names::FEED_FORWARD_NORM, "post_attention_layernorm"),
        matrix(names::GATE_UP, &gate_up, embed),
        matrix(names::DOWN, &down, (model.ffn_dim, Axis::Ffn)),
    ]
}

/// Number of parameters; a tied head counts once.
pub fn num_parameters(model: &ModelConfig) -> u64 {
    parameters(model).iter().map(ParameterSpec::num_elements).sum()
}

/// The smallest run of rows or columns along `axis` that a split may not cut through: one head
/// for the head axes, 1 elsewhere.
pub fn axis_unit(model: &ModelConfig, axis: Axis) -> usize {
    match axis {
        Axis::Heads | Axis::KvHeads => model.head_dim,
        Axis::Vocab | Axis::Embed | Axis::Ffn | Axis::Fused => 1,
    }
}

/// One tensor as Hugging Face's files hold it, and where it lies in ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HfTensor {
    /// Name in Hugging Face's files.
    pub name: String,
    /// Shape there.
    pub shape: Vec<usize>,
    /// Canonical name of the (fused) parameter that holds it.
    pub parameter: String,
    /// First row in that parameter.
    pub row_start: usize,
}

/// All tensors under their unfused names, in the order of [`parameters`].
pub fn hf_tensors(model: &ModelConfig) -> Vec<HfTensor> {
    let unfuse = |spec: &ParameterSpec| -> Vec<HfTensor> {
        spec.parts
            .iter()
            .map(|part| HfTensor {
                name: part.hf_name.clone(),
                shape: spec.part_shape(part),
                parameter: spec.name.clone(),
                row_start: part.row_start,
            })
            .collect()
    };
    parameters(model).iter().flat_map(unfuse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_models::{llama3_8b, llama3_70b, llama3_405b, llama32_1b, tiny};

    fn check_count(model: &ModelConfig, expected: u64) {
        assert_eq!(num_parameters(model), expected);
        let by_hf: usize =
            hf_tensors(model).iter().map(|tensor| tensor.shape.iter().product::<usize>()).sum();
        assert_eq!(by_hf as u64, expected);
    }

    #[test]
    fn counts_are_those_of_the_published_models() {
        check_count(&llama3_8b(), 8_030_261_248);
        check_count(&llama3_70b(), 70_553_706_496);
        check_count(&llama3_405b(), 405_853_388_800);
        check_count(&llama32_1b(), 1_235_814_400);
    }

    #[test]
    fn names_are_unique_and_parts_cover_each_parameter() {
        for model in [tiny(), llama32_1b()] {
            let all = parameters(&model);
            let mut names: Vec<&str> = all.iter().map(|spec| spec.name.as_str()).collect();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), all.len());
            for spec in &all {
                assert_eq!(spec.axes.len(), spec.shape.len(), "{}", spec.name);
                let mut row = 0;
                for part in &spec.parts {
                    assert_eq!(part.row_start, row, "{}", part.hf_name);
                    row += part.row_count;
                }
                assert_eq!(row, spec.shape[0], "{}", spec.name);
            }
        }
    }

    #[test]
    fn tied_models_have_no_head_of_their_own() {
        let tied = parameters(&llama32_1b());
        assert!(tied.iter().all(|spec| spec.name != names::HEAD));
        assert!(parameters(&tiny()).iter().any(|spec| spec.name == names::HEAD));
    }

    #[test]
    fn only_norms_are_spared_from_decay() {
        for spec in parameters(&tiny()) {
            assert_eq!(spec.decays(false), spec.shape.len() == 2, "{}", spec.name);
            assert!(spec.decays(true));
        }
    }

    #[test]
    fn fused_rows_state_their_own_axes() {
        let model = tiny();
        let name = names::in_block(1, names::QKV);
        let qkv = parameters(&model).into_iter().find(|spec| spec.name == name).unwrap();
        assert_eq!(qkv.shape, vec![(4 + 2 + 2) * 32, 96]);
        assert_eq!(qkv.axes, vec![Axis::Fused, Axis::Embed]);
        let rows: Vec<_> =
            qkv.parts.iter().map(|part| (part.axis, part.row_start, part.row_count)).collect();
        assert_eq!(
            rows,
            vec![(Axis::Heads, 0, 128), (Axis::KvHeads, 128, 64), (Axis::KvHeads, 192, 64)]
        );
        assert_eq!(axis_unit(&model, Axis::KvHeads), 32);
    }
}
