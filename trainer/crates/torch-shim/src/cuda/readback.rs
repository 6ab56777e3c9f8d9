//! Numbers on their way from where they were computed to the host.

use tch::{Device, Kind, Tensor};

use super::Event;
use crate::error::Result;
use crate::result::{made_one, raw};
use crate::sys;

/// Numbers of which the host needs to know only later: on a GPU they are copied while it goes on.
pub struct Readback(State);

enum State {
    Known(Vec<f64>),
    Copying { host: Tensor, end: Event },
}

impl Readback {
    /// Begins to read a tensor of any shape, behind what this thread has given its device. It may
    /// be written and dropped from then on.
    ///
    /// # Errors
    /// When libtorch refuses.
    pub fn begin(numbers: &Tensor) -> Result<Self> {
        let wide = numbers.f_detach()?.f_to_kind(Kind::Double)?.f_reshape([-1])?;
        let Device::Cuda(index) = wide.device() else {
            return Ok(Self(State::Known(Vec::try_from(&wide)?)));
        };
        // SAFETY: the tensor lives through the call.
        let host = made_one(|out| unsafe { sys::phx_download(raw(&wide), out) })?;
        Ok(Self(State::Copying { host, end: Event::on_current(index)? }))
    }

    /// Whether they are there, so that [`Readback::wait`] returns at once.
    ///
    /// # Errors
    /// When what computed them failed.
    pub fn is_there(&self) -> Result<bool> {
        match &self.0 {
            State::Known(_) => Ok(true),
            State::Copying { end, .. } => end.is_past(),
        }
    }

    /// Waits for them, and for nothing that was given the device later.
    ///
    /// # Errors
    /// When what computed them failed.
    pub fn wait(self) -> Result<Vec<f64>> {
        match self.0 {
            State::Known(numbers) => Ok(numbers),
            State::Copying { host, end } => {
                end.wait()?;
                Ok(Vec::try_from(&host)?)
            }
        }
    }
}
