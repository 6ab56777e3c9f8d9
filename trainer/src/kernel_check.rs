//! `phalanx-trainer kernels`: what this device computes, operator by operator, against the same in
//! FP64 on the CPU: values and gradients, on inputs that both hold exactly.

use crate::error::{Result, TrainError};
use crate::gpu::choose;
use crate::setup::{prepare_libtorch, read_config};
use std::path::PathBuf;
use torch_shim::flash::{Kernel, misbehaviour};
use torch_shim::fused;
use torch_shim::params::{ParameterSet, ParameterSpec};
use torch_shim::tch::{Device, Kind, Tensor, no_grad};
use torch_shim::{Result as ShimResult, autograd};

/// Of which device.
#[derive(Debug, clap::Args)]
pub struct KernelArgs {
    /// A run config, for its device and threads.
    #[arg(long)]
    config: PathBuf,
}

/// Batch, sequence and width of the inputs.
const SHAPE: [i64; 3] = [2, 96, 256];
/// Rows of tables.
const VOCABULARY: i64 = 512;
/// Query heads, key heads and width of each in the fused projection.
const HEADS: (i64, i64, i64) = (4, 2, 64);

/// Unit roundoff of BF16, whose significands have 8 bits.
const BF16_UNIT: f64 = 1.0 / 256.0;

/// The largest relative deviation, in the 2-norm, that is rounding.
///
/// Where each element of a result is off by at most k units of its own, so is the norm: results in
/// BF16 stand behind that many roundings ([`Operator::roundings`]), each of one unit at the most
/// (0.43 of it in the mean square). All else is FP32, which is far less.
///
/// In FP32, sums of up to 512 products are made in another order: 512 x 2^-24 at the worst, 3e-5,
/// and far below a tenth of it where errors do not conspire. A product whose operands a GPU rounds
/// to TF32's 11 bits is off by 2^-12 each, 2e-4, and is seen.
fn limit(kind: Kind, roundings: f64) -> f64 {
    if kind == Kind::BFloat16 { roundings * BF16_UNIT } else { 1e-5 }
}

/// An operator over parameters, and inputs of whole numbers or of real ones.
struct Operator {
    name: &'static str,
    /// Roundings to BF16 between inputs and results, gradients included.
    roundings: f64,
    parameters: &'static [&'static [i64]],
    inputs: &'static [&'static [i64]],
    run: fn(&ParameterSet, &[Tensor]) -> ShimResult<Vec<Tensor>>,
}

const OPERATORS: &[Operator] = &[
    Operator {
        name: "linear",
        // The result, and sums of parts of it, which cuBLAS may make in BF16.
        roundings: 2.0,
        parameters: &[&[384, 256]],
        inputs: &[&SHAPE],
        run: |p, x| Ok(vec![fused::linear(&x[0], first(p)?)?]),
    },
    Operator {
        name: "embedding",
        // None: rows are copied, and their gradients summed in FP32.
        roundings: 0.01,
        parameters: &[&[VOCABULARY, 256]],
        inputs: &[],
        run: |p, _| Ok(vec![fused::embedding(&tokens(p)?, first(p)?)?]),
    },
    Operator {
        name: "rms_norm",
        // The result alone.
        roundings: 1.0,
        parameters: &[&[256]],
        inputs: &[&SHAPE],
        run: |p, x| Ok(vec![fused::rms_norm(&x[0], first(p)?, 1e-5)?]),
    },
    Operator {
        name: "add_rms_norm",
        // The sum; twice more by its square; the result, or the sum of the gradients.
        roundings: 4.0,
        parameters: &[&[256]],
        inputs: &[&SHAPE, &SHAPE],
        run: |p, x| {
            let (normed, sum) = fused::add_rms_norm(&x[0], &x[1], first(p)?, 1e-5)?;
            Ok(vec![normed, sum])
        },
    },
    Operator {
        name: "rope_qkv",
        // The result alone.
        roundings: 1.0,
        parameters: &[],
        inputs: &[&[2, 96, (HEADS.0 + 2 * HEADS.1) * HEADS.2]],
        run: |_, x| {
            let kind = if x[0].kind() == Kind::Double { Kind::Double } else { Kind::Float };
            let angles = numbers(&[96, HEADS.2 / 2], 5, Kind::Float)?.f_to_device(x[0].device())?;
            let angles = Tensor::f_cat(&[&angles, &angles], 1)?;
            let (cos, sin) = (angles.f_cos()?.f_to_kind(kind)?, angles.f_sin()?.f_to_kind(kind)?);
            let (q, k, v) = fused::rope_qkv(&x[0], &cos, &sin, HEADS.0, HEADS.1, HEADS.2)?;
            Ok(vec![q, k, v])
        },
    },
    Operator {
        name: "swiglu",
        // The result alone.
        roundings: 1.0,
        parameters: &[],
        inputs: &[&[2, 96, 512]],
        run: |_, x| Ok(vec![fused::swiglu(&x[0])?]),
    },
    Operator {
        name: "head_loss",
        // Logits of up to 26 are rounded, and stand in exponentials. What this does to the
        // gradients comes to 1.6 units in the mean square, with their own roundings to 1.75 (no
        // bound by the largest error says anything here): half as much again.
        roundings: 2.5,
        parameters: &[&[VOCABULARY, 256]],
        inputs: &[&SHAPE],
        run: |p, x| {
            let targets = tokens(p)?;
            Ok(vec![fused::head_loss(&x[0], first(p)?, &targets, 1.0 / 192.0, 64)?])
        },
    },
];

fn first(set: &ParameterSet) -> ShimResult<&torch_shim::params::Parameter> {
    set.at(0).ok_or_else(|| torch_shim::ShimError::Invalid("no parameter".into()))
}

/// Rows of a table, some of them many times.
fn tokens(set: &ParameterSet) -> ShimResult<Tensor> {
    let ids: Vec<i64> = (0..SHAPE[0] * SHAPE[1]).map(|at| at * at % 37 * 13 % VOCABULARY).collect();
    let ids = Tensor::f_from_slice(&ids)?.f_view([SHAPE[0], SHAPE[1]])?;
    Ok(ids.f_to_device(set.flat_grad().device())?)
}

/// Numbers between -1 and 1 that `kind` holds, in FP64: as good as random, so that sums of them
/// lose no more than others do.
fn numbers(shape: &[i64], seed: u64, kind: Kind) -> ShimResult<Tensor> {
    let count: i64 = shape.iter().product();
    let number = |at: i64| {
        // A step of splitmix64, whose high bits are used.
        let mut x = (at as u64 ^ seed << 40).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
    };
    let values: Vec<f64> = (0..count).map(number).collect();
    let values = Tensor::f_from_slice(&values)?.f_to_kind(kind)?;
    Ok(values.f_to_kind(Kind::Double)?.f_view(shape)?)
}

/// Outputs, gradients of the inputs and gradients of the parameters, in FP64 on the CPU; computed
/// in `kind` from numbers that `held` holds.
fn results(
    operator: &Operator,
    (kind, held): (Kind, Kind),
    device: Device,
) -> ShimResult<Vec<Tensor>> {
    let spec = |(index, shape): (usize, &&[i64])| ParameterSpec {
        name: index.to_string(),
        shape: shape.to_vec(),
        decay: true,
    };
    let specs: Vec<ParameterSpec> = operator.parameters.iter().enumerate().map(spec).collect();
    let master = if kind == Kind::Double { Kind::Double } else { Kind::Float };
    let set = ParameterSet::new(specs, kind, master, device)?;
    for (index, parameter) in set.iter().enumerate() {
        let values = numbers(&parameter.shape, 10 + index as u64, held)?;
        no_grad(|| parameter.master.shallow_clone().f_copy_(&values))?;
    }
    set.refresh_compute()?;
    let leaf = |(index, shape): (usize, &&[i64])| -> ShimResult<Tensor> {
        let values = numbers(shape, 20 + index as u64, held)?;
        Ok(values.f_to_device(device)?.f_to_kind(kind)?.f_set_requires_grad(true)?)
    };
    let inputs =
        operator.inputs.iter().enumerate().map(leaf).collect::<ShimResult<Vec<Tensor>>>()?;
    let outputs = (operator.run)(&set, &inputs)?;
    let given = outputs.iter().enumerate().map(|(index, output)| -> ShimResult<Tensor> {
        if output.dim() == 0 {
            // A loss, whose gradient must be one.
            return Ok(output.f_ones_like()?);
        }
        let values = numbers(&output.size(), 30 + index as u64, held)?;
        Ok(values.f_to_device(device)?.f_to_kind(output.kind())?)
    });
    let given = given.collect::<ShimResult<Vec<Tensor>>>()?;
    autograd::backward(&outputs.iter().collect::<Vec<_>>(), &given.iter().collect::<Vec<_>>())?;
    let gradients = inputs.iter().map(|input| input.f_grad());
    let gradients = gradients.collect::<std::result::Result<Vec<_>, _>>()?;
    let of_parameters = set.iter().map(|parameter| parameter.grad.shallow_clone());
    let all = outputs.into_iter().chain(gradients).chain(of_parameters);
    all.map(|x| Ok(x.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?)).collect()
}

/// The largest relative deviation of an operator's results; two runs must be equal.
fn deviation(operator: &Operator, kind: Kind, device: Device) -> ShimResult<(f64, bool)> {
    let expected = results(operator, (Kind::Double, kind), Device::Cpu)?;
    let run = || results(operator, (kind, kind), device);
    let (found, again) = (run()?, run()?);
    let mut is_same = true;
    for (found, again) in found.iter().zip(&again) {
        is_same &= found.f_equal(again)?;
    }
    Ok((farthest(&found, &expected)?, is_same))
}

/// The largest relative deviation of any of these, in the 2-norm.
fn farthest(found: &[Tensor], expected: &[Tensor]) -> ShimResult<f64> {
    let mut worst = 0.0_f64;
    for (found, expected) in found.iter().zip(expected) {
        let norm = expected.f_norm()?.f_double_value(&[])?.max(f64::MIN_POSITIVE);
        let relative = found.f_sub(expected)?.f_norm()?.f_double_value(&[])? / norm;
        // A comparison with NaN would not see it.
        worst = if relative.is_nan() { f64::INFINITY } else { worst.max(relative) };
    }
    Ok(worst)
}

/// Checks all and prints a line of JSON for each.
///
/// # Errors
/// Where something is wrong; what, stands in the lines.
pub fn run(args: &KernelArgs) -> Result<()> {
    let config = read_config(&args.config)?;
    prepare_libtorch(config.cluster.threads_per_rank.unwrap_or(1))?;
    let device = choose(&config, 0)?.device;
    let mut num_wrong = 0;
    let mut tell = |name: String, is_right: bool, figure: String| {
        num_wrong += usize::from(!is_right);
        let line = serde_json::json!({ "name": name, "is_right": is_right, "figure": figure });
        println!("{line}");
    };
    for operator in OPERATORS {
        for kind in [Kind::BFloat16, Kind::Float] {
            let name = format!("{} {kind:?}", operator.name);
            let limit = limit(kind, operator.roundings);
            let (deviation, is_same) = match deviation(operator, kind, device) {
                Ok(found) => found,
                Err(error) => {
                    tell(name, false, error.to_string());
                    continue;
                }
            };
            let same = if is_same { "the same twice" } else { "NOT the same twice" };
            let figure = format!("off by {deviation:.1e} (limit {limit:.0e}), {same}");
            tell(name, deviation <= limit && is_same, figure);
        }
    }
    for kernel in kernels(device) {
        for is_packed in [false, true] {
            let shapes = [(32, 8, 128), (8, 8, 64), (6, 1, 64)];
            let wrong = shapes.iter().find_map(|shape| {
                let told = misbehaviour(*kernel, *shape, device, is_packed);
                let told = told.unwrap_or_else(|error| Some(error.to_string()));
                told.map(|wrong| format!("{shape:?}: {wrong}"))
            });
            let form = if is_packed { "within documents" } else { "of whole rows" };
            let name = format!("attention by {kernel:?}, {form}");
            let figure = wrong.clone().unwrap_or("three shapes of heads, each twice".into());
            // A run takes cuDNN's only where it finds them right.
            let is_right = wrong.is_none() || *kernel == Kernel::Cudnn;
            tell(name, is_right, figure);
        }
    }
    match num_wrong {
        0 => Ok(()),
        _ => Err(TrainError::Panic(format!("{num_wrong} kernels compute something else"))),
    }
}

fn kernels(device: Device) -> &'static [Kernel] {
    match device {
        Device::Cuda(_) => &[Kernel::Flash, Kernel::Cudnn],
        _ => &[Kernel::Plain],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a CPU too they are held against FP64.
    #[test]
    fn operators_are_within_their_limits() {
        for operator in OPERATORS {
            for kind in [Kind::BFloat16, Kind::Float] {
                let (worst, is_same) = deviation(operator, kind, Device::Cpu).unwrap();
                let limit = limit(kind, operator.roundings);
                println!("{} {kind:?}: {worst:.2e}, limit {limit:.2e}", operator.name);
                assert!(worst <= limit && is_same, "{} {kind:?}: {worst:e}", operator.name);
            }
        }
    }

    /// What another operator computes in `kind`, held against what `name` computes in FP64, is
    /// seen.
    fn is_seen(
        name: &str,
        kind: Kind,
        run: fn(&ParameterSet, &[Tensor]) -> ShimResult<Vec<Tensor>>,
    ) {
        let right = OPERATORS.iter().find(|operator| operator.name == name).unwrap();
        let wrong = Operator { run, ..*right };
        let expected = results(right, (Kind::Double, kind), Device::Cpu).unwrap();
        let found = results(&wrong, (kind, kind), Device::Cpu).unwrap();
        let worst = farthest(&found, &expected).unwrap();
        println!("{name} {kind:?}, wrong: {worst:.2e}");
        assert!(worst > limit(kind, right.roundings), "{name} {kind:?}: {worst:e}");
    }

    #[test]
    fn errors_are_seen() {
        for kind in [Kind::BFloat16, Kind::Float] {
            // One of 256 products is left out.
            is_seen("linear", kind, |p, x| {
                let cut = x[0].f_slice(-1, 0, 255, 1)?.f_constant_pad_nd([0, 1])?;
                Ok(vec![fused::linear(&cut, first(p)?)?])
            });
            // One row is another's.
            is_seen("embedding", kind, |p, _| {
                let mut ids = tokens(p)?;
                let _ = ids.get(0).get(5).fill_(3);
                ids = ids.f_contiguous()?;
                Ok(vec![fused::embedding(&ids, first(p)?)?])
            });
            is_seen("rms_norm", kind, |p, x| Ok(vec![fused::rms_norm(&x[0], first(p)?, 4e-3)?]));
            is_seen("add_rms_norm", kind, |p, x| {
                let (normed, sum) = fused::add_rms_norm(&x[0], &x[1], first(p)?, 3e-2)?;
                Ok(vec![normed, sum])
            });
            is_seen("swiglu", kind, |_, x| Ok(vec![fused::swiglu(&x[0])?.f_mul_scalar(1.006)?]));
            // A token counts for the one before it.
            is_seen("head_loss", kind, |p, x| {
                let targets = tokens(p)?.f_roll([1], [1])?;
                Ok(vec![fused::head_loss(&x[0], first(p)?, &targets, 1.0 / 192.0, 64)?])
            });
        }
        // Operands of TF32's 11 bits.
        is_seen("linear", Kind::Float, |p, x| {
            let many = x[0].f_mul_scalar(8193.0)?;
            let short = many.f_sub(&many.f_sub(&x[0])?)?;
            // The gradient is the right one.
            let short = x[0].f_add(&short.f_sub(&x[0])?.f_detach()?)?;
            Ok(vec![fused::linear(&short, first(p)?)?])
        });
    }
}
