//! Carries out a pipeline schedule: the passes of a step through the chunks of one stage.
//!
//! The order is the schedule's alone; this file moves tensors. A chunk's input from another stage
//! is a leaf of its graph, so that its gradient is there after the backward pass and goes back the
//! way the input came.
//!
//! Shapes: `B` batch, `s` tokens of this rank, `D` dim.

use std::collections::HashMap;
use std::sync::Arc;

use collectives::{Communicator, Work};
use layout::schedule::{Action, Message, MessageKind, Schedule};
use model::{Inputs, Llama, Residual};
use torch_shim::params::{Deferred, ParameterSet};
use torch_shim::tch::{Device, Kind, Tensor};
use torch_shim::{ShimError, autograd, profiler};

use crate::error::{ParallelError, Result};

/// A chunk and a micro-batch.
type Place = (usize, usize);

/// What a micro-batch reads on this rank.
pub(crate) struct Batch {
    pub(crate) inputs: Inputs,
    pub(crate) targets_BS: Tensor,
}

/// The shape of what goes between stages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Boundary {
    pub(crate) shape: [i64; 3],
    pub(crate) kind: Kind,
    pub(crate) device: Device,
}

/// What the forward pass of a chunk leaves for its backward pass.
struct Alive {
    /// The input from another stage; none where tokens enter.
    input: Option<Tensor>,
    /// What goes on to the next chunk, or the loss.
    output: Tensor,
}

/// A receive under way.
struct Expected {
    message: Message,
    tensor: Tensor,
    work: Work,
}

/// A stage at work on a step.
pub(crate) struct Stage<'a> {
    pub(crate) stage: usize,
    pub(crate) schedule: Schedule,
    pub(crate) chunks: &'a [Llama],
    pub(crate) params: &'a ParameterSet,
    pub(crate) group: Option<&'a Arc<dyn Communicator>>,
    pub(crate) boundary: Boundary,
    pub(crate) scale: f64,
    pub(crate) with_gradients: bool,
    alive: HashMap<Place, Alive>,
    deferred: HashMap<Place, Deferred>,
    /// Messages from this stage to itself.
    handed: HashMap<(MessageKind, usize, usize), Tensor>,
    /// Sends under way; their tensors must live until they are done.
    sent: Vec<(Work, Tensor)>,
    /// None is read: on a GPU that would wait for all that was issued before it.
    losses: Vec<Tensor>,
}

impl<'a> Stage<'a> {
    pub(crate) fn new(
        (stage, schedule): (usize, Schedule),
        chunks: &'a [Llama],
        params: &'a ParameterSet,
        group: Option<&'a Arc<dyn Communicator>>,
        boundary: Boundary,
        (scale, with_gradients): (f64, bool),
    ) -> Self {
        Self {
            stage,
            schedule,
            chunks,
            params,
            group,
            boundary,
            scale,
            with_gradients,
            alive: HashMap::new(),
            deferred: HashMap::new(),
            handed: HashMap::new(),
            sent: Vec::new(),
            losses: Vec::new(),
        }
    }

    /// Does `actions` in order; `before` is told of each. Returns the losses that were computed
    /// here, in the order of the micro-batches: scalars on the device, which nobody has waited for.
    pub(crate) fn run(
        mut self,
        actions: &[Action],
        batches: &[Batch],
        mut before: impl FnMut(Action),
    ) -> Result<Vec<Tensor>> {
        let mut expected = self.begin_receive(actions.first())?;
        for (index, &action) in actions.iter().enumerate() {
            let received = self.received(action, expected.take())?;
            // The next one's message may come while this one computes.
            expected = self.begin_receive(actions.get(index + 1))?;
            before(action);
            let made = self.act(action, batches, received)?;
            if let (Some(message), Some(tensor)) =
                (self.schedule.messages(self.stage, action).send, made)
            {
                self.send(message, tensor)?;
            }
            self.let_go()?;
        }
        for (work, _) in std::mem::take(&mut self.sent) {
            work.wait()?;
        }
        Ok(self.losses)
    }

    /// Begins to receive what an action needs.
    fn begin_receive(&self, action: Option<&Action>) -> Result<Option<Expected>> {
        let message = action.and_then(|&action| self.needs(action));
        let Some(message) = message.filter(|message| !message.is_local()) else { return Ok(None) };
        let Boundary { shape, kind, device } = self.boundary;
        let tensor = Tensor::f_empty(shape, (kind, device)).map_err(ShimError::from)?;
        let work = self.group()?.recv(&tensor, message.from, message.tag())?;
        Ok(Some(Expected { message, tensor, work }))
    }

    fn needs(&self, action: Action) -> Option<Message> {
        self.schedule.messages(self.stage, action).receive
    }

    fn received(&mut self, action: Action, expected: Option<Expected>) -> Result<Option<Tensor>> {
        let Some(message) = self.needs(action) else { return Ok(None) };
        if message.is_local() {
            let key = (message.kind, message.chunk, message.micro_batch);
            let tensor = self.handed.remove(&key);
            return tensor.ok_or_else(|| out_of_order(action)).map(Some);
        }
        match expected {
            Some(expected) if expected.message == message => {
                expected.work.wait()?;
                Ok(Some(expected.tensor))
            }
            _ => Err(out_of_order(action)),
        }
    }

    fn send(&mut self, message: Message, tensor: Tensor) -> Result<()> {
        if message.is_local() {
            self.handed.insert((message.kind, message.chunk, message.micro_batch), tensor);
            return Ok(());
        }
        let tensor = tensor.f_contiguous().map_err(ShimError::from)?;
        let work = self.group()?.send(&tensor, message.to, message.tag())?;
        self.sent.push((work, tensor));
        Ok(())
    }

    /// Lets the tensors go of messages that are through. One that failed names the peer: what comes
    /// after it may only say that nothing came back.
    fn let_go(&mut self) -> Result<()> {
        let is_over = |(work, _): &(Work, Tensor)| work.is_done();
        let (over, under_way) = std::mem::take(&mut self.sent).into_iter().partition(is_over);
        self.sent = under_way;
        let over: Vec<(Work, Tensor)> = over;
        over.into_iter().try_for_each(|(work, _)| work.wait())?;
        Ok(())
    }

    fn group(&self) -> Result<&dyn Communicator> {
        let alone = || ShimError::Invalid("a message to another stage where there is one".into());
        Ok(self.group.ok_or_else(alone)?.as_ref())
    }

    /// Does one action; returns what goes to another chunk.
    fn act(
        &mut self,
        action: Action,
        batches: &[Batch],
        received: Option<Tensor>,
    ) -> Result<Option<Tensor>> {
        let place = (action.chunk(), action.micro_batch());
        let _phase = profiler::phase(match action {
            Action::Forward { .. } => "forward",
            Action::Backward { .. } => "backward",
            Action::BackwardInput { .. } => "backward: inputs",
            Action::BackwardWeight { .. } => "backward: weights",
        });
        match action {
            Action::Forward { chunk, micro_batch } => {
                let batch = batches.get(micro_batch).ok_or_else(|| out_of_order(action))?;
                let alive = self.forward(chunk, batch, received)?;
                let output = alive.output.f_detach().map_err(ShimError::from)?;
                if self.with_gradients {
                    self.alive.insert(place, alive);
                }
                Ok(Some(output))
            }
            Action::Backward { .. } => {
                let alive = self.alive.remove(&place).ok_or_else(|| out_of_order(action))?;
                backward(&alive, received.as_ref())
            }
            Action::BackwardInput { .. } => {
                let alive = self.alive.remove(&place).ok_or_else(|| out_of_order(action))?;
                let mut gradient = None;
                let deferred = self.params.deferring(|| {
                    gradient = backward(&alive, received.as_ref())?;
                    Ok::<(), ParallelError>(())
                })?;
                self.deferred.insert(place, deferred);
                Ok(gradient)
            }
            Action::BackwardWeight { .. } => {
                let deferred = self.deferred.remove(&place).ok_or_else(|| out_of_order(action))?;
                deferred.run()?;
                Ok(None)
            }
        }
    }

    fn forward(&mut self, chunk: usize, batch: &Batch, received: Option<Tensor>) -> Result<Alive> {
        let model = &self.chunks[chunk];
        let piece = model.stage();
        let (stream, input) = match received {
            None => (model.embed(&batch.inputs)?, None),
            Some(input) => {
                let input = input.f_detach().map_err(ShimError::from)?;
                let leaf =
                    input.f_set_requires_grad(self.with_gradients).map_err(ShimError::from)?;
                (Residual::new(leaf.shallow_clone()), Some(leaf))
            }
        };
        let stream = model.blocks(piece.blocks.clone(), stream, &batch.inputs, None)?;
        if !piece.head {
            return Ok(Alive { input, output: stream.sum()? });
        }
        let loss = model.loss(stream, &batch.inputs, &batch.targets_BS, self.scale)?;
        self.losses.push(loss.f_detach().map_err(ShimError::from)?);
        Ok(Alive { input, output: loss })
    }
}

/// The backward pass of a chunk, whose output has the gradient `given` (none: it is the loss);
/// returns that of its input.
fn backward(alive: &Alive, given: Option<&Tensor>) -> Result<Option<Tensor>> {
    let given: Vec<&Tensor> = given.into_iter().collect();
    autograd::backward(&[&alive.output], &given)?;
    match &alive.input {
        None => Ok(None),
        Some(input) => Ok(Some(input.f_grad().map_err(ShimError::from)?)),
    }
}

fn out_of_order(action: Action) -> ParallelError {
    ShimError::Invalid(format!("{action:?} comes before what it needs")).into()
}
