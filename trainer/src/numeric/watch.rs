//! What a rank knows of the steps before, by which it takes a step for one in trouble.

use super::window::{Measure, Window};
use crate::error::{Result, TrainError};
use rank_protocol::RollBack;
use run_config::Numeric;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What is wrong with a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Trouble {
    /// Its loss or its gradient norm is not finite.
    NotFinite,
    /// One of them jumps.
    Spike(Spike),
}

/// A number far above those of the steps before.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spike {
    /// Which.
    pub measure: Measure,
    /// The number.
    pub value: f64,
    /// The mean of the window.
    pub usual: f64,
    /// Standard deviations above it.
    pub zscore: f64,
    /// The limit.
    pub limit: f64,
}

/// The highest loss and gradient norm without trouble, for those that look where the numbers are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Of the loss.
    pub loss: f64,
    /// Of the gradient norm.
    pub grad_norm: f64,
}

impl Trouble {
    /// The word for it in `events.jsonl`.
    pub fn name(&self) -> &'static str {
        match self {
            Trouble::NotFinite => "not_finite",
            Trouble::Spike(Spike { measure: Measure::Loss, .. }) => "loss_spike",
            Trouble::Spike(Spike { measure: Measure::GradNorm, .. }) => "grad_norm_spike",
        }
    }

    /// In a sentence.
    pub fn describe(&self, loss: f64, grad_norm: f64) -> String {
        match self {
            Trouble::NotFinite => format!("not finite: loss {loss}, gradient norm {grad_norm}"),
            Trouble::Spike(spike) => {
                let key = match spike.measure {
                    Measure::Loss => "loss_zscore",
                    Measure::GradNorm => "grad_norm_zscore",
                };
                format!(
                    "{} {:.6} is {:.1} standard deviations above the usual {:.6} (limit \
                     numeric.{key} = {})",
                    spike.measure.name(),
                    spike.value,
                    spike.zscore,
                    spike.usual,
                    spike.limit
                )
            }
        }
    }
}

/// The part of it that is training state: a run that goes on from a checkpoint decides as one that
/// was never stopped.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct State {
    /// Of the newest steps that were applied.
    losses: Window,
    grad_norms: Window,
    /// Newest steps that were skipped.
    skipped: Vec<u64>,
    /// Steps that the run went back behind.
    roll_backs: Vec<RollBack>,
}

/// The watch over a run's numbers.
#[derive(Clone, Debug)]
pub struct Watch {
    config: Numeric,
    state: State,
    /// Findings of a bad device in this generation, by rank.
    device_faults: Vec<u32>,
}

impl Watch {
    /// At the start, or as it was when it was saved (`Null`: by a version that had none). The
    /// launcher knows the steps that the run went back behind.
    ///
    /// # Errors
    /// Where what was saved cannot be read.
    pub fn restore(config: &Numeric, saved: &Value, roll_backs: &[RollBack]) -> Result<Self> {
        let mut state = match saved {
            Value::Null => State::default(),
            saved => State::deserialize(saved).map_err(|error| {
                TrainError::Config(format!("state.json of the checkpoint: extra.numeric: {error}"))
            })?,
        };
        state.roll_backs = roll_backs.to_vec();
        Ok(Self { config: config.clone(), state, device_faults: Vec::new() })
    }

    /// As [`Watch::restore`] takes it.
    ///
    /// # Errors
    /// Where it cannot be put into words.
    pub fn saved(&self) -> Result<Value> {
        let saved = serde_json::to_value(&self.state);
        saved.map_err(|error| TrainError::Config(error.to_string()))
    }

    /// What the config says.
    pub fn config(&self) -> &Numeric {
        &self.config
    }

    /// Looks at a step that has not been applied.
    pub fn look(&self, loss: f64, grad_norm: f64) -> Option<Trouble> {
        if !(loss.is_finite() && grad_norm.is_finite()) {
            return Some(Trouble::NotFinite);
        }
        let config = &self.config;
        let measured = [
            (Measure::Loss, &self.state.losses, loss, config.loss_zscore),
            (Measure::GradNorm, &self.state.grad_norms, grad_norm, config.grad_norm_zscore),
        ];
        measured.into_iter().find_map(|(measure, window, value, limit)| {
            let limit = limit?;
            let score = window.score(measure, value, config.window)?;
            let spike = Spike { measure, value, usual: score.usual, zscore: score.zscore, limit };
            (score.zscore > limit).then_some(Trouble::Spike(spike))
        })
    }

    /// Numbers of the next step up to which [`Watch::look`] finds no trouble. They may lie a little
    /// too low: who decides by them alone shall look before it acts.
    pub fn limits(&self) -> Limits {
        let config = &self.config;
        let highest = |measure, window: &Window, limit: Option<f64>| {
            limit.map_or(f64::MAX, |limit| {
                window.highest(measure, config.window, |score| score.zscore <= limit)
            })
        };
        Limits {
            loss: highest(Measure::Loss, &self.state.losses, config.loss_zscore),
            grad_norm: highest(Measure::GradNorm, &self.state.grad_norms, config.grad_norm_zscore),
        }
    }

    /// A step was applied.
    pub fn applied(&mut self, loss: f64, grad_norm: f64) {
        self.state.losses.push(loss, self.config.window);
        self.state.grad_norms.push(grad_norm, self.config.window);
    }

    /// A step was skipped.
    pub fn skipped(&mut self, step: u64) {
        let within = self.config.interventions_within_steps;
        self.state.skipped.retain(|skipped| skipped.saturating_add(within) > step);
        self.state.skipped.push(step);
    }

    /// Steps that were skipped or gone back behind, of those that count at `step`.
    pub fn num_interventions(&self, step: u64) -> usize {
        let within = self.config.interventions_within_steps;
        let counts = |other: u64| other.saturating_add(within) > step;
        let skipped = self.state.skipped.iter().filter(|skipped| counts(**skipped));
        let roll_backs = self.state.roll_backs.iter().filter(|back| counts(back.step));
        skipped.count() + roll_backs.count()
    }

    /// A rank's device was found bad; how often that makes in this generation.
    pub fn device_fault(&mut self, rank: usize) -> u32 {
        if self.device_faults.len() <= rank {
            self.device_faults.resize(rank + 1, 0);
        }
        self.device_faults[rank] += 1;
        self.device_faults[rank]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use run_config::{OnNonFinite, OnSpike, SampleRange};

    fn config() -> Numeric {
        Numeric {
            window: 4,
            loss_zscore: Some(3.0),
            grad_norm_zscore: Some(6.0),
            on_spike: OnSpike::Skip,
            on_non_finite: OnNonFinite::Skip,
            replay: true,
            max_interventions: 3,
            interventions_within_steps: 10,
        }
    }

    fn watch(config: &Numeric) -> Watch {
        let mut watch = Watch::restore(config, &Value::Null, &[]).unwrap();
        (0..4).for_each(|_| watch.applied(2.0, 1.0));
        watch
    }

    fn name(watch: &Watch, loss: f64, grad_norm: f64) -> Option<&'static str> {
        watch.look(loss, grad_norm).map(|trouble| trouble.name())
    }

    #[test]
    fn each_trouble_is_told_from_the_others() {
        let watch = watch(&config());
        assert_eq!(name(&watch, 2.05, 1.2), None);
        assert_eq!(name(&watch, 2.07, 1.2), Some("loss_spike"), "3 x 0.02 above");
        assert_eq!(name(&watch, 1.0, 1.4), Some("grad_norm_spike"), "exp(6 x 0.05) = 1.35");
        assert_eq!(name(&watch, 0.1, 0.1), None, "what falls is no trouble");
        assert_eq!(name(&watch, f64::NAN, 1.0), Some("not_finite"));
        assert_eq!(name(&watch, 2.0, f64::INFINITY), Some("not_finite"));
        let words = watch.look(2.2, 1.0).unwrap().describe(2.2, 1.0);
        assert!(words.contains("10.0 standard deviations above the usual 2.000000"), "{words}");
        assert!(words.contains("limit numeric.loss_zscore = 3"), "{words}");
    }

    /// Whatever lies within the limits is no trouble, and they are as high as that allows.
    #[test]
    fn limits_are_where_trouble_begins() {
        let mut watch = watch(&config());
        let check = |watch: &Watch| {
            let Limits { loss, grad_norm } = watch.limits();
            assert_eq!(name(watch, loss, grad_norm), None, "{loss} {grad_norm}");
            let above = 1.0 + 1e-9;
            assert_eq!(name(watch, loss * above, grad_norm), Some("loss_spike"));
            assert_eq!(name(watch, loss, grad_norm * above), Some("grad_norm_spike"));
        };
        check(&watch);
        for step in 1..50 {
            watch.applied(2.0 + (f64::from(step) * 0.7).sin(), 0.1 + f64::from(step % 7));
            check(&watch);
        }
        let off = Numeric { loss_zscore: None, ..config() };
        assert_eq!(self::watch(&off).limits().loss, f64::MAX);
        let young = Watch::restore(&config(), &Value::Null, &[]).unwrap();
        assert_eq!(young.limits(), Limits { loss: f64::MAX, grad_norm: f64::MAX });
    }

    #[test]
    fn limits_can_be_off() {
        let off = Numeric { loss_zscore: None, grad_norm_zscore: None, ..config() };
        assert_eq!(name(&watch(&off), 1e9, 1e9), None);
        assert_eq!(name(&watch(&off), f64::NAN, 1.0), Some("not_finite"));
    }

    #[test]
    fn a_step_that_is_skipped_leaves_the_window_as_it_was() {
        let mut watch = watch(&config());
        let before = watch.look(9.0, 1.0);
        watch.skipped(5);
        assert_eq!(watch.look(9.0, 1.0), before);
        watch.applied(9.0, 1.0);
        assert_ne!(watch.look(9.0, 1.0), before);
    }

    #[test]
    fn interventions_are_counted_over_so_many_steps() {
        let samples = SampleRange { first: 0, last: 7 };
        let roll_backs = [RollBack { step: 4, samples }, RollBack { step: 12, samples }];
        let mut watch = Watch::restore(&config(), &Value::Null, &roll_backs).unwrap();
        watch.skipped(5);
        watch.skipped(6);
        assert_eq!(watch.num_interventions(6), 4, "one that lies ahead counts too");
        assert_eq!(watch.num_interventions(13), 4);
        assert_eq!(watch.num_interventions(14), 3);
        assert_eq!(watch.num_interventions(16), 1);
        assert_eq!(watch.num_interventions(22), 0);
    }

    #[test]
    fn what_is_read_back_decides_alike() {
        let mut watch = watch(&config());
        watch.applied(1.0 / 3.0, 0.1);
        watch.skipped(5);
        let text = watch.saved().unwrap().to_string();
        let saved: Value = serde_json::from_str(&text).unwrap();
        let back = Watch::restore(&config(), &saved, &[]).unwrap();
        assert_eq!(back.state, watch.state);
        let error = Watch::restore(&config(), &serde_json::json!({ "losses": 3 }), &[]);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("extra.numeric"), "{error}");
    }
}
