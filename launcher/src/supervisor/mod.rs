//! Runs the ranks of a run: starts them, hears what they say, and decides what follows from it.
//!
//! [`state`] decides and is pure ([`policy`] holds its words, [`cause`] its failures, [`stall`]
//! what it knows of progress, [`pace`] of slow ranks, [`state::growth`] when missing nodes may come
//! back); [`run`] carries out and is the sole owner of the state; [`rank`] holds the tasks of one
//! process, [`mpirun`] those of an MPI job; [`unix`] is the fence around the operating system;
//! [`relay`] passes on what ranks log; [`record`] writes the run's files, and [`ledger`] says what
//! its time was spent on; [`restore`] looks for checkpoints.

pub mod cause;
pub mod ledger;
pub mod mpirun;
pub mod pace;
pub mod policy;
pub mod rank;
pub mod record;
pub mod relay;
pub mod restore;
pub mod run;
pub mod stall;
pub mod state;
pub mod unix;
