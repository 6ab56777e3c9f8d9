//! What end-to-end tests share: a sandbox in which real `phalanx` processes run.

pub mod sandbox;
