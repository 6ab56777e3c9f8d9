//! One rank of a training run: its piece of the model, and the passes of a step over it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use collectives::{Communicator, ReduceOp};
use layout::Schedule;
use layout::mesh::Axis;
use layout::plan::{PartialSum, SumOver, TensorPlace, partial_sums};
use layout::schedule::Action;
use model::{Dense, Inputs, LayerBuilder, Llama, Recompute, allocate_sharded};
use model_spec::LocalParameter;
use run_config::RunConfig;
use torch_shim::ShimError;
use torch_shim::cuda::Readback;
use torch_shim::norm::squared_norm;
use torch_shim::params::{ParameterSet, Sharding};
use torch_shim::profiler;
use torch_shim::tch::{Device, Tensor, no_grad};

use crate::builder::Sharded;
use crate::context::{self, ContextGroup, Masks};
use crate::data::Data;
use crate::error::{ParallelError, Result};
use crate::failure::Failure;
use crate::groups::{Groups, tensor_place};
use crate::pieces::{held, parameters_of, stages};
use crate::pipeline::{Batch, Boundary};
use crate::scalars::sum;
use crate::shards::Shards;
use crate::tensor::TensorGroup;

/// One micro-batch: what the model reads, and the targets `[B, S]`, of whole sequences.
#[derive(Debug)]
pub struct Pass {
    /// Tokens, positions, documents.
    pub inputs: Inputs,
    /// Target ids; -100 for none.
    pub targets_BS: Tensor,
}

/// A rank's piece of the model and its part in the step.
pub struct Worker {
    /// Its parameters.
    pub params: ParameterSet,
    /// What the parameters are of the whole.
    pub held: Vec<LocalParameter>,
    /// The ranks it works with.
    pub groups: Groups,
    /// The chunks of the model that this rank's pipeline stage holds.
    chunks: Vec<Llama>,
    /// The parameters of each.
    parameters_of: Vec<Vec<usize>>,
    pipeline: run_config::Pipeline,
    /// Whether the stream between chunks is cut along the sequence, over how many ranks.
    stream_parts: usize,
    data: Data,
    sums: Vec<PartialSum>,
    failure: Failure,
}

impl Worker {
    /// Applies the parallel forms in their order, outside in; each decides what the next one finds.
    /// `dense` builds what no form cuts.
    ///
    /// # Errors
    /// Where memory runs out or libtorch refuses.
    pub fn new(
        config: &RunConfig,
        groups: Groups,
        device: Device,
        num_positions: usize,
        bucket_bytes: usize,
        dense: Dense,
    ) -> Result<Self> {
        let (model, failure) = (&config.model, Failure::default());
        // 1. Pipeline: which blocks. All else is decided parameter by parameter.
        let stages = stages(config, groups.coordinate(Axis::Pipeline));
        // 2. Tensor: which rows and columns, before memory is taken for them.
        let place = tensor_place(config, &groups.mesh, groups.rank);
        let held = held(config, place, &stages)?;
        let compute = config.precision.compute;
        // 3. Shards: whose piece of each unit, so that no rank ever holds the state of another's.
        let sharding = sharding(&groups);
        let decay_norms = config.optimizer.decay_norms;
        let params = allocate_sharded(&held, decay_norms, compute, device, sharding)?;
        let data = Data::new(config, &groups, &params, &held, bucket_bytes, &failure)?;
        // 4. Sequence, context and recomputation: how each layer's graph is built.
        let shards = data.shards(&params, &held);
        let builder = builder(config, &groups, place, &failure, shards, dense);
        let builder: Arc<dyn LayerBuilder> = Arc::new(builder);
        let parameters_of = parameters_of(&stages, &held);
        let chunk = |stage| Llama::new(model, stage, &params, builder.clone(), num_positions);
        let chunks = stages.into_iter().map(chunk).collect::<Result<_, _>>()?;
        Ok(Self {
            sums: partial_sums(model, place, &held, groups.tied_stages.is_some()),
            stream_parts: if place.sequence { place.ranks } else { 1 },
            pipeline: config.parallelism.pipeline.clone(),
            params,
            held,
            groups,
            chunks,
            parameters_of,
            data,
            failure,
        })
    }

    /// Accumulates the gradients of all micro-batches, summed over the ranks; returns this rank's
    /// part of the loss, an FP64 scalar on the device, which nobody has waited for. `scale` is the
    /// reciprocal of the global number of targets.
    ///
    /// # Errors
    /// Where libtorch or a peer fails; the gradients are worth nothing then.
    pub fn forward_backward(&self, passes: &[Pass], scale: f64) -> Result<Tensor> {
        let loss = self.run_step(passes, scale).map_err(|error| self.cause(error))?;
        let _phase = profiler::phase("last gradient sums");
        self.data.finish().map_err(|error| self.cause(error))?;
        self.sum_partial_gradients()?;
        self.counted_loss(loss)
    }

    /// A collective that fails in the graph ends the pass: it names the peer, the graph does not.
    fn cause(&self, error: ParallelError) -> ParallelError {
        if let Some(error) = self.failure.take() {
            return error.into();
        }
        match self.data.failure() {
            Some(first) => first,
            None => error,
        }
    }

    fn run_step(&self, passes: &[Pass], scale: f64) -> Result<Tensor> {
        let batches = passes.iter().map(|pass| self.own_part(pass)).collect::<Result<Vec<_>>>()?;
        self.data.begin_step()?;
        let schedule = self.schedule(passes.len())?;
        let actions = schedule.actions(self.stage());
        let stage = self.at_work(schedule, &batches, (scale, true))?;
        let losses = stage.run(&actions, &batches, |action| {
            if completes(action) && action.micro_batch() + 1 == passes.len() {
                self.data.begin_last_pass(&self.parameters_of[action.chunk()]);
            }
        })?;
        Ok(sum(&losses, self.device())?)
    }

    /// The loss of each micro-batch, summed over this rank's targets, without gradients; none where
    /// they are another rank's. The stages of a pipeline work on several at the same time, and
    /// nothing is kept of one but what is on its way to the next stage.
    ///
    /// # Errors
    /// Where libtorch or a peer fails.
    pub fn evaluate(&self, passes: &[Pass]) -> Result<Vec<f64>> {
        let batches = passes.iter().map(|pass| self.own_part(pass)).collect::<Result<Vec<_>>>()?;
        let schedule = self.schedule(passes.len())?;
        let actions: Vec<Action> = schedule.forwards().collect();
        let stage = self.at_work(schedule, &batches, (1.0, false))?;
        let losses = no_grad(|| stage.run(&actions, &batches, |_| ()));
        let losses = losses.map_err(|error| self.cause(error))?;
        if losses.is_empty() || self.groups.coordinate(Axis::Tensor) > 0 {
            return Ok(Vec::new());
        }
        let losses = Tensor::f_stack(&losses, 0).map_err(ShimError::from)?;
        Ok(Readback::begin(&losses)?.wait()?)
    }

    fn stage(&self) -> usize {
        self.groups.coordinate(Axis::Pipeline)
    }

    fn schedule(&self, num_passes: usize) -> Result<Schedule> {
        Schedule::of(&self.pipeline, num_passes)
            .map_err(|error| ShimError::Invalid(error.to_string()).into())
    }

    fn at_work(
        &self,
        schedule: Schedule,
        batches: &[Batch],
        goal: (f64, bool),
    ) -> Result<crate::pipeline::Stage<'_>> {
        let first = batches.first();
        let first = first.ok_or_else(|| ShimError::Invalid("a step without a batch".into()))?;
        let (rows, tokens) = (first.inputs.batch(), first.inputs.sequence());
        let dim = self.chunks[0].config().dim as i64;
        let boundary = Boundary {
            shape: [rows, tokens / self.stream_parts as i64, dim],
            kind: self.params.compute_kind(),
            device: self.device(),
        };
        let group = self.groups.pipeline.as_ref();
        let at = (self.stage(), schedule);
        Ok(crate::pipeline::Stage::new(at, &self.chunks, &self.params, group, boundary, goal))
    }

    /// Where its piece of the model lives.
    pub fn device(&self) -> Device {
        self.params.owned_grad().device()
    }

    /// The loss, where it is not another rank's too: tensor-parallel ranks all have the same.
    fn counted_loss(&self, loss: Tensor) -> Result<Tensor> {
        match self.groups.coordinate(Axis::Tensor) {
            0 => Ok(loss),
            _ => Ok(loss.f_zeros_like().map_err(ShimError::from)?),
        }
    }

    /// This rank's tokens of whole sequences.
    fn own_part(&self, pass: &Pass) -> Result<Batch> {
        let Some(context) = &self.groups.context else {
            let targets_BS = pass.targets_BS.shallow_clone();
            return Ok(Batch { inputs: pass.inputs.share(), targets_BS });
        };
        let sequence = pass.inputs.sequence() as usize;
        let pieces = context::chunks(sequence, context.rank(), context.size());
        let targets_BS = model::take(&pass.targets_BS, &pieces)?;
        Ok(Batch { inputs: pass.inputs.take(&pieces)?, targets_BS })
    }

    /// Sums the gradients that ranks of one tensor-parallel group, or two stages, share.
    fn sum_partial_gradients(&self) -> Result<()> {
        for over in [SumOver::Tensor, SumOver::KvCopies, SumOver::TiedStages] {
            let group = match over {
                SumOver::Tensor => &self.groups.tensor,
                SumOver::KvCopies => &self.groups.kv_copies,
                SumOver::TiedStages => &self.groups.tied_stages,
            };
            let Some(group) = group else { continue };
            let mut views = Vec::new();
            for sum in self.sums.iter().filter(|sum| sum.over == over) {
                views.extend(self.gradient_rows(sum.parameter, &sum.rows)?);
            }
            if !views.is_empty() {
                sum_together(group.as_ref(), &views)?;
            }
        }
        Ok(())
    }

    /// What is owned of the gradient of some rows of a parameter.
    fn gradient_rows(&self, parameter: usize, rows: &Range<usize>) -> Result<Vec<Tensor>> {
        let parameter = self.params.at(parameter);
        let parameter = parameter
            .ok_or_else(|| ShimError::Invalid("a sum of a parameter that is not held".into()))?;
        let width: i64 = parameter.shape.iter().skip(1).product();
        let start = parameter.range.start + rows.start as i64 * width;
        let range = start..start + rows.len() as i64 * width;
        owned_parts(&self.params, &range).map(|part| self.gradient(&part)).collect()
    }

    fn gradient(&self, owned: &Range<i64>) -> Result<Tensor> {
        let part = self.params.owned_grad().f_narrow(0, owned.start, owned.end - owned.start);
        Ok(part.map_err(ShimError::from)?)
    }

    /// The gradients that count here in the norm of all: each element of the model counts on one
    /// rank.
    ///
    /// # Errors
    /// Where libtorch refuses.
    pub fn counted_gradients(&self) -> Result<Vec<Tensor>> {
        let axes = [Axis::Context, Axis::Replicate];
        if axes.iter().any(|&axis| self.groups.coordinate(axis) > 0) {
            // Ranks that differ in their tokens alone have the same gradients.
            return Ok(Vec::new());
        }
        counted(&self.held, &self.params).iter().map(|run| self.gradient(run)).collect()
    }

    /// Sum of the squares of the gradients that count here, in the order of
    /// [`Worker::counted_gradients`]: an FP64 scalar on the device.
    ///
    /// # Errors
    /// Where libtorch refuses.
    pub fn counted_squares(&self) -> Result<Tensor> {
        let gradients = self.counted_gradients()?;
        let squares = gradients.iter().map(squared_norm).collect::<Result<Vec<_>, _>>()?;
        Ok(sum(&squares, self.device())?)
    }

    /// Sum of the squares of what this rank added to the gradients of the last step, before they
    /// were summed with those of ranks that read other samples: an FP64 scalar on the device. The
    /// same samples give the same to the last bit on any of those ranks. Known with
    /// `numeric.replay`. `counted` is what [`Worker::counted_squares`] was then.
    ///
    /// # Errors
    /// Where libtorch refuses.
    pub fn local_squares(&self, counted: &Tensor) -> Result<Tensor> {
        if let Some(sum) = self.data.local_squares()? {
            return Ok(sum);
        }
        if self.groups.mesh.size() == 1 {
            // All that there is counts.
            return Ok(counted.shallow_clone());
        }
        Ok(no_grad(|| squared_norm(self.params.owned_grad()))?)
    }

    /// Says that the master weights were written: the weights that compute follow them.
    ///
    /// # Errors
    /// Where libtorch or a peer fails.
    pub fn weights_changed(&self) -> Result<()> {
        self.data.weights_changed().map_err(|error| self.cause(error))
    }
}

/// Whether an action completes gradients of weights, one by one, so that their sums can begin.
/// Micro-batches come in rising order, so that a chunk's last one is the last of its actions.
fn completes(action: Action) -> bool {
    matches!(action, Action::Backward { .. } | Action::BackwardWeight { .. })
}

/// What is owned of a run of the flat index space, in the buffers of what is owned.
fn owned_parts(params: &ParameterSet, range: &Range<i64>) -> impl Iterator<Item = Range<i64>> {
    let range = range.clone();
    params.owned().into_iter().filter_map(move |owned| {
        let low = range.start.max(owned.elements.start);
        let high = range.end.min(owned.elements.end);
        let start = owned.start + low - owned.elements.start;
        (low < high).then(|| start..start + high - low)
    })
}

/// The longest runs of what is owned whose elements all count here; the padding between two
/// parameters, which is zero, with them.
fn counted(held: &[LocalParameter], params: &ParameterSet) -> Vec<Range<i64>> {
    let mut runs: Vec<Range<i64>> = Vec::new();
    let mut open = false;
    for (local, parameter) in held.iter().zip(params.iter()) {
        let width: usize = local.shape.iter().skip(1).product();
        for part in &local.parts {
            let start = parameter.range.start + (part.row_start * width) as i64;
            for owned in owned_parts(params, &(start..start + part.num_elements() as i64)) {
                match runs.last_mut() {
                    Some(run) if open && part.counts => run.end = owned.end,
                    _ if part.counts => runs.push(owned),
                    _ => {}
                }
                open = part.counts;
            }
        }
    }
    runs
}

/// Sums tensors over a group in one operation.
fn sum_together(group: &dyn Communicator, views: &[Tensor]) -> Result<()> {
    let torch = |error| ParallelError::Torch(ShimError::from(error));
    let flat: Vec<Tensor> =
        views.iter().map(|view| view.f_reshape([-1])).collect::<Result<_, _>>().map_err(torch)?;
    let joined = Tensor::f_cat(&flat, 0).map_err(torch)?;
    group.all_reduce(&joined, ReduceOp::Sum)?.wait()?;
    let mut at = 0;
    for view in views {
        let count = view.numel() as i64;
        let sum = joined.f_narrow(0, at, count).and_then(|sum| sum.f_view(view.size().as_slice()));
        view.shallow_clone().f_copy_(&sum.map_err(torch)?).map_err(torch)?;
        at += count;
    }
    Ok(())
}

/// This rank's place among those that cut one copy among them.
fn sharding(groups: &Groups) -> Sharding {
    Sharding {
        ranks: groups.degree(Axis::Shard) as i64,
        rank: groups.coordinate(Axis::Shard) as i64,
    }
}

fn builder(
    config: &RunConfig,
    groups: &Groups,
    place: TensorPlace,
    failure: &Failure,
    shards: Option<(Shards, HashMap<usize, usize>)>,
    dense: Dense,
) -> Sharded {
    let dense = dense.with_products(config.precision.matmul);
    let tensor = groups.tensor.as_ref().map(|comm| TensorGroup {
        comm: comm.clone(),
        sequence: place.sequence,
        failure: failure.clone(),
        products: dense.products().clone(),
    });
    let context = groups.context.as_ref().map(|comm| ContextGroup {
        comm: comm.clone(),
        failure: failure.clone(),
        masks: Masks::default(),
    });
    let recompute = match config.parallelism.recompute {
        run_config::Recompute::None => Recompute::None,
        run_config::Recompute::Selective => Recompute::Attention,
        run_config::Recompute::Full => Recompute::Block,
    };
    Sharded { dense, tensor, context, recompute, shards }
}
