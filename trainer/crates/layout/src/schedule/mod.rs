//! Pipeline schedules: in which order each stage runs the micro-batches of a step through its
//! chunks of the model. Pure functions of the stage and a [`Schedule`].
//!
//! [`Schedule::actions`] makes the lists, [`Schedule::messages`] says
//! what each action receives and sends, [`simulate()`] runs the lists against a clock, and the
//! closed forms ([`Schedule::bubble_time`], [`Schedule::peak_activations`]) say what the clock has
//! to show. [`draw`] makes pictures.

pub mod draw;
mod formula;
mod messages;
mod order;
pub mod simulate;

use run_config::{Pipeline, PipelineSchedule};
use serde::Serialize;
use thiserror::Error;

pub use messages::{Message, MessageKind, Messages};
pub use simulate::{Costs, Span, Stuck, Timeline, simulate, simulate_actions};

/// Most chunks over all stages.
pub const MAX_CHUNKS: usize = 1 << 15;

/// What a stage does with one micro-batch. `chunk` counts the chunks of the stage: its virtual
/// stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// The forward pass.
    Forward {
        /// Virtual stage.
        chunk: usize,
        /// Micro-batch of the step.
        micro_batch: usize,
    },
    /// The whole backward pass.
    Backward {
        /// Virtual stage.
        chunk: usize,
        /// Micro-batch of the step.
        micro_batch: usize,
    },
    /// The part of the backward pass that the stage before waits for: the gradient of the input.
    BackwardInput {
        /// Virtual stage.
        chunk: usize,
        /// Micro-batch of the step.
        micro_batch: usize,
    },
    /// The rest of the backward pass: the gradients of the weights.
    BackwardWeight {
        /// Virtual stage.
        chunk: usize,
        /// Micro-batch of the step.
        micro_batch: usize,
    },
}

impl Action {
    /// Virtual stage.
    pub fn chunk(self) -> usize {
        match self {
            Self::Forward { chunk, .. }
            | Self::Backward { chunk, .. }
            | Self::BackwardInput { chunk, .. }
            | Self::BackwardWeight { chunk, .. } => chunk,
        }
    }

    /// Micro-batch of the step.
    pub fn micro_batch(self) -> usize {
        match self {
            Self::Forward { micro_batch, .. }
            | Self::Backward { micro_batch, .. }
            | Self::BackwardInput { micro_batch, .. }
            | Self::BackwardWeight { micro_batch, .. } => micro_batch,
        }
    }

    /// Whether the activations of the micro-batch are not needed any more afterwards.
    pub fn frees_activations(self) -> bool {
        matches!(self, Self::Backward { .. } | Self::BackwardWeight { .. })
    }
}

/// A schedule that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ScheduleError {
    /// A size of 0.
    #[error("a pipeline schedule needs 1 {what} or more")]
    None {
        /// Of what there is none.
        what: &'static str,
    },
    /// Several chunks per stage in a schedule that knows one.
    #[error(
        "{virtual_stages} chunks per stage, where gpipe and 1f1b run 1; interleaved-1f1b and \
         zero-bubble run more"
    )]
    OneChunk {
        /// Chunks per stage.
        virtual_stages: usize,
    },
    /// More chunks than there are tags.
    #[error("{stages} stages x {virtual_stages} virtual stages: more than {MAX_CHUNKS} chunks")]
    TooManyChunks {
        /// Stages.
        stages: usize,
        /// Chunks per stage.
        virtual_stages: usize,
    },
    /// More actions than can be counted.
    #[error("{micro_batches} micro-batches are too many")]
    TooManyMicroBatches {
        /// Micro-batches.
        micro_batches: usize,
    },
}

/// How the micro-batches of one step go through the pipeline; valid by construction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    kind: PipelineSchedule,
    stages: usize,
    micro_batches: usize,
    virtual_stages: usize,
    in_a_row: usize,
}

impl Schedule {
    /// The schedule of `micro_batches` over `stages` x `virtual_stages` chunks, with as many
    /// micro-batches in a row as there are stages.
    ///
    /// # Errors
    /// Where a size is 0, where gpipe or 1f1b is to run more than one chunk per stage, and where
    /// there are more than [`MAX_CHUNKS`] chunks.
    pub fn new(
        kind: PipelineSchedule,
        stages: usize,
        micro_batches: usize,
        virtual_stages: usize,
    ) -> Result<Self, ScheduleError> {
        let sizes =
            [(stages, "stage"), (micro_batches, "micro-batch"), (virtual_stages, "virtual stage")];
        if let Some((_, what)) = sizes.into_iter().find(|(size, _)| *size == 0) {
            return Err(ScheduleError::None { what });
        }
        let plain =
            matches!(kind, PipelineSchedule::Gpipe | PipelineSchedule::OneForwardOneBackward);
        if plain && virtual_stages > 1 {
            return Err(ScheduleError::OneChunk { virtual_stages });
        }
        let chunks = stages.checked_mul(virtual_stages).filter(|chunks| *chunks <= MAX_CHUNKS);
        let Some(chunks) = chunks else {
            return Err(ScheduleError::TooManyChunks { stages, virtual_stages });
        };
        // Three actions per micro-batch and chunk, of which each is counted somewhere.
        if micro_batches.checked_mul(3 * chunks).is_none() {
            return Err(ScheduleError::TooManyMicroBatches { micro_batches });
        }
        Ok(Self { kind, stages, micro_batches, virtual_stages, in_a_row: stages })
    }

    /// The schedule that a config asks for, with `micro_batches` in a step.
    ///
    /// # Errors
    /// As [`Schedule::new`].
    pub fn of(pipeline: &Pipeline, micro_batches: usize) -> Result<Self, ScheduleError> {
        let Pipeline { schedule, stages, virtual_stages, contiguous_micro_batches } = *pipeline;
        let schedule = Self::new(schedule, stages, micro_batches, virtual_stages)?;
        Ok(schedule.in_a_row(contiguous_micro_batches.unwrap_or(stages)))
    }

    /// With at least `num` micro-batches (1 or more) through a chunk before the stage turns to its
    /// next chunk, the N of Llama 3 (arXiv 2407.21783, section 3.3.2): with as many as there are
    /// stages a micro-batch goes through as early as it can (depth first), with all of them every
    /// chunk runs the whole batch (breadth first). Fewer than the stages hold fewer activations
    /// and leave a bubble in every round.
    #[must_use]
    pub fn in_a_row(self, num: usize) -> Self {
        Self { in_a_row: num.max(1), ..self }
    }

    /// Kind.
    pub fn kind(&self) -> PipelineSchedule {
        self.kind
    }

    /// Number of stages.
    pub fn stages(&self) -> usize {
        self.stages
    }

    /// Micro-batches of a step.
    pub fn micro_batches(&self) -> usize {
        self.micro_batches
    }

    /// Chunks per stage.
    pub fn virtual_stages(&self) -> usize {
        self.virtual_stages
    }

    /// Chunks over all stages.
    pub fn num_chunks(&self) -> usize {
        self.stages * self.virtual_stages
    }

    /// Number in the whole model of a stage's `chunk`.
    pub fn global_chunk(&self, stage: usize, chunk: usize) -> usize {
        chunk * self.stages + stage
    }

    /// Actions of one stage in a step.
    pub fn num_actions(&self) -> usize {
        let passes = if self.splits_backward() { 3 } else { 2 };
        passes * self.passes()
    }

    /// Forward passes of one stage in a step.
    fn passes(&self) -> usize {
        self.micro_batches * self.virtual_stages
    }

    /// Whether the backward pass is two actions.
    fn splits_backward(&self) -> bool {
        self.kind == PipelineSchedule::ZeroBubble
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use PipelineSchedule::{Gpipe, Interleaved, OneForwardOneBackward, ZeroBubble};

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        let check = |kind, sizes: [usize; 3], expected: &str| {
            let error = Schedule::new(kind, sizes[0], sizes[1], sizes[2]).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check(Gpipe, [0, 1, 1], "needs 1 stage or more");
        check(Gpipe, [1, 0, 1], "needs 1 micro-batch or more");
        check(Interleaved, [1, 1, 0], "needs 1 virtual stage or more");
        check(Gpipe, [4, 8, 2], "2 chunks per stage, where gpipe and 1f1b run 1");
        check(OneForwardOneBackward, [4, 8, 3], "3 chunks per stage");
        check(ZeroBubble, [usize::MAX, 1, 2], "more than 32768 chunks");
        check(Interleaved, [4096, 1, 9], "4096 stages x 9 virtual stages: more than 32768 chunks");
        check(ZeroBubble, [4096, usize::MAX / 8192, 1], "micro-batches are too many");
        assert!(Schedule::new(Interleaved, 4096, 1, 8).is_ok());
    }

    #[test]
    fn a_config_names_its_schedule() {
        let pipeline = Pipeline {
            stages: 4,
            schedule: Interleaved,
            virtual_stages: 2,
            contiguous_micro_batches: None,
        };
        let schedule = Schedule::of(&pipeline, 8).unwrap();
        assert_eq!((schedule.kind(), schedule.stages()), (Interleaved, 4));
        assert_eq!((schedule.micro_batches(), schedule.virtual_stages()), (8, 2));
        assert_eq!((schedule.num_chunks(), schedule.global_chunk(3, 1)), (8, 7));
        assert_eq!(schedule.row_lengths(), (4, 4));
        let of = |number| Pipeline { contiguous_micro_batches: Some(number), ..pipeline.clone() };
        let schedule = |number| Schedule::of(&of(number), 8).unwrap();
        assert_eq!(schedule(8), Schedule::of(&pipeline, 8).unwrap().in_a_row(8));
        assert_eq!(
            [2, 3, 5, 8].map(|n| schedule(n).row_lengths()),
            [(2, 2), (4, 4), (8, 8), (8, 8)]
        );
    }
}
