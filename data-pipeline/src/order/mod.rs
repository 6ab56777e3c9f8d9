//! The order of the data as a pure function of the global sample index: no state, no IO, and
//! independent of the number of ranks.
//!
//! place in the order -> [`left_out`] -> global sample -> [`mixture`] -> sample of a source ->
//! epoch and position -> [`epoch`] -> window of row groups and place in it. Documents are shuffled
//! inside a window by the [`crate::packing`].

pub mod epoch;
pub mod feistel;
pub mod left_out;
pub mod mixture;

pub use epoch::{EpochOrder, GroupSize, OrderParams, SampleUnit, WindowSpan};
pub use left_out::LeftOut;
