//! The program that every rank runs: it trains, validates, saves, and lets a model write.

pub mod attention;
pub mod backend;
pub mod bench;
pub mod cadence;
pub mod error;
pub mod faults;
pub mod generate;
pub mod gpu;
pub mod identity;
pub mod kernel_check;
pub mod late;
pub mod metrics;
pub mod numeric;
pub mod profile;
pub mod rank;
pub mod saving;
pub mod setup;
pub mod standing;
pub mod state;
pub mod store;
pub mod tensorboard;
pub mod train_loop;
pub mod train_step;
pub mod validation;
