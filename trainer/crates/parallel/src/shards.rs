//! Sharded data parallelism (Rajbhandari et al. 2020, "ZeRO"; Zhao et al. 2023, "PyTorch FSDP").
//!
//! The unit is a transformer block; the embedding and the head are one each. Of a unit's weights,
//! gradients and optimizer state each rank owns one of as many equal pieces as there are ranks.
//! Gradients are reduce-scattered unit by unit while backward goes on; with the level `gradients`
//! only the owned piece is kept between micro-batches, with `parameters` only that of the weights
//! too, which are gathered one unit ahead of need. The units of embedding and head stay gathered
//! through a step. Where other ranks own the same elements, a unit's last sum goes on over these
//! while backward goes on.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use collectives::{CommError, Communicator, ReduceOp, Work};
use layout::sharded::REDUCTIONS;
use model::Residual;
use run_config::ShardLevel;
use torch_shim::autograd::{self, is_recording};
use torch_shim::params::{Memory, Parameter, ParameterSet};
use torch_shim::tch::{Device, Kind, Tensor, no_grad};
use torch_shim::{Result as ShimResult, ShimError};

use crate::error::Result;
use crate::failure::Failure;
use crate::squares::Squares;

/// What is cut, and when gathered weights are given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Policy {
    pub(crate) level: ShardLevel,
    pub(crate) reshard_after_forward: bool,
    /// Whether [`Shards::local_squares`] is known.
    pub(crate) keeps_squares: bool,
}

impl Policy {
    fn cuts_gradients(self) -> bool {
        matches!(self.level, ShardLevel::Gradients | ShardLevel::Parameters)
    }

    fn cuts_weights(self) -> bool {
        self.level == ShardLevel::Parameters
    }
}

/// The units of one rank; clones share them.
#[derive(Clone)]
pub(crate) struct Shards(Arc<Mutex<State>>);

struct State {
    shard: Arc<dyn Communicator>,
    /// Ranks that own the same elements.
    copies: Option<Arc<dyn Communicator>>,
    policy: Policy,
    compute: Kind,
    units: Vec<Unit>,
    unit_of: Vec<usize>,
    reducing: VecDeque<usize>,
    /// Of what this rank adds.
    squares: Squares,
    failure: Failure,
}

struct Unit {
    first: usize,
    compute: Memory,
    grad: Memory,
    owned_master: Tensor,
    owned_grad: Tensor,
    /// Whether it is a block, whose weights come and go within a step.
    is_block: bool,
    missing: Vec<bool>,
    gathered: bool,
    gathering: Option<(Work, Tensor)>,
    has_grad: bool,
    reducing: Option<Reducing>,
    reduced: bool,
    /// Whether the next backward pass through it is the step's last.
    is_last: bool,
    /// Whether what is owned has been given to the sum over the copies, and that sum.
    is_copied: bool,
    copying: Option<Work>,
    /// Graphs alive that will read the weights again.
    users: usize,
}

/// A unit's gradients on their way to the ranks that own them.
struct Reducing {
    work: Work,
    sum: Tensor,
    /// Whether nothing of this step comes after it.
    is_last: bool,
}

impl Shards {
    /// Takes over the memory of a sharded set, and its ready hook. `is_block` says of each unit
    /// whether it is a block.
    pub(crate) fn new(
        set: &ParameterSet,
        (shard, copies): (Arc<dyn Communicator>, Option<Arc<dyn Communicator>>),
        policy: Policy,
        is_block: &[bool],
        failure: Failure,
    ) -> Result<Self> {
        let mut unit_of = vec![0; set.len()];
        let mut units = Vec::with_capacity(set.units().len());
        for (index, (unit, &is_block)) in set.units().iter().zip(is_block).enumerate() {
            unit_of[unit.parameters.clone()].fill(index);
            let owned = |buffer: &Tensor| {
                let length = unit.owned.elements.end - unit.owned.elements.start;
                buffer.f_narrow(0, unit.owned.start, length).map_err(ShimError::from)
            };
            if !policy.cuts_weights() {
                unit.compute.take()?;
            }
            if !policy.cuts_gradients() {
                unit.grad.take()?;
            }
            units.push(Unit {
                first: unit.parameters.start,
                compute: unit.compute.share(),
                grad: unit.grad.share(),
                owned_master: owned(set.owned_master())?,
                owned_grad: owned(set.owned_grad())?,
                is_block,
                missing: vec![true; unit.parameters.len()],
                gathered: false,
                gathering: None,
                has_grad: !policy.cuts_gradients(),
                reducing: None,
                reduced: false,
                is_last: false,
                is_copied: false,
                copying: None,
                users: 0,
            });
        }
        let state = State {
            shard,
            copies,
            policy,
            compute: set.compute_kind(),
            units,
            unit_of,
            reducing: VecDeque::new(),
            squares: Squares::new(policy.keeps_squares),
            failure,
        };
        let shards = Shards(Arc::new(Mutex::new(state)));
        let hook = Arc::downgrade(&shards.0);
        set.set_ready_hook(move |index| match hook.upgrade() {
            Some(state) => lock(&state).ready(index),
            None => Ok(()),
        })?;
        Ok(shards)
    }

    /// Begins a step: gradients are zero.
    pub(crate) fn begin_step(&self) -> Result<()> {
        let mut state = lock(&self.0);
        state.squares.clear();
        for unit in &mut state.units {
            (unit.reduced, unit.is_last) = (false, false);
            (unit.is_copied, unit.copying) = (false, None);
            unit.missing.fill(true);
            if unit.has_grad {
                let _ = unit.grad.tensor().shallow_clone().f_zero_().map_err(ShimError::from)?;
            }
        }
        Ok(())
    }

    /// The next backward pass completes the gradients of these parameters: a unit that has all of
    /// its own is reduced at once, where it is not with each micro-batch anyway.
    pub(crate) fn begin_last_pass(&self, parameters: &[usize]) {
        let mut state = lock(&self.0);
        for &parameter in parameters {
            let index = state.unit_of[parameter];
            let unit = &mut state.units[index];
            unit.is_last = true;
            unit.missing.fill(true);
        }
    }

    /// Reduces what is left and waits for all: then what is owned has the sums over all ranks.
    pub(crate) fn finish(&self) -> Result<()> {
        let mut state = lock(&self.0);
        for index in (0..state.units.len()).rev() {
            let pending = match state.policy.cuts_gradients() {
                true => state.units[index].has_grad && state.units[index].reducing.is_none(),
                false => !state.units[index].reduced,
            };
            if pending {
                state.reduce(index)?;
            }
        }
        while let Some(index) = state.reducing.pop_front() {
            state.complete(index)?;
        }
        (0..state.units.len()).rev().try_for_each(|index| state.begin_copying(index))?;
        for index in 0..state.units.len() {
            if let Some(work) = state.units[index].copying.take() {
                state.kept(work.wait())?;
            }
        }
        if state.policy.cuts_weights() {
            state.release_all()?;
        }
        Ok(())
    }

    /// Sum of the squares of what this rank added to the last step's gradients, part by part as
    /// they were summed: an FP64 scalar, where these are.
    pub(crate) fn local_squares(&self) -> Result<Tensor> {
        let state = lock(&self.0);
        let device = state.units.first().map_or(Device::Cpu, |unit| unit.owned_grad.device());
        Ok(state.squares.sum(device)?)
    }

    /// The owned master weights changed: gathers the weights that are kept whole, and forgets those
    /// that are not.
    pub(crate) fn weights_changed(&self) -> Result<()> {
        let mut state = lock(&self.0);
        if state.policy.cuts_weights() {
            return Ok(state.release_all()?);
        }
        for index in 0..state.units.len() {
            state.units[index].gathered = false;
            state.begin_gather(index)?;
        }
        (0..state.units.len()).try_for_each(|index| state.gather(index))?;
        Ok(())
    }

    /// The embedding asks for its weight here.
    pub(crate) fn need_embedding(&self, weight: &Parameter) -> ShimResult<()> {
        let mut state = lock(&self.0);
        let index = state.unit_of[weight.index];
        state.gather(index)
    }

    /// After the forward pass of the embedding, and in the backward pass before it: its gradients
    /// are among the largest, and have no memory sooner.
    pub(crate) fn leave_embedding(&self, weight: &Parameter, x: Tensor) -> ShimResult<Tensor> {
        if !is_recording() {
            return Ok(x);
        }
        let index = lock(&self.0).unit_of[weight.index];
        let shards = self.clone();
        let stream = watched(Residual::new(x), move || lock(&shards.0).take_grad(index))?;
        Ok(stream.stream_BSD)
    }

    /// Whatever else reads a weight in a forward pass asks for it here. The head adds to its
    /// gradients at once.
    pub(crate) fn need(&self, weight: &Parameter) -> ShimResult<()> {
        let mut state = lock(&self.0);
        let index = state.unit_of[weight.index];
        state.gather(index)?;
        if !state.units[index].is_block && is_recording() {
            state.take_grad(index)?;
        }
        Ok(())
    }

    /// Before the forward pass of a block, and in the backward pass after it.
    pub(crate) fn enter(&self, unit: usize, stream: Residual) -> ShimResult<Residual> {
        {
            let mut state = lock(&self.0);
            state.gather(unit)?;
            state.begin_gather(unit + 1)?;
            if !is_recording() {
                return Ok(stream);
            }
            state.units[unit].users += 1;
        }
        let shards = self.clone();
        watched(stream, move || lock(&shards.0).after_backward(unit))
    }

    /// After the forward pass of a block, and in the backward pass before it.
    pub(crate) fn leave(&self, unit: usize, stream: Residual) -> ShimResult<Residual> {
        {
            let mut state = lock(&self.0);
            if state.policy.reshard_after_forward || !is_recording() {
                state.release(unit)?;
            }
            if !is_recording() {
                return Ok(stream);
            }
        }
        let shards = self.clone();
        watched(stream, move || lock(&shards.0).before_backward(unit))
    }
}

/// The same stream, with `event` called when its gradient comes by.
fn watched(
    stream: Residual,
    mut event: impl FnMut() -> ShimResult<()> + Send + 'static,
) -> ShimResult<Residual> {
    let Residual { stream_BSD, branch_BSD } = stream;
    let inputs: Vec<&Tensor> = std::iter::once(&stream_BSD).chain(&branch_BSD).collect();
    let same = |inputs: &[Option<Tensor>]| -> ShimResult<Vec<Tensor>> {
        Ok(inputs.iter().flatten().map(Tensor::shallow_clone).collect())
    };
    let backward = move |gradients: &[Option<Tensor>]| {
        event()?;
        Ok(gradients.iter().map(|g| g.as_ref().map(Tensor::shallow_clone)).collect())
    };
    let mut outputs = autograd::apply(&inputs, inputs.len(), same, backward)?.into_iter();
    let missing = || ShimError::Closure("a stream without a tensor".into());
    Ok(Residual { stream_BSD: outputs.next().ok_or_else(missing)?, branch_BSD: outputs.next() })
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn kept<T>(&self, result: std::result::Result<T, CommError>) -> ShimResult<T> {
        result.map_err(|error| self.failure.keep(error))
    }

    /// Begins to gather a unit's weights, where that has not been done.
    fn begin_gather(&mut self, index: usize) -> ShimResult<()> {
        let Some(unit) = self.units.get(index) else { return Ok(()) };
        if unit.gathered || unit.gathering.is_some() {
            return Ok(());
        }
        unit.compute.take()?;
        let own = no_grad(|| unit.owned_master.f_to_kind(self.compute))?;
        let work = self.kept(self.shard.all_gather(unit.compute.tensor(), &own))?;
        self.units[index].gathering = Some((work, own));
        Ok(())
    }

    /// The unit's weights are there.
    fn gather(&mut self, index: usize) -> ShimResult<()> {
        self.begin_gather(index)?;
        if let Some((work, _own)) = self.units[index].gathering.take() {
            self.kept(work.wait())?;
            self.units[index].gathered = true;
        }
        Ok(())
    }

    /// Gives a block's weights back, where they are cut.
    fn release(&mut self, index: usize) -> ShimResult<()> {
        if !self.policy.cuts_weights() || !self.units[index].is_block {
            return Ok(());
        }
        self.forget(index)
    }

    fn forget(&mut self, index: usize) -> ShimResult<()> {
        if let Some((work, _own)) = self.units[index].gathering.take() {
            self.kept(work.wait())?;
        }
        self.units[index].gathered = false;
        self.units[index].compute.release()
    }

    fn release_all(&mut self) -> ShimResult<()> {
        (0..self.units.len()).try_for_each(|index| self.forget(index))
    }

    /// Memory for a unit's gradients, zero, where there is none.
    fn take_grad(&mut self, index: usize) -> ShimResult<()> {
        if self.units[index].reducing.is_some() {
            self.reducing.retain(|&other| other != index);
            self.complete(index)?;
        }
        let unit = &mut self.units[index];
        if !unit.has_grad {
            unit.grad.take()?;
            let _ = unit.grad.tensor().shallow_clone().f_zero_()?;
            unit.has_grad = true;
        }
        Ok(())
    }

    fn before_backward(&mut self, index: usize) -> ShimResult<()> {
        self.gather(index)?;
        if let Some(before) = index.checked_sub(1) {
            self.begin_gather(before)?;
        }
        self.take_grad(index)
    }

    fn after_backward(&mut self, index: usize) -> ShimResult<()> {
        self.units[index].users = self.units[index].users.saturating_sub(1);
        if self.units[index].users == 0 {
            self.release(index)?;
        }
        Ok(())
    }

    /// A parameter's gradient is complete for the graphs alive.
    fn ready(&mut self, parameter: usize) -> ShimResult<()> {
        let index = self.unit_of[parameter];
        let cuts_gradients = self.policy.cuts_gradients();
        let unit = &mut self.units[index];
        if !unit.is_last && !cuts_gradients {
            return Ok(());
        }
        unit.missing[parameter - unit.first] = false;
        if unit.missing.iter().any(|&missing| missing) {
            return Ok(());
        }
        unit.missing.fill(true);
        self.reduce(index)
    }

    /// Begins to sum a unit's gradients.
    fn reduce(&mut self, index: usize) -> ShimResult<()> {
        while self.reducing.len() >= REDUCTIONS {
            if let Some(oldest) = self.reducing.pop_front() {
                self.complete(oldest)?;
            }
        }
        let unit = &self.units[index];
        if unit.is_copied {
            let text = "a unit's gradients came after their sum over the copies".to_owned();
            return Err(ShimError::Invalid(text));
        }
        let is_last = unit.is_last;
        self.squares.add(unit.grad.tensor())?;
        let sum = unit.owned_grad.f_empty_like()?;
        let work = self.shard.reduce_scatter(&sum, unit.grad.tensor(), ReduceOp::Sum);
        let work = self.kept(work)?;
        self.units[index].reducing = Some(Reducing { work, sum, is_last });
        self.units[index].reduced = true;
        self.reducing.push_back(index);
        Ok(())
    }

    /// Waits for a unit's sums and adds them to what is owned.
    fn complete(&mut self, index: usize) -> ShimResult<()> {
        let Some(reducing) = self.units[index].reducing.take() else { return Ok(()) };
        let Reducing { work, sum, is_last } = reducing;
        self.kept(work.wait())?;
        let unit = &mut self.units[index];
        let _ = unit.owned_grad.f_add_(&sum)?;
        if self.policy.cuts_gradients() {
            unit.grad.release()?;
            unit.has_grad = false;
        }
        if is_last { self.begin_copying(index) } else { Ok(()) }
    }

    /// Begins to sum what is owned of a unit over the ranks that own the same, once a step.
    fn begin_copying(&mut self, index: usize) -> ShimResult<()> {
        let unit = &self.units[index];
        let Some(copies) = self.copies.as_ref().filter(|_| !unit.is_copied) else { return Ok(()) };
        let work = self.kept(copies.all_reduce(&unit.owned_grad, ReduceOp::Sum))?;
        let unit = &mut self.units[index];
        (unit.is_copied, unit.copying) = (true, Some(work));
        Ok(())
    }
}
