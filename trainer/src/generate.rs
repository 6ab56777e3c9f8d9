//! `phalanx-trainer generate`: a trained model writes.

use crate::error::{Result, TrainError};
use crate::rank::longest_sequence;
use crate::setup::{check_libtorch, read_config, trainee};
use checkpoint::Target;
use checkpoint_format::scan;
use data_pipeline::prepare::tokenizer::Tokenizer;
use model::Sampling;
use rank_protocol::env;
use rank_protocol::run_dir::RunDir;
use run_config::Matmul;
use std::io::Write;
use std::path::{Path, PathBuf};
use torch_shim::tch::no_grad_guard;

/// What to write.
#[derive(Debug, clap::Args)]
pub struct GenerateArgs {
    /// The run: its directory, or its name under `runs/` (or $PHALANX_RUNS).
    pub run: String,
    /// Text to continue.
    #[arg(long)]
    pub prompt: String,
    /// Step of the checkpoint; the newest by default.
    #[arg(long)]
    pub step: Option<u64>,
    /// At most so many new tokens.
    #[arg(long, default_value_t = 128)]
    pub max_new_tokens: usize,
    /// Divides the logits; 0 always takes the likeliest token.
    #[arg(long, default_value_t = 0.8, allow_negative_numbers = true)]
    pub temperature: f64,
    /// Only the smallest set of likeliest tokens whose probability reaches this.
    #[arg(long, default_value_t = 0.95, allow_negative_numbers = true)]
    pub top_p: f64,
    /// Seed of the choices.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// Prints the prompt and what the model makes of it.
///
/// # Errors
/// Where run, checkpoint, tokenizer or sampling values cannot be used.
pub fn run(args: &GenerateArgs) -> Result<()> {
    check_libtorch()?;
    if args.prompt.is_empty() {
        let message = "--prompt is empty; hint: give at least one character to continue from";
        return Err(TrainError::Config(message.into()));
    }
    let run_dir = RunDir::new(find(&args.run)?);
    let config = read_config(&run_dir.config())?;
    let unusable = |error: checkpoint_format::FormatError| TrainError::Config(error.to_string());
    let step_dir = scan::checkpoint_of_run(run_dir.root(), args.step).map_err(unusable)?;
    if args.step.is_none() {
        say_passed_over(&run_dir, &step_dir);
    }
    let tokenizer = Tokenizer::load(&config.data.tokenizer)?;
    let mut prompt: Vec<i32> = tokenizer.bos_id.into_iter().map(|id| id as i32).collect();
    prompt.extend(tokenizer.encode(&args.prompt)?.into_iter().map(|id| id as i32));
    let sampling = Sampling {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_p: args.top_p,
        seed: args.seed,
        stop_tokens: tokenizer.eos_id.into_iter().map(|id| id as i32).collect(),
        use_cache: true,
    };
    // One token at a time there is little to multiply: FP8 would cost accuracy and save nothing.
    let trainee = trainee(&config, longest_sequence(&config), Matmul::Same)?;
    let whole = model_spec::hf_tensors(&config.model);
    let target = Target { whole: &whole, held: &trainee.held, params: &trainee.params };
    checkpoint::load(&step_dir, target, &[])?;
    let _no_grad = no_grad_guard();
    let device = trainee.device;
    let mut new = model::generate(&trainee.model, &prompt, &sampling, device, |_| ())
        .map_err(|error| TrainError::Config(error.to_string()))?;
    new.retain(|token| !sampling.stop_tokens.contains(token));
    let ids: Vec<u32> = new.into_iter().map(|id| id as u32).collect();
    let text = format!("{}{}\n", args.prompt, tokenizer.decode(&ids)?);
    let written = std::io::stdout().write_all(text.as_bytes());
    written.map_err(|source| TrainError::Io { path: "standard output".into(), source })
}

/// Newer checkpoints than the one that is used are damaged: that is said.
fn say_passed_over(run_dir: &RunDir, used: &Path) {
    let Ok(scan) = scan::scan(&run_dir.checkpoints()) else { return };
    let used = scan.committed.iter().find(|found| found.path == used).map(|found| found.step);
    for damaged in scan.damaged.iter().filter(|damaged| Some(damaged.step) > used) {
        let (step, reason) = (damaged.step, &damaged.reason);
        let _ = writeln!(
            std::io::stderr(),
            "the checkpoint of step {step} is damaged and passed over: {reason}"
        );
    }
}

fn find(run: &str) -> Result<PathBuf> {
    let runs = std::env::var_os(env::RUNS).map_or_else(|| PathBuf::from("runs"), PathBuf::from);
    let candidates = [Path::new(run).to_owned(), runs.join(run)];
    let found = candidates.iter().find(|path| path.join("config.yaml").is_file());
    found.cloned().ok_or_else(|| {
        TrainError::Config(format!(
            "there is no run {run:?}: neither {} nor {} holds a config.yaml",
            candidates[0].display(),
            candidates[1].display()
        ))
    })
}
