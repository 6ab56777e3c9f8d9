//! `phalanx-trainer bench device`: the ceilings of a device, measured: a large matrix product, and
//! a large copy. Whatever is computed on it takes no less time than its operations and bytes do at
//! these rates.

use crate::error::{Result, TrainError};
use crate::gpu::choose;
use crate::setup::{prepare_libtorch, read_config};
use kernels::ops::fp8::rows;
use run_config::Matmul;
use std::path::PathBuf;
use std::time::Instant;
use torch_shim::cuda::{self, Event};
use torch_shim::scaled::{self, Scaled};
use torch_shim::tch::{Device, Kind, Tensor, no_grad};

/// Repetitions before those that count.
const WARMUP: usize = 3;

/// What to measure.
#[derive(Debug, clap::Args)]
pub struct DeviceArgs {
    /// A run config, for its device and threads.
    #[arg(long)]
    config: PathBuf,
    /// Rows and columns of the matrices.
    #[arg(long, default_value_t = 8192)]
    side: i64,
    /// MiB that are copied.
    #[arg(long, default_value_t = 4096)]
    mib: i64,
    /// Repetitions, of which the median counts.
    #[arg(long, default_value_t = 20)]
    repeats: usize,
}

/// Measures and prints JSON: TFLOP/s of a BF16 product, and of one in FP8 where the config makes
/// such, and GB/s of a copy, bytes that are read and that are written counted.
///
/// # Errors
/// Where the config cannot be used or libtorch fails.
pub fn run(args: &DeviceArgs) -> Result<()> {
    let config = read_config(&args.config)?;
    prepare_libtorch(config.cluster.threads_per_rank.unwrap_or(1))?;
    let chosen = choose(&config, 0)?;
    let device = chosen.device;
    let side = args.side;
    // Random numbers: of zeros some hardware makes faster work.
    let random = |_| Tensor::f_randn([side, side], (Kind::BFloat16, device));
    let matrices = (0..2).map(random).collect::<std::result::Result<Vec<_>, _>>()?;
    let product = Tensor::f_empty([side, side], (Kind::BFloat16, device))?;
    let multiply = || -> Result<()> {
        let [a, b] = &matrices[..] else { return Ok(()) };
        let _ = a.f_matmul_out(&product, b)?;
        Ok(())
    };
    let product_s = no_grad(|| median_s(device, args.repeats, multiply))?;
    let elements = (args.mib << 20) / 4;
    let from = Tensor::f_randn([elements], (Kind::Float, device))?;
    let mut to = Tensor::f_empty([elements], (Kind::Float, device))?;
    let copy_s = median_s(device, args.repeats, || Ok(to.f_copy_(&from)?))?;
    let operations = 2.0 * (side as f64).powi(3);
    let mut result = serde_json::json!({
        "device": chosen.gpu.map_or("CPU".to_owned(), |gpu| gpu.card.name),
        "matmul_tflops": operations / product_s / 1e12,
        "matmul_side": side,
        "copy_gb_per_s": 8.0 * elements as f64 / copy_s / 1e9,
        "copy_mib": args.mib,
    });
    if config.precision.matmul == Matmul::Fp8 {
        let fp8_s = fp8_product_s(device, side, args.repeats)?;
        result["fp8_tflops"] = (operations / fp8_s / 1e12).into();
    }
    println!("{result}");
    Ok(())
}

/// The median time of a product of matrices that are in FP8 already.
fn fp8_product_s(device: Device, side: i64, repeats: usize) -> Result<f64> {
    let random = |_| -> Result<Scaled> {
        Ok(rows(None, &Tensor::f_randn([side, side], (Kind::BFloat16, device))?)?)
    };
    let matrices = (0..2).map(random).collect::<Result<Vec<_>>>()?;
    let multiply = || -> Result<()> {
        let [a, b] = &matrices[..] else { return Ok(()) };
        drop(scaled::product(a, b, scaled::accumulation())?);
        Ok(())
    };
    no_grad(|| median_s(device, repeats, multiply))
}

/// The median time of one call, by the device's own clock where it has one.
fn median_s(device: Device, repeats: usize, mut body: impl FnMut() -> Result<()>) -> Result<f64> {
    (0..WARMUP).try_for_each(|_| body())?;
    let mut times = Vec::with_capacity(repeats);
    match device {
        Device::Cuda(index) => {
            let mut marks = vec![Event::timed_on_current(index)?];
            for _ in 0..repeats {
                body()?;
                marks.push(Event::timed_on_current(index)?);
            }
            cuda::synchronize(index)?;
            for pair in marks.windows(2) {
                times.push(pair[0].ms_until(&pair[1])? / 1e3);
            }
        }
        _ => {
            for _ in 0..repeats {
                let started = Instant::now();
                body()?;
                times.push(started.elapsed().as_secs_f64());
            }
        }
    }
    times.sort_by(f64::total_cmp);
    let median = times.get(times.len() / 2).copied();
    median.ok_or_else(|| TrainError::Config("--repeats: at least 1".into()))
}
