//! How a run lies on its ranks: pure arithmetic, no torch, no IO.
//!
//! [`mesh`] names the axes and says who is where; [`memory`] estimates the bytes of a rank;
//! [`plan`] says which piece of each parameter it holds;
//! [`stages`] cuts the model for a pipeline, and [`schedule`] says what each stage does when.

pub mod memory;
pub mod mesh;
pub mod plan;
pub mod schedule;
pub mod stages;

pub use memory::{Memory, memory_per_rank};
pub use mesh::{Axis, Mesh, MeshError};
pub use schedule::Schedule;
pub use stages::{ChunkSpan, chunks};
