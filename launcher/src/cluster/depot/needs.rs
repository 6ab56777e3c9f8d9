//! What ranks read of a checkpoint: it follows from its index and their layout. Pure.

use checkpoint_format::TensorBox;
use checkpoint_format::index::{Index, StoredBox};
use checkpoint_format::names::{FIRST_MOMENT, MASTER, SECOND_MOMENT};
use layout::{Held, Mesh};
use model_spec::Rectangle;
use run_config::{Parallelism, RunConfig};
use std::collections::BTreeMap;

/// What each of these `ranks` holds, of `world_size`; with so many `replicas`, where these are
/// others than the config's.
///
/// # Errors
/// Where that is no layout.
pub(super) fn held(
    config: &RunConfig,
    (ranks, world_size): (&[usize], usize),
    replicas: Option<usize>,
) -> Result<Vec<Held>, String> {
    let replicate = replicas.or(config.parallelism.replicate);
    let parallelism = Parallelism { replicate, ..config.parallelism.clone() };
    let mesh = Mesh::new(&parallelism, world_size).map_err(|error| error.to_string())?;
    let of = |rank: &usize| Held::new(config, &mesh, *rank).map_err(|error| error.to_string());
    ranks.iter().map(of).collect()
}

/// By file, the boxes of which ranks that hold this read something, in the order of their bytes.
pub(super) fn needed(index: &Index, held: &[Held]) -> BTreeMap<String, Vec<StoredBox>> {
    let mut needed: BTreeMap<String, Vec<StoredBox>> = BTreeMap::new();
    for (tensor, regions) in owned(held) {
        for stored in stored_names(index, &tensor) {
            let boxes = index.tensors.get(&stored).into_iter().flat_map(|entry| &entry.boxes);
            let is_read = |stored: &&StoredBox| {
                regions.iter().any(|region| region.intersect(&stored.region).is_some())
            };
            for stored in boxes.filter(is_read) {
                needed.entry(stored.file.clone()).or_default().push(stored.clone());
            }
        }
    }
    for boxes in needed.values_mut() {
        boxes.sort_by_key(|stored| stored.range);
        boxes.dedup();
    }
    needed
}

/// The tensors of a checkpoint that a weight and its optimizer state are read from: the master
/// copy, where there is one.
fn stored_names(index: &Index, tensor: &str) -> [String; 3] {
    let master = format!("{MASTER}{tensor}");
    let weight = if index.tensors.contains_key(&master) { master } else { tensor.to_owned() };
    [weight, format!("{FIRST_MOMENT}{tensor}"), format!("{SECOND_MOMENT}{tensor}")]
}

/// The parts of each tensor that are owned.
pub(super) fn owned(held: &[Held]) -> BTreeMap<String, Vec<TensorBox>> {
    let mut regions: BTreeMap<String, Vec<TensorBox>> = BTreeMap::new();
    for held in held {
        for (local, range) in held.parameters.iter().zip(&held.ranges) {
            let width: usize = local.shape.iter().skip(1).product();
            for part in &local.parts {
                let first = range.start + (part.row_start * width) as u64;
                let last = first + part.num_elements() as u64;
                let runs = held
                    .units
                    .iter()
                    .map(|unit| (first.max(unit.owned.start), last.min(unit.owned.end)));
                for (low, high) in runs.filter(|(low, high)| low < high) {
                    let run = (low - first) as usize..(high - first) as usize;
                    let boxes = part.rectangles(run).into_iter();
                    let boxes = boxes.map(|rectangle| region(part.shape.len(), &rectangle));
                    regions.entry(part.hf_name.clone()).or_default().extend(boxes);
                }
            }
        }
    }
    // Replicas on one node hold the same.
    for boxes in regions.values_mut() {
        boxes.sort_unstable();
        boxes.dedup();
    }
    regions
}

fn region(dimensions: usize, rectangle: &Rectangle) -> TensorBox {
    let ranges = [&rectangle.rows, &rectangle.columns].into_iter().take(dimensions);
    TensorBox {
        offsets: ranges.clone().map(|range| range.start as u64).collect(),
        lengths: ranges.map(|range| range.len() as u64).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use checkpoint_format::Dtype;
    use checkpoint_format::checksum::Checksum;
    use checkpoint_format::index::TensorEntry;
    use std::path::Path;

    fn config(parallelism: &str) -> RunConfig {
        let text = format!(
            "name: test\n\
             model: {{dim: 32, layers: 4, heads: 4, kv_heads: 2, ffn_dim: 64, vocab_size: 512}}\n\
             data: {{tokenizer: t, sequence_length: 32, sources: [{{name: a, path: a}}]}}\n\
             parallelism: {parallelism}\n\
             training: {{steps: 10, global_batch: 16}}\n\
             cluster: {{nodes: 1, ranks_per_node: 8, device: cpu}}\n"
        );
        let loaded = RunConfig::from_yaml_str(&text, Path::new("/"), &[]);
        loaded.unwrap_or_else(|errors| panic!("{errors}")).config
    }

    /// Each tensor in boxes of four rows, eight boxes to a file; of some prefixes.
    fn index(config: &RunConfig, prefixes: &[&str]) -> Index {
        let mut index = Index::default();
        let mut number = 0;
        for prefix in prefixes {
            for tensor in model_spec::hf_tensors(&config.model) {
                let shape: Vec<u64> = tensor.shape.iter().map(|size| *size as u64).collect();
                let of_rows = |first: u64| {
                    number += 1;
                    let count = 4.min(shape[0] - first);
                    StoredBox {
                        region: TensorBox::rows(&shape, first, count),
                        file: format!("file-{}", number / 8),
                        range: [number, number + 1],
                        checksum: Checksum::default(),
                    }
                };
                let boxes = (0..shape[0]).step_by(4).map(of_rows).collect();
                let entry = TensorEntry { shape, dtype: Dtype::F32, boxes };
                index.tensors.insert(format!("{prefix}{}", tensor.name), entry);
            }
        }
        index
    }

    fn count(needed: &BTreeMap<String, Vec<StoredBox>>) -> usize {
        needed.values().map(Vec::len).sum()
    }

    fn all(index: &Index) -> usize {
        index.tensors.values().map(|entry| entry.boxes.len()).sum()
    }

    /// Boxes that each of eight ranks reads, in hundredths of all, and that all of them do.
    #[track_caller]
    fn check(parallelism: &str, percent: std::ops::RangeInclusive<usize>) {
        let config = config(parallelism);
        let index = index(&config, &["", "m/", "v/"]);
        let of =
            |ranks: &[usize]| count(&needed(&index, &held(&config, (ranks, 8), None).unwrap()));
        let everybody: Vec<usize> = (0..8).collect();
        assert_eq!(of(&everybody), all(&index), "{parallelism}");
        for rank in 0..8 {
            let share = 100 * of(&[rank]) / all(&index);
            assert!(percent.contains(&share), "{parallelism}: {share} % for rank {rank}");
        }
    }

    #[test]
    fn ranks_read_what_they_hold_and_together_all() {
        check("{replicate: 8}", 100..=100);
        check("{shard: {ranks: 8, level: optimizer}}", 8..=30);
        check("{shard: {ranks: 8, level: parameters}}", 8..=30);
        check("{pipeline: {stages: 4}, replicate: 2}", 10..=60);
        // Columns are cut too: of such a tensor each rank reads a part of every box.
        check("{tensor: 2, replicate: 4}", 50..=85);
    }

    #[test]
    fn the_master_copy_is_read_in_place_of_the_weights() {
        let config = config("{replicate: 8}");
        let index = index(&config, &["", "master/", "m/", "v/"]);
        let needed = needed(&index, &held(&config, (&[0], 8), None).unwrap());
        assert_eq!(count(&needed), 3 * all(&index) / 4);
    }

    #[test]
    fn fewer_replicas_are_another_layout() {
        let config = config("{tensor: 2, replicate: 4}");
        assert!(held(&config, (&[5], 6), Some(3)).is_ok());
        assert!(held(&config, (&[5], 6), None).is_err());
    }
}
