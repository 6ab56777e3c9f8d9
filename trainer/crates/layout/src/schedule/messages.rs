//! What an action needs from another stage, and what another stage needs from it.
//!
//! Sends do not wait for their receiver. All stages take the forward passes in one order, and the
//! backward passes too, so between two stages the messages of a kind are sent and received in the
//! same order: a transport that keeps the order of messages with one tag confuses none, and two
//! tags are enough.

use super::{Action, Schedule};

/// What a message holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum MessageKind {
    /// The output of the chunk before: input of a forward pass.
    Activation,
    /// The gradient of the chunk's output: input of a backward pass.
    Gradient,
}

/// One message between neighbouring chunks; the same value at its sender and its receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Message {
    /// What it holds.
    pub kind: MessageKind,
    /// Number in the whole model of the chunk that needs it.
    pub chunk: usize,
    /// Micro-batch of the step.
    pub micro_batch: usize,
    /// Stage that has it.
    pub from: usize,
    /// Stage that needs it.
    pub to: usize,
}

impl Message {
    /// The tag that it travels with: one for each kind.
    pub fn tag(&self) -> u32 {
        match self.kind {
            MessageKind::Activation => 0,
            MessageKind::Gradient => 1,
        }
    }

    /// Whether it stays on its stage: a hand-over, nothing to send.
    pub fn is_local(&self) -> bool {
        self.from == self.to
    }
}

/// The messages of one action.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Messages {
    /// To be received before the action.
    pub receive: Option<Message>,
    /// To be sent after it.
    pub send: Option<Message>,
}

impl Schedule {
    /// What `stage` receives before `action` and sends after it. The first chunk receives no
    /// activation and sends no gradient, the last the other way round.
    pub fn messages(&self, stage: usize, action: Action) -> Messages {
        let chunk = self.global_chunk(stage, action.chunk());
        let before = chunk.checked_sub(1);
        let next = Some(chunk + 1).filter(|next| *next < self.num_chunks());
        let message = |kind, chunk: usize, sender: usize| {
            let micro_batch = action.micro_batch();
            let (from, to) = (sender % self.stages, chunk % self.stages);
            Message { kind, chunk, micro_batch, from, to }
        };
        match action {
            Action::Forward { .. } => Messages {
                receive: before.map(|before| message(MessageKind::Activation, chunk, before)),
                send: next.map(|next| message(MessageKind::Activation, next, chunk)),
            },
            Action::Backward { .. } | Action::BackwardInput { .. } => Messages {
                receive: next.map(|next| message(MessageKind::Gradient, chunk, next)),
                send: before.map(|before| message(MessageKind::Gradient, before, chunk)),
            },
            Action::BackwardWeight { .. } => Messages::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use run_config::PipelineSchedule::Interleaved;

    const FORWARD: Action = Action::Forward { chunk: 1, micro_batch: 5 };
    const BACKWARD: Action = Action::Backward { chunk: 0, micro_batch: 5 };

    #[test]
    fn activations_go_to_the_next_chunk_and_gradients_to_the_one_before() {
        let schedule = Schedule::new(Interleaved, 4, 8, 2).unwrap();
        let places = |message: Option<Message>| message.map(|m| (m.kind, m.chunk, m.from, m.to));
        let check = |stage, action, receive, send| {
            let messages = schedule.messages(stage, action);
            assert_eq!((places(messages.receive), places(messages.send)), (receive, send));
        };
        let activation = |chunk, from, to| Some((MessageKind::Activation, chunk, from, to));
        let gradient = |chunk, from, to| Some((MessageKind::Gradient, chunk, from, to));
        check(0, FORWARD, activation(4, 3, 0), activation(5, 0, 1));
        check(3, FORWARD, activation(7, 2, 3), None);
        check(0, BACKWARD, gradient(0, 1, 0), None);
        check(3, BACKWARD, gradient(3, 0, 3), gradient(2, 3, 2));
        check(3, Action::Backward { chunk: 1, micro_batch: 0 }, None, gradient(6, 3, 2));
        let input = Action::BackwardInput { chunk: 0, micro_batch: 5 };
        assert_eq!(schedule.messages(2, input), schedule.messages(2, BACKWARD));
        check(2, Action::BackwardWeight { chunk: 0, micro_batch: 0 }, None, None);
        check(0, Action::Forward { chunk: 0, micro_batch: 0 }, None, activation(1, 0, 1));
    }

    #[test]
    fn one_stage_hands_over_to_itself() {
        let schedule = Schedule::new(Interleaved, 1, 2, 3).unwrap();
        let messages = schedule.messages(0, FORWARD);
        assert!(messages.receive.unwrap().is_local() && messages.send.unwrap().is_local());
    }
}
