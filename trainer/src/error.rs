//! What can end a rank, and how the launcher should take it.

use checkpoint::CheckpointError;
use checkpoint_format::FormatError;
use collectives::CommError;
use data_pipeline::DataError;
use model::ModelError;
use optim::OptimError;
use parallel::ParallelError;
use rank_protocol::RollBack;
use rank_protocol::client::ClientError;
use rank_protocol::exit_code;
use rank_protocol::jsonl::JsonlError;
use rank_protocol::message::FailureClass;
use run_config::SampleRange;
use torch_shim::ShimError;
use torch_shim::tch::TchError;

/// Why a rank cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The config, or something it names, cannot be used.
    #[error("{0}")]
    Config(String),
    /// The data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A collective.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// A parallel operation.
    #[error(transparent)]
    Parallel(#[from] ParallelError),
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The optimizer.
    #[error(transparent)]
    Optim(#[from] OptimError),
    /// libtorch.
    #[error(transparent)]
    Torch(#[from] ShimError),
    /// The connection to the agent.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// `metrics.jsonl`.
    #[error(transparent)]
    Metrics(#[from] JsonlError),
    /// Any other file.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Loss or gradients were not finite, or far too high, for too many steps in a row.
    #[error(
        "loss or gradient not finite or too high for {in_a_row} steps in a row (limit \
         training.max_skipped_steps = {limit}); step {step} had loss {loss}, gradient norm \
         {grad_norm}; its batch: samples {first} to {last} of the data order; hint: lower \
         optimizer.learning_rate, or look at these samples",
        first = samples.first,
        last = samples.last
    )]
    NotFinite {
        /// The step.
        step: u64,
        /// Steps skipped in a row.
        in_a_row: u32,
        /// The limit.
        limit: u32,
        /// The last loss.
        loss: f64,
        /// The last gradient norm.
        grad_norm: f64,
        /// Ids of all samples of the last batch.
        samples: SampleRange,
    },
    /// A step in trouble at which the config, or one of its limits, ends the run.
    #[error(
        "step {step}: {words}; its batch: samples {first} to {last} of the data order; {why}; \
         hint: lower optimizer.learning_rate, or look at these samples (data.skip_samples leaves \
         some out)",
        first = samples.first,
        last = samples.last
    )]
    Trouble {
        /// The step.
        step: u64,
        /// What is wrong with it.
        words: String,
        /// Its samples.
        samples: SampleRange,
        /// Why the run ends.
        why: String,
    },
    /// A step in trouble behind which the run goes back.
    #[error(
        "step {step}: {words}; back to the newest checkpoint, and on without samples {first} to \
         {last} of the data order",
        step = roll_back.step,
        first = roll_back.samples.first,
        last = roll_back.samples.last
    )]
    RollBack {
        /// What is wrong with it.
        words: String,
        /// The step and its samples.
        roll_back: RollBack,
    },
    /// What a rank computes is not what others do.
    #[error(
        "step {step}: {words}; the results of rank {ranks:?} are wrong: its device is bad; hint: \
         test it, and use another node"
    )]
    BadDevice {
        /// The step.
        step: u64,
        /// This rank.
        own: usize,
        /// Those whose results are wrong.
        ranks: Vec<usize>,
        /// What was wrong with the step.
        words: String,
    },
    /// A panic, caught.
    #[error("internal error: {0}")]
    Panic(String),
}

/// The result of a step of a rank's life.
pub type Result<T, E = TrainError> = std::result::Result<T, E>;

impl From<TchError> for TrainError {
    fn from(error: TchError) -> Self {
        TrainError::Torch(error.into())
    }
}

impl TrainError {
    /// How the launcher should take it.
    pub fn class(&self) -> FailureClass {
        match self {
            TrainError::Config(_) => FailureClass::Config,
            TrainError::Data(error) if error.is_bad_input() => FailureClass::Config,
            TrainError::Checkpoint(
                CheckpointError::OtherModel { .. } | CheckpointError::NoOptimizerState { .. },
            ) => FailureClass::Config,
            // Another rank failed, and says why; or they have lost each other.
            TrainError::Checkpoint(CheckpointError::Format(
                FormatError::NotCommitted { .. } | FormatError::DidNotMeet { .. },
            )) => FailureClass::Transient,
            TrainError::Data(_)
            | TrainError::Checkpoint(_)
            | TrainError::Metrics(_)
            | TrainError::Io { .. } => FailureClass::Storage,
            TrainError::Comm(_)
            | TrainError::Parallel(ParallelError::Comm(_))
            | TrainError::Client(ClientError::Released { .. }) => FailureClass::Transient,
            TrainError::NotFinite { .. }
            | TrainError::Trouble { .. }
            | TrainError::RollBack { .. } => FailureClass::Numeric,
            // Every rank says so, and the one that it is about is the first cause.
            TrainError::BadDevice { own, ranks, .. } => match ranks.contains(own) {
                true => FailureClass::Node,
                false => FailureClass::Transient,
            },
            TrainError::Model(_)
            | TrainError::Optim(_)
            | TrainError::Parallel(_)
            | TrainError::Torch(_)
            | TrainError::Client(_)
            | TrainError::Panic(_) => FailureClass::Process,
        }
    }

    /// The step that the run shall go back behind.
    pub fn roll_back(&self) -> Option<RollBack> {
        match self {
            TrainError::RollBack { roll_back, .. } => Some(*roll_back),
            _ => None,
        }
    }

    /// Whether the process is as good as before: others have failed, or all go back. A rank that
    /// `was_told` to let go meets a store and disks that end under its hands; what libtorch or the
    /// rank itself did not survive is a failure all the same.
    pub fn is_survived(&self, was_told: bool) -> bool {
        match self.class() {
            FailureClass::Transient => true,
            FailureClass::Numeric => self.roll_back().is_some(),
            FailureClass::Config | FailureClass::Storage => was_told,
            FailureClass::Process
            | FailureClass::Node
            | FailureClass::Hang
            | FailureClass::Preemption => false,
        }
    }

    /// Whether a checkpoint could not be written, here or by another rank, and nothing else is
    /// wrong. (That this generation is an old one is, and that ranks have lost each other: none of
    /// their later saves would be committed.)
    pub fn is_of_storage(&self) -> bool {
        matches!(
            self,
            TrainError::Checkpoint(CheckpointError::Format(
                FormatError::NotCommitted { .. }
                    | FormatError::NoSpace { .. }
                    | FormatError::Write { .. }
                    | FormatError::Io { .. }
            ))
        )
    }

    /// The rank's exit code.
    pub fn exit_code(&self) -> i32 {
        match self.class() {
            FailureClass::Config => exit_code::CONFIG,
            _ => exit_code::FAILED,
        }
    }

    /// The message and its causes, one a line.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![self.to_string()];
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            lines.push(error.to_string());
            cause = error.source();
        }
        lines.dedup();
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Training goes on after a save that found no room; not after one whose ranks have lost each
    /// other, since no later one would be committed.
    #[test]
    fn only_trouble_with_the_disk_lets_training_go_on() {
        let is_of_storage = |error| {
            let error = TrainError::from(CheckpointError::Format(error));
            assert_eq!(error.class(), FailureClass::Transient);
            error.is_of_storage()
        };
        let reason = || "gone".to_owned();
        assert!(is_of_storage(FormatError::NotCommitted { step: 1, reason: reason() }));
        assert!(!is_of_storage(FormatError::DidNotMeet { step: 1, reason: reason() }));
    }
}
