//! What becomes of gradients, and of weights, among ranks that read other tokens.

use std::collections::HashMap;

use model_spec::{LocalParameter, Place};
use run_config::RunConfig;
use torch_shim::params::ParameterSet;
use torch_shim::tch::Tensor;

use crate::data_parallel::DataParallel;
use crate::error::{ParallelError, Result};
use crate::failure::Failure;
use crate::groups::Groups;
use crate::shards::{Policy, Shards};

/// The form of data parallelism.
pub(crate) enum Data {
    /// One rank.
    Alone,
    /// Each rank has a copy of all.
    Replicated(DataParallel),
    /// Ranks cut a copy among them; there may be replicas of that too.
    Sharded(Shards),
}

impl Data {
    /// The form that the groups ask for.
    pub(crate) fn new(
        config: &RunConfig,
        groups: &Groups,
        params: &ParameterSet,
        held: &[LocalParameter],
        bucket_bytes: usize,
        failure: &Failure,
    ) -> Result<Self> {
        let policy = Policy {
            level: config.parallelism.shard.level,
            reshard_after_forward: config.parallelism.shard.reshard_after_forward,
            keeps_squares: config.numeric.replay,
        };
        Ok(match (&groups.shard, &groups.data) {
            (Some(shard), _) => {
                let comms = (shard.clone(), groups.copies.clone());
                let units = params.units().iter();
                let block = |at: usize| matches!(held[at].spec.place, Place::Block(_));
                let is_block: Vec<bool> = units.map(|unit| block(unit.parameters.start)).collect();
                Data::Sharded(Shards::new(params, comms, policy, &is_block, failure.clone())?)
            }
            (None, Some(data)) => {
                let data = DataParallel::new(params, data.clone(), bucket_bytes)?;
                if config.numeric.replay {
                    data.keep_local_squares();
                }
                Data::Replicated(data)
            }
            (None, None) => Data::Alone,
        })
    }

    /// Sharded weights, and the unit of each block.
    pub(crate) fn shards(
        &self,
        params: &ParameterSet,
        held: &[LocalParameter],
    ) -> Option<(Shards, HashMap<usize, usize>)> {
        let Data::Sharded(shards) = self else { return None };
        let units = params.units().iter().enumerate();
        let of_block = |(index, unit): (usize, &torch_shim::params::Unit)| match held
            [unit.parameters.start]
            .spec
            .place
        {
            Place::Block(layer) => Some((layer, index)),
            Place::Embedding | Place::Head => None,
        };
        Some((shards.clone(), units.filter_map(of_block).collect()))
    }

    /// Begins a step, whose gradients are zero so far.
    pub(crate) fn begin_step(&self) -> Result<()> {
        match self {
            Data::Alone => Ok(()),
            Data::Replicated(data) => {
                data.begin_step();
                Ok(())
            }
            Data::Sharded(shards) => shards.begin_step(),
        }
    }

    /// The next backward pass completes the gradients of these parameters.
    pub(crate) fn begin_last_pass(&self, parameters: &[usize]) {
        match self {
            Data::Alone => {}
            Data::Replicated(data) => data.begin_last_pass(parameters),
            Data::Sharded(shards) => shards.begin_last_pass(parameters),
        }
    }

    /// Waits until what is owned has the sums over all ranks.
    pub(crate) fn finish(&self) -> Result<()> {
        match self {
            Data::Alone => Ok(()),
            Data::Replicated(data) => data.finish(),
            Data::Sharded(shards) => shards.finish(),
        }
    }

    /// Sum of the squares of what this rank added to the gradients of the last step, an FP64 scalar
    /// where these are; `None` where nobody else adds to them.
    pub(crate) fn local_squares(&self) -> Result<Option<Tensor>> {
        match self {
            Data::Alone => Ok(None),
            Data::Replicated(data) => data.local_squares().map(Some),
            Data::Sharded(shards) => shards.local_squares().map(Some),
        }
    }

    /// What a reduction failed with in a hook.
    pub(crate) fn failure(&self) -> Option<ParallelError> {
        match self {
            Data::Replicated(data) => data.failure().map(Into::into),
            Data::Alone | Data::Sharded(_) => None,
        }
    }

    /// The master weights were written.
    pub(crate) fn weights_changed(&self) -> Result<()> {
        match self {
            Data::Sharded(shards) => shards.weights_changed(),
            Data::Alone | Data::Replicated(_) => Ok(()),
        }
    }
}
