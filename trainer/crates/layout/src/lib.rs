//! How a run lies on its ranks: pure arithmetic, no torch, no IO.
//!
//! [`mesh`] names the axes and says who is where; [`memory`] estimates the bytes of a rank.

pub mod memory;
pub mod mesh;

pub use memory::{Memory, memory_per_rank};
pub use mesh::{Axis, Mesh, MeshError};
