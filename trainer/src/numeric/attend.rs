//! What is done about a step in trouble, before its update is applied.

use super::finding::Finding;
use super::replay::{Replayed, replay};
use super::watch::Trouble;
use crate::error::{Result, TrainError};
use crate::state::Rank;
use crate::train_step::{Computed, Share};
use rank_protocol::RollBack;
use rank_protocol::message::Event;
use run_config::{OnNonFinite, OnSpike};
use serde_json::json;

/// Findings of a bad device in one generation after which the rank's node is given up, where it
/// computes rightly in between: a bit may flip anywhere once.
const MAX_DEVICE_FAULTS: u32 = 2;

/// What becomes of the step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Response {
    /// Its update is applied.
    Apply,
    /// It is not.
    Skip,
}

/// What follows from trouble, in the words of the config; besides those, `repeat`: a device was
/// wrong, and the step that was done again is sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Report,
    Skip,
    RollBack,
    Stop,
    Repeat,
    GiveUp,
}

impl Action {
    fn of(trouble: &Trouble, rank: &Rank) -> Self {
        let config = rank.watch.config();
        match trouble {
            Trouble::NotFinite => match config.on_non_finite {
                OnNonFinite::Skip => Action::Skip,
                OnNonFinite::Rollback => Action::RollBack,
                OnNonFinite::Stop => Action::Stop,
            },
            Trouble::Spike(_) => match config.on_spike {
                OnSpike::Report => Action::Report,
                OnSpike::Skip => Action::Skip,
                OnSpike::Rollback => Action::RollBack,
            },
        }
    }

    fn name(self) -> &'static str {
        match self {
            Action::Report => "report",
            Action::Skip => "skip",
            Action::RollBack => "rollback",
            Action::Stop => "stop",
            Action::Repeat => "repeat",
            Action::GiveUp => "give_up_node",
        }
    }
}

/// Finds out whether samples or a device are to blame, tells of it, and does what the config says.
/// `computed` becomes the step as it was done last, whose gradients are there.
///
/// # Errors
/// Where the run shall go back or stop, or a node be given up; where data, libtorch or a peer fail.
pub fn attend(
    rank: &mut Rank,
    share: &Share<'_>,
    computed: &mut Computed,
    trouble: &Trouble,
) -> Result<Response> {
    let words = trouble.describe(computed.loss, computed.grad_norm);
    let suspect = (computed.loss, computed.grad_norm);
    let replayed = match rank.watch.config().replay {
        true => Some(replay(rank, share, computed)?),
        false => None,
    };
    let mut action = Action::of(trouble, rank);
    let finding = replayed.as_ref().map(|replayed| replayed.finding.clone());
    if let Some(Finding::BadDevice { ranks, is_lasting, is_again_sound }) = &finding {
        let is_well = replayed.as_ref().is_some_and(|Replayed { computed, .. }| {
            rank.watch.look(computed.loss, computed.grad_norm).is_none()
        });
        let faults = ranks.iter().map(|found| rank.watch.device_fault(*found)).max();
        if *is_lasting || !is_again_sound || faults >= Some(MAX_DEVICE_FAULTS) {
            action = Action::GiveUp;
        } else if is_well {
            action = Action::Repeat;
        }
    }
    tell(rank, share.step, trouble, suspect, &words, replayed.as_ref(), action)?;
    if let Some(replayed) = replayed {
        computed.take_result_of(replayed.computed);
    }
    respond(rank, share.step, action, words, finding.as_ref())
}

fn respond(
    rank: &Rank,
    step: u64,
    action: Action,
    words: String,
    finding: Option<&Finding>,
) -> Result<Response> {
    let samples = rank.loader.samples_of(step);
    let config = rank.watch.config();
    match action {
        Action::Report | Action::Repeat => Ok(Response::Apply),
        Action::Skip => Ok(Response::Skip),
        Action::Stop => Err(TrainError::Trouble {
            step,
            words,
            samples,
            why: "numeric.on_non_finite is stop".into(),
        }),
        Action::RollBack => {
            let (count, limit) = (rank.watch.num_interventions(step) + 1, config.max_interventions);
            if count >= limit {
                return Err(too_many(rank, step, words, count));
            }
            Err(TrainError::RollBack { words, roll_back: RollBack { step, samples } })
        }
        Action::GiveUp => {
            let ranks = finding.map_or(&[][..], Finding::ranks).to_vec();
            Err(TrainError::BadDevice { step, own: rank.worker.groups.rank, ranks, words })
        }
    }
}

/// The error of a run with more trouble than its limits allow.
pub(crate) fn too_many(rank: &Rank, step: u64, words: String, count: usize) -> TrainError {
    let config = rank.watch.config();
    let why = format!(
        "{count} steps skipped or gone back behind within {} steps (limit \
         numeric.max_interventions = {})",
        config.interventions_within_steps, config.max_interventions
    );
    TrainError::Trouble { step, words, samples: rank.loader.samples_of(step), why }
}

/// Says it in the log, and in `events.jsonl`. Rank 0 speaks for all, which know the same.
fn tell(
    rank: &Rank,
    step: u64,
    trouble: &Trouble,
    (loss, grad_norm): (f64, f64),
    words: &str,
    replayed: Option<&Replayed>,
    action: Action,
) -> Result<()> {
    if rank.worker.groups.rank != 0 {
        return Ok(());
    }
    let samples = rank.loader.samples_of(step);
    let finite = |value: f64| value.is_finite().then_some(value);
    let (finding, found) = match replayed {
        Some(replayed) => (replayed.finding.name(), describe(replayed)),
        None => ("none", "the step was not done again (numeric.replay)".to_owned()),
    };
    let mut fields = json!({
        "step": step,
        "trouble": trouble.name(),
        "loss": finite(loss),
        "grad_norm": finite(grad_norm),
        "first_sample": samples.first,
        "last_sample": samples.last,
        "finding": finding,
        "ranks": replayed.map_or(&[][..], |replayed| replayed.finding.ranks()),
        "repeated_on": replayed.map(|replayed| match replayed.is_elsewhere {
            true => "other_ranks",
            false => "same_ranks",
        }),
        "action": action.name(),
        "reason": format!("{words}; {found}"),
    });
    if let Trouble::Spike(spike) = trouble {
        fields["zscore"] = finite(spike.zscore).into();
        fields["usual"] = spike.usual.into();
    }
    tracing::warn!("step {step}: {words}; {found}; {}", action.name());
    let fields = fields.as_object().cloned().unwrap_or_default();
    Ok(rank.client.event(Event { kind: "numeric_trouble".into(), fields })?)
}

fn describe(replayed: &Replayed) -> String {
    let by = match replayed.is_elsewhere {
        true => "other ranks and the same",
        false => "the same ranks, as there are no others with these parameters,",
    };
    match &replayed.finding {
        Finding::BadData => {
            let alike = match replayed.is_elsewhere {
                true => "it is the data, or the weights",
                false => "it is the data or the weights, unless the device fails alike each time",
            };
            format!("done again by {by} with equal results: {alike}")
        }
        Finding::BadDevice { ranks, is_lasting, .. } => {
            let often = if *is_lasting { "each time" } else { "once" };
            format!("done again by {by}: the results of rank {ranks:?} were wrong {often}")
        }
        Finding::Unclear => format!(
            "done again by {by} with results that differ, and not so that one rank can be named"
        ),
    }
}
