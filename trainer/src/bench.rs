//! `phalanx-trainer bench train`: the speed of training steps of one process on made-up tokens.

use crate::error::Result;
use crate::rank::longest_sequence;
use crate::setup::{initialize, prepare_libtorch, read_config, trainee};
use model::{Inputs, targets};
use optim::{AdamW, clip_coefficient, gradient_norm};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// What to measure.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    /// The run config.
    #[arg(long)]
    config: PathBuf,
    /// Steps measured.
    #[arg(long, default_value_t = 20)]
    steps: usize,
    /// Steps before those.
    #[arg(long, default_value_t = 3)]
    warmup: usize,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Measures and prints: median step time, tokens per second, seconds from the start of the
/// process to the end of its first step, and peak memory.
///
/// # Errors
/// Where the config cannot be used or libtorch fails.
pub fn run(args: &BenchArgs) -> Result<()> {
    let config = read_config(&args.config)?;
    let threads = config.cluster.threads_per_rank.unwrap_or(1);
    prepare_libtorch(threads)?;
    let trainee = trainee(&config, longest_sequence(&config))?;
    initialize(&config, &trainee.held, &trainee.params, Path::new("runs"))?;
    let optimizer = AdamW::new(&config.optimizer, &trainee.params)?;
    let mut optimizer = optimizer.with_kernels(trainee.kernels.clone())?;
    let stage = config.training.batch_stages[0];
    let (batch, sequence) = (config.training.micro_batch, stage.sequence_length);
    let num_micro_batches = stage.global_batch.div_ceil(batch);
    let mut times = Vec::new();
    let mut startup_s = f64::NAN;
    for step in 0..args.warmup + args.steps {
        let started = Instant::now();
        trainee.params.zero_grad()?;
        let mut loss = 0.0;
        for micro in 0..num_micro_batches {
            let tokens = made_up(step * num_micro_batches + micro, batch * (sequence + 1), &config);
            let rows = || tokens.chunks(sequence + 1);
            let input: Vec<i32> = rows().flat_map(|row| &row[..sequence]).copied().collect();
            let goal: Vec<i32> = rows().flat_map(|row| &row[1..]).copied().collect();
            let inputs = Inputs::consecutive(&input, batch, 0, trainee.device)?;
            let goal = targets(&goal, batch, trainee.device)?;
            let scale = 1.0 / (stage.global_batch * sequence) as f64;
            let part = trainee.model.forward_loss(&inputs, &goal, scale)?;
            part.f_backward()?;
            loss += part.f_double_value(&[])?;
        }
        let clip = config.training.clip_norm;
        let coefficient = match clip {
            Some(_) => clip_coefficient(gradient_norm(&trainee.params)?, clip),
            None => 1.0,
        };
        optimizer.step(&trainee.params, config.optimizer.learning_rate, coefficient)?;
        if step == 0 {
            startup_s = seconds_since_start();
        }
        if step >= args.warmup {
            times.push(started.elapsed().as_secs_f64());
        }
        tracing::debug!(step, loss, "bench");
    }
    times.sort_by(f64::total_cmp);
    let median = times.get(times.len() / 2).copied().unwrap_or(f64::NAN);
    let tokens = (stage.global_batch * sequence) as f64;
    let result = serde_json::json!({
        "tokens_per_s": tokens / median,
        "median_ms": median * 1e3,
        "fastest_ms": times.first().map(|fastest| fastest * 1e3),
        "startup_s": startup_s,
        "peak_rss_mb": peak_rss_mb(),
    });
    match args.json {
        true => println!("{result}"),
        false => println!("{result:#}"),
    }
    Ok(())
}

/// Tokens that cost the same as real ones: a linear congruence over the vocabulary.
fn made_up(index: usize, count: usize, config: &run_config::RunConfig) -> Vec<i32> {
    let vocab = config.model.vocab_size as u64;
    let mut state = index as u64 + config.seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        ((state >> 33) % vocab) as i32
    };
    (0..count).map(|_| next()).collect()
}

/// Seconds since this process was started, by the kernel's clock (`/proc`), 0.01 s fine.
fn seconds_since_start() -> f64 {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let stat = read("/proc/self/stat");
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let ticks = after_name.split_whitespace().nth(19).and_then(|text| text.parse::<f64>().ok());
    let uptime = read("/proc/uptime");
    let uptime = uptime.split_whitespace().next().and_then(|text| text.parse::<f64>().ok());
    let launched = std::env::var("BENCH_T0").ok().and_then(|text| text.parse::<f64>().ok());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map(|now| now.as_secs_f64());
    match (launched, now, ticks, uptime) {
        (Some(launched), Ok(now), ..) => now - launched,
        (_, _, Some(ticks), Some(uptime)) => {
            uptime - ticks / rustix::param::clock_ticks_per_second() as f64
        }
        _ => f64::NAN,
    }
}

fn peak_rss_mb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok());
    kib.map_or(f64::NAN, |kib| kib / 1024.0)
}
