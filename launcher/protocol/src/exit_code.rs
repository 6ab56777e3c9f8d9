//! Every exit code of `phalanx` and of a rank, in one place. Scripts rely on them.

/// Done; also the resume of a run that had finished.
pub const DONE: i32 = 0;
/// Gave up, differs or damaged.
pub const FAILED: i32 = 1;
/// Usage or config; trying again without a change is of no use.
pub const CONFIG: i32 = 64;
/// Pre-empted with the state saved: queue again.
pub const PREEMPTED: i32 = 75;
/// This node is unhealthy: queue again elsewhere.
pub const NODE_UNHEALTHY: i32 = 76;
/// Do not queue again: the same failure at the same step, three times.
pub const DO_NOT_REQUEUE: i32 = 93;
/// Interrupted twice: stopped at once, nothing saved.
pub const INTERRUPTED: i32 = 130;
