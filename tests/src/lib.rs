//! What end-to-end tests share: a sandbox in which real `phalanx` processes run, a text to learn
//! from, comparisons of what was learned, and an object store that fails on demand.

pub mod losses;
pub mod object_store;
pub mod proxy;
pub mod random;
pub mod sandbox;
pub mod text;
