//! Steps in floating-point operations a second, beside what the GPU could do at best.

use super::peak::peak_tflops;
use model_spec::{FlopConvention, flops_per_token};
use run_config::{ComputeDtype, Matmul, ModelConfig, RunConfig};

/// The speed of a rank's GPU in a step: the model's operations, those that are done again in the
/// backward pass not counted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    /// TFLOP/s, attention counted in full.
    pub tflops_full: f64,
    /// TFLOP/s, causal attention counted as half.
    pub tflops_half: f64,
    /// Share of the peak, attention counted in full; NaN where the peak is not known.
    pub mfu_full: f64,
    /// Share of the peak, causal attention counted as half; NaN where the peak is not known.
    pub mfu_half: f64,
}

/// Turns tokens a second into these.
#[derive(Clone, Debug)]
pub struct Speedometer {
    model: ModelConfig,
    num_ranks: usize,
    /// TFLOP/s; NaN where it is not known.
    peak: f64,
}

impl Speedometer {
    /// Of a run on `num_ranks` GPUs, of which this rank's has this name. The peak is that of BF16
    /// products, so that other formats have none.
    pub fn new(config: &RunConfig, num_ranks: usize, gpu_name: &str) -> Self {
        let precision = &config.precision;
        let is_bf16 = precision.compute == ComputeDtype::Bf16 && precision.matmul == Matmul::Same;
        let peak = peak_tflops(gpu_name).filter(|_| is_bf16).unwrap_or(f64::NAN);
        Self { model: config.model.clone(), num_ranks: num_ranks.max(1), peak }
    }

    /// Of a step of sequences of this length, in which all ranks together did so many tokens a
    /// second.
    pub fn speed(&self, tokens_per_second: f64, sequence_length: usize) -> Speed {
        let tflops = |convention| {
            let of_token = flops_per_token(&self.model, sequence_length, convention);
            of_token * tokens_per_second / self.num_ranks as f64 / 1e12
        };
        let tflops_full = tflops(FlopConvention::FullAttention);
        let tflops_half = tflops(FlopConvention::CausalHalf);
        let (mfu_full, mfu_half) = (tflops_full / self.peak, tflops_half / self.peak);
        Speed { tflops_full, tflops_half, mfu_full, mfu_half }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn config(compute: &str) -> RunConfig {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/runs/llama3-8b.yaml");
        let set = [format!("precision.compute={compute}")];
        RunConfig::load(&path, &set).unwrap().config
    }

    /// The 8B has 5.791e10 FLOP a token at 8192 tokens with full attention, 5.147e10 with half of
    /// it, as `phalanx check` prints: the forward pass's 2 a weight but the embedding's, and 4 a
    /// pair of positions and width, times 3.
    #[test]
    fn speeds_are_flops_of_the_tokens_by_the_gpus() {
        let meter = Speedometer::new(&config("bf16"), 8, "NVIDIA H200");
        let speed = meter.speed(80_000.0, 8192);
        assert!((speed.tflops_full - 579.1).abs() < 0.1, "{speed:?}");
        assert!((speed.tflops_half - 514.7).abs() < 0.1, "{speed:?}");
        assert!((speed.mfu_full - 579.1 / 989.4).abs() < 1e-3, "{speed:?}");
        assert!((speed.mfu_half - 514.7 / 989.4).abs() < 1e-3, "{speed:?}");
        assert!(meter.speed(80_000.0, 4096).tflops_full < speed.tflops_full);
    }

    #[test]
    fn without_a_known_peak_there_is_no_share_of_it() {
        for (compute, name) in [("bf16", "NVIDIA of tomorrow"), ("fp32", "NVIDIA H200")] {
            let speed = Speedometer::new(&config(compute), 1, name).speed(1e3, 128);
            assert!(speed.tflops_full > 0.0 && speed.mfu_full.is_nan() && speed.mfu_half.is_nan());
        }
    }
}
