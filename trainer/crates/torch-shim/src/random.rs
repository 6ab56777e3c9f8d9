//! Normal random numbers in bulk, with all lanes of the processor.

use crate::sys;

/// Fills `out`, of an even length, with the pairs of normals `first_pair..` of the stream `key`,
/// times `std`. The numbers are defined by the model's `random.rs`, bit by bit.
pub fn fill_normal_pairs(key: u64, first_pair: u64, std: f64, out: &mut [f32]) {
    let pairs = i64::try_from(out.len() / 2).unwrap_or(0);
    // SAFETY: `out` has room for twice as many numbers as `pairs`, which are all that is written.
    unsafe { sys::phx_normals(key, first_pair, pairs, std, out.as_mut_ptr()) };
}
