//! The messages from one rank to another with one tag.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};

use torch_shim::cuda::Event;
use torch_shim::tch::Tensor;

use crate::error::{CommError, Result};
use crate::nccl::lane::{Lane, Place};
use crate::nccl::native::buffer;
use crate::nccl::{Route, WATCH};
use crate::work::{Completion, Finisher, Work};

/// One end of it. Its thread ends when it is dropped, or when something fails.
pub(crate) struct Channel {
    place: Arc<Place>,
    queue: Sender<Job>,
}

struct Job {
    tensor: Tensor,
    after: Event,
    finisher: Finisher,
}

impl Channel {
    pub(crate) fn open(place: &Arc<Place>, route: Route, own: usize) -> Result<Channel> {
        let (from, to, tag) = route;
        let name = format!("{}-{from}-to-{to}-{tag}", place.group);
        let (sender, receiver) = channel();
        let of_thread = place.clone();
        std::thread::Builder::new()
            .name(format!("comm-{name}"))
            .spawn(move || {
                if let Err(error) = carry(&of_thread, &name, own == from, &receiver) {
                    of_thread.failed(&error);
                    for job in receiver.try_iter() {
                        job.finisher.finish(Err(error.clone()));
                    }
                }
            })
            .map_err(|error| {
                CommError::Backend(format!("group {}: no thread: {error}", place.group))
            })?;
        Ok(Channel { place: place.clone(), queue: sender })
    }

    pub(crate) fn put(&self, tensor: Tensor, after: Event) -> Result<Work> {
        let completion = Arc::new(Completion::default());
        let job = Job { tensor, after, finisher: Finisher(completion.clone()) };
        if self.queue.send(job).is_err() {
            self.place.failure()?;
            let cause = "its thread is gone".to_string();
            return Err(CommError::Dead { group: self.place.group.clone(), cause });
        }
        Ok(Work::queued(completion))
    }
}

/// Carries the messages, in order; the two ranks meet at the first.
fn carry(place: &Arc<Place>, name: &str, sends: bool, jobs: &Receiver<Job>) -> Result<()> {
    let mut lane = None;
    let mut number = 0u64;
    loop {
        let job = match jobs.recv_timeout(WATCH) {
            Ok(job) => job,
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
            Err(RecvTimeoutError::Timeout) => {
                lane.as_ref().map_or(Ok(()), Lane::watch)?;
                continue;
            }
        };
        let what = format!("message {number} of {name}");
        let put = |lane: &mut Option<Lane>| {
            let lane = match lane {
                Some(lane) => lane,
                None => lane.insert(Lane::connect(place, name, (usize::from(!sends), 2))?),
            };
            let whole = buffer(&job.tensor)?;
            let tensors = vec![job.tensor];
            lane.put(&what, job.after, tensors, &|nccl, stream| match sends {
                true => nccl.send(whole, 1, stream),
                false => nccl.recv(whole, 0, stream),
            })
        };
        let result = put(&mut lane);
        let error = result.as_ref().err().cloned();
        job.finisher.finish(result.map(Some));
        if let Some(error) = error {
            return Err(error);
        }
        number += 1;
    }
}
