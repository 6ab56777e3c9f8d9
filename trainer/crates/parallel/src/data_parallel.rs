//! Data parallelism: gradients are summed over the ranks in buckets, while backward goes on.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use collectives::{CommError, Communicator, ReduceOp, Work};
use torch_shim::ShimError;
use torch_shim::params::ParameterSet;
use torch_shim::tch::{Device, Tensor};

use crate::buckets::{Bucket, cut};
use crate::error::Result;
use crate::squares::Squares;

/// Sums the gradients of a parameter set over the ranks of a group.
///
/// Call [`DataParallel::begin_step`] at the begin of a step, [`DataParallel::begin_last_pass`]
/// before the backward passes that complete gradients, and [`DataParallel::finish`] after them. The
/// losses are already divided by the global number of targets, so the plain sum, in the
/// accumulators' own dtype (FP32, or FP64), is the gradient of the global batch. Buckets are issued
/// in one fixed order on every rank, whatever the order in which they become ready, so runs are
/// bit-equal.
pub struct DataParallel {
    state: Arc<Mutex<State>>,
}

struct State {
    comm: Arc<dyn Communicator>,
    buckets: Vec<Pending>,
    /// Which bucket each parameter is in.
    bucket_of: Vec<usize>,
    /// Buckets before this one have been issued.
    next: usize,
    /// Whether the next backward pass through a parameter is the step's last.
    is_last: Vec<bool>,
    /// Of what this rank adds.
    squares: Squares,
    /// What the hook failed with: libtorch makes a text of it.
    failure: Option<CommError>,
}

struct Pending {
    bucket: Bucket,
    view: Tensor,
    missing: Vec<bool>,
    num_missing: usize,
    work: Option<Work>,
}

impl DataParallel {
    /// Cuts the set's gradients into buckets of about `bucket_bytes`, and takes the set's ready
    /// hook.
    ///
    /// # Errors
    /// When libtorch refuses the views.
    pub fn new(
        set: &ParameterSet,
        comm: Arc<dyn Communicator>,
        bucket_bytes: usize,
    ) -> Result<Self> {
        let ranges: Vec<_> = set.iter().map(|parameter| parameter.range.clone()).collect();
        let limit = bucket_bytes / set.flat_grad().kind().elt_size_in_bytes();
        let mut bucket_of = vec![0; ranges.len()];
        let mut buckets = Vec::new();
        for bucket in cut(&ranges, i64::try_from(limit).unwrap_or(i64::MAX).max(1)) {
            bucket_of[bucket.parameters.clone()].fill(buckets.len());
            let length = bucket.elements.end - bucket.elements.start;
            let view = set.flat_grad().f_narrow(0, bucket.elements.start, length);
            let view = view.map_err(ShimError::from)?;
            let num_missing = bucket.parameters.len();
            buckets.push(Pending {
                view,
                missing: vec![true; num_missing],
                num_missing,
                work: None,
                bucket,
            });
        }
        let state = State {
            comm,
            buckets,
            next: 0,
            is_last: vec![false; bucket_of.len()],
            bucket_of,
            squares: Squares::new(false),
            failure: None,
        };
        let state = Arc::new(Mutex::new(state));
        let hook = Arc::downgrade(&state);
        set.set_ready_hook(move |index| match hook.upgrade() {
            Some(state) => {
                let mut state = lock(&state);
                state.ready(index).map_err(|error| {
                    let text = error.to_string();
                    state.failure.get_or_insert(error);
                    ShimError::Closure(text)
                })
            }
            None => Ok(()),
        })?;
        Ok(DataParallel { state })
    }

    /// Begins a step, whose gradients are zero so far.
    pub fn begin_step(&self) {
        let mut state = lock(&self.state);
        state.next = 0;
        state.is_last.fill(false);
        state.squares.clear();
        for pending in &mut state.buckets {
            pending.missing.fill(true);
            pending.num_missing = pending.missing.len();
            pending.work = None;
        }
    }

    /// The next backward pass completes the gradients of these parameters: a bucket that has all of
    /// its own is reduced at once.
    pub fn begin_last_pass(&self, parameters: &[usize]) {
        let mut state = lock(&self.state);
        for &parameter in parameters {
            if let Some(is_last) = state.is_last.get_mut(parameter) {
                *is_last = true;
            }
        }
    }

    /// Issues the buckets that are left (parameters without a use have none of their own), and
    /// waits for all: then the gradients are the sums over all ranks.
    ///
    /// # Errors
    /// What a reduction failed with; the gradients are worth nothing then.
    pub fn finish(&self) -> Result<()> {
        let mut state = lock(&self.state);
        state.is_last.fill(false);
        while state.next < state.buckets.len() {
            state.issue()?;
        }
        let works: Vec<Work> =
            state.buckets.iter_mut().filter_map(|pending| pending.work.take()).collect();
        drop(state);
        works.into_iter().try_for_each(Work::wait)?;
        Ok(())
    }

    /// From now on, [`DataParallel::local_squares`] is known after each step, for a pass over the
    /// gradients.
    pub fn keep_local_squares(&self) {
        lock(&self.state).squares = Squares::new(true);
    }

    /// Sum of the squares of what this rank added to the last step's gradients: an FP64 scalar,
    /// where these are.
    ///
    /// # Errors
    /// When libtorch refuses.
    pub fn local_squares(&self) -> Result<Tensor> {
        let state = lock(&self.state);
        let device = state.buckets.first().map_or(Device::Cpu, |pending| pending.view.device());
        Ok(state.squares.sum(device)?)
    }

    /// What a reduction that was issued in a backward pass failed with. It issues none: the other
    /// ranks may have failed too, or wait for something else.
    pub(crate) fn failure(&self) -> Option<CommError> {
        lock(&self.state).failure.take()
    }

    /// Number of buckets.
    pub fn num_buckets(&self) -> usize {
        lock(&self.state).buckets.len()
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn ready(&mut self, index: usize) -> Result<(), CommError> {
        if !self.is_last.get(index).copied().unwrap_or(false) {
            return Ok(());
        }
        let Some(&bucket) = self.bucket_of.get(index) else { return Ok(()) };
        let pending = &mut self.buckets[bucket];
        let place = index - pending.bucket.parameters.start;
        if std::mem::replace(&mut pending.missing[place], false) {
            pending.num_missing -= 1;
        }
        while self.buckets.get(self.next).is_some_and(|pending| pending.num_missing == 0) {
            self.issue()?;
        }
        Ok(())
    }

    fn issue(&mut self) -> Result<(), CommError> {
        let pending = &mut self.buckets[self.next];
        self.squares.add(&pending.view)?;
        if self.comm.size() > 1 {
            pending.work = Some(self.comm.all_reduce(&pending.view, ReduceOp::Sum)?);
        }
        self.next += 1;
        Ok(())
    }
}
