//! What a rank carries from step to step, and how it goes into checkpoints and comes back.

use crate::cadence::Cadence;
use crate::error::{Result, TrainError};
use crate::gpu::{Gpu, Speedometer};
use crate::late::Late;
use crate::numeric::Watch;
use crate::numeric::faults::Faults;
use crate::saving::Saving;
use crate::train_loop::is_due;
use checkpoint::{SaveRequest, Snapshot, Target, TrainState};
use collectives::Communicator;
use data_pipeline::{DataCursor, Loader, LoaderOptions, Split};
use layout::Axis;
use model::AttentionKernels;
use optim::AdamW;
use parallel::{Groups, Worker};
use rank_protocol::RollBack;
use rank_protocol::bundle::NodePlace;
use rank_protocol::client::RankClient;
use rank_protocol::message::{Event, Phase};
use rank_protocol::run_dir::RunDir;
use run_config::{RunConfig, SampleRange};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use torch_shim::tch::Device;

pub use layout::communication::BUCKET_BYTES;

/// All of a training rank.
pub struct Rank {
    /// The run's config.
    pub config: RunConfig,
    /// The agent.
    pub client: RankClient,
    /// The run's directory.
    pub run_dir: RunDir,
    /// All ranks, to wait for each other's storage.
    pub storage: Arc<dyn Communicator>,
    /// The model's piece, and the ranks that work on it together.
    pub worker: Worker,
    /// The optimizer.
    pub optimizer: AdamW,
    /// The data.
    pub loader: Loader,
    /// What it does now.
    pub phase: Phase,
    /// Steps done.
    pub step: u64,
    /// Steps skipped so far.
    pub skipped_steps: u64,
    /// Steps skipped in a row, up to now.
    pub skipped_in_a_row: u32,
    /// The watch over loss and gradient norm.
    pub watch: Watch,
    /// What goes wrong on purpose, in tests.
    pub faults: Faults,
    /// When to save.
    pub cadence: Cadence,
    /// The checkpoint that is being written.
    pub saving: Option<Saving>,
    /// Checkpoints in memory, where there are any.
    pub memory: Option<Memory>,
    /// What is open between two steps, where their numbers are read late.
    pub late: Option<Late>,
    /// Who computes attention, on a GPU.
    pub kernels: Option<AttentionKernels>,
    /// The GPU that it computes on, where it is one.
    pub gpu: Option<Gpu>,
    /// What a step's speed is, on a GPU.
    pub speedometer: Option<Speedometer>,
}

/// Checkpoints in memory.
pub struct Memory {
    /// Their folder.
    pub dir: PathBuf,
    /// Set where each node has a folder of its own, for its own ranks.
    pub node: Option<NodePlace>,
    /// All ranks, to wait for each other's: not those that a disk is waited for with.
    pub group: Arc<dyn Communicator>,
    /// Steps between two.
    pub every_steps: u64,
    /// The one that is being written.
    pub saving: Option<Saving>,
}

impl Memory {
    /// Whether the state is kept after `step`.
    pub fn is_due(&self, step: u64) -> bool {
        is_due(step, self.every_steps)
    }
}

/// The loader of this rank's part of the training data from `first_step` on, without the samples of
/// steps that the run went back behind.
///
/// # Errors
/// What is wrong with the data.
pub fn open_loader(
    config: &RunConfig,
    groups: &Groups,
    first_step: u64,
    roll_backs: &[RollBack],
) -> Result<Loader> {
    let samples: Vec<SampleRange> = roll_backs.iter().map(|back| back.samples).collect();
    let options = LoaderOptions {
        split: Split::Train,
        dp_rank: groups.mesh.data_rank(groups.rank),
        dp_size: groups.mesh.data_size(),
        first_step,
        steps: (config.training.steps + 1).saturating_sub(first_step),
    };
    Ok(Loader::open_without(config, options, &samples)?)
}

/// A loader of what a data-parallel rank reads in one step, in the order of `like`.
///
/// # Errors
/// What is wrong with the data.
pub fn open_share(
    config: &RunConfig,
    like: &Loader,
    groups: &Groups,
    dp_rank: usize,
    step: u64,
) -> Result<Loader> {
    let dp_size = groups.mesh.data_size();
    let options =
        LoaderOptions { split: Split::Train, dp_rank, dp_size, first_step: step, steps: 1 };
    Ok(Loader::open_without(config, options, like.left_out().ranges())?)
}

/// Reads a checkpoint into model and optimizer.
///
/// # Errors
/// Where it is damaged or of another model.
pub fn load(
    step_dir: &Path,
    config: &RunConfig,
    worker: &Worker,
    optimizer: &mut AdamW,
) -> Result<TrainState> {
    let moments = [("m", optimizer.flat_m()), ("v", optimizer.flat_v())];
    let whole = model_spec::hf_tensors(&config.model);
    let target = Target { whole: &whole, held: &worker.held, params: &worker.params };
    let state = checkpoint::load(step_dir, target, &moments)?;
    optimizer.set_num_steps(state.step - state.skipped_steps.min(state.step));
    Ok(state)
}

/// Refuses to continue on other data than the checkpoint's.
///
/// # Errors
/// What differs.
pub fn verify_cursor(state: &TrainState, loader: &Loader) -> Result<()> {
    let saved: DataCursor = serde_json::from_value(state.data_cursor.clone()).map_err(|error| {
        TrainError::Config(format!("checkpoint of step {}: data cursor: {error}", state.step))
    })?;
    Ok(saved.verify_resumes(&loader.cursor_after(state.step))?)
}

impl Rank {
    /// Begins a phase, and tells the agent.
    ///
    /// # Errors
    /// Where the agent is gone.
    pub fn enter(&mut self, phase: Phase) -> Result<()> {
        self.phase = phase;
        Ok(self.client.phase(phase)?)
    }

    /// Ends all that is under way in other threads and on the GPU, and waits for it: the generation
    /// is lost, and the process is not. Of a save nothing is left that is not left where a process
    /// dies.
    ///
    /// # Errors
    /// What the GPU was given failed: the process is of no use any more.
    pub fn abandon(&mut self) -> Result<()> {
        self.worker.groups.abort();
        self.storage.abort();
        let kept = self.memory.as_mut().and_then(|memory| {
            memory.group.abort();
            self.client.give_up_copy();
            memory.saving.take()
        });
        for saving in [self.saving.take(), kept].into_iter().flatten() {
            let step = saving.step;
            if let Err(error) = saving.finish() {
                tracing::debug!("the save of step {step} was given up: {error}");
            }
        }
        match self.worker.device() {
            Device::Cuda(index) => Ok(torch_shim::cuda::synchronize(index)?),
            _ => Ok(()),
        }
    }

    /// Seconds that it has waited for other ranks since it had waited for so long; none on a GPU,
    /// where the host does not wait.
    pub fn waited_since(&self, before: Duration) -> Option<f64> {
        let waited = collectives::waited().saturating_sub(before);
        (self.worker.device() == Device::Cpu).then_some(waited.as_secs_f64())
    }

    /// The step that it is at: the one in work while it trains, else the one just done.
    pub fn current_step(&self) -> u64 {
        self.step + u64::from(self.phase == Phase::Train)
    }

    /// Begins to write the checkpoint of the step just done, together with all ranks, of a copy of
    /// all that belongs to it. None other is being written.
    ///
    /// # Errors
    /// Where the state cannot be put into words, or there is no thread.
    pub fn begin_save(&mut self, learning_rate: f64, is_last: bool) -> Result<()> {
        let c = &self.config.checkpoint;
        let kept = (c.keep_last, c.keep_every_steps);
        let dir = self.run_dir.checkpoints();
        let snapshot = self.snapshot(&dir, kept, learning_rate, is_last)?;
        let (storage, groups) = (self.storage.clone(), self.worker.groups.clone());
        let (step, client) = (self.step, self.client.clone());
        let tell = move || {
            // Without an agent there is nobody to tell, and the control thread ends it all.
            let _ = client.checkpoint_committed(step);
        };
        self.saving = Some(Saving::start(snapshot, step, storage, groups, tell)?);
        Ok(())
    }

    /// Begins to keep the state after the step just done in memory, as [`Rank::begin_save`] does on
    /// disk; nothing where there is no such memory.
    ///
    /// # Errors
    /// As there.
    pub fn begin_keep(&mut self, learning_rate: f64) -> Result<()> {
        let Some(memory) = &self.memory else { return Ok(()) };
        let snapshot = self.snapshot(&memory.dir, (1, 0), learning_rate, false)?;
        let (group, groups) = (memory.group.clone(), self.worker.groups.clone());
        let (step, client) = (self.step, self.client.clone());
        if let Some(place) = memory.node {
            let saving = Saving::start_bundle(snapshot, step, place, group, groups, client)?;
            self.keeping(saving);
            return Ok(());
        }
        let tell = move || {
            let fields = [("step".to_owned(), step.into())].into_iter().collect();
            let _ = client.event(Event { kind: "checkpoint_kept".into(), fields });
        };
        let saving = Saving::start(snapshot, step, group, groups, tell)?;
        self.keeping(saving);
        Ok(())
    }

    fn keeping(&mut self, saving: Saving) {
        if let Some(memory) = &mut self.memory {
            memory.saving = Some(saving);
        }
    }

    fn snapshot(
        &self,
        checkpoints_dir: &Path,
        (keep_last, keep_every_steps): (usize, u64),
        learning_rate: f64,
        is_last: bool,
    ) -> Result<Snapshot> {
        let config = &self.config;
        let cursor = self.loader.cursor_after(self.step);
        let plain = |error: serde_json::Error| TrainError::Config(error.to_string());
        let groups = &self.worker.groups;
        let degrees = Axis::ALL.map(|axis| (axis.name().to_string(), groups.degree(axis).into()));
        let state = TrainState {
            tokens: cursor.consumed_tokens,
            data_cursor: serde_json::to_value(cursor).map_err(plain)?,
            mesh: Value::Object(degrees.into_iter().collect()),
            learning_rate,
            seed: config.seed,
            skipped_steps: self.skipped_steps,
            config_hash: config.hash(),
            model_hash: config.model_hash(),
            build_hash: env!("CARGO_PKG_VERSION").into(),
            model: serde_json::to_value(&config.model).map_err(plain)?,
            extra: json!({
                "skipped_in_a_row": self.skipped_in_a_row,
                "numeric": self.watch.saved()?,
            }),
            ..TrainState::at(self.step)
        };
        let moments = [("m", self.optimizer.flat_m()), ("v", self.optimizer.flat_v())];
        let request = SaveRequest {
            checkpoints_dir,
            step: self.step,
            generation: self.client.assignment().generation,
            rank: groups.rank,
            world_size: groups.mesh.size(),
            replica: groups.copies.as_ref().map_or(0, |copies| copies.rank()),
            replicas: groups.copies.as_ref().map_or(1, |copies| copies.size()),
            num_elements: model_spec::num_parameters(&config.model),
            held: &self.worker.held,
            params: &self.worker.params,
            moments: &moments,
            state,
            keep_last,
            keep_every_steps,
        };
        // Nothing changes after the last one, which then needs no memory of its own.
        Ok(if is_last { Snapshot::view(&request) } else { Snapshot::take(&request) })
    }
}
