//! A rank's life: assignment, set-up, training, and how it ends, or goes on in another generation.

use crate::attention;
use crate::backend::Backend;
use crate::cadence::Cadence;
use crate::error::{Result, TrainError};
use crate::gpu::{self, Chosen, Speedometer};
use crate::identity;
use crate::late::Late;
use crate::numeric::Watch;
use crate::numeric::faults::Faults;
use crate::setup::{
    Connections, check_libtorch, connect, initialize, prepare_libtorch, read_config,
};
use crate::standing::Standing;
use crate::state::{BUCKET_BYTES, Memory, Rank, load, open_loader, verify_cursor};
use crate::train_loop::{Outcome, train};
use checkpoint_format::names;
use data_pipeline::Loader;
use model::Dense;
use optim::AdamW;
use parallel::Worker;
use rank_protocol::client::RankClient;
use rank_protocol::exit_code;
use rank_protocol::message::{FailureReport, Phase};
use rank_protocol::run_dir::RunDir;
use run_config::RunConfig;
use serde_json::Value;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Instant;

/// Runs this process as a rank, in one generation after another; returns its exit code.
pub fn run() -> i32 {
    // The launcher keeps all of it in the rank's log, and shows people from INFO on.
    let log = tracing_subscriber::fmt().json().with_max_level(tracing::Level::DEBUG);
    log.with_writer(std::io::stderr).init();
    let mut standing = Standing::before_a_place();
    let mut client = match RankClient::from_env() {
        Ok(client) => client,
        Err(error) => {
            tracing::error!("{error}");
            return exit_code::CONFIG;
        }
    };
    loop {
        let mut place = Place { phase: Phase::Init, step: None, stays: None };
        let caught = catch_unwind(AssertUnwindSafe(|| live(&client, &mut standing, &mut place)));
        let outcome = caught.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
            Err(TrainError::Panic(text.unwrap_or_default()))
        });
        let error = match outcome {
            Ok(Outcome::Finished) => return client.exiting(exit_code::DONE),
            Ok(Outcome::Preempted) => return client.exiting(exit_code::PREEMPTED),
            Err(error) => error,
        };
        let stays = place.stays.unwrap_or_else(|| stays(&client, &error));
        let rank = client.assignment().rank;
        if !(stays && client.alive().is_err()) {
            // An agent that has told the ranks to end meanwhile takes no report any more.
            tracing::debug!("rank {rank} fails: {}", error.lines().join("; "));
            // Without an agent there is nobody to tell, and the control thread ends the process.
            let _ = client.failure(place.report(&error));
        }
        if !stays {
            return client.exiting(error.exit_code());
        }
        tracing::debug!("rank {rank} has let go of the generation");
        client = match client.let_go() {
            Ok(next) => next,
            Err(error) => {
                tracing::error!("{error}");
                return exit_code::FAILED;
            }
        };
    }
}

/// Whether this process outlives its generation, which ended so.
fn stays(client: &RankClient, error: &TrainError) -> bool {
    client.assignment().may_stay && error.is_survived(client.alive().is_err())
}

/// Where a rank is, for the report of its failure.
struct Place {
    phase: Phase,
    step: Option<u64>,
    /// Whether its process outlives the generation, once that is decided.
    stays: Option<bool>,
}

impl Place {
    fn report(&self, error: &TrainError) -> FailureReport {
        FailureReport {
            class: error.class(),
            phase: self.phase,
            step: self.step,
            collective: None,
            lines: error.lines(),
            roll_back: error.roll_back(),
        }
    }
}

/// One generation. Nothing of it is left when it returns.
fn live(client: &RankClient, standing: &mut Standing, place: &mut Place) -> Result<Outcome> {
    client.phase(Phase::Init)?;
    check_libtorch()?;
    let (mut rank, backend) = set_up(client, standing, place)?;
    let outcome = train(&mut rank).and_then(|outcome| {
        // Nobody leaves while another may still be reading from it.
        rank.storage.barrier()?.wait()?;
        Ok(outcome)
    });
    (place.phase, place.step) = (rank.phase, Some(rank.current_step()));
    if let Err(TrainError::NotFinite { step, .. } | TrainError::Trouble { step, .. }) = &outcome {
        place.step = Some(*step);
    }
    let outcome = match outcome {
        Ok(outcome) => outcome,
        Err(error) => {
            place.stays = Some(stays(client, &error));
            if place.stays == Some(true)
                && let Err(broken) = rank.abandon()
            {
                place.stays = Some(false);
                return Err(broken);
            }
            return Err(error);
        }
    };
    let step = rank.step;
    // Its groups go before what carries them.
    drop(rank);
    backend.leave()?;
    if outcome == Outcome::Finished {
        client.finished(step)?;
    }
    Ok(outcome)
}

fn set_up(
    client: &RankClient,
    standing: &mut Standing,
    place: &mut Place,
) -> Result<(Rank, Backend)> {
    let started = Instant::now();
    let assignment = client.assignment();
    prepare_libtorch(assignment.threads)?;
    let run_dir = RunDir::new(&assignment.run_dir);
    let config = read_config(&run_dir.config())?;
    let Chosen { device, gpu } = gpu::choose(&config, assignment.local_rank)?;
    identity::agree(client, &config)?;
    let backend = Backend::start(&config, assignment)?;
    let Connections { groups, storage, memory } = connect(client, &config, device, &backend)?;
    let attention = gpu.as_ref().map(|gpu| attention::kernels(&config, gpu)).transpose()?;
    let positions = longest_sequence(&config);
    let kernels = standing.kernels(device)?;
    let dense = Dense::new(kernels.clone());
    let worker = Worker::new(&config, groups, device, positions, BUCKET_BYTES, dense)?;
    let optimizer = AdamW::new(&config.optimizer, &worker.params)?;
    let mut optimizer = optimizer.with_kernels(kernels)?;
    let first_step = assignment.resume_step.unwrap_or(0) + 1;
    let roll_backs = &assignment.roll_backs;
    let loader = open_loader(&config, &worker.groups, first_step, roll_backs)?;
    let TakenUp { skips, watched } =
        take_up((client, place), &config, &worker, &mut optimizer, &loader)?;
    worker.weights_changed()?;
    // From here on ranks wait for each other's steps, and no longer for their reading.
    storage.barrier()?.wait()?;
    tracing::debug!(
        seconds = started.elapsed().as_secs_f64(),
        threads = assignment.threads,
        "rank {} of {} is ready for step {first_step}",
        worker.groups.rank,
        worker.groups.mesh.size()
    );
    let watch = Watch::restore(&config.numeric, &watched, roll_backs)?;
    let cadence = Cadence::new(&config, assignment, first_step - 1);
    let every_steps = config.checkpoint.memory.every_steps;
    let memory = assignment.memory_dir.clone().zip(memory);
    let node = assignment.node;
    let memory = memory.map(|(dir, group)| Memory { dir, node, group, every_steps, saving: None });
    let speedometer = gpu
        .as_ref()
        .map(|gpu| Speedometer::new(&config, worker.groups.mesh.size(), &gpu.card.name));
    let rank = Rank {
        config,
        client: client.clone(),
        run_dir,
        storage,
        worker,
        optimizer,
        loader,
        phase: Phase::Init,
        step: first_step - 1,
        skipped_steps: skips.0,
        skipped_in_a_row: skips.1,
        watch,
        faults: Faults::from_env()?,
        cadence,
        saving: None,
        memory,
        late: Late::on(device)?,
        kernels: attention,
        gpu,
        speedometer,
    };
    Ok((rank, backend))
}

/// What a checkpoint says besides tensors.
#[derive(Default)]
struct TakenUp {
    /// Steps skipped in all, and in a row.
    skips: (u64, u32),
    /// What is known of numbers so far.
    watched: Value,
}

/// Loads the state of the checkpoint to continue from, or makes the initial weights.
fn take_up(
    (client, place): (&RankClient, &mut Place),
    config: &RunConfig,
    worker: &Worker,
    optimizer: &mut AdamW,
    loader: &Loader,
) -> Result<TakenUp> {
    let assignment = client.assignment();
    let run_dir = RunDir::new(&assignment.run_dir);
    let Some(step) = assignment.resume_step else {
        let runs = run_dir.root().parent().unwrap_or(Path::new("."));
        initialize(config, &worker.held, &worker.params, runs)?;
        return Ok(TakenUp::default());
    };
    (place.phase, place.step) = (Phase::Load, Some(step));
    client.phase(Phase::Load)?;
    let dir = assignment.resume_dir.clone().unwrap_or_else(|| run_dir.checkpoints());
    let step_dir = dir.join(names::step_folder(step));
    let mut state = load(&step_dir, config, worker, optimizer)?;
    verify_cursor(&state, loader)?;
    let in_a_row = state.extra["skipped_in_a_row"].as_u64().unwrap_or(0);
    let skips = (state.skipped_steps, u32::try_from(in_a_row).unwrap_or(u32::MAX));
    Ok(TakenUp { skips, watched: state.extra["numeric"].take() })
}

/// The longest sequence of all batch stages.
pub fn longest_sequence(config: &RunConfig) -> usize {
    config.training.batch_stages.iter().map(|stage| stage.sequence_length).max().unwrap_or(0)
}
