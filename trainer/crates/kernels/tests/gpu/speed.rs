//! How fast kernels are: bytes that must move over the time they take, at the sizes of Llama 3 8B
//! with 8192 tokens. To be held against the speed of a large copy, which is measured beside.

use std::time::Instant;

use kernels::Kernels;
use kernels::ops::adamw::{Buffers, Chunks, adamw};
use kernels::ops::rope::{Layout, Tables};
use kernels::ops::{
    accumulate, cross_entropy, embedding, fp8, gradient_norm, rms_norm, rope, swiglu,
};
use torch_shim::cuda;
use torch_shim::ops::AdamW;
use torch_shim::scaled::{Accumulation, product};
use torch_shim::tch::{Kind, Tensor};

const TOKENS: i64 = 8192;
const DIM: i64 = 4096;
const FFN: i64 = 14336;
const VOCABULARY: i64 = 128_256;
/// Rows of logits that are made at a time.
const CHUNK: i64 = 1024;
const PARAMETERS: i64 = 200_000_000;
const REPEATS: u32 = 30;

/// Bytes per second of a kernel, in words.
pub fn of(kernels: &Kernels, name: &str) -> String {
    let make =
        |shape: &[i64], kind| Tensor::randn(shape, (Kind::Float, kernels.device())).to_kind(kind);
    let bf16 = |shape: &[i64]| make(shape, Kind::BFloat16);
    let activations = (TOKENS * DIM * 2) as f64;
    let copy = {
        let (from, to) = (bf16(&[TOKENS, 16 * DIM]), bf16(&[TOKENS, 16 * DIM]));
        rate(2.0 * 16.0 * activations, || to.shallow_clone().copy_(&from))
    };
    let parts: Vec<(&str, f64)> = match name {
        "rms_norm" => {
            let (x, residual, weight) = (bf16(&[TOKENS, DIM]), bf16(&[TOKENS, DIM]), bf16(&[DIM]));
            let forward =
                || rms_norm::forward(kernels, &x, Some(&residual), &weight, 1e-5).unwrap();
            let made = forward();
            let gradient = make(&[DIM], Kind::Float);
            let outer = (&x, Some(&residual));
            let backward = || {
                let (z, r) = (&made.sum, &made.reciprocal);
                drop(rms_norm::backward(kernels, outer, z, &weight, r, &gradient).unwrap());
            };
            vec![
                ("forward", rate(4.0 * activations, || drop(forward()))),
                ("backward", rate(4.0 * activations, backward)),
            ]
        }
        "rope" => {
            let layout = Layout { heads: 32, kv_heads: 8, head_dim: 128 };
            let (qkv, table) = (bf16(&[1, TOKENS, 6144]), make(&[TOKENS, 128], Kind::Float));
            let tables = Tables { cos: &table, sin: &table };
            let parts = rope::forward(kernels, &qkv, tables, layout).unwrap();
            let bytes = (TOKENS * 2 * 2) as f64;
            let forward = || drop(rope::forward(kernels, &qkv, tables, layout).unwrap());
            let backward =
                || drop(rope::backward(kernels, parts.each_ref(), tables, layout).unwrap());
            vec![
                ("forward", rate(bytes * 5120.0, forward)),
                ("backward", rate(bytes * 6144.0, backward)),
            ]
        }
        "swiglu" => {
            let (gate_up, dy) = (bf16(&[TOKENS, 2 * FFN]), bf16(&[TOKENS, FFN]));
            let bytes = (TOKENS * FFN * 2) as f64;
            vec![
                (
                    "forward",
                    rate(3.0 * bytes, || drop(swiglu::forward(kernels, &gate_up).unwrap())),
                ),
                (
                    "backward",
                    rate(5.0 * bytes, || drop(swiglu::backward(kernels, &dy, &gate_up).unwrap())),
                ),
            ]
        }
        "cross_entropy" => {
            let logits = bf16(&[CHUNK, VOCABULARY]);
            let targets = Tensor::arange(CHUNK, (Kind::Int64, kernels.device()));
            // Once read and once written; the second reading should come out of the L2 cache.
            let bytes = (CHUNK * VOCABULARY * 2 * 2) as f64;
            let run = || {
                drop(cross_entropy::cross_entropy(kernels, &logits, &targets, 1e-4, true).unwrap());
            };
            vec![("with gradients", rate(bytes, run))]
        }
        "embedding" => {
            let tokens = Tensor::arange(TOKENS, (Kind::Int64, kernels.device())).remainder(3000);
            let (dy, gradient) = (bf16(&[TOKENS, DIM]), make(&[3000, DIM], Kind::Float));
            let run = || embedding::accumulate_rows(kernels, &tokens, &dy, &gradient).unwrap();
            // With the sort of the tokens.
            vec![("gradient", rate(activations + (3000 * DIM * 8) as f64, run))]
        }
        "adamw" => {
            let make = || make(&[PARAMETERS], Kind::Float);
            let (master, gradients, first, second) = (make(), make(), make(), make().square());
            let copy = bf16(&[PARAMETERS]);
            let chunks = Chunks::new(kernels, &[(0..PARAMETERS, true)]).unwrap();
            let constants = AdamW {
                learning_rate: 1e-6,
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                weight_decay: 0.1,
                step: 9,
            };
            let run = || {
                let (master, gradients) = (&master, &gradients);
                let (first, second, copy) = (&first, &second, Some(&copy));
                let buffers = Buffers { master, gradients, first, second, copy };
                adamw(kernels, buffers, &chunks, None, &constants).unwrap();
            };
            vec![("update", rate(PARAMETERS as f64 * 30.0, run))]
        }
        "gradient_norm" => {
            let gradients = make(&[PARAMETERS], Kind::Float);
            let chunks = Chunks::new(kernels, &[(0..PARAMETERS, true)]).unwrap();
            let run = || drop(gradient_norm::squared_norm(kernels, &gradients, &chunks).unwrap());
            vec![("norm", rate(PARAMETERS as f64 * 4.0, run))]
        }
        "fp8" => {
            let x = bf16(&[TOKENS, FFN]);
            let bytes = (TOKENS * FFN) as f64;
            vec![
                ("rows", rate(3.0 * bytes, || drop(fp8::quantise_rows(kernels, &x).unwrap()))),
                (
                    "columns",
                    rate(5.0 * bytes, || drop(fp8::quantise_columns(kernels, &x).unwrap())),
                ),
            ]
        }
        _ => {
            let (sum, x) = (make(&[DIM, FFN], Kind::Float), bf16(&[DIM, FFN]));
            let bytes = (DIM * FFN * 10) as f64;
            vec![("sum", rate(bytes, || accumulate::accumulate(kernels, &sum, &x).unwrap()))]
        }
    };
    let parts = parts.iter().map(|(part, rate)| format!("{part} {rate:.2} TB/s"));
    format!("{} (a copy {copy:.2})", parts.collect::<Vec<_>>().join(", "))
}

/// TFLOP/s of FP8 products at the sizes of a feed-forward, by how they are summed, in words.
pub fn of_fp8_products(kernels: &Kernels) -> String {
    let make = |rows: i64| {
        let x = Tensor::randn([rows, DIM], (Kind::BFloat16, kernels.device()));
        fp8::quantise_rows(kernels, &x).unwrap()
    };
    let (x, weight) = (make(TOKENS), make(2 * FFN));
    let operations = (2 * TOKENS * DIM * 2 * FFN) as f64;
    let of = |sums| rate(operations, || drop(product(&x, &weight, sums).unwrap()));
    let (fp32, fast) = (of(Accumulation::Fp32), of(Accumulation::Fast));
    format!("{fp32:.0} TFLOP/s summed in FP32, {fast:.0} with fast sums")
}

/// TB/s of the median run. Each is timed by the host's clock between two waits for the GPU: good
/// for what takes well over ten microseconds.
fn rate(bytes: f64, run: impl Fn()) -> f64 {
    for _ in 0..3 {
        run();
    }
    cuda::synchronize(0).unwrap();
    let mut times: Vec<f64> = (0..REPEATS)
        .map(|_| {
            let started = Instant::now();
            run();
            cuda::synchronize(0).unwrap();
            started.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    bytes / times[times.len() / 2] / 1e12
}
