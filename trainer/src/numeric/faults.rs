//! Numeric faults on purpose, for tests.
//!
//! `PHALANX_NUMERIC_FAULT` is a list, separated by `;`, of
//! - `sample:ID:FACTOR`: a share that holds this sample comes out FACTOR times as large, in loss
//!   and gradients, on whichever rank computes it: bad data;
//! - `once:RANK:STEP:FACTOR`: what this rank computes comes out so, the first time that it does the
//!   step in the first generation: a bit that flips;
//! - `gradient:RANK:STEP:VALUE`: so long, VALUE is added to one of its gradients, and its loss is
//!   right (not where gradients are sharded);
//! - `always:RANK:STEP:FACTOR`: from the step on, each time: a broken device.
//!
//! Each fault that strikes is told of in `events.jsonl` (`fault_injected`).

use crate::error::{Result, TrainError};
use crate::train_step::Share;
use parallel::Worker;
use rank_protocol::client::RankClient;
use rank_protocol::message::Event;
use serde_json::json;
use torch_shim::tch::no_grad;

/// Name of the variable.
pub const VARIABLE: &str = "PHALANX_NUMERIC_FAULT";

#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    Sample(u64),
    Once { rank: usize, step: u64 },
    Gradient { rank: usize, step: u64 },
    Always { rank: usize, step: u64 },
}

#[derive(Clone, Debug, PartialEq)]
struct Fault {
    text: String,
    place: Place,
    value: f64,
    has_struck: bool,
}

/// The faults of a process; none where the variable is not set.
#[derive(Clone, Debug, Default)]
pub struct Faults(Vec<Fault>);

impl Faults {
    /// Those that the variable asks for.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub fn from_env() -> Result<Self> {
        Self::parse(&std::env::var(VARIABLE).unwrap_or_default())
    }

    fn parse(text: &str) -> Result<Self> {
        let faults = text.split(';').filter(|fault| !fault.is_empty());
        faults
            .map(|fault| {
                let wrong = || TrainError::Config(format!("{VARIABLE}: no fault {fault:?}"));
                Fault::parse(fault).ok_or_else(wrong)
            })
            .collect::<Result<_>>()
            .map(Self)
    }

    /// Brings about what is due for a share on this rank; returns the factor of all that it
    /// computes.
    ///
    /// # Errors
    /// Where libtorch refuses, or the agent is gone.
    pub fn inject(
        &mut self,
        client: &RankClient,
        worker: &Worker,
        share: &Share<'_>,
    ) -> Result<f64> {
        let (own, generation) = (worker.groups.rank, client.assignment().generation);
        let mut factor = 1.0;
        for fault in &mut self.0 {
            let is_here = |rank: usize, step: u64, is_due: bool| {
                rank == own && is_due && (share.step == step)
            };
            let is_first = generation == 1 && !fault.has_struck;
            let strikes = match fault.place {
                Place::Sample(id) => share.batches.iter().any(|b| b.sample_ids.contains(&id)),
                Place::Once { rank, step } | Place::Gradient { rank, step } => {
                    is_here(rank, step, is_first)
                }
                Place::Always { rank, step } => rank == own && share.step >= step,
            };
            if !strikes {
                continue;
            }
            match fault.place {
                Place::Gradient { .. } => {
                    let one = worker.params.flat_grad().f_narrow(0, 0, 1);
                    let _ = no_grad(|| one.and_then(|mut one| one.f_add_scalar_(fault.value)))?;
                }
                _ => factor *= fault.value,
            }
            if !std::mem::replace(&mut fault.has_struck, true) {
                let fields = json!({ "fault": fault.text, "step": share.step });
                let fields = fields.as_object().cloned().unwrap_or_default();
                client.event(Event { kind: "fault_injected".into(), fields })?;
            }
        }
        Ok(factor)
    }
}

impl Fault {
    fn parse(text: &str) -> Option<Self> {
        let parts: Vec<&str> = text.split(':').collect();
        let (place, value) = match parts[..] {
            ["sample", id, value] => (Place::Sample(id.parse().ok()?), value),
            [kind, rank, step, value] => {
                let (rank, step) = (rank.parse().ok()?, step.parse().ok()?);
                let place = match kind {
                    "once" => Place::Once { rank, step },
                    "gradient" => Place::Gradient { rank, step },
                    "always" => Place::Always { rank, step },
                    _ => return None,
                };
                (place, value)
            }
            _ => return None,
        };
        let value = value.parse().ok()?;
        Some(Self { text: text.to_owned(), place, value, has_struck: false })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_is_read_as_documented() {
        let faults = Faults::parse("sample:7:NaN;once:1:12:1e3;always:0:3:2").unwrap();
        let places: Vec<Place> = faults.0.iter().map(|fault| fault.place).collect();
        let expected = [
            Place::Sample(7),
            Place::Once { rank: 1, step: 12 },
            Place::Always { rank: 0, step: 3 },
        ];
        assert_eq!(places, expected);
        assert!(faults.0[0].value.is_nan() && faults.0[1].value == 1e3);
        assert!(Faults::parse("").unwrap().0.is_empty());
        for wrong in ["sample:7", "twice:0:1:2", "once:a:1:2", "sample:7:much"] {
            let error = Faults::parse(wrong).unwrap_err().to_string();
            assert!(error.contains(VARIABLE) && error.contains(wrong), "{error}");
        }
    }
}
