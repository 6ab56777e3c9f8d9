//! Numeric trouble: steps whose loss or gradient norm is not finite, or jumps. What is looked at,
//! and what follows, is the same on every rank, and a function of the training state.

mod attend;
pub mod faults;
mod finding;
mod replay;
mod watch;
mod window;

pub(crate) use attend::too_many;
pub use attend::{Response, attend};
pub use finding::{Finding, Print, Results};
pub use watch::{Limits, Spike, Trouble, Watch};
pub use window::{Measure, Window};
