//! A step of sharded data parallelism on one rank, counted: how often each unit's weights are
//! gathered and its gradients reduced, and how much of them is there at once.
//!
//! It goes through the actions of a pipeline stage as the parallel forms do. Weights that are cut
//! are gathered where they are needed, one block ahead, and given back after a block's last
//! backward pass (after each forward pass with `reshard_after_forward`). Gradients that are cut are
//! reduced when no graph is alive that would add to them.

use crate::held::Held;
use crate::schedule::{Action, Schedule};
use model_spec::Place;
use run_config::{Recompute, RunConfig, ShardLevel};
use std::collections::VecDeque;

/// Reductions under way at a time: their gradients are held.
pub const REDUCTIONS: usize = 2;

/// What is counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardedStep {
    /// All-gathers of each unit's weights, those after the update included.
    pub gathers: Vec<u64>,
    /// Reduce-scatters of each unit's gradients.
    pub reductions: Vec<u64>,
    /// Most elements of gathered weights at once.
    pub peak_weights: u64,
    /// Most elements of whole gradients at once, those being reduced included.
    pub peak_gradients: u64,
}

/// Counts a step of `stage`, which holds `held` and runs `schedule`.
pub fn sharded_step(
    config: &RunConfig,
    held: &Held,
    stage: usize,
    schedule: &Schedule,
) -> ShardedStep {
    let mut state = State::new(config, held);
    if state.cuts_gradients {
        for action in schedule.actions(stage) {
            state.act(action);
        }
    } else {
        state.counted.reductions.fill(1);
    }
    if !state.cuts_weights {
        state.counted.gathers.fill(1);
    }
    state.counted
}

struct State<'a> {
    held: &'a Held,
    cuts_gradients: bool,
    cuts_weights: bool,
    reshards: bool,
    recomputes_blocks: bool,
    chunks: Vec<Chunk>,
    units: Vec<Unit>,
    /// Reductions under way, the oldest first.
    reducing: VecDeque<usize>,
    weights: u64,
    gradients: u64,
    counted: ShardedStep,
}

/// The units of a chunk.
struct Chunk {
    embedding: Option<usize>,
    blocks: Vec<usize>,
    /// That of the final norm and the output head; with a tied head, the embedding's after it.
    head: Vec<usize>,
}

#[derive(Clone)]
struct Unit {
    num_elements: u64,
    is_block: bool,
    has_weights: bool,
    has_gradients: bool,
    /// Forward passes whose backward pass will read the weights.
    users: u64,
    /// Uses in living graphs that will add to the gradients.
    uses: u64,
}

impl<'a> State<'a> {
    fn new(config: &RunConfig, held: &'a Held) -> Self {
        let level = config.parallelism.shard.level;
        let cuts_weights = level == ShardLevel::Parameters;
        let cuts_gradients = cuts_weights || level == ShardLevel::Gradients;
        let unit = |unit: &crate::held::Unit| Unit {
            num_elements: unit.num_elements(),
            is_block: matches!(unit.place, Place::Block(_)),
            has_weights: !cuts_weights,
            has_gradients: !cuts_gradients,
            users: 0,
            uses: 0,
        };
        let all = held.num_elements();
        let number = held.units.len();
        let chunks = held.chunks.iter().map(|chunk| {
            let of = |place| held.unit_of(place);
            let tied = config.model.tied_embeddings.then(|| of(Place::Embedding)).flatten();
            Chunk {
                embedding: chunk.embedding.then(|| of(Place::Embedding)).flatten(),
                blocks: chunk.blocks.clone().filter_map(|layer| of(Place::Block(layer))).collect(),
                head: match chunk.head {
                    true => of(Place::Head).into_iter().chain(tied).collect(),
                    false => Vec::new(),
                },
            }
        });
        Self {
            held,
            cuts_gradients,
            cuts_weights,
            reshards: config.parallelism.shard.reshard_after_forward,
            recomputes_blocks: config.parallelism.recompute == Recompute::Full,
            chunks: chunks.collect(),
            units: held.units.iter().map(unit).collect(),
            reducing: VecDeque::new(),
            weights: if cuts_weights { 0 } else { all },
            gradients: if cuts_gradients { 0 } else { all },
            counted: ShardedStep {
                gathers: vec![0; number],
                reductions: vec![0; number],
                peak_weights: if cuts_weights { 0 } else { all },
                peak_gradients: if cuts_gradients { 0 } else { all },
            },
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Forward { chunk, .. } => self.forward(chunk),
            Action::Backward { chunk, .. } => self.backward(chunk, true),
            Action::BackwardInput { chunk, .. } => self.backward(chunk, false),
            Action::BackwardWeight { chunk, .. } => self.backward_weight(chunk),
        }
    }

    fn forward(&mut self, chunk: usize) {
        if let Some(unit) = self.chunks[chunk].embedding {
            self.gather(Some(unit));
            self.units[unit].uses += 1;
        }
        for unit in self.chunks[chunk].blocks.clone() {
            self.gather(Some(unit));
            self.gather(Some(unit + 1));
            self.units[unit].users += 1;
            self.units[unit].uses += u64::from(!self.recomputes_blocks);
            if self.reshards {
                self.release(unit);
            }
        }
        for unit in self.chunks[chunk].head.clone() {
            self.need(unit);
        }
    }

    /// Backward through a chunk; `completes` the gradients of weights, or leaves them for later.
    fn backward(&mut self, chunk: usize, completes: bool) {
        if completes {
            self.used_by_head(chunk);
        }
        for unit in self.chunks[chunk].blocks.clone().into_iter().rev() {
            self.gather(Some(unit));
            self.gather(unit.checked_sub(1));
            self.take_gradients(unit);
            self.units[unit].uses += u64::from(self.recomputes_blocks);
            if completes {
                self.used(unit);
            }
            self.units[unit].users -= 1;
            if self.units[unit].users == 0 {
                self.release(unit);
            }
        }
        if let Some(unit) = self.chunks[chunk].embedding {
            self.take_gradients(unit);
        }
        if completes {
            self.used_by_embedding(chunk);
        }
    }

    fn backward_weight(&mut self, chunk: usize) {
        self.used_by_head(chunk);
        for unit in self.chunks[chunk].blocks.clone().into_iter().rev() {
            self.used(unit);
        }
        self.used_by_embedding(chunk);
    }

    fn used_by_head(&mut self, chunk: usize) {
        for unit in self.chunks[chunk].head.clone().into_iter().rev() {
            self.used(unit);
        }
    }

    fn used_by_embedding(&mut self, chunk: usize) {
        if let Some(unit) = self.chunks[chunk].embedding {
            self.used(unit);
        }
    }

    /// A forward pass reads the weights of the head, and adds to its gradients.
    fn need(&mut self, unit: usize) {
        self.gather(Some(unit));
        self.take_gradients(unit);
        self.units[unit].uses += 1;
    }

    fn gather(&mut self, unit: Option<usize>) {
        let Some(index) = unit.filter(|unit| *unit < self.units.len()) else { return };
        let unit = &mut self.units[index];
        if unit.has_weights {
            return;
        }
        unit.has_weights = true;
        self.counted.gathers[index] += 1;
        self.weights += unit.num_elements;
        self.counted.peak_weights = self.counted.peak_weights.max(self.weights);
    }

    /// Gives a block's weights back, where they are cut.
    fn release(&mut self, index: usize) {
        let unit = &mut self.units[index];
        if self.cuts_weights && unit.is_block && unit.has_weights {
            unit.has_weights = false;
            self.weights -= unit.num_elements;
        }
    }

    fn take_gradients(&mut self, index: usize) {
        if self.reducing.contains(&index) {
            self.reducing.retain(|other| *other != index);
            self.complete(index);
        }
        let unit = &mut self.units[index];
        if !unit.has_gradients {
            unit.has_gradients = true;
            self.gradients += unit.num_elements;
            self.counted.peak_gradients = self.counted.peak_gradients.max(self.gradients);
        }
    }

    /// A use of the unit has added its gradients; the last one alive lets them be reduced.
    fn used(&mut self, index: usize) {
        self.units[index].uses -= 1;
        if self.units[index].uses > 0 {
            return;
        }
        while self.reducing.len() >= REDUCTIONS {
            if let Some(oldest) = self.reducing.pop_front() {
                self.complete(oldest);
            }
        }
        self.counted.reductions[index] += 1;
        self.reducing.push_back(index);
    }

    fn complete(&mut self, index: usize) {
        let unit = &mut self.units[index];
        if unit.has_gradients {
            unit.has_gradients = false;
            self.gradients -= self.held.units[index].num_elements();
        }
    }
}
