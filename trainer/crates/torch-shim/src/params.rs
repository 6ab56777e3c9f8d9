//! Parameters as views of flat buffers: one for the master weights, one for the compute copy, one
//! for gradients.
//!
//! Every parameter starts on a 64-byte boundary of each buffer; the padding between stays zero, so
//! that whole ranges can be reduced, clipped and updated. The order is that of the specs, the same
//! on every rank.

mod storage;

use std::collections::BTreeMap;
use std::ops::Range;
use std::ptr::null_mut;
use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use crate::error::{Result, ShimError};
use crate::memory;
use crate::result::{call_ready_closure, check, drop_ready_closure, raw, ready_context};
use crate::sys::{self, RawDeferred, RawHook, RawParameter};

pub use storage::Memory;
use storage::{Ledger, bytes};

/// Parameters start at multiples of this many elements: 64 bytes of BF16, and more of wider types.
pub const ALIGNMENT_ELEMENTS: i64 = 32;

/// What a parameter is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParameterSpec {
    /// Its name in the model.
    pub name: String,
    /// Its shape; a linear weight is `[out, in]`.
    pub shape: Vec<i64>,
    /// Whether weight decay applies.
    pub decay: bool,
}

/// One parameter: views into the set's buffers.
#[derive(Debug)]
pub struct Parameter {
    /// Its place in the set.
    pub index: usize,
    /// Its name in the model.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i64>,
    /// What forward and backward read: a leaf that requires a gradient.
    pub compute: Tensor,
    /// What the optimizer updates (FP32, or FP64): the same storage as `compute` where the dtypes
    /// are equal; empty where the set is sharded, which owns pieces of units.
    pub master: Tensor,
    /// The accumulator (FP32, or FP64) that the fused operators add to.
    pub grad: Tensor,
    /// Whether weight decay applies.
    pub decay: bool,
    /// Its elements in each flat buffer, without padding.
    pub range: Range<i64>,
    handle: Handle,
}

impl Parameter {
    /// Another owner of the same storage, for a layer to keep.
    pub fn shallow_clone(&self) -> Parameter {
        Parameter {
            index: self.index,
            name: self.name.clone(),
            shape: self.shape.clone(),
            compute: self.compute.shallow_clone(),
            master: self.master.shallow_clone(),
            grad: self.grad.shallow_clone(),
            decay: self.decay,
            range: self.range.clone(),
            handle: self.handle.share(),
        }
    }

    /// Number of elements.
    pub fn num_elements(&self) -> i64 {
        self.range.end - self.range.start
    }

    pub(crate) fn raw(&self) -> *mut RawParameter {
        self.handle.0
    }
}

/// Reference-counted owner of the C++ side of a parameter.
#[derive(Debug)]
struct Handle(*mut RawParameter);

// SAFETY: the C++ object is counted atomically, and its tensors are used by one thread at a time,
// as tch's tensors are.
unsafe impl Send for Handle {}

impl Handle {
    fn share(&self) -> Handle {
        // SAFETY: the pointer is alive as long as `self` is.
        Handle(unsafe { sys::phx_parameter_share(self.0) })
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: this owner's reference is given back once.
        unsafe { sys::phx_parameter_free(self.0) }
    }
}

#[derive(Debug)]
struct Hook(*mut RawHook);

// SAFETY: the C++ object locks its closure and is counted atomically.
unsafe impl Send for Hook {}

impl Drop for Hook {
    fn drop(&mut self) {
        // SAFETY: this owner's reference is given back once.
        unsafe { sys::phx_hook_free(self.0) }
    }
}

/// Weight gradients that were put off: what is left of a backward pass.
#[derive(Debug)]
pub struct Deferred(*mut RawDeferred);

// SAFETY: the C++ object is used by one thread at a time.
unsafe impl Send for Deferred {}

impl Deferred {
    /// Makes the gradients, in the order in which they came up, and says which are ready.
    ///
    /// # Errors
    /// What the ready hook failed with, or a refusal of libtorch.
    pub fn run(self) -> Result<()> {
        // SAFETY: the object is alive with `self`.
        check(unsafe { sys::phx_deferred_run(self.0) })
    }
}

impl Drop for Deferred {
    fn drop(&mut self) {
        // SAFETY: this owner's reference is given back once.
        unsafe { sys::phx_deferred_free(self.0) }
    }
}

/// A run of elements of the flat buffers whose master weights and optimizer state are this rank's,
/// and where it begins in the buffers that hold nothing else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owned {
    /// Elements of the flat buffers.
    pub elements: Range<i64>,
    /// First element in the buffers of what is owned.
    pub start: i64,
}

/// Over how many ranks the master weights, their gradients and their state are cut, and which of
/// them this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sharding {
    /// Ranks.
    pub ranks: i64,
    /// Which of them.
    pub rank: i64,
}

impl Sharding {
    /// One rank owns all.
    pub const NONE: Self = Self { ranks: 1, rank: 0 };
}

/// The most bytes of a set that there were at once, by kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeakBytes {
    /// Weights that compute.
    pub weights: u64,
    /// Master weights; 0 where they are the weights that compute.
    pub master: u64,
    /// Gradients: of what is owned, and whole ones besides.
    pub gradients: u64,
}

/// Parameters whose weights are gathered, and whose gradients are reduced, together.
#[derive(Debug)]
pub struct Unit {
    /// Their places in the set.
    pub parameters: Range<usize>,
    /// Their elements of the flat index space, padding included.
    pub elements: Range<i64>,
    /// What of them is this rank's.
    pub owned: Owned,
    /// The weights that compute, `[elements]`.
    pub compute: Memory,
    /// The accumulators, `[elements]`.
    pub grad: Memory,
}

/// All parameters of a model (or of a shard of one) and their flat buffers.
///
/// Every parameter has a place in one flat index space. A set that is not sharded has one buffer
/// of each kind over all of it. A sharded one has buffers of each unit, and of what this rank owns.
#[derive(Debug)]
pub struct ParameterSet {
    parameters: Vec<Parameter>,
    by_name: BTreeMap<String, usize>,
    units: Vec<Unit>,
    sharding: Sharding,
    master: Tensor,
    owned_grad: Tensor,
    compute_bytes: Arc<Ledger>,
    grad_bytes: Arc<Ledger>,
    hook: Hook,
}

impl ParameterSet {
    /// Allocates the buffers, zeroed, and makes the views. `master` is FP32, or FP64 where
    /// `compute` is.
    ///
    /// # Errors
    /// When a name comes twice, the dtypes do not fit, or memory is short.
    pub fn new(
        specs: Vec<ParameterSpec>,
        compute: Kind,
        master: Kind,
        device: Device,
    ) -> Result<Self> {
        Self::sharded(vec![specs], (compute, master), device, Sharding::NONE)
    }

    /// As [`ParameterSet::new`], in units, with master weights and state cut over ranks: each
    /// unit's elements in as many equal pieces. Without cuts, all are one unit. The units of a cut
    /// set have no memory until it is taken, so that it is never there for all of them at once.
    ///
    /// # Errors
    /// As [`ParameterSet::new`].
    pub fn sharded(
        units: Vec<Vec<ParameterSpec>>,
        (compute, master): (Kind, Kind),
        device: Device,
        sharding: Sharding,
    ) -> Result<Self> {
        check_kinds(compute, master)?;
        let Sharding { ranks, rank } = sharding;
        let units = if ranks == 1 { vec![units.concat()] } else { units };
        let ends = |specs: &[ParameterSpec]| -> Vec<i64> {
            let sizes = specs.iter().map(|spec| spec.shape.iter().product());
            let end = |at: &mut i64, size: i64| {
                *at += up_to_multiple(size, ALIGNMENT_ELEMENTS);
                Some(*at)
            };
            sizes.scan(0, end).collect()
        };
        let length = |specs: &Vec<ParameterSpec>| {
            up_to_multiple(ends(specs).last().copied().unwrap_or(0), ALIGNMENT_ELEMENTS * ranks)
        };
        let total: i64 = units.iter().map(length).sum();
        let owned_master = memory::zeros(total / ranks, master, device)?;
        // Without shards, what is owned is what there is.
        let shared = ranks == 1;
        let owned_grad = memory::zeros(total / ranks, master, device)?;
        let mut set = ParameterSet {
            parameters: Vec::new(),
            by_name: BTreeMap::new(),
            units: Vec::with_capacity(units.len()),
            sharding,
            master: owned_master,
            owned_grad,
            compute_bytes: Arc::default(),
            grad_bytes: Arc::default(),
            hook: new_hook()?,
        };
        let mut first = 0;
        for specs in units {
            let elements = first..first + length(&specs);
            first = elements.end;
            let size = elements.end - elements.start;
            let share = size / ranks;
            let start = elements.start / ranks;
            let mine = elements.start + rank * share;
            let (compute_buffer, grad) = set.buffers(size, compute)?;
            let place = set.parameters.len();
            set.units.push(Unit {
                parameters: place..place + specs.len(),
                owned: Owned { elements: mine..mine + share, start },
                elements: elements.clone(),
                compute: Memory::new(compute_buffer, &set.compute_bytes),
                grad: Memory::new(grad, &set.grad_bytes),
            });
            let mut start = 0;
            for (end, spec) in ends(&specs).into_iter().zip(specs) {
                set.push(spec, start, elements.start)?;
                start = end;
            }
            if let Some(unit) = set.units.last().filter(|_| !shared) {
                unit.compute.release()?;
                unit.grad.release()?;
            }
        }
        Ok(set)
    }

    /// Weights and gradients of a unit: those of what is owned where nothing is cut.
    fn buffers(&self, size: i64, compute: Kind) -> Result<(Tensor, Tensor)> {
        let (master, device) = (self.master.kind(), self.master.device());
        if self.sharding.ranks > 1 {
            let empty = |kind| Tensor::f_empty([size], (kind, device));
            return Ok((empty(compute)?, empty(master)?));
        }
        let weights = match compute == master {
            true => self.master.shallow_clone(),
            false => memory::zeros(size, compute, device)?,
        };
        Ok((weights, self.owned_grad.shallow_clone()))
    }

    /// Adds a parameter of the newest unit, `start` elements into it.
    fn push(&mut self, spec: ParameterSpec, start: i64, unit_start: i64) -> Result<()> {
        let index = self.parameters.len();
        let elements: i64 = spec.shape.iter().product();
        let view =
            |buffer: &Tensor| buffer.f_narrow(0, start, elements)?.f_view(spec.shape.as_slice());
        let none = || ShimError::Invalid("a parameter without a unit".to_string());
        let unit = self.units.last().ok_or_else(none)?;
        let compute = view(unit.compute.tensor())?.f_detach()?.f_set_requires_grad(true)?;
        let grad = view(unit.grad.tensor())?;
        let master = match self.sharding.ranks {
            1 => view(&self.master)?,
            _ => self.master.f_narrow(0, 0, 0)?,
        };
        let mut handle = null_mut();
        // SAFETY: the tensors and the hook live through the call; the shim keeps references of its
        // own.
        check(unsafe {
            sys::phx_parameter_new(raw(&compute), raw(&grad), index, self.hook.0, &mut handle)
        })?;
        let handle = Handle(handle);
        if self.by_name.insert(spec.name.clone(), index).is_some() {
            return Err(ShimError::Invalid(format!("the parameter {} comes twice", spec.name)));
        }
        let ParameterSpec { name, shape, decay } = spec;
        let range = unit_start + start..unit_start + start + elements;
        let parameter =
            Parameter { index, name, shape, compute, master, grad, decay, range, handle };
        self.parameters.push(parameter);
        Ok(())
    }

    /// Number of parameters (tensors).
    pub fn len(&self) -> usize {
        self.parameters.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.parameters.is_empty()
    }

    /// Number of elements of all parameters, without padding.
    pub fn num_elements(&self) -> i64 {
        self.parameters.iter().map(Parameter::num_elements).sum()
    }

    /// The parameters in the order of the specs, which is that of the buffers.
    pub fn iter(&self) -> std::slice::Iter<'_, Parameter> {
        self.parameters.iter()
    }

    /// The parameters sorted by name: the same order on every rank, whatever it holds.
    pub fn iter_by_name(&self) -> impl Iterator<Item = &Parameter> {
        self.by_name.values().map(|&index| &self.parameters[index])
    }

    /// The parameter of that name.
    pub fn get(&self, name: &str) -> Option<&Parameter> {
        self.by_name.get(name).map(|&index| &self.parameters[index])
    }

    /// The parameter at a place in the order.
    pub fn at(&self, index: usize) -> Option<&Parameter> {
        self.parameters.get(index)
    }

    /// The master weights of all, padding included: `[elements]`; of what is owned where the set
    /// is sharded.
    pub fn flat_master(&self) -> &Tensor {
        &self.master
    }

    /// The compute copy of all (the master itself where the dtypes are equal): `[elements]`; of the
    /// first unit where the set is sharded.
    pub fn flat_compute(&self) -> &Tensor {
        self.units.first().map_or(&self.master, |unit| unit.compute.tensor())
    }

    /// The gradient accumulators of all: `[elements]`; of what is owned where the set is sharded.
    pub fn flat_grad(&self) -> &Tensor {
        &self.owned_grad
    }

    /// The units: what is gathered and reduced together.
    pub fn units(&self) -> &[Unit] {
        &self.units
    }

    /// How the set is cut over ranks.
    pub fn sharding(&self) -> Sharding {
        self.sharding
    }

    /// What of the flat index space is this rank's to update and to save.
    pub fn owned(&self) -> Vec<Owned> {
        self.units.iter().map(|unit| unit.owned.clone()).collect()
    }

    /// The master weights of what is owned: `[elements]`.
    pub fn owned_master(&self) -> &Tensor {
        &self.master
    }

    /// The gradients of what is owned: `[elements]`.
    pub fn owned_grad(&self) -> &Tensor {
        &self.owned_grad
    }

    /// The most bytes of it that there were at once, since it was made.
    pub fn peak_bytes(&self) -> PeakBytes {
        let is_cut = self.sharding.ranks > 1;
        let has_master = is_cut || self.has_compute_copy();
        let whole = if is_cut { self.grad_bytes.peak() } else { 0 };
        PeakBytes {
            weights: self.compute_bytes.peak(),
            master: if has_master { bytes(&self.master) } else { 0 },
            gradients: bytes(&self.owned_grad) + whole,
        }
    }

    /// The type that forward and backward compute in.
    pub fn compute_kind(&self) -> Kind {
        self.flat_compute().kind()
    }

    /// Whether the compute weights are of another type than the master weights.
    pub fn has_compute_copy(&self) -> bool {
        self.compute_kind() != self.master.kind()
    }

    /// Clears the gradients of what is owned.
    ///
    /// # Errors
    /// When libtorch refuses.
    pub fn zero_grad(&self) -> Result<()> {
        self.owned_grad.shallow_clone().f_zero_().map(drop)?;
        Ok(())
    }

    /// Casts the master weights into the compute copy. Nothing to do where they are one; a sharded
    /// set's weights must be gathered from all ranks instead.
    ///
    /// # Errors
    /// When libtorch refuses.
    pub fn refresh_compute(&self) -> Result<()> {
        if self.has_compute_copy() && self.sharding.ranks == 1 {
            let _guard = tch::no_grad_guard();
            self.flat_compute().shallow_clone().f_copy_(&self.master).map(drop)?;
        }
        Ok(())
    }

    /// Calls `hook` with a parameter's index each time that its gradient is complete for the graphs
    /// alive: in backward, on the thread that runs it, after its last use. An error of the hook
    /// becomes an error of backward. The hook must not set or clear hooks.
    ///
    /// # Errors
    /// When the shim refuses.
    pub fn set_ready_hook(
        &self,
        hook: impl Fn(usize) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let context = ready_context(Box::new(hook));
        // SAFETY: the hook is alive with `self`; the shim owns the context.
        check(unsafe {
            sys::phx_hook_set(self.hook.0, context, call_ready_closure, drop_ready_closure)
        })
    }

    /// Runs `backward` with the gradients of linear weights put off: those of inputs come first,
    /// because another rank waits for them (Qi et al. 2023, "Zero Bubble Pipeline Parallelism").
    ///
    /// # Errors
    /// What `backward` failed with.
    pub fn deferring<E: From<ShimError>>(
        &self,
        backward: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<Deferred, E> {
        // SAFETY: the hook is alive with `self`.
        check(unsafe { sys::phx_hook_defer(self.hook.0) })?;
        let outcome = backward();
        let mut pointer = null_mut();
        // SAFETY: as above; the place for the answer lives through the call.
        check(unsafe { sys::phx_hook_take_deferred(self.hook.0, &mut pointer) })?;
        let deferred = Deferred(pointer);
        outcome.map(|()| deferred)
    }

    /// Takes the ready hook away.
    ///
    /// # Errors
    /// When the shim refuses.
    pub fn clear_ready_hook(&self) -> Result<()> {
        // SAFETY: the hook is alive with `self`.
        check(unsafe { sys::phx_hook_clear(self.hook.0) })
    }
}

fn up_to_multiple(size: i64, of: i64) -> i64 {
    (size + of - 1) / of * of
}

fn new_hook() -> Result<Hook> {
    let mut hook = null_mut();
    // SAFETY: the place for the answer lives through the call.
    check(unsafe { sys::phx_hook_new(&mut hook) })?;
    Ok(Hook(hook))
}

fn check_kinds(compute: Kind, master: Kind) -> Result<()> {
    match (compute, master) {
        (Kind::Double, Kind::Double) | (Kind::Float | Kind::BFloat16 | Kind::Half, Kind::Float) => {
            Ok(())
        }
        _ => Err(ShimError::Invalid(format!(
            "compute {compute:?} with master {master:?}: the master is Double for Double, \
             and Float for all else"
        ))),
    }
}
