//! The groups of ranks that one rank talks in.

use std::sync::Arc;

use collectives::{CommError, Communicator};
use layout::mesh::{Axis, Mesh};
use layout::plan::TensorPlace;
use run_config::RunConfig;

/// Connects this rank with others, given by a name that is unique in the run and their ranks.
pub type Connect<'a> = dyn FnMut(&str, &[usize]) -> Result<Arc<dyn Communicator>, CommError> + 'a;

/// One rank's groups. `None` stands for a group of this rank alone.
#[derive(Clone)]
pub struct Groups {
    /// Who is where.
    pub mesh: Mesh,
    /// This rank.
    pub rank: usize,
    /// All ranks: the numbers of a step.
    pub world: Arc<dyn Communicator>,
    /// Tensor parallelism.
    pub tensor: Option<Arc<dyn Communicator>>,
    /// Ranks with the same key and value head.
    pub kv_copies: Option<Arc<dyn Communicator>>,
    /// Context parallelism.
    pub context: Option<Arc<dyn Communicator>>,
    /// Pipeline parallelism.
    pub pipeline: Option<Arc<dyn Communicator>>,
    /// The first and the last stage, where they share a tied embedding.
    pub tied_stages: Option<Arc<dyn Communicator>>,
    /// Ranks that cut one copy of the weights or of their state among them.
    pub shard: Option<Arc<dyn Communicator>>,
    /// Ranks that own the same elements: context parallelism and replicas.
    pub copies: Option<Arc<dyn Communicator>>,
    /// Ranks with the same parameters that see other tokens: shards, context and replicas.
    pub data: Option<Arc<dyn Communicator>>,
}

impl Groups {
    /// Makes all groups of `rank`; every rank makes its own, in the same order.
    ///
    /// # Errors
    /// What `connect` failed with.
    pub fn connect(
        config: &RunConfig,
        mesh: Mesh,
        rank: usize,
        connect: &mut Connect<'_>,
    ) -> Result<Self, CommError> {
        let all: Vec<usize> = (0..mesh.size()).collect();
        let world = connect("world", &all)?;
        let mut group = |name: &str, ranks: Vec<usize>| match ranks.as_slice() {
            [] | [_] => Ok(None),
            [first, ..] => connect(&format!("{name}-{first}"), &ranks).map(Some),
        };
        let place = tensor_place(config, &mesh, rank);
        let tensor_ranks = mesh.group(rank, Axis::Tensor);
        let copies = place.kv_copies(&config.model);
        let kv_ranks = tensor_ranks[place.rank / copies * copies..][..copies].to_vec();
        let pipeline_ranks = mesh.group(rank, Axis::Pipeline);
        let tied = match pipeline_ranks.as_slice() {
            [first, .., last] if config.model.tied_embeddings => vec![*first, *last],
            _ => Vec::new(),
        };
        let tied = if tied.contains(&rank) { tied } else { Vec::new() };
        let data = [Axis::Context, Axis::Shard, Axis::Replicate];
        Ok(Self {
            world,
            tensor: group("tensor", tensor_ranks)?,
            kv_copies: group("kv", kv_ranks)?,
            context: group("context", mesh.group(rank, Axis::Context))?,
            pipeline: group("pipeline", pipeline_ranks)?,
            tied_stages: group("tied", tied)?,
            shard: group("shard", mesh.group(rank, Axis::Shard))?,
            copies: group("copies", mesh.group_over(rank, &[Axis::Context, Axis::Replicate]))?,
            data: group("data", mesh.group_over(rank, &data))?,
            mesh,
            rank,
        })
    }

    /// Where this rank is on an axis.
    pub fn coordinate(&self, axis: Axis) -> usize {
        self.mesh.coordinate(self.rank, axis)
    }

    /// Number of ranks along an axis.
    pub fn degree(&self, axis: Axis) -> usize {
        self.mesh.degree(axis)
    }

    /// Whether this rank speaks for those that read the same data: the first on all other axes.
    pub fn reads_first(&self) -> bool {
        [Axis::Tensor, Axis::Context, Axis::Pipeline].iter().all(|&axis| self.coordinate(axis) == 0)
    }

    /// Whether nothing has failed in any group: see [`Communicator::alive`].
    ///
    /// # Errors
    /// The first cause of one that is dead.
    pub fn alive(&self) -> Result<(), CommError> {
        self.all().try_for_each(|group| group.alive())
    }

    /// Ends every operation under way in all groups.
    pub fn abort(&self) {
        self.all().for_each(|group| group.abort());
    }

    fn all(&self) -> impl Iterator<Item = &Arc<dyn Communicator>> {
        let groups = [
            &self.tensor,
            &self.kv_copies,
            &self.context,
            &self.pipeline,
            &self.tied_stages,
            &self.shard,
            &self.copies,
            &self.data,
        ];
        std::iter::once(&self.world).chain(groups.into_iter().flatten())
    }
}

/// A rank's place in its tensor-parallel group.
pub fn tensor_place(config: &RunConfig, mesh: &Mesh, rank: usize) -> TensorPlace {
    let ranks = mesh.degree(Axis::Tensor);
    TensorPlace {
        ranks,
        rank: mesh.coordinate(rank, Axis::Tensor),
        sequence: config.parallelism.sequence && ranks > 1,
    }
}
