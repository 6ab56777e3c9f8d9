//! AdamW (Loshchilov and Hutter 2019) with libtorch's fused kernel.
//!
//! Per element, at step t, with gradient g scaled by the clip coefficient:
//! `w -= lr * decay * w; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
//! w -= lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)`.

use crate::error::{OptimError, Result};
use run_config::Optimizer;
use std::ops::Range;
use torch_shim::ops::OnDevice;
use torch_shim::params::{Parameter, ParameterSet};
use torch_shim::tch::{Device, Kind, Tensor, no_grad};
use torch_shim::{ShimError, memory, ops};

/// AdamW and its state: two flat buffers laid out as the parameter set's master buffer is.
#[derive(Debug)]
pub struct AdamW {
    config: Optimizer,
    num_steps: u64,
    m: Tensor,
    v: Tensor,
    decayed: Vec<Range<i64>>,
    spared: Vec<Range<i64>>,
}

/// Running moments of one parameter's gradient: views, of its master's shape and kind.
#[derive(Debug)]
pub struct Moments {
    /// First moment.
    pub m: Tensor,
    /// Second moment.
    pub v: Tensor,
}

impl AdamW {
    /// Zero state for `parameters`.
    ///
    /// # Errors
    /// Where memory runs out.
    pub fn new(config: &Optimizer, parameters: &ParameterSet) -> Result<Self> {
        let master = parameters.flat_master();
        let zeros = || memory::zeros(master.numel() as i64, master.kind(), master.device());
        Ok(Self {
            config: config.clone(),
            num_steps: 0,
            m: zeros()?,
            v: zeros()?,
            decayed: runs(parameters, true),
            spared: runs(parameters, false),
        })
    }

    /// One step at `learning_rate`, with all gradients first multiplied by `coefficient` (in
    /// place; 1 leaves them as they are). The compute copy of the weights is refreshed too.
    ///
    /// # Errors
    /// Where the set is not the one the state was made for, or libtorch refuses.
    pub fn step(
        &mut self,
        parameters: &ParameterSet,
        learning_rate: f64,
        coefficient: f64,
    ) -> Result<()> {
        self.check(parameters)?;
        no_grad(|| -> Result<()> {
            if coefficient != 1.0 {
                let mut gradients = parameters.flat_grad().shallow_clone();
                let _ = gradients.f_mul_scalar_(coefficient)?;
            }
            Ok(())
        })?;
        self.update_all(parameters, learning_rate, OnDevice::default())
    }

    /// As [`AdamW::step`], by what the device has computed and the host has not read: what the
    /// gradients are multiplied by (none: 1; a scalar of any floating kind), and whether the update
    /// is held back, FP32 of one element: where it is 1, nothing changes, and the host, once it
    /// knows, says so with [`AdamW::take_back`].
    ///
    /// # Errors
    /// As [`AdamW::step`].
    pub fn step_unless(
        &mut self,
        parameters: &ParameterSet,
        learning_rate: f64,
        coefficient: Option<&Tensor>,
        held: &Tensor,
    ) -> Result<()> {
        self.check(parameters)?;
        let gradients = parameters.flat_grad();
        let is_on_gpu = matches!(gradients.device(), Device::Cuda(_));
        let mut divisor = None;
        if let Some(coefficient) = coefficient {
            let coefficient = coefficient.f_to_kind(gradients.kind())?;
            match is_on_gpu && gradients.kind() == Kind::Float {
                // The update's own kernel does it, which reads them anyway.
                true => divisor = Some(coefficient.f_reciprocal()?),
                false => drop(no_grad(|| gradients.shallow_clone().f_mul_(&coefficient))?),
            }
        }
        let on_device = OnDevice { divisor: divisor.as_ref(), held: Some(held) };
        self.update_all(parameters, learning_rate, on_device)
    }

    /// The last update was held back.
    pub fn take_back(&mut self) {
        self.num_steps = self.num_steps.saturating_sub(1);
    }

    fn check(&self, parameters: &ParameterSet) -> Result<()> {
        let (state, elements) = (self.m.numel(), parameters.flat_master().numel());
        match state == elements {
            true => Ok(()),
            false => Err(OptimError::OtherSet { state, parameters: elements }),
        }
    }

    fn update_all(
        &mut self,
        parameters: &ParameterSet,
        learning_rate: f64,
        on_device: OnDevice<'_>,
    ) -> Result<()> {
        self.num_steps += 1;
        let decay = self.config.weight_decay;
        no_grad(|| {
            self.update(parameters, &self.decayed, (learning_rate, decay), on_device)?;
            self.update(parameters, &self.spared, (learning_rate, 0.0), on_device)
        })?;
        Ok(parameters.refresh_compute()?)
    }

    fn update(
        &self,
        parameters: &ParameterSet,
        runs: &[Range<i64>],
        (learning_rate, weight_decay): (f64, f64),
        on_device: OnDevice<'_>,
    ) -> Result<()> {
        let cut = |buffer: &Tensor| -> std::result::Result<Vec<Tensor>, ShimError> {
            let piece = |run: &Range<i64>| buffer.f_narrow(0, run.start, run.end - run.start);
            runs.iter().map(|run| Ok(piece(run)?)).collect()
        };
        let constants = ops::AdamW {
            learning_rate,
            beta1: self.config.betas[0],
            beta2: self.config.betas[1],
            eps: self.config.eps,
            weight_decay,
            step: self.num_steps,
        };
        let (masters, gradients) = (cut(parameters.flat_master())?, cut(parameters.flat_grad())?);
        let (m, v) = (cut(&self.m)?, cut(&self.v)?);
        Ok(ops::fused_adamw(&masters, &gradients, &m, &v, &constants, on_device)?)
    }

    /// Number of steps taken.
    pub fn num_steps(&self) -> u64 {
        self.num_steps
    }

    /// Says that the moments, written through [`AdamW::moments`], are those after `num_steps`.
    pub fn set_num_steps(&mut self, num_steps: u64) {
        self.num_steps = num_steps;
    }

    /// The moments of one of the parameters, for a checkpoint to read from and write into.
    ///
    /// # Errors
    /// Where the parameter is not of the set the state was made for.
    pub fn moments(&self, parameter: &Parameter) -> Result<Moments> {
        let view = |buffer: &Tensor| -> Result<Tensor> {
            let elements = buffer.f_narrow(0, parameter.range.start, parameter.num_elements())?;
            Ok(elements.f_view(parameter.shape.as_slice())?)
        };
        Ok(Moments { m: view(&self.m)?, v: view(&self.v)? })
    }

    /// The first moments of all, padding included.
    pub fn flat_m(&self) -> &Tensor {
        &self.m
    }

    /// The second moments of all, padding included.
    pub fn flat_v(&self) -> &Tensor {
        &self.v
    }
}

/// The longest runs of what is owned whose parameters all decay, or all do not. The padding between
/// two parameters of a run is updated with them: it is zero and stays so.
fn runs(parameters: &ParameterSet, decay: bool) -> Vec<Range<i64>> {
    let owned = parameters.owned();
    let mut runs: Vec<Range<i64>> = Vec::new();
    let mut open = false;
    for parameter in parameters.iter() {
        for run in &owned {
            let low = parameter.range.start.max(run.elements.start);
            let high = parameter.range.end.min(run.elements.end);
            if low >= high {
                continue;
            }
            let place = |element| run.start + element - run.elements.start;
            if parameter.decay == decay {
                match runs.last_mut() {
                    Some(last) if open => last.end = place(high),
                    _ => runs.push(place(low)..place(high)),
                }
            }
            open = parameter.decay == decay;
        }
    }
    runs
}
