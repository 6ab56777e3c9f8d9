//! The program that every rank runs.

pub mod tensorboard;
