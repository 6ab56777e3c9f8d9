//! How a run lies on its ranks: pure arithmetic, no torch, no IO.
//!
//! [`mesh`] names the axes and says who is where; [`memory`] estimates the bytes of a rank;
//! [`plan`] says which piece of each parameter it holds;
//! [`plan_table`] prints that; [`communication`] says what a rank sends in a step;
//! [`peers`] says which node keeps the copy of which;
//! [`stages`] cuts the model for a pipeline, and [`schedule`] says what each stage does when.

pub mod communication;
pub mod held;
pub mod memory;
pub mod mesh;
pub mod peers;
pub mod plan;
pub mod plan_table;
mod saving;
pub mod schedule;
pub mod sharded;
pub mod stages;

pub use communication::{Communication, communication};
pub use held::Held;
pub use memory::{Memory, memory_per_rank};
pub use mesh::{Axis, Mesh, MeshError};
pub use peers::{Group, Peers};
pub use schedule::Schedule;
pub use stages::{ChunkSpan, chunks};
