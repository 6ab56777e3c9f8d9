//! Random initial weights as a pure function of (seed, tensor name, element).
//!
//! No generator is carried along: element `i` of the tensor that Hugging Face's files call `name`
//! has the same value whatever the layout, the order of filling or the number of threads. A rank
//! that holds a piece of a tensor fills just that piece.

use crate::error::Result;
use crate::random::RandomStream;
use model_spec::{Init, LocalParameter, LocalPart};
use std::ops::Range;
use torch_shim::memory;
use torch_shim::params::ParameterSet;
use torch_shim::tch::{Tensor, no_grad};

/// Elements made at a time where they are not made in place: bounds the memory beside the weights.
const CHUNK_ELEMENTS: usize = 1 << 22;

/// Elements that are not worth a thread of their own.
const THREAD_ELEMENTS: usize = 1 << 16;

/// Fills `out` with elements `first..first + out.len()` of the tensor `name`: normal, around 0.
/// Values are rounded to FP32 whatever the compute dtype, so that all start from the same model.
pub fn fill_normal(seed: u64, name: &str, std: f64, first: u64, out: &mut [f32]) {
    let stream = RandomStream::new(seed, name);
    let threads = usize::try_from(torch_shim::tch::get_num_threads()).unwrap_or(1).max(1);
    let per_thread = out.len().div_ceil(threads).max(THREAD_ELEMENTS);
    if out.len() <= per_thread {
        return fill_piece(stream, std, first, out);
    }
    std::thread::scope(|scope| {
        for (index, piece) in out.chunks_mut(per_thread).enumerate() {
            let first = first + (index * per_thread) as u64;
            scope.spawn(move || fill_piece(stream, std, first, piece));
        }
    });
}

fn fill_piece(stream: RandomStream, std: f64, first: u64, out: &mut [f32]) {
    let (lead, rest) = out.split_at_mut(((first % 2) as usize).min(out.len()));
    let mut element = first;
    if let [odd] = lead {
        *odd = (std * stream.normal_pair(element / 2).1) as f32;
        element += 1;
    }
    let (pairs, last) = rest.split_at_mut(rest.len() / 2 * 2);
    stream.fill_normal_pairs(element / 2, std, pairs);
    element += pairs.len() as u64;
    if let [last] = last {
        *last = (std * stream.normal_pair(element / 2).0) as f32;
    }
}

/// Writes the initial values of what is owned into the master copies, and refreshes the compute
/// copies. `held` is what `parameters` was allocated from.
///
/// # Errors
/// Where libtorch refuses the copies.
pub fn initialize(seed: u64, held: &[LocalParameter], parameters: &ParameterSet) -> Result<()> {
    let owned = parameters.owned();
    for (local, parameter) in held.iter().zip(parameters.iter()) {
        let width: usize = local.shape.iter().skip(1).product();
        for part in &local.parts {
            let first = parameter.range.start as usize + part.row_start * width;
            for run in &owned {
                let (from, to) = (run.elements.start as usize, run.elements.end as usize);
                let (low, high) = (first.max(from), (first + part.num_elements()).min(to));
                if low >= high {
                    continue;
                }
                let start = run.start as usize + low - from;
                let target = parameters.owned_master();
                let target = target.f_narrow(0, start as i64, (high - low) as i64)?;
                match local.spec.init {
                    Init::Ones => fill_ones(&target)?,
                    Init::Normal { std } => {
                        fill_elements(seed, part, std, low - first..high - first, &target)?;
                    }
                }
            }
        }
    }
    parameters.refresh_compute()?;
    Ok(())
}

/// Fills a buffer with the elements `range` of a part, counted as they are held.
fn fill_elements(
    seed: u64,
    part: &LocalPart,
    std: f64,
    range: Range<usize>,
    target: &Tensor,
) -> Result<()> {
    let widths = (part.columns.len(), part.shape.get(1).copied().unwrap_or(1));
    let in_place = |out: &mut [f32]| {
        fill_run(seed, part, std, (range.start, widths.0, widths.1), out);
    };
    if memory::write_floats(&mut target.shallow_clone(), in_place).is_some() {
        return Ok(());
    }
    let mut chunk = vec![0.0_f32; CHUNK_ELEMENTS.min(range.len())];
    for offset in range.clone().step_by(CHUNK_ELEMENTS) {
        let length = CHUNK_ELEMENTS.min(range.end - offset);
        fill_run(seed, part, std, (offset, widths.0, widths.1), &mut chunk[..length]);
        let values = Tensor::f_from_slice(&chunk[..length])?;
        let mut place = target.f_narrow(0, (offset - range.start) as i64, length as i64)?;
        no_grad(|| place.f_copy_(&values))?;
    }
    Ok(())
}

/// Elements of a part from `offset` on, counted as they are held.
fn fill_run(
    seed: u64,
    part: &LocalPart,
    std: f64,
    (offset, width, whole_width): (usize, usize, usize),
    out: &mut [f32],
) {
    for piece in part.rectangles(offset..offset + out.len()) {
        // Whole rows lie one after another in the whole tensor too.
        let rows = if width == whole_width { 1 } else { piece.rows.len() };
        let run = piece.num_elements() / rows;
        for row in 0..rows {
            let first = (piece.rows.start + row) * whole_width + piece.columns.start;
            let at = piece.start - offset + row * run;
            fill_normal(seed, &part.hf_name, std, first as u64, &mut out[at..at + run]);
        }
    }
}

fn fill_ones(master: &Tensor) -> Result<()> {
    let mut master = master.shallow_clone();
    let _ = no_grad(|| master.f_fill_(1.0))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(seed: u64, name: &str, first: u64, count: usize) -> Vec<f32> {
        let mut out = vec![f32::NAN; count];
        fill_normal(seed, name, 1.0, first, &mut out);
        out
    }

    #[test]
    fn any_piece_equals_the_same_elements_of_the_whole() {
        let whole = filled(7, "a", 0, 300_001);
        for (first, count) in [(0, 1), (1, 1), (1, 2), (3, 200_000), (299_999, 2), (65_535, 4)] {
            assert_eq!(filled(7, "a", first as u64, count), whole[first..first + count]);
        }
        assert!(filled(7, "a", 5, 0).is_empty());
    }

    #[test]
    fn seeds_and_names_are_independent() {
        let n = 100_000;
        let base = filled(1, "a", 0, n);
        for other in [filled(2, "a", 0, n), filled(1, "b", 0, n), filled(1, "a", n as u64, n)] {
            let correlation: f64 =
                base.iter().zip(&other).map(|(x, y)| f64::from(x * y)).sum::<f64>() / n as f64;
            // Standard error 1 / sqrt(n) = 0.0032.
            assert!(correlation.abs() < 0.013, "{correlation}");
        }
    }

    #[test]
    fn values_are_standard_normal() {
        let n = 1_000_000;
        let values = filled(3, "normal", 0, n);
        let moment =
            |power: i32| values.iter().map(|&x| f64::from(x).powi(power)).sum::<f64>() / n as f64;
        // Four standard errors of the first four moments of a normal distribution.
        for (power, expected, deviation) in [
            (1, 0.0, 1.0),
            (2, 1.0, 2.0_f64.sqrt()),
            (3, 0.0, 15.0_f64.sqrt()),
            (4, 3.0, 96.0_f64.sqrt()),
        ] {
            let got = moment(power);
            assert!((got - expected).abs() < 4.0 * deviation / 1e3, "moment {power}: {got}");
        }
        let beyond_three = values.iter().filter(|x| x.abs() > 3.0).count();
        assert!((2492..2908).contains(&beyond_three), "{beyond_three}"); // 2700 +- 4 sigma
    }
}
