//! A rank's life: assignment, set-up, training, and how it ends.

use crate::backend::Backend;
use crate::error::{Result, TrainError};
use crate::identity;
use crate::numeric::Watch;
use crate::numeric::faults::Faults;
use crate::setup::{
    Connections, check_libtorch, connect, device, initialize, kernels, prepare_libtorch,
    read_config,
};
use crate::state::{BUCKET_BYTES, Rank, load, open_loader, verify_cursor};
use crate::train_loop::{Outcome, train};
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

/// Runs this process as a rank; returns its exit code.
pub fn run() -> i32 {
    // The launcher keeps all of it in the rank's log, and shows people from INFO on.
    let log = tracing_subscriber::fmt().json().with_max_level(tracing::Level::DEBUG);
    log.with_writer(std::io::stderr).init();
    let client = match RankClient::from_env() {
        Ok(client) => client,
        Err(error) => {
            tracing::error!("{error}");
            return exit_code::CONFIG;
        }
    };
    let mut place = Place { phase: Phase::Init, step: None };
    let caught = catch_unwind(AssertUnwindSafe(|| live(&client, &mut place)));
    let outcome = caught.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        Err(TrainError::Panic(text.unwrap_or_default()))
    });
    client.exiting(match outcome {
        Ok(Outcome::Finished) => exit_code::DONE,
        Ok(Outcome::Preempted) => exit_code::PREEMPTED,
        Err(error) => {
            let report = FailureReport {
                class: error.class(),
                phase: place.phase,
                step: place.step,
                collective: None,
                lines: error.lines(),
                roll_back: error.roll_back(),
            };
            // Without an agent there is nobody to tell, and the control thread ends the process.
            let _ = client.failure(report);
            error.exit_code()
        }
    })
}

/// Where a rank is, for the report of its failure.
struct Place {
    phase: Phase,
    step: Option<u64>,
}

fn live(client: &RankClient, place: &mut Place) -> Result<Outcome> {
    client.phase(Phase::Init)?;
    check_libtorch()?;
    let (mut rank, backend) = set_up(client, place)?;
    let outcome = train(&mut rank);
    (place.phase, place.step) = (rank.phase, Some(rank.current_step()));
    if let Err(TrainError::NotFinite { step, .. } | TrainError::Trouble { step, .. }) = &outcome {
        place.step = Some(*step);
    }
    let outcome = outcome?;
    // Nobody leaves while another may still be reading from it.
    rank.storage.barrier()?.wait()?;
    let step = rank.step;
    // Its groups go before what carries them.
    drop(rank);
    backend.leave()?;
    if outcome == Outcome::Finished {
        client.finished(step)?;
    }
    Ok(outcome)
}

fn set_up(client: &RankClient, place: &mut Place) -> Result<(Rank, Backend)> {
    let started = Instant::now();
    let assignment = client.assignment();
    prepare_libtorch(assignment.threads)?;
    let run_dir = RunDir::new(&assignment.run_dir);
    let config = read_config(&run_dir.config())?;
    let device = device(&config, assignment.local_rank)?;
    identity::agree(client, &config)?;
    let backend = Backend::start(&config, assignment)?;
    let Connections { groups, storage } = connect(client, &config, device, &backend)?;
    let positions = longest_sequence(&config);
    let kernels = kernels(device)?;
    let dense = Dense::new(kernels.clone());
    let worker = Worker::new(&config, groups, device, positions, BUCKET_BYTES, dense)?;
    let optimizer = AdamW::new(&config.optimizer, &worker.params)?;
    let mut optimizer = optimizer.with_kernels(kernels)?;
    let first_step = assignment.resume_step.unwrap_or(0) + 1;
    let roll_backs = &assignment.roll_backs;
    let loader = open_loader(&config, &worker.groups, first_step, roll_backs)?;
    let mut skips = (0, 0);
    let mut watched = Value::Null;
    match assignment.resume_step {
        Some(step) => {
            (place.phase, place.step) = (Phase::Load, Some(step));
            client.phase(Phase::Load)?;
            let mut state = load(&run_dir, step, &config, &worker, &mut optimizer)?;
            verify_cursor(&state, &loader)?;
            let in_a_row = state.extra["skipped_in_a_row"].as_u64().unwrap_or(0);
            skips = (state.skipped_steps, u32::try_from(in_a_row).unwrap_or(u32::MAX));
            watched = state.extra["numeric"].take();
        }
        None => {
            let runs = run_dir.root().parent().unwrap_or(Path::new("."));
            initialize(&config, &worker.held, &worker.params, runs)?;
        }
    }
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
        saving: None,
    };
    Ok((rank, backend))
}

/// The longest sequence of all batch stages.
pub fn longest_sequence(config: &RunConfig) -> usize {
    config.training.batch_stages.iter().map(|stage| stage.sequence_length).max().unwrap_or(0)
}
