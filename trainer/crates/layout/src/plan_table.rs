//! The plan as a table: for each parameter what its dimensions mean, how it is split, on which
//! pipeline stages it is, and its bytes on a rank. Blocks with equal rows are one row.

use crate::communication::Dtype;
use crate::held::Held;
use crate::mesh::{Axis, Mesh};
use crate::plan::{PlanError, TensorPlace, mesh_axis};
use model_spec::{self as spec, LocalParameter, Place};
use run_config::{RunConfig, ShardLevel};
use serde::Serialize;

/// A parameter, or the same one of several blocks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PlanRow {
    /// Its name; `layers.0..31.` for blocks 0 to 31.
    pub name: String,
    /// First and last block; none for what is outside of blocks.
    pub blocks: Option<(usize, usize)>,
    /// Pipeline stages that hold it, rising.
    pub stages: Vec<usize>,
    /// What each dimension means; the runs of rows of a fused parameter one by one.
    pub axes: Vec<Vec<spec::Axis>>,
    /// Shape of the whole.
    pub shape: Vec<usize>,
    /// How the tensor axis of the mesh cuts it.
    pub split: String,
    /// Shape that a rank holds.
    pub local_shape: Vec<usize>,
    /// How the shard axis of the mesh cuts its state.
    pub state: String,
    /// Bytes on a rank of one such parameter.
    pub bytes: RowBytes,
}

/// Bytes of one parameter on one rank, without padding. What is cut over shard ranks counts as an
/// equal part, though the cuts run through the unit and not through each parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct RowBytes {
    /// Weights that compute; with shard level `parameters` there only while they are gathered.
    pub weights: u64,
    /// Master weights; 0 where the compute weights are the master weights.
    pub master: u64,
    /// Gradients, those that are whole while backward goes through their block apart.
    pub gradients: u64,
    /// AdamW's two moments.
    pub optimizer: u64,
}

impl RowBytes {
    /// Sum over the kinds.
    pub fn total(&self) -> u64 {
        self.weights + self.master + self.gradients + self.optimizer
    }
}

/// The rows of the whole model, as the first rank of each pipeline stage holds it.
///
/// # Errors
/// Where a parameter does not split over the ranks; a checked config has none.
pub fn plan_table(config: &RunConfig, mesh: &Mesh) -> Result<Vec<PlanRow>, PlanError> {
    let mut rows: Vec<PlanRow> = Vec::new();
    let inner = mesh.degree(Axis::Tensor) * mesh.degree(Axis::Context);
    // In the model's order, in which a later chunk of an earlier stage comes later.
    let mut found: Vec<(usize, usize, LocalParameter, TensorPlace)> = Vec::new();
    for stage in 0..mesh.degree(Axis::Pipeline) {
        let held = Held::new(config, mesh, stage * inner)?;
        for local in held.parameters {
            let is_copy = local.spec.place == Place::Embedding && stage > 0;
            let order = match local.spec.place {
                Place::Embedding if is_copy => usize::MAX,
                Place::Embedding => 0,
                Place::Block(layer) => 1 + layer,
                Place::Head => usize::MAX - 1,
            };
            found.push((order, stage, local, held.tensor));
        }
    }
    found.sort_by_key(|(order, ..)| *order);
    for (_, stage, local, tensor) in &found {
        let row = row(config, mesh, (local, *tensor), *stage);
        match rows.iter_mut().rev().find(|other| goes_on(other, &row)) {
            Some(other) => extend(other, &row),
            None => rows.push(row),
        }
    }
    rows.iter_mut().for_each(name_blocks);
    Ok(rows)
}

fn row(
    config: &RunConfig,
    mesh: &Mesh,
    (local, tensor): (&LocalParameter, TensorPlace),
    stage: usize,
) -> PlanRow {
    let spec = &local.spec;
    let (name, blocks) = match spec.place {
        Place::Block(layer) => {
            let prefix = spec::names::in_block(layer, "");
            let name = spec.name.strip_prefix(&prefix).unwrap_or(&spec.name);
            (name.to_owned(), Some((layer, layer)))
        }
        Place::Embedding if stage > 0 => (format!("{} (for the head)", spec.name), None),
        Place::Embedding | Place::Head => (spec.name.clone(), None),
    };
    let rows = spec.parts.iter().map(|part| part.axis).collect();
    let columns = spec.axes.iter().skip(1).map(|axis| vec![*axis]);
    PlanRow {
        name,
        blocks,
        stages: vec![stage],
        axes: std::iter::once(rows).chain(columns).collect(),
        shape: spec.shape.clone(),
        split: split(config, local, tensor),
        local_shape: local.shape.clone(),
        state: state(config, mesh),
        bytes: bytes(config, mesh, local.num_elements()),
    }
}

/// Whether `row` is the block after the last of `other`, and alike.
fn goes_on(other: &PlanRow, row: &PlanRow) -> bool {
    let (Some((_, last)), Some((first, _))) = (other.blocks, row.blocks) else { return false };
    let alike = |row: &PlanRow| PlanRow { blocks: None, stages: Vec::new(), ..row.clone() };
    last + 1 == first && alike(other) == alike(row)
}

fn extend(other: &mut PlanRow, row: &PlanRow) {
    if let (Some((_, last)), Some((_, next))) = (&mut other.blocks, row.blocks) {
        *last = next;
    }
    other.stages.extend(&row.stages);
    other.stages.sort_unstable();
    other.stages.dedup();
}

fn name_blocks(row: &mut PlanRow) {
    match row.blocks {
        Some((first, last)) if first == last => row.name = format!("layers.{first}.{}", row.name),
        Some((first, last)) => row.name = format!("layers.{first}..{last}.{}", row.name),
        None => {}
    }
}

fn split(config: &RunConfig, local: &LocalParameter, tensor: TensorPlace) -> String {
    let is_cut = |axis: &spec::Axis| mesh_axis(*axis).is_some();
    let ranks = tensor.ranks;
    let copies = tensor.kv_copies(&config.model);
    let has_kv = local.spec.parts.iter().any(|part| part.axis == spec::Axis::KvHeads);
    if ranks > 1 && local.spec.axes.iter().skip(1).any(is_cut) {
        format!("columns / {ranks}")
    } else if ranks > 1 && local.spec.parts.iter().any(|part| is_cut(&part.axis)) {
        let repeated =
            if has_kv && copies > 1 { format!(", KV heads x{copies}") } else { String::new() };
        format!("rows / {ranks}{repeated}")
    } else {
        "whole".to_owned()
    }
}

fn state(config: &RunConfig, mesh: &Mesh) -> String {
    let ranks = mesh.degree(Axis::Shard);
    match config.parallelism.shard.level {
        _ if ranks == 1 => "whole".to_owned(),
        ShardLevel::None => "whole".to_owned(),
        ShardLevel::Optimizer => format!("optimizer / {ranks}"),
        ShardLevel::Gradients => format!("optimizer, gradients / {ranks}"),
        ShardLevel::Parameters => format!("all / {ranks}"),
    }
}

fn bytes(config: &RunConfig, mesh: &Mesh, elements: u64) -> RowBytes {
    let compute = Dtype::of_compute(config.precision.compute);
    let state = Dtype::of_state(config.precision.compute);
    let (ranks, width) = (mesh.degree(Axis::Shard) as u64, state.width());
    let owned = elements.div_ceil(ranks) * width;
    let has_master = ranks > 1 || compute != state;
    let keeps_gradients = config.parallelism.shard.level == ShardLevel::Optimizer && ranks > 1;
    RowBytes {
        weights: elements * compute.width(),
        master: if has_master { owned } else { 0 },
        gradients: owned + if keeps_gradients { elements * width } else { 0 },
        optimizer: 2 * owned,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn table(preset: &str, ranks: usize, sets: &[&str]) -> Vec<PlanRow> {
        let text = format!(
            "name: x\nmodel: {{preset: {preset}}}\n\
             data: {{tokenizer: t, sources: [{{name: a, path: b}}]}}\n\
             training: {{steps: 10, global_batch: 64}}\ncluster: {{ranks_per_node: {ranks}}}\n"
        );
        let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
        let loaded = RunConfig::from_yaml_str(&text, Path::new("/"), &sets);
        let config = loaded.unwrap_or_else(|error| panic!("{error}")).config;
        plan_table(&config, &Mesh::new(&config.parallelism, ranks).unwrap()).unwrap()
    }

    fn lines(rows: &[PlanRow]) -> Vec<String> {
        let line = |row: &PlanRow| {
            let (first, last) = (row.stages[0], row.stages[row.stages.len() - 1]);
            format!("{} | {} | {first}-{last} | {:?}", row.name, row.split, row.local_shape)
        };
        rows.iter().map(line).collect()
    }

    #[test]
    fn a_large_model_is_nine_rows() {
        let pipeline = "parallelism.pipeline.stages=16";
        let rows = table("llama3-405b", 128, &["parallelism.tensor=8", pipeline]);
        let expected = [
            "embedding.weight | rows / 8 | 0-0 | [16032, 16384]",
            "layers.0..125.attention_norm.weight | whole | 0-15 | [16384]",
            "layers.0..125.attention.qkv.weight | rows / 8 | 0-15 | [2304, 16384]",
            "layers.0..125.attention.output.weight | columns / 8 | 0-15 | [16384, 2048]",
            "layers.0..125.feed_forward_norm.weight | whole | 0-15 | [16384]",
            "layers.0..125.feed_forward.gate_up.weight | rows / 8 | 0-15 | [13312, 16384]",
            "layers.0..125.feed_forward.down.weight | columns / 8 | 0-15 | [16384, 6656]",
            "norm.weight | whole | 15-15 | [16384]",
            "head.weight | rows / 8 | 15-15 | [16032, 16384]",
        ];
        assert_eq!(lines(&rows), expected);
    }

    #[test]
    fn tied_embeddings_and_repeated_heads() {
        let chunks = "parallelism.pipeline={stages: 2, schedule: interleaved-1f1b, \
                      virtual_stages: 2}";
        let rows = table("llama3.2-1b", 32, &["parallelism.tensor=16", chunks]);
        let lines = lines(&rows);
        assert_eq!(
            lines[2],
            "layers.0..15.attention.qkv.weight | rows / 16, KV heads x2 | 0-1 | [256, 2048]"
        );
        assert_eq!(lines.len(), 9);
        assert!(lines[8].starts_with("embedding.weight (for the head) | rows / 16 | 1-1 |"));
        assert_eq!(rows[2].axes[0], [spec::Axis::Heads, spec::Axis::KvHeads, spec::Axis::KvHeads]);
        assert_eq!(rows[2].axes[1], [spec::Axis::Embed]);
    }

    /// In bytes per element of the model.
    #[test]
    fn bytes_by_level() {
        let check = |sets: &[&str], expected: [u64; 4], state: &str| {
            let rows = table("llama3-8b", 8, sets);
            let head = &rows[8];
            let bytes = head.bytes;
            let elements = 128_256 * 4096;
            let found = [bytes.weights, bytes.master, bytes.gradients, bytes.optimizer];
            assert_eq!(found.map(|bytes| 8 * bytes / elements), expected, "{sets:?}");
            assert_eq!(head.state, state);
        };
        let shard = |level| format!("parallelism.shard={{ranks: 8, level: {level}}}");
        check(&["parallelism.replicate=8"], [16, 32, 32, 64], "whole");
        check(&[&shard("optimizer")], [16, 4, 36, 8], "optimizer / 8");
        check(&[&shard("gradients")], [16, 4, 4, 8], "optimizer, gradients / 8");
        check(&[&shard("parameters")], [16, 4, 4, 8], "all / 8");
        check(&["precision.compute=fp32"], [32, 0, 32, 64], "whole");
        check(
            &["precision.compute=fp32", &shard("gradients")],
            [32, 4, 4, 8],
            "optimizer, gradients / 8",
        );
    }
}
