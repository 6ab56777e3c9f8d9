//! `phalanx-trainer bench train`: the speed of training steps of one process on made-up tokens.

use crate::attention;
use crate::error::Result;
use crate::gpu::Speedometer;
use crate::profile::Profile;
use crate::rank::longest_sequence;
use crate::setup::{Trainee, initialize, prepare_libtorch, read_config, trainee};
use model::{AttentionKernels, Inputs, targets};
use optim::{AdamW, clip_coefficient_of};
use rank_protocol::Steps;
use run_config::RunConfig;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use torch_shim::cuda::Readback;
use torch_shim::norm::squared_norm;
use torch_shim::tch::{Kind, Tensor};

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
    /// Write a timeline of two more steps, which chrome://tracing and Perfetto show.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
}

/// A process that trains on made-up tokens. A loss is read once the next step has been given to
/// the device, as in training on a GPU.
struct Bench {
    config: RunConfig,
    trainee: Trainee,
    kernels: Option<AttentionKernels>,
    optimizer: AdamW,
    /// No update is held back.
    go: Tensor,
    reading: Option<Readback>,
    num_steps: usize,
}

impl Bench {
    fn new(config: RunConfig) -> Result<Self> {
        let trainee = trainee(&config, longest_sequence(&config), config.precision.matmul)?;
        initialize(&config, &trainee.held, &trainee.params, Path::new("runs"))?;
        let gpu = trainee.gpu.as_ref();
        let kernels = gpu.map(|gpu| attention::kernels(&config, gpu)).transpose()?;
        let optimizer = AdamW::new(&config.optimizer, &trainee.params)?;
        let go = Tensor::f_zeros([1], (Kind::Float, trainee.device))?;
        Ok(Self { config, trainee, kernels, optimizer, go, reading: None, num_steps: 0 })
    }

    /// Gives the device a step, and reads the loss of the one before.
    fn step(&mut self) -> Result<()> {
        let params = &self.trainee.params;
        let stage = self.config.training.batch_stages[0];
        let num_micro_batches = stage.global_batch.div_ceil(self.config.training.micro_batch);
        params.zero_grad()?;
        let mut loss = Tensor::f_zeros([], (Kind::Double, self.trainee.device))?;
        for micro in 0..num_micro_batches {
            let part = self.pass(self.num_steps * num_micro_batches + micro)?;
            part.f_backward()?;
            loss = loss.f_add(&part.f_detach()?.f_to_kind(Kind::Double)?)?;
        }
        let coefficient = match self.config.training.clip_norm {
            None => None,
            clip => clip_coefficient_of(&squared_norm(params.flat_grad())?.f_sqrt()?, clip)?,
        };
        let rate = self.config.optimizer.learning_rate;
        self.optimizer.step_unless(params, rate, coefficient.as_ref(), &self.go)?;
        let before = self.reading.replace(Readback::begin(&loss)?);
        self.num_steps += 1;
        before.map_or(Ok(()), |reading| Self::told(self.num_steps - 1, reading))
    }

    /// Waits for the step that was given last.
    fn finish(&mut self) -> Result<()> {
        self.reading.take().map_or(Ok(()), |reading| Self::told(self.num_steps, reading))
    }

    fn told(step: usize, reading: Readback) -> Result<()> {
        let loss = reading.wait()?;
        tracing::debug!(step, loss = loss.first(), "bench");
        Ok(())
    }

    /// The forward pass of a micro-batch.
    fn pass(&self, index: usize) -> Result<Tensor> {
        let stage = self.config.training.batch_stages[0];
        let (batch, sequence) = (self.config.training.micro_batch, stage.sequence_length);
        let tokens = made_up(index, batch * (sequence + 1), &self.config);
        let rows = || tokens.chunks(sequence + 1);
        let input: Vec<i32> = rows().flat_map(|row| &row[..sequence]).copied().collect();
        let goal: Vec<i32> = rows().flat_map(|row| &row[1..]).copied().collect();
        let inputs = Inputs::consecutive(&input, batch, 0, self.trainee.device)?;
        let inputs = match self.kernels {
            Some(kernels) => inputs.with_kernels(kernels)?,
            None => inputs,
        };
        let goal = targets(&goal, batch, self.trainee.device)?;
        let scale = 1.0 / (stage.global_batch * sequence) as f64;
        Ok(self.trainee.model.forward_loss(&inputs, &goal, scale)?)
    }
}

/// Measures and prints: median step time, tokens per second, seconds from the start of the
/// process to the end of its first step, and peak memory; on a GPU, its speed and its memory too.
///
/// # Errors
/// Where the config cannot be used or libtorch fails.
pub fn run(args: &BenchArgs) -> Result<()> {
    let config = read_config(&args.config)?;
    let threads = config.cluster.threads_per_rank.unwrap_or(1);
    prepare_libtorch(threads)?;
    let mut bench = Bench::new(config)?;
    let mut times = Vec::new();
    let mut startup_s = f64::NAN;
    for step in 0..args.warmup + args.steps {
        let started = Instant::now();
        bench.step()?;
        if step == 0 {
            bench.finish()?;
            startup_s = seconds_since_start();
        }
        if step >= args.warmup {
            times.push(started.elapsed().as_secs_f64());
        }
    }
    bench.finish()?;
    times.sort_by(f64::total_cmp);
    let median = times.get(times.len() / 2).copied().unwrap_or(f64::NAN);
    let stage = bench.config.training.batch_stages[0];
    let tokens_per_s = (stage.global_batch * stage.sequence_length) as f64 / median;
    let mut result = serde_json::json!({
        "tokens_per_s": tokens_per_s,
        "median_ms": median * 1e3,
        "fastest_ms": times.first().map(|fastest| fastest * 1e3),
        "startup_s": startup_s,
        "peak_rss_mb": peak_rss_mb(),
    });
    if let Some(gpu) = &bench.trainee.gpu {
        let meter = Speedometer::new(&bench.config, 1, &gpu.card.name);
        let speed = meter.speed(tokens_per_s, stage.sequence_length);
        result["gpu"] = gpu.card.name.as_str().into();
        result["tflops_full"] = speed.tflops_full.into();
        result["tflops_half"] = speed.tflops_half.into();
        result["mfu_full"] = speed.mfu_full.into();
        result["mfu_half"] = speed.mfu_half.into();
        let peak = gpu.take_memory_use()?.peak_allocated;
        result["memory_gib"] = (peak as f64 / f64::from(1 << 30)).into();
        result["attention"] = format!("{:?}", bench.kernels.unwrap_or_default().whole).into();
    }
    if let Some(path) = &args.trace {
        trace(&mut bench, path)?;
    }
    match args.json {
        true => println!("{result}"),
        false => println!("{result:#}"),
    }
    Ok(())
}

/// Two steps more, with a timeline.
fn trace(bench: &mut Bench, path: &Path) -> Result<()> {
    let steps = Steps { first: 1, last: 2 };
    let mut profile = Profile::new(Some(steps), path.to_owned(), bench.trainee.device, (0, 1));
    for step in steps.first..=steps.last {
        profile.before(step);
        bench.step()?;
        bench.finish()?;
        profile.after(step);
    }
    Ok(())
}

/// Tokens that cost the same as real ones: a linear congruence over the vocabulary.
fn made_up(index: usize, count: usize, config: &RunConfig) -> Vec<i32> {
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
