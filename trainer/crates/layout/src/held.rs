//! What one rank holds: the chunks of its pipeline stage, its piece of each parameter, and the
//! units in which sharded data parallelism cuts them.
//!
//! A unit is the embedding, a block, or the head. Parameters begin at multiples of
//! [`ALIGNMENT_ELEMENTS`], and a unit's length is a multiple of that for each shard rank, so that
//! all own equal pieces. Without shards all parameters are one unit.

use crate::mesh::{Axis, Mesh};
use crate::plan::{PlanError, TensorPlace, local_parameters};
use crate::stages::{ChunkSpan, chunks};
use model_spec::{LocalParameter, ParameterSpec, Place, parameters};
use run_config::RunConfig;
use std::ops::Range;

/// Parameters start at multiples of this many elements of the flat buffers.
pub const ALIGNMENT_ELEMENTS: u64 = 32;

/// Parameters whose weights are gathered, and whose gradients are reduced, together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Where in the model it sits.
    pub place: Place,
    /// Its elements of the flat index space, padding included.
    pub elements: Range<u64>,
    /// What of them is this rank's.
    pub owned: Range<u64>,
}

impl Unit {
    /// Number of elements, padding included.
    pub fn num_elements(&self) -> u64 {
        self.elements.end - self.elements.start
    }
}

/// What one rank holds.
#[derive(Clone, Debug, PartialEq)]
pub struct Held {
    /// Its place in its tensor-parallel group.
    pub tensor: TensorPlace,
    /// The chunks of its pipeline stage.
    pub chunks: Vec<ChunkSpan>,
    /// Its piece of each parameter.
    pub parameters: Vec<LocalParameter>,
    /// Elements of each parameter in the flat index space, without padding.
    pub ranges: Vec<Range<u64>>,
    /// What is gathered and reduced together; the parameters are in their order.
    pub units: Vec<Unit>,
}

impl Held {
    /// What `rank` holds.
    ///
    /// # Errors
    /// Where a parameter does not split over the ranks; a checked config has none.
    pub fn new(config: &RunConfig, mesh: &Mesh, rank: usize) -> Result<Self, PlanError> {
        let ranks = mesh.degree(Axis::Tensor);
        let tensor = TensorPlace {
            ranks,
            rank: mesh.coordinate(rank, Axis::Tensor),
            sequence: config.parallelism.sequence && ranks > 1,
        };
        let pipeline = &config.parallelism.pipeline;
        let stage = mesh.coordinate(rank, Axis::Pipeline);
        let all = chunks(config.model.layers, pipeline.stages, pipeline.virtual_stages);
        let chunks: Vec<ChunkSpan> = all.into_iter().filter(|chunk| chunk.stage == stage).collect();
        let parameters = local_parameters(&config.model, tensor, &specs(config, &chunks))?;
        let shard = (mesh.degree(Axis::Shard) as u64, mesh.coordinate(rank, Axis::Shard) as u64);
        let (ranges, units) = place(&parameters, shard);
        Ok(Self { tensor, chunks, parameters, ranges, units })
    }

    /// The unit of a place, where the set is cut over shard ranks.
    pub fn unit_of(&self, place: Place) -> Option<usize> {
        self.units.iter().position(|unit| unit.place == place)
    }

    /// Elements of all units, padding included.
    pub fn num_elements(&self) -> u64 {
        self.units.iter().map(Unit::num_elements).sum()
    }

    /// How many of a run of elements are this rank's.
    pub fn num_owned(&self, run: &Range<u64>) -> u64 {
        let common = |unit: &Unit| {
            let end = run.end.min(unit.owned.end);
            end.saturating_sub(run.start.max(unit.owned.start))
        };
        self.units.iter().map(common).sum()
    }
}

/// The parameters of `chunks`, in order. A tied embedding belongs to the first chunk of the model
/// and to the last, and is held once.
fn specs(config: &RunConfig, chunks: &[ChunkSpan]) -> Vec<ParameterSpec> {
    let tied = config.model.tied_embeddings;
    let all = parameters(&config.model);
    let places: Vec<&[ParameterSpec]> = all.chunk_by(|a, b| a.place == b.place).collect();
    let of = |place| places.iter().filter(move |specs| specs[0].place == place).copied().flatten();
    let first_block = places.iter().position(|specs| specs[0].place == Place::Block(0));
    let first_block = first_block.unwrap_or(places.len());
    let mut held: Vec<ParameterSpec> = Vec::new();
    let mut has_embedding = false;
    for chunk in chunks {
        if (chunk.embedding || chunk.head && tied) && !has_embedding {
            held.extend(of(Place::Embedding).cloned());
            has_embedding = true;
        }
        // The blocks are in their order.
        let blocks = places.iter().skip(first_block + chunk.blocks.start).take(chunk.blocks.len());
        held.extend(blocks.copied().flatten().cloned());
        if chunk.head {
            held.extend(of(Place::Head).cloned());
        }
    }
    held
}

/// Where each parameter lies in the flat index space, and the units.
fn place(parameters: &[LocalParameter], (ranks, rank): (u64, u64)) -> (Vec<Range<u64>>, Vec<Unit>) {
    let (mut ranges, mut units) = (Vec::with_capacity(parameters.len()), Vec::new());
    let mut first = 0;
    let same = |a: &LocalParameter, b: &LocalParameter| ranks == 1 || a.spec.place == b.spec.place;
    for members in parameters.chunk_by(same) {
        let mut end = first;
        for parameter in members {
            ranges.push(end..end + parameter.num_elements());
            end += parameter.num_elements().next_multiple_of(ALIGNMENT_ELEMENTS);
        }
        let length = (end - first).next_multiple_of(ALIGNMENT_ELEMENTS * ranks);
        let owned = first + rank * (length / ranks);
        units.push(Unit {
            place: members[0].spec.place,
            elements: first..first + length,
            owned: owned..owned + length / ranks,
        });
        first += length;
    }
    (ranges, units)
}
