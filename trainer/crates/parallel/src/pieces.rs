//! Which pieces of the model a rank holds.

use layout::ChunkSpan;
use layout::plan::{TensorPlace, local_parameters};
use model::Stage;
use model_spec::{LocalParameter, ParameterSpec, Place};
use run_config::RunConfig;

use crate::error::Result;

/// The pieces of the model that a pipeline stage holds, one for each virtual stage.
pub(crate) fn stages(config: &RunConfig, stage: usize) -> Vec<Stage> {
    let pipeline = &config.parallelism.pipeline;
    let chunks = layout::chunks(config.model.layers, pipeline.stages, pipeline.virtual_stages);
    let own = chunks.into_iter().filter(|chunk| chunk.stage == stage);
    own.map(|ChunkSpan { embedding, blocks, head, .. }| Stage { embedding, blocks, head }).collect()
}

/// The parameters whose gradients the last backward pass of each piece completes. Those of a tied
/// embedding that belongs to two pieces are complete after that of the first, which comes last.
pub(crate) fn parameters_of(stages: &[Stage], held: &[LocalParameter]) -> Vec<Vec<usize>> {
    let piece_of = |place: Place| {
        let has = |is: &dyn Fn(&Stage) -> bool| stages.iter().position(is);
        match place {
            Place::Embedding => has(&|stage| stage.embedding).or_else(|| has(&|stage| stage.head)),
            Place::Block(layer) => has(&|stage| stage.blocks.contains(&layer)),
            Place::Head => has(&|stage| stage.head),
        }
    };
    let mut parameters = vec![Vec::new(); stages.len()];
    for (index, local) in held.iter().enumerate() {
        if let Some(piece) = piece_of(local.spec.place) {
            parameters[piece].push(index);
        }
    }
    parameters
}

/// What a rank holds of the parameters of its pieces.
pub(crate) fn held(
    config: &RunConfig,
    place: TensorPlace,
    stages: &[Stage],
) -> Result<Vec<LocalParameter>> {
    let model = &config.model;
    let mut specs: Vec<ParameterSpec> = Vec::new();
    for spec in stages.iter().flat_map(|stage| stage.parameters(model)) {
        // A tied embedding may belong to two pieces of one stage.
        if specs.iter().all(|other| other.name != spec.name) {
            specs.push(spec);
        }
    }
    let mut held = local_parameters(model, place, &specs)?;
    if stages.iter().all(|stage| !stage.embedding) {
        // The last stage's copy of a tied embedding: the first stage's counts.
        let tied = held.iter_mut().filter(|local| local.spec.place == Place::Embedding);
        tied.flat_map(|local| &mut local.parts).for_each(|part| part.counts = false);
    }
    Ok(held)
}
