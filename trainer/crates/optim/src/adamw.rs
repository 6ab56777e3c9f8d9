//! AdamW (Loshchilov and Hutter 2019) with libtorch's fused kernel, or on a GPU with our own, which
//! also applies the clip coefficient and writes the compute copy of the weights.
//!
//! Per element, at step t, with gradient g scaled by the clip coefficient:
//! `w -= lr * decay * w; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
//! w -= lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)`.

use crate::clip::clip_coefficient_of;
use crate::error::{OptimError, Result};
use kernels::Kernels;
use kernels::ops::adamw::{self, Buffers, Chunks};
use kernels::ops::gradient_norm;
use run_config::Optimizer;
use std::ops::Range;
use torch_shim::ops::OnDevice;
use torch_shim::params::{Parameter, ParameterSet};
use torch_shim::tch::{Device, Kind, Tensor, no_grad};
use torch_shim::{ShimError, memory, norm, ops};

/// AdamW and its state: two flat buffers laid out as the parameter set's master buffer is.
#[derive(Debug)]
pub struct AdamW {
    config: Optimizer,
    num_steps: u64,
    m: Tensor,
    v: Tensor,
    decayed: Vec<Range<i64>>,
    spared: Vec<Range<i64>>,
    own: Option<Own>,
}

/// A kernel of our own in place of libtorch's, and its work.
#[derive(Debug)]
struct Own {
    kernels: Kernels,
    chunks: Chunks,
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
            own: None,
        })
    }

    /// The same, updating with these kernels where they take the state.
    ///
    /// # Errors
    /// Where libtorch refuses.
    pub fn with_kernels(mut self, kernels: Option<Kernels>) -> Result<Self> {
        let Some(kernels) = kernels.filter(|kernels| kernels.takes(&self.m)) else {
            return Ok(self);
        };
        let flagged = |runs: &[Range<i64>], decays| -> Vec<(Range<i64>, bool)> {
            runs.iter().map(|run| (run.clone(), decays)).collect()
        };
        let runs = [flagged(&self.decayed, true), flagged(&self.spared, false)].concat();
        let chunks = Chunks::new(&kernels, &runs)?;
        self.own = Some(Own { kernels, chunks });
        Ok(self)
    }

    /// One step at `learning_rate`, with all gradients first multiplied by `coefficient`, perhaps
    /// in place: they are worth nothing afterwards. The compute copy of the weights is refreshed
    /// too.
    ///
    /// # Errors
    /// Where the set is not the one the state was made for, or libtorch refuses.
    pub fn step(
        &mut self,
        parameters: &ParameterSet,
        learning_rate: f64,
        coefficient: f64,
    ) -> Result<()> {
        let device = parameters.flat_grad().device();
        let coefficient = (coefficient != 1.0)
            .then(|| Tensor::f_full([] as [i64; 0], coefficient, (Kind::Double, device)))
            .transpose()?;
        self.update_all(parameters, learning_rate, coefficient.as_ref(), None)
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
        self.update_all(parameters, learning_rate, coefficient, Some(held))
    }

    /// Sum of the squares of all gradients, an FP64 scalar on their device.
    ///
    /// # Errors
    /// Where libtorch refuses.
    pub fn squared_norm(&self, parameters: &ParameterSet) -> Result<Tensor> {
        let gradients = parameters.flat_grad();
        match &self.own {
            Some(Own { kernels, chunks }) => {
                Ok(gradient_norm::squared_norm(kernels, gradients, chunks)?)
            }
            None => Ok(norm::squared_norm(gradients)?),
        }
    }

    /// The global norm, FP64, from the sum of the squares of all gradients, and what
    /// [`AdamW::step_unless`] multiplies gradients of this norm by; `None` where nothing is
    /// clipped. Nothing is read. Where the norm is not finite the other number is of no use.
    ///
    /// # Errors
    /// Where libtorch refuses.
    pub fn clip(
        &self,
        squares: &Tensor,
        clip_norm: Option<f64>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        if let (Some(own), Some(_)) = (&self.own, clip_norm) {
            let (norm, coefficient) = gradient_norm::clip(&own.kernels, squares, clip_norm)?;
            return Ok((norm, Some(coefficient)));
        }
        let norm = squares.f_sqrt()?;
        let coefficient = clip_coefficient_of(&norm, clip_norm)?;
        Ok((norm, coefficient))
    }

    /// The last update was held back.
    pub fn take_back(&mut self) {
        self.num_steps = self.num_steps.saturating_sub(1);
    }

    fn update_all(
        &mut self,
        parameters: &ParameterSet,
        learning_rate: f64,
        coefficient: Option<&Tensor>,
        held: Option<&Tensor>,
    ) -> Result<()> {
        let (state, elements) = (self.m.numel(), parameters.flat_master().numel());
        if state != elements {
            return Err(OptimError::OtherSet { state, parameters: elements });
        }
        self.num_steps += 1;
        no_grad(|| {
            let kind = parameters.flat_grad().kind();
            let coefficient = coefficient.map(|number| number.f_to_kind(kind)).transpose()?;
            match &self.own {
                Some(own) => {
                    let factor = factor(coefficient, held)?;
                    self.update_whole(own, parameters, learning_rate, factor.as_ref())
                }
                None => self.update_plainly(parameters, learning_rate, coefficient, held),
            }
        })
    }

    /// With libtorch's kernel.
    fn update_plainly(
        &self,
        parameters: &ParameterSet,
        learning_rate: f64,
        coefficient: Option<Tensor>,
        held: Option<&Tensor>,
    ) -> Result<()> {
        let gradients = parameters.flat_grad();
        let is_on_gpu = matches!(gradients.device(), Device::Cuda(_));
        let mut divisor = None;
        if let Some(coefficient) = coefficient {
            match is_on_gpu && gradients.kind() == Kind::Float {
                // The update's own kernel does it, which reads them anyway.
                true => divisor = Some(coefficient.f_reciprocal()?),
                false => drop(gradients.shallow_clone().f_mul_(&coefficient)?),
            }
        }
        let on_device = OnDevice { divisor: divisor.as_ref(), held };
        let decay = self.config.weight_decay;
        self.update(parameters, &self.decayed, (learning_rate, decay), on_device)?;
        self.update(parameters, &self.spared, (learning_rate, 0.0), on_device)?;
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
        let constants = self.constants(learning_rate, weight_decay);
        let (masters, gradients) = (cut(parameters.flat_master())?, cut(parameters.flat_grad())?);
        let (m, v) = (cut(&self.m)?, cut(&self.v)?);
        Ok(ops::fused_adamw(&masters, &gradients, &m, &v, &constants, on_device)?)
    }

    fn constants(&self, learning_rate: f64, weight_decay: f64) -> ops::AdamW {
        ops::AdamW {
            learning_rate,
            beta1: self.config.betas[0],
            beta2: self.config.betas[1],
            eps: self.config.eps,
            weight_decay,
            step: self.num_steps,
        }
    }

    /// All elements in one launch.
    fn update_whole(
        &self,
        Own { kernels, chunks }: &Own,
        parameters: &ParameterSet,
        learning_rate: f64,
        factor: Option<&Tensor>,
    ) -> Result<()> {
        // A sharded set's weights are gathered from all ranks, by others.
        let has_copy = parameters.has_compute_copy() && parameters.sharding().ranks == 1;
        let buffers = Buffers {
            master: parameters.flat_master(),
            gradients: parameters.flat_grad(),
            first: &self.m,
            second: &self.v,
            copy: has_copy.then(|| parameters.flat_compute()),
        };
        let constants = self.constants(learning_rate, self.config.weight_decay);
        Ok(adamw::adamw(kernels, buffers, chunks, factor, &constants)?)
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

/// What our kernel multiplies gradients by: `coefficient` to the bit, or NaN where `held` is 1,
/// which tells the kernel to change nothing.
fn factor(coefficient: Option<Tensor>, held: Option<&Tensor>) -> Result<Option<Tensor>> {
    let Some(held) = held else { return Ok(coefficient) };
    let goes = held.f_view(())?.f_rsub_scalar(1.0)?;
    // 1 / 1, or 0 / 0.
    let gate = goes.f_div(&goes)?;
    Ok(Some(match coefficient {
        Some(coefficient) => coefficient.f_mul(&gate)?,
        None => gate,
    }))
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
